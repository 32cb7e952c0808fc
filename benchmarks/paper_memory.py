"""Memory of a training step on a GPU, counted on paper: bf16 weights with fp32 masters, AdamW, packed sequences.

Per weight: 2 bytes of the weight, 4 of its gradient (summed in fp32), 4 of its master, 8 of AdamW's moments (2 in 8
bits). Per token: what each layer keeps for its backward pass, tensor by tensor as ``policy`` computes them on a GPU
(``policy.varlen``, ``policy.grouped``); with activation checkpointing only each layer's input, and one layer's whole
set while its backward runs. And a chunk of logits with its gradient, and the head's gradient.

Shapes: N tokens, H hidden, A heads, D = query/key width, V = value width, C = kv_lora_rank, Q = q_lora_rank,
K = experts per token, I = moe_intermediate_size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from benchmarks.flops import attention_parameters

_MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}  # bytes per weight


@dataclass(frozen=True, kw_only=True)
class PaperMemory:
    """Bytes at the peak of a step, by what they hold."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, part.name) for part in fields(self))

    def words(self) -> str:
        """The parts in GiB, for a note."""
        return ", ".join(f"{part.name} {getattr(self, part.name) / 2**30:.2f}" for part in fields(self)) + " GiB"


def training_memory(
    config: Any, tokens: int, loss_tokens: int, *, checkpointing: str, chunk: int, kind: str = "adamw"
) -> PaperMemory:
    """The peak of a step.

    Args:
        config: a ``DeepseekV3Config``.
        tokens, loss_tokens: of one micro-batch; those that are fed, and those under the loss.
        checkpointing: ``none`` | ``layer``.
        chunk: tokens whose logits exist at once.
        kind: of the optimizer.
    """
    count = parameters(config)
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    kept = [layer_bytes(config, tokens, dense=i < dense) for i in range(config.num_hidden_layers)]
    inputs = 2 * tokens * config.hidden_size
    layers = sum(kept) if checkpointing == "none" else len(kept) * inputs + max(kept)
    head = 2 * loss_tokens * config.hidden_size + 4 * loss_tokens
    final = 6 * tokens * config.hidden_size
    rows = min(chunk, loss_tokens)
    return PaperMemory(
        weights=2 * count,
        gradients=4 * count,
        masters=4 * count,
        moments=int(_MOMENTS[kind] * count),
        activations=layers + final + head,
        logits=(4 + 2) * rows * config.vocab_size + 4 * config.vocab_size * config.hidden_size,
    )


def parameters(config: Any) -> int:
    """All weights of a policy."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    dense = min(config.first_k_dense_replace, layers)
    inner = 3 * hidden * config.moe_intermediate_size
    moe = (config.n_routed_experts + config.n_shared_experts) * inner + hidden * config.n_routed_experts
    norms = 2 * hidden + config.kv_lora_rank + (config.q_lora_rank or 0)
    heads = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return (
        layers * (attention_parameters(config) + norms)
        + dense * 3 * hidden * config.intermediate_size
        + (layers - dense) * moe
        + heads
        + hidden
    )


def layer_bytes(config: Any, tokens: int, *, dense: bool) -> int:
    """What one layer keeps for its backward pass.

    A norm keeps its input in fp32 and its output, which the products behind it share, in bf16.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    aligned = -(-max(width, config.v_head_dim) // 8) * 8
    latents = config.kv_lora_rank + (config.q_lora_rank or 0)
    norms = 6 * hidden + 6 * latents + 6 * hidden
    # query, key, value and result at one width, a log-sum-exp, and what goes into o_proj
    attention = heads * (4 * 2 * aligned + 4) + 2 * heads * config.v_head_dim
    each = norms + attention
    if dense:
        return tokens * (each + 8 * config.intermediate_size)
    top, experts = config.num_experts_per_tok, config.n_routed_experts
    router = 4 * hidden + 4 * experts + 40 * top  # input in fp32, scores, gates and choices
    shared = 8 * config.moe_intermediate_size * config.n_shared_experts
    rows = tokens * top + 7 * experts + 1
    # an expert's input; gate and up, silu, its product with up, that with the gate's weight: each kept for one product
    routed = rows * (2 * hidden + 10 * config.moe_intermediate_size + 12)
    return tokens * (each + router + shared) + routed

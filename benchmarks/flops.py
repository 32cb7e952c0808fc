"""Useful floating-point operations of a DeepSeek-V3 policy: what the mathematics needs, not what a program does.

A product of [a, b] and [b, c] counts 2abc. Counted are the matrix products of the layers that a token really passes
(its own experts, not all of them), the two products of causal attention over the keys that a query may see, and the
LM head on the tokens under the loss. Padding, recomputation, norms, softmax and the optimizer count nothing. A
training step is three forward passes: one forward, and in the backward pass one product each for the inputs' and the
weights' gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def active_parameters(config: Any) -> int:
    """Weights of the matrices that one token passes in all layers, LM head and embedding left out.

    Args:
        config: a ``DeepseekV3Config`` (its published field names).
    """
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    moe = config.num_hidden_layers - dense
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    experts = (config.num_experts_per_tok + config.n_shared_experts) * 3 * hidden * inner
    router = hidden * config.n_routed_experts
    return (
        config.num_hidden_layers * attention_parameters(config)
        + dense * 3 * hidden * config.intermediate_size
        + moe * (experts + router)
    )


def attention_parameters(config: Any) -> int:
    """Weights of the matrices of one latent-attention layer."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    low_rank = config.q_lora_rank
    queries = hidden * query if low_rank is None else hidden * low_rank + low_rank * query
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    expand = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return queries + latent + expand + heads * config.v_head_dim * hidden


def forward_flops(config: Any, lengths: Sequence[int], head_tokens: int) -> int:
    """Operations of one forward pass.

    Args:
        config: a ``DeepseekV3Config``.
        lengths: input tokens of each sequence.
        head_tokens: tokens that pass the LM head.
    """
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # a query sees itself and what is before it
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * 2 * widths * pairs
    head = 2 * config.hidden_size * config.vocab_size * head_tokens
    return 2 * active_parameters(config) * tokens + attention + head


def training_flops(config: Any, lengths: Sequence[int], head_tokens: int) -> int:
    """Operations of a forward and a backward pass; arguments as :func:`forward_flops`."""
    return 3 * forward_flops(config, lengths, head_tokens)

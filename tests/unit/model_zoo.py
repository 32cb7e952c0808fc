"""Small random policies and their transformers twins, for the tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from policy.model import PolicyModel

BASE: dict[str, Any] = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=None,
    kv_lora_rank=20,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
)

YARN: dict[str, Any] = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4,
    beta_slow=1,
    mscale=0.7,
    mscale_all_dim=0.9,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_lora": dict(q_lora_rank=14),
    "groups": dict(n_group=4, topk_group=2, num_experts_per_tok=4),
    "one-group-of-four": dict(n_group=4, topk_group=1, num_experts_per_tok=2, n_shared_experts=2),
    "all-moe": dict(first_k_dense_replace=0, norm_topk_prob=False),
    "all-dense": dict(first_k_dense_replace=3),
    "yarn": dict(rope_parameters=YARN, max_position_embeddings=64),
    "yarn-deepseek": dict(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, q_lora_rank=14),
    "yarn-plain": dict(rope_parameters={k: v for k, v in YARN.items() if not k.startswith("mscale")}),
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(attention_bias=True, q_lora_rank=14),
    # Of the norms between the layers only: those of the latents stay at 1e-6, in transformers as here.
    "norm-eps": dict(rms_norm_eps=1e-3, q_lora_rank=14, initializer_range=0.1),
}


def config_of(variant: str = "plain", **overrides: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{**BASE, **VARIANTS[variant], **overrides})


def make_policy(variant: str = "plain", seed: int = 0, **overrides: Any) -> PolicyModel:
    """A policy in which nothing is at its neutral value: norms, biases and correction biases are random too."""
    torch.manual_seed(seed)
    model = PolicyModel(config_of(variant, **overrides))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias") or name.endswith(".bias"):
                tensor.normal_(0.0, 0.3)
    return model


def twin_of(model: PolicyModel) -> DeepseekV3ForCausalLM:
    """transformers' model with the same weights (its names and shapes in memory are the same)."""
    twin = DeepseekV3ForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def ragged(lengths: list[int], vocabulary: int = 53, *, left: bool = False, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random rows of these lengths, padded with token 0: input_ids and attention_mask, [B, T] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in zip(ids, lengths, strict=True):
        part = row[len(row) - n :] if left else row[:n]
        part.copy_(torch.randint(1, vocabulary, (n,), generator=generator))
    return ids, (ids != 0).long()

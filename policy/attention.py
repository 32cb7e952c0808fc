"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1), expanded as training needs it.

Shapes: N tokens of a packed stream, H = hidden_size, A heads, D = qk_nope_head_dim + qk_rope_head_dim, V = v_head_dim,
R = qk_rope_head_dim, C = kv_lora_rank, S sequences of a bucket, L their padded length.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import DeepseekV3Config

from policy.causal import LatentHeads, causal_attention
from policy.layers import RMSNorm, by_hand, normed_linear, normed_linears
from policy.rope import softmax_scale
from policy.segments import Segments


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent per token; one rotated key part is shared by the heads."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        assert config.v_head_dim is not None
        self.heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * (self.nope_dim + self.rope_dim)
        self.low_rank_query = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent_dim + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim)
        self.kv_b_proj = nn.Linear(self.latent_dim, self.heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=bias)

    def forward(self, x: Tensor, norm: RMSNorm, turns: Tensor, segments: Segments) -> Tensor:
        """Causal attention of norm(x) within every segment. x [N, H], turns by position [N, R / 2] -> [N, H]"""
        query, latent, k_rope = self._projected(x, norm)
        kv = normed_linear(latent, self.kv_a_layernorm, self.kv_b_proj).view(-1, self.heads, self.nope_dim + self.v_dim)
        heads = LatentHeads(query.view(-1, self.heads, self.nope_dim + self.rope_dim), kv, k_rope, turns)
        return self.o_proj(causal_attention(heads, self.scale, segments).flatten(1))

    def _projected(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, A * D], latent [N, C] and shared key [N, R] of norm(x)."""
        first = self.q_a_proj if self.low_rank_query else self.q_proj
        parts = (self.latent_dim, self.rope_dim)
        if by_hand(x, first, self.kv_a_proj_with_mqa):
            query, latent, k_rope = normed_linears(
                x, norm, (first.weight, *self.kv_a_proj_with_mqa.weight.split(parts))
            )
        else:
            x = norm(x)
            query = first(x)
            latent, k_rope = self.kv_a_proj_with_mqa(x).split(parts, dim=-1)
        if self.low_rank_query:
            query = normed_linear(query, self.q_a_layernorm, self.q_b_proj)
        return query, latent, k_rope

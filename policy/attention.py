"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1), expanded as training needs it.

Shapes: N tokens of a packed stream, H = hidden_size, A heads, D = qk_nope_head_dim + qk_rope_head_dim, V = v_head_dim,
R = qk_rope_head_dim, C = kv_lora_rank, S sequences of a bucket, L their padded length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from policy.causal import causal_attention
from policy.layers import RMSNorm, normed_linear
from policy.rope import rotate, softmax_scale
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

    def forward(self, x: Tensor, turns: Tensor, segments: Segments) -> Tensor:
        """Causal attention within every segment. x [N, H], turns by position, complex [N, R / 2] -> [N, H]"""
        q_nope, q_rope = self._queries(x).split((self.nope_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent_dim, self.rope_dim), dim=-1)
        kv = normed_linear(latent, self.kv_a_layernorm, self.kv_b_proj).view(-1, self.heads, self.nope_dim + self.v_dim)
        k_nope, value = kv.split((self.nope_dim, self.v_dim), dim=-1)
        query = torch.cat((q_nope, rotate(q_rope, turns[:, None])), dim=-1)
        shared = rotate(k_rope, turns)[:, None].expand(-1, self.heads, -1)
        key = torch.cat((k_nope, shared), dim=-1)
        return self.o_proj(causal_attention(query, key, value, self.scale, segments).flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, A, D]"""
        if self.low_rank_query:
            q = normed_linear(self.q_a_proj(x), self.q_a_layernorm, self.q_b_proj)
        else:
            q = self.q_proj(x)
        return q.view(-1, self.heads, self.nope_dim + self.rope_dim)

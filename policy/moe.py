"""Mixture of experts of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid router, group-limited choice.

Shapes: N tokens, H = hidden_size, E = n_routed_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config

from policy.balance import SequenceIndex, sequence_balance
from policy.experts import Experts
from policy.layers import GatedMlp, at_least_fp32


class RouterReport(NamedTuple):
    """What is counted while a router decides. A tuple, so that checkpointing and sharding see the tensors in it.

    Attributes:
        score_entropy: entropy of each token's scores over their sum, summed over the tokens, nats. 0-d, float64
        agreed: how many of the given experts are this router's own choice too; None when none were given. 0-d, int64
        balance: sum over the sequences of their balance loss (``policy.balance``), with gradient; None when it was not
            asked for. 0-d
    """

    score_entropy: Tensor
    agreed: Tensor | None
    balance: Tensor | None


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts. Always in fp32 (or fp64 when the model is)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        assert config.n_group and config.topk_group and config.num_experts_per_tok
        self.top_k = config.num_experts_per_tok
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.normalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, x: Tensor, given: Tensor | None = None, sequences: SequenceIndex | None = None
    ) -> tuple[Tensor, Tensor, RouterReport]:
        """Gates [N, K] (fp32) and experts [N, K] (int64) of x [N, H], and what is counted on the way.

        Args:
            x: the tokens.
            given: replaces the choice; the gates are then this router's scores of the given experts. [N, K]
            sequences: where the tokens come from; asks for the balance loss.
        """
        wide = at_least_fp32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
            balance = None if sequences is None else sequence_balance(scores, sequences, self.top_k)
        chosen = self._choose(scores.detach())
        experts = chosen if given is None else given
        agreed = None if given is None else (chosen[:, :, None] == given[:, None, :]).sum()
        gates = scores.gather(1, experts)
        if self.normalise:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return gates * self.scaling, experts, RouterReport(_entropy(scores.detach()), agreed, balance)

    @torch.no_grad()
    def margin(self, x: Tensor) -> Tensor:
        """How far the choice for each token is from another one, in scores: 0 is a tie. [N, H] -> [N]

        The smaller of two gaps: between the last chosen and the first refused expert, and the same of groups.
        """
        wide = at_least_fp32(x.dtype)
        biased = F.linear(x.to(wide), self.weight.to(wide)).sigmoid() + self.e_score_correction_bias
        nearest = torch.full_like(biased[:, 0], float("inf"))
        if self.top_groups < self.groups:
            by_group = biased.view(len(biased), self.groups, -1)
            nearest = _gap(by_group.topk(2, dim=-1).values.sum(dim=-1), self.top_groups)
            biased = self._open(biased)
        return nearest.minimum(_gap(biased, self.top_k)) if self.top_k < biased.shape[1] else nearest

    def _choose(self, scores: Tensor) -> Tensor:
        """The K best experts of the best groups, by score plus correction bias. [N, E] -> [N, K]

        A group is as good as the sum of its two best experts.
        """
        biased = scores + self.e_score_correction_bias
        if self.top_groups < self.groups:
            biased = self._open(biased)
        return biased.topk(self.top_k, dim=-1, sorted=False).indices

    def _open(self, biased: Tensor) -> Tensor:
        """The scores with those of all but the best groups at -inf. [N, E]"""
        grouped = biased.view(len(biased), self.groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)


@torch.no_grad()
def _entropy(scores: Tensor) -> Tensor:
    """[N, E] -> 0-d, float64"""
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return torch.special.entr(shares).sum(dtype=torch.float64)


def _gap(values: Tensor, count: int) -> Tensor:
    """Between the last of the ``count`` largest and the next. [N, M] -> [N]"""
    best = values.topk(count + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


class MoE(nn.Module):
    """Routed experts plus shared ones that every token passes."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        self.shared_experts = GatedMlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, x: Tensor, given: Tensor | None = None, sequences: SequenceIndex | None = None
    ) -> tuple[Tensor, Tensor, Tensor, RouterReport]:
        """x [N, H] -> output [N, H], chosen experts [N, K], tokens by expert [E], and the router's report"""
        gates, experts, report = self.gate(x, given, sequences)
        routed, load = self.experts(x, gates, experts)
        return routed + self.shared_experts(x), experts, load, report

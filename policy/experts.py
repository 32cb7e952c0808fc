"""The routed experts: who goes where, and the products of every expert with its tokens.

Shapes: N tokens, H = hidden_size, E = n_routed_experts, K = num_experts_per_tok, I = moe_intermediate_size,
M = N * K assignments sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config

from policy.expert_parallel import ExpertExchange
from policy.grouped import Groups, grouped_mlp, runs_grouped
from policy.layers import gated_gradient, row_blocks

# MKL takes other paths for products of few rows: fewer than 4 with one thread, up to 27 with sixteen. Products of fewer
# rows than this are padded, so that what one sequence chooses cannot change another one's bits.
LEAST_ROWS = 32


@dataclass(frozen=True)
class Dispatch:
    """Who goes where: the N * K assignments sorted by expert, and within an expert by token.

    Attributes:
        token: the token of each assignment. [M]
        place: where assignment k of token n lies in that order. [N * K]
        load: tokens by expert. [E]
        top_k: experts of each token (K).
    """

    token: Tensor
    place: Tensor
    load: Tensor
    top_k: int

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Dispatch:
        """The dispatch of a choice of experts. [N, K] -> Dispatch"""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        # bincount would wait for a GPU.
        load = flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))
        return cls(order // experts.shape[1], place, load, experts.shape[1])

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The assignments of expert e are bounds[e] .. bounds[e + 1] - 1. Waits for the device. [E + 1]"""
        return 0, *self.load.cumsum(0).tolist()

    def slices(self) -> list[tuple[int, slice]]:
        """Experts that have tokens, each with its slice of the assignments."""
        return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(self.bounds)) if b > a]

    def combine(self, rows: Tensor) -> Tensor:
        """Sum over each token's K rows, always in the order of k. [M, H] -> [N, H]"""
        places = self.place.view(-1, self.top_k)
        out = rows.new_empty(len(places), rows.shape[1])
        for block in row_blocks(len(places)):
            torch.index_select(rows, 0, places[block, 0].contiguous(), out=out[block])
            for k in range(1, self.top_k):
                out[block] += rows.index_select(0, places[block, k])
        return out


def _product(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """rows @ matrix, written into ``out``; each row's result is the same, bit for bit, however many rows there are."""
    missing = LEAST_ROWS - len(rows)
    if missing <= 0 or rows.device.type != "cpu":
        return torch.mm(rows, matrix, out=out)
    return out.copy_(torch.mm(F.pad(rows, (0, 0, 0, missing)), matrix)[: len(rows)])


class _RoutedMlp(torch.autograd.Function):
    """Sum over k of gate[n, k] * down_e(silu(gate_e(x)) * up_e(x)) with e = experts[n, k], expert by expert.

    One node instead of a graph per expert: an expert's rows stay in the cache and are not kept, its weight gradients
    are written in place, and nothing is summed in an order that depends on threads. Gates weigh the I inner columns,
    not the H outer.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, dispatch: Dispatch
    ) -> Tensor:
        weight = torch.empty_like(gates).flatten().scatter_(0, dispatch.place, gates.flatten())
        projected = x.new_empty(len(dispatch.token), gate_up.shape[1])
        out = x.new_empty(len(dispatch.token), x.shape[1])
        for e, part in dispatch.slices():
            rows = x.index_select(0, dispatch.token[part])
            gate, up = _product(rows, gate_up[e].T, projected[part]).chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up).mul_(weight[part, None])
            _product(inner, down[e].T, out[part])
        ctx.save_for_backward(x, projected, weight, gate_up, down)
        ctx.dispatch, ctx.gate_shape = dispatch, gates.shape
        return dispatch.combine(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, projected, weight, gate_up, down = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        grad_rows, grad_weight = x.new_empty(len(dispatch.token), x.shape[1]), torch.empty_like(weight)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, part in dispatch.slices():
            grad_out = grad.index_select(0, dispatch.token[part])
            pulled = _product(grad_out, down[e], grad_out.new_empty(len(grad_out), down.shape[2]))
            activated, both = gated_gradient(projected[part], pulled * weight[part, None])
            torch.sum(pulled.mul_(activated), dim=-1, out=grad_weight[part])
            if ctx.needs_input_grad[3]:  # not when only adapters train
                torch.mm(grad_out.T, activated.mul_(weight[part, None]), out=grad_down[e])
            _product(both, gate_up[e], grad_rows[part])
            if ctx.needs_input_grad[2]:
                torch.mm(both.T, x.index_select(0, dispatch.token[part]), out=grad_gate_up[e])
        grad_gates = grad_weight[dispatch.place].view(ctx.gate_shape)
        return dispatch.combine(grad_rows), grad_gates, grad_gate_up, grad_down, None


def routed_product(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Experts.forward` with the weights given: gate_up [E, 2I, H], down [E, H, I]."""
    dispatch = Dispatch.of(experts, len(down))
    # Under autocast the products would change dtype in the middle of the function, which writes into buffers.
    with torch.autocast(x.device.type, enabled=False):
        rows, gates = x.to(down.dtype), gates.to(down.dtype)
        if runs_grouped(rows, gate_up, down):
            groups = Groups.of(dispatch.place, dispatch.load, dispatch.top_k)
            out = grouped_mlp(rows, gates, (gate_up, down), groups)
        else:
            out = _RoutedMlp.apply(rows, gates, gate_up, down, dispatch)
            assert isinstance(out, Tensor)
    return out.to(x.dtype), dispatch.load


class Experts(nn.Module):
    """The routed experts, batched in memory: gate and up stacked [E, 2I, H], down [E, H, I]."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.count = config.n_routed_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, 2 * config.moe_intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.count, config.hidden_size, config.moe_intermediate_size))
        self.exchange: ExpertExchange | None = None  # when other ranks hold some of the experts

    def forward(self, x: Tensor, gates: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over k of gates[:, k] * expert_k(x). x [N, H], gates, experts [N, K] -> [N, H], tokens by expert [E]"""
        if self.exchange is not None:
            return self.exchange(x, gates, experts, (self.gate_up_proj, self.down_proj), routed_product)
        return routed_product(x, gates, experts, self.gate_up_proj, self.down_proj)

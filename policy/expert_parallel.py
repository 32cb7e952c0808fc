"""Expert parallelism: every rank holds some of the routed experts, and tokens travel to them and back.

For a rank's tokens, each with K chosen experts::

    rows of x by expert  ->  all-to-all  ->  the experts' product on what came  ->  all-to-all  ->  sum over k

A row brings its gate along, so that the product is the one of a single rank (``policy.experts``) with K = 1. All ranks
of the group call this together, forward and backward, also who has no tokens for some expert.

Shapes: N tokens, H hidden width, K experts of a token, M = N * K rows by expert, R received rows, G ranks of the group,
E experts in all, E / G of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# (rows [R, H], gates [R, 1], experts [R, 1], gate_up, down) -> [R, H], rows by expert
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ExpertExchange:
    """Takes tokens to the ranks of their experts and brings the results back.

    Args:
        group: the ranks that share the experts; rank g holds experts g * E / G to (g + 1) * E / G - 1.
    """

    def __init__(self, group: Any) -> None:
        self._group, self._size = group, dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertExchange:
        return self  # a process group is no value: a copy of the model exchanges over the same one

    def __call__(
        self, x: Tensor, gates: Tensor, experts: Tensor, weights: tuple[Tensor, Tensor], product: Product
    ) -> tuple[Tensor, Tensor]:
        """Sum over k of gates[:, k] * expert_k(x), and how many of this rank's tokens went to each expert.

        Args:
            x: this rank's tokens. [N, H]
            gates: of its chosen experts. [N, K]
            experts: which these are, of all. [N, K]
            weights: gate_up and down of this rank's experts, DTensors over the group.
            product: the experts' computation.

        Returns:
            [N, H], [E]
        """
        gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.bincount(flat, minlength=len(gate_up) * self._size).view(self._size, -1)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self._group)
        out_splits, in_splits = counts.sum(dim=1).tolist(), coming.sum(dim=1).tolist()

        token = torch.div(order, experts.shape[1], rounding_mode="floor")
        rows = _Spread.apply(x.to(down.dtype), token, place)
        gate = _Permute.apply(gates.to(down.dtype).reshape(-1, 1), order, place)
        sent = torch.cat((rows, gate), dim=1)
        received = _AllToAll.apply(sent, out_splits, in_splits, self._group)
        assert isinstance(received, Tensor)
        own = torch.arange(len(gate_up), device=x.device).repeat(self._size).repeat_interleave(coming.flatten())
        out, _ = product(received[:, :-1].contiguous(), received[:, -1:].contiguous(), own[:, None], gate_up, down)
        back = _AllToAll.apply(out, in_splits, out_splits, self._group)
        summed = _Combine.apply(back, token, place)
        assert isinstance(summed, Tensor)
        return summed.to(x.dtype), counts.flatten()


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of the group, ``out_splits`` to each and ``in_splits`` from each; gradients go back."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any
    ) -> Tensor:
        ctx.splits, ctx.group = (out_splits, in_splits), group
        return _exchange(rows, out_splits, in_splits, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out_splits, in_splits = ctx.splits
        return _exchange(grad, in_splits, out_splits, ctx.group), None, None, None


def _exchange(rows: Tensor, out_splits: list[int], in_splits: list[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(in_splits), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), in_splits, out_splits, group=group)
    return received


# Indexing's own backward adds in an order that depends on threads; these three add K rows in the order of k, or copy.


def _sum_over_choices(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    """[M, H] -> [N, H]"""
    return rows.index_select(0, place).view(tokens, -1, rows.shape[1]).sum(dim=1)


class _Spread(torch.autograd.Function):
    """x[token]: each token once for each of its experts. [N, H] -> [M, H]"""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(place)
        ctx.tokens = len(x)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_over_choices(grad, ctx.saved_tensors[0], ctx.tokens), None, None


class _Combine(torch.autograd.Function):
    """Sum over each token's K rows. [M, H] -> [N, H]"""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(token)
        return _sum_over_choices(rows, place, int(token.max()) + 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Permute(torch.autograd.Function):
    """rows[order], with the inverse permutation given. [M, 1] -> [M, 1]"""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(place)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None

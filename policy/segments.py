"""Where the sequences of a packed batch lie, and how attention lays them side by side.

The model runs on a flat stream of tokens without padding. Only attention needs sequences side by side: ``Segments``
sorts them by length, cuts them into buckets of similar length, and knows which row of the stream goes where.

Shapes: N tokens of the stream, A heads, S sequences of a bucket, L their padded length, n tokens of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# A bucket ends where a sequence would fill less than this share of the padded length, or where it would hold more than
# so many places: a bucket that fits in the caches is faster than a large one, and a long sequence needs no company.
MIN_FILL = 0.7
BUCKET_PLACES = 512


class _ScatterRows(torch.autograd.Function):
    """Rows of x at ``slots`` of a zero tensor; unlike that of indexing, the backward is a copy and not a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, rows: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(slots)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _GatherRows(torch.autograd.Function):
    """Rows of x at ``slots``, no slot twice; unlike that of indexing, the backward is a copy and not a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(slots)
        ctx.rows = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, slots, grad), None


def scatter_rows(x: Tensor, slots: Tensor, rows: int) -> Tensor:
    """Zero tensor of ``rows`` rows with x[i] at row slots[i]. [n, ...], [n] -> [rows, ...]. No slot may occur twice."""
    out = _ScatterRows.apply(x, slots, rows)
    assert isinstance(out, Tensor)
    return out


def gather_rows(x: Tensor, slots: Tensor) -> Tensor:
    """x[slots] with a cheap, deterministic backward. [m, ...], [n] -> [n, ...]. No slot may occur twice."""
    out = _GatherRows.apply(x, slots)
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length that lie next to each other in the stream, longest first.

    Attributes:
        start, stop: their tokens in the stream.
        lengths: tokens of each sequence, falling. [S]
        side_by_side: (token, head) row of the bucket for each (sequence, head, place); places behind the end of a
            sequence repeat its last token. [S * A * L]
        in_stream: the inverse: (sequence, head, place) for each (token, head). [n * A]
        padding: the (sequence, head, place) that are behind the end of a sequence.
    """

    start: int
    stop: int
    lengths: tuple[int, ...]
    side_by_side: Tensor
    in_stream: Tensor
    padding: Tensor

    @property
    def tokens(self) -> slice:
        """This bucket's part of the stream."""
        return slice(self.start, self.stop)

    def lay_out(self, x: Tensor, *, zero_padding: bool = False) -> Tensor:
        """This bucket's tokens, heads apart. [n, A, D] -> [S * A, L, D], a view when there is one sequence.

        Padding holds finite values that no real token looks at, or zeros. (Gathering is three times as fast as
        scattering into zeros, so repeating a token is the cheaper padding.)
        """
        if len(self.lengths) == 1:
            return x.transpose(0, 1)
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.side_by_side)
        if zero_padding and len(self.padding):
            rows.index_fill_(0, self.padding, 0)
        return rows.view(-1, self.lengths[0], x.shape[-1])

    def put_back(self, x: Tensor, heads: int) -> Tensor:
        """Inverse of :meth:`lay_out`. [S * A, L, D] -> [n, A, D]"""
        if len(self.lengths) == 1:
            return x.transpose(0, 1)
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.in_stream)
        return rows.view(-1, heads, x.shape[-1])

    def room(self, stream: Tensor) -> Tensor:
        """Where to write what belongs into ``stream`` [N, A, D], heads apart; :meth:`settle` puts it there.

        One sequence is written in its place at once. [S * A, L, D]
        """
        if len(self.lengths) == 1:
            return stream[self.tokens].transpose(0, 1)
        return stream.new_empty(len(self.lengths) * stream.shape[1], self.lengths[0], stream.shape[2])

    def settle(self, room: Tensor, stream: Tensor) -> None:
        """Ends what :meth:`room` began."""
        if len(self.lengths) > 1:
            stream[self.tokens] = self.put_back(room, stream.shape[1])


@dataclass(frozen=True)
class Segments:
    """The plan of one packed batch.

    Attributes:
        buckets: they tile the model's stream.
        order: token of the caller's stream at each place of the model's stream, which is sorted by sequence length;
            None when both are the same. [N]
        bounds: sequence s of the model's stream is its tokens bounds[s] .. bounds[s + 1] - 1. [S + 1], int32
        longest: tokens of the longest sequence.
    """

    buckets: tuple[Bucket, ...]
    order: Tensor | None
    bounds: Tensor
    longest: int

    @classmethod
    def plan(cls, lengths: Sequence[int], heads: int, device: torch.device | str = "cpu") -> Segments:
        """Plans for sequences of these lengths, in the order of the caller's stream.

        Raises:
            ValueError: no sequence, or a length below 1.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segment_lengths must be one or more lengths >= 1, got {list(lengths)[:8]}")
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        order = None
        if by_length != list(range(len(lengths))):
            starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
            order = torch.cat([torch.arange(lengths[i]) + starts[i] for i in by_length]).to(device)
        ordered = [lengths[i] for i in by_length]
        buckets: list[Bucket] = []
        first, start = 0, 0
        for i in range(1, len(ordered) + 1):
            full = (i - first + 1) * ordered[first] > BUCKET_PLACES
            if i == len(ordered) or full or ordered[i] < MIN_FILL * ordered[first]:
                buckets.append(_bucket(ordered[first:i], start, heads, device))
                first, start = i, buckets[-1].stop
        bounds = torch.tensor([0, *accumulate(ordered)], dtype=torch.int32, device=device)
        return cls(tuple(buckets), order, bounds, ordered[0])

    def to_model_order(self, x: Tensor) -> Tensor:
        """The caller's stream to the model's. [N, ...]"""
        return x if self.order is None else gather_rows(x, self.order)

    def to_caller_order(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`to_model_order`. [N, ...]"""
        return x if self.order is None else scatter_rows(x, self.order, x.shape[0])


def _bucket(lengths: Sequence[int], start: int, heads: int, device: torch.device | str) -> Bucket:
    size = torch.tensor(lengths)[:, None]
    place, head = torch.arange(lengths[0]), torch.arange(heads)
    token = (size.cumsum(0) - size) + place.minimum(size - 1)
    side_by_side = token[:, None, :] * heads + head[:, None]
    real = place < size
    sequence, place = real.nonzero(as_tuple=True)
    in_stream = (sequence[:, None] * heads + head) * lengths[0] + place[:, None]
    padding = (~real)[:, None, :].expand(-1, heads, -1).flatten().nonzero()
    rows = (index.flatten().to(device) for index in (side_by_side, in_stream, padding))
    return Bucket(start, start + sum(lengths), tuple(lengths), *rows)

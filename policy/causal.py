"""Causal attention over the sequences of a packed stream, forward and backward.

For every sequence and head: out = softmax(scale * q k^T + causal mask) v.

On a CPU in fp32 and fp64 it runs block by block over the queries: a block of queries meets only the keys before its
end, and only the sequences that reach into it. The backward keeps the probabilities (or computes them again when they
are large), which at these sizes takes half the time of PyTorch's fused CPU kernel. Elsewhere PyTorch's fused attention
does the work.

Shapes: N tokens, A heads, D = query/key width, V = value width, S sequences of a bucket, L their padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.segments import Bucket, Segments

# Queries of one block. 64 was best of 64, 128, 256 for lengths of 100 to 2,048.
BLOCK = 64
# Probabilities that one bucket may keep for the backward; above, they are computed again. 2^26 take 256 MiB in fp32.
KEPT_PROBABILITIES = 2**26


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Segments) -> Tensor:
    """Attention of every token to its own sequence up to itself.

    Args:
        query, key: [N, A, D], value: [N, A, V], all in the order of ``segments``.
        scale: factor on the products of queries and keys.

    Returns:
        [N, A, V]
    """
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        out = _BlockedAttention.apply(query, key, value, scale, segments.buckets)
        assert isinstance(out, Tensor)
        return out
    return torch.cat([_fused(query, key, value, scale, bucket) for bucket in segments.buckets])


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, bucket: Bucket) -> Tensor:
    """One bucket through PyTorch. No mask beyond the causal one: padding lies behind every real token."""
    heads, sequences, length = value.shape[1], len(bucket.lengths), bucket.lengths[0]
    q, k, v = (bucket.lay_out(x).view(sequences, heads, length, -1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.reshape(-1, out.shape[-1]).index_select(0, bucket.in_stream).view(-1, heads, out.shape[-1])


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) of the first ``rows`` (sequence, head) pairs: those of sequences longer than ``start``."""

    rows: int
    start: int
    stop: int

    @property
    def queries(self) -> tuple[slice, slice]:
        return slice(self.rows), slice(self.start, self.stop)

    @property
    def keys(self) -> tuple[slice, slice]:
        return slice(self.rows), slice(self.stop)

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax over the keys. query (scaled), key [S * A, L, D] -> [rows, stop - start, stop]"""
        scores = torch.bmm(query[self.queries], key[self.keys].transpose(1, 2))
        width = self.stop - self.start
        future = torch.ones(width, width, dtype=torch.bool, device=query.device).triu_(1)
        scores[:, :, self.start :].masked_fill_(future, float("-inf"))
        return torch.softmax(scores, dim=-1)


def _blocks(bucket: Bucket, heads: int) -> list[_Block]:
    longest = bucket.lengths[0]
    return [
        _Block(sum(n > start for n in bucket.lengths) * heads, start, min(start + BLOCK, longest))
        for start in range(0, longest, BLOCK)
    ]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, buckets: tuple[Bucket, ...]
    ) -> Tensor:
        ctx.scale, ctx.buckets, ctx.keep, ctx.width = scale, buckets, [], query.shape[-1]
        heads = query.shape[1]
        out = torch.empty_like(value)
        saved = []
        for bucket in buckets:
            q, k, v = bucket.lay_out(query).mul_(scale), bucket.lay_out(key), bucket.lay_out(value)
            blocks = _blocks(bucket, heads)
            numbers = sum(b.rows * (b.stop - b.start) * b.stop for b in blocks)
            keep = any(ctx.needs_input_grad) and numbers <= KEPT_PROBABILITIES
            result = torch.empty_like(v)
            saved += [q, k, v]
            for block in blocks:
                p = block.probabilities(q, k)
                result[block.queries] = torch.bmm(p, v[block.keys])
                if keep:
                    saved.append(p)
            bucket.put_back(result, out)
            ctx.keep.append(keep)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = iter(ctx.saved_tensors)
        tokens, heads, _ = grad.shape
        grad_query, grad_key = (grad.new_empty(tokens, heads, ctx.width) for _ in range(2))
        grad_value = torch.empty_like(grad)
        for bucket, keep in zip(ctx.buckets, ctx.keep, strict=True):
            q, k, v = next(saved), next(saved), next(saved)
            g = bucket.lay_out(grad, zero_padding=True)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for block in _blocks(bucket, heads):
                p = next(saved) if keep else block.probabilities(q, k)
                block_g = g[block.queries]
                dv[block.keys].baddbmm_(p.transpose(1, 2), block_g)
                dp = torch.bmm(block_g, v[block.keys].transpose(1, 2))
                # Backward of the softmax: p * (dp - sum(p * dp)), one fused kernel.
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq[block.queries] = torch.bmm(ds, k[block.keys])
                dk[block.keys].baddbmm_(ds.transpose(1, 2), q[block.queries])
            bucket.put_back(dq.mul_(ctx.scale), grad_query)
            bucket.put_back(dk, grad_key)
            bucket.put_back(dv, grad_value)
        return grad_query, grad_key, grad_value, None, None

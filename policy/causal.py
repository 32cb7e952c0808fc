"""Causal attention of multi-head latent attention over the sequences of a packed stream, forward and backward.

For every sequence and head, with q and k after the rotation of their last R columns:
out = softmax(scale * q k^T + causal mask) v.

On a CPU in fp32 and fp64 it runs sequence by sequence and block by block over the queries: a block of queries meets
only the keys before its end. A sequence's heads fit in the caches, from the rotation to the last gradient; nothing of
the size of the stream is copied, rotated or laid out. The backward keeps the probabilities (or computes them again when
they are large). In half precision on a GPU it is ``policy.varlen``; elsewhere PyTorch's fused attention per bucket.

Shapes: N tokens, A heads, D = query/key width, R = rotated columns of it, P = D - R, V = value width, S sequences of a
bucket, L their padded length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.rope import rotate
from policy.segments import Bucket, Segments
from policy.varlen import runs_varlen, varlen_attention

# Queries of one block, about: 64 does no more work beyond the diagonal than it must for lengths of 100 to 2,048. From
# LONG tokens on that is little anyway, and blocks of 128 make fewer and better products.
BLOCK, LONG_BLOCK, LONG = 64, 128, 4096
# Probabilities that one call may keep for the backward; above, they are computed again. 2^26 take 256 MiB in fp32.
KEPT_PROBABILITIES = 2**26
# Probabilities that exist at once, unless one head alone has more: 1 MiB in fp32, a core's cache. One head at a time
# is a fifth faster for 8,192 tokens than all four.
LIVE_PROBABILITIES = 2**18


@dataclass(frozen=True)
class LatentHeads:
    """What attention gets of every token.

    Attributes:
        query: not rotated yet. [N, A, D]
        key_value: the keys' unrotated columns, then the values. [N, A, P + V]
        shared_key: the columns of the key that all heads share, not rotated yet. [N, R]
        turns: of every token's position (``policy.rope``), complex. [N, R / 2]
    """

    query: Tensor
    key_value: Tensor
    shared_key: Tensor
    turns: Tensor

    def assembled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys [N, A, D], values [N, A, V]."""
        rotated = self.shared_key.shape[-1]
        plain = self.query.shape[-1] - rotated
        q_plain, q_rope = self.query.split((plain, rotated), dim=-1)
        k_plain, value = self.key_value.split((plain, self.key_value.shape[-1] - plain), dim=-1)
        query = torch.cat((q_plain, rotate(q_rope, self.turns[:, None])), dim=-1)
        shared = rotate(self.shared_key, self.turns)[:, None].expand(-1, query.shape[1], -1)
        return query, torch.cat((k_plain, shared), dim=-1), value


def causal_attention(heads: LatentHeads, scale: float, segments: Segments) -> Tensor:
    """Attention of every token to its own sequence up to itself.

    Args:
        heads: in the order of ``segments``.
        scale: factor on the products of queries and keys.

    Returns:
        [N, A, V]
    """
    query = heads.query
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        out = _BlockedAttention.apply(query, heads.key_value, heads.shared_key, heads.turns, scale, segments.buckets)
        assert isinstance(out, Tensor)
        return out
    query, key, value = heads.assembled()
    if runs_varlen(query, value):
        return varlen_attention(query, key, value, scale, segments)
    return torch.cat([_fused(query, key, value, scale, bucket) for bucket in segments.buckets])


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, bucket: Bucket) -> Tensor:
    """One bucket through PyTorch. No mask beyond the causal one: padding lies behind every real token."""
    heads, sequences, length = value.shape[1], len(bucket.lengths), bucket.lengths[0]
    q, k, v = (bucket.lay_out(x[bucket.tokens]).reshape(sequences, heads, length, -1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return bucket.put_back(out.flatten(0, 1), heads)


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) of some (sequence, head) pairs: those of sequences longer than ``start``."""

    pairs: slice
    start: int
    stop: int

    @property
    def queries(self) -> tuple[slice, slice]:
        return self.pairs, slice(self.start, self.stop)

    @property
    def keys(self) -> tuple[slice, slice]:
        return self.pairs, slice(self.stop)

    @property
    def size(self) -> int:
        return (self.pairs.stop - self.pairs.start) * (self.stop - self.start) * self.stop

    def probabilities(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Softmax over the keys. query, key [S * A, L, D] -> [pairs, stop - start, stop]"""
        q, k = query[self.queries], key[self.keys]
        scores = _product(q, k.transpose(1, 2), scale)
        scores[:, :, self.start :].add_(_future(self.stop - self.start, scores.dtype))
        return torch.softmax(scores, dim=-1)


@functools.lru_cache(maxsize=2 * BLOCK)
def _future(width: int, dtype: torch.dtype) -> Tensor:
    """-inf where a key comes after the query, else 0; adding is three times as fast as filling. [width, width]"""
    return torch.full((width, width), float("-inf"), dtype=dtype).triu_(1)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, in one pass over the result."""
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2]).baddbmm_(left, right, beta=0, alpha=scale)


def _blocks(bucket: Bucket, heads: int) -> list[_Block]:
    """The last block of a head first: it meets all keys, so that the gradients of keys and values start with it."""
    longest = bucket.lengths[0]
    count = max(1, round(longest / (BLOCK if longest < LONG else LONG_BLOCK)))
    bounds = [longest * i // count for i in range(count + 1)]
    blocks = []
    for start, stop in reversed(list(pairwise(bounds))):
        pairs = sum(n > start for n in bucket.lengths) * heads
        step = max(1, LIVE_PROBABILITIES // ((stop - start) * stop))
        blocks += [_Block(slice(i, min(i + step, pairs)), start, stop) for i in range(0, pairs, step)]
    return blocks


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, query: Tensor, key_value: Tensor, shared_key: Tensor, turns: Tensor, scale: float,
        buckets: tuple[Bucket, ...],
    ) -> Tensor:  # fmt: skip
        heads, plain = query.shape[1], query.shape[-1] - shared_key.shape[-1]
        out = key_value.new_empty(len(query), heads, key_value.shape[-1] - plain)
        saved, kept, learning = [], 0, any(ctx.needs_input_grad)
        ctx.scale, ctx.buckets, ctx.keep, ctx.shape = scale, buckets, [], (heads, plain)
        for bucket in buckets:
            here = bucket.tokens
            q, k = _rotated(query[here], key_value[here], shared_key[here], turns[here])
            q, k, v = bucket.lay_out(q), bucket.lay_out(k), bucket.lay_out(key_value[here, :, plain:])
            blocks = _blocks(bucket, heads)
            kept += sum(block.size for block in blocks)
            keep = learning and kept <= KEPT_PROBABILITIES
            result = bucket.room(out)
            if learning:
                saved += [q, k]
            for block in blocks:
                p = block.probabilities(q, k, scale)
                result[block.queries] = torch.bmm(p, v[block.keys])
                if keep:
                    saved.append(p)
            bucket.settle(result, out)
            ctx.keep.append(keep)
        ctx.save_for_backward(key_value, turns, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        key_value, turns, *rest = ctx.saved_tensors
        saved = iter(rest)
        heads, plain = ctx.shape
        back = turns.conj().resolve_conj()
        grad_kv = torch.empty_like(key_value, memory_format=torch.contiguous_format)
        grad_query = grad_shared = None
        for bucket, keep in zip(ctx.buckets, ctx.keep, strict=True):
            here = bucket.tokens
            q, k, v = next(saved), next(saved), bucket.lay_out(key_value[here, :, plain:])
            if grad_query is None or grad_shared is None:
                grad_query = q.new_empty(len(key_value), heads, q.shape[-1])
                grad_shared = q.new_empty(len(key_value), q.shape[-1] - plain)
            g = bucket.lay_out(grad[here], zero_padding=True)
            dq, dk, dv = bucket.room(grad_query), _Total(k), _Total(v)
            for block in _blocks(bucket, heads):
                p = next(saved) if keep else block.probabilities(q, k, ctx.scale)
                block_g = g[block.queries]
                dv.add(block, p.transpose(1, 2), block_g, 1.0)
                dp = torch.bmm(block_g, v[block.keys].transpose(1, 2))
                # Backward of the softmax: p * (dp - sum(p * dp)), one fused kernel.
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq[block.queries] = _product(ds, k[block.keys], ctx.scale)
                dk.add(block, ds.transpose(1, 2), q[block.queries], ctx.scale)
            bucket.settle(dq, grad_query)
            turned = grad_query[here, :, plain:]
            turned.copy_(rotate(turned, back[here, None]))
            key = bucket.put_back(dk.value, heads)
            grad_kv[here, :, :plain] = key[..., :plain]
            grad_kv[here, :, plain:] = bucket.put_back(dv.value, heads)
            grad_shared[here] = rotate(key[..., plain:].sum(1), back[here])
        assert grad_query is not None and grad_shared is not None
        return grad_query, grad_kv, grad_shared, None, None, None


class _Total:
    """The gradient of all keys (or values) of a bucket, summed over the blocks of queries."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        assert self._value is not None
        return self._value

    def add(self, block: _Block, left: Tensor, right: Tensor, scale: float) -> None:
        """Adds scale * left @ right to the rows of the block's keys. A product first and a sum then: adding into rows
        that do not lie together would run one small product after the other."""
        part = _product(left, right, scale)
        if self._value is None:
            if part.shape == self._like.shape:
                self._value = part
                return
            self._value = part.new_zeros(self._like.shape)
        self._value[block.keys] += part


def _rotated(query: Tensor, key_value: Tensor, shared_key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with their rotated columns in place. [n, A, D] each"""
    plain = query.shape[-1] - shared_key.shape[-1]
    q, k = query.new_empty(query.shape), query.new_empty(query.shape)
    q[..., :plain] = query[..., :plain]
    q[..., plain:] = rotate(query[..., plain:], turns[:, None])
    k[..., :plain] = key_value[..., :plain]
    k[..., plain:] = rotate(shared_key, turns)[:, None]
    return q, k

"""Layout of packed sequences, and the attention over them, against PyTorch's on one sequence at a time."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from policy import causal
from policy.causal import LatentHeads, causal_attention
from policy.inputs import plan_stream
from policy.segments import BUCKET_PLACES, MIN_FILL, Segments, gather_rows, scatter_rows

lengths_of = st.lists(st.integers(1, 150), min_size=1, max_size=10)


PLAIN, ROTATED, VALUE = 6, 4, 5


def _heads(tokens: int, dtype: torch.dtype = torch.float64) -> LatentHeads:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 2, PLAIN + ROTATED), (tokens, 2, PLAIN + VALUE), (tokens, ROTATED))
    query, key_value, shared = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    angles = torch.rand(tokens, ROTATED // 2, generator=generator) * 6
    return LatentHeads(query, key_value, shared, torch.polar(torch.ones_like(angles), angles))


def _attend(heads: LatentHeads, lengths: list[int]) -> Tensor:
    """The attention under test, in the caller's order. -> [N, A, V]"""
    segments = Segments.plan(lengths, heads=heads.query.shape[1])
    ordered = LatentHeads(*(segments.to_model_order(getattr(heads, f.name)) for f in fields(heads)))
    return segments.to_caller_order(causal_attention(ordered, 0.3, segments))


def _one_by_one(heads: LatentHeads, lengths: list[int]) -> Tensor:
    parts = zip(*(x.split(lengths) for x in heads.assembled()), strict=True)
    heads_first = ((a.transpose(0, 1), b.transpose(0, 1), c.transpose(0, 1)) for a, b, c in parts)
    return torch.cat(
        [F.scaled_dot_product_attention(*p, is_causal=True, scale=0.3).transpose(0, 1) for p in heads_first]
    )


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), kept=st.sampled_from([0, 20_000, 2**26]))
def test_attention_and_its_gradient(lengths: list[int], kept: int) -> None:
    ours, theirs = (_heads(sum(lengths)) for _ in range(2))
    leaves = [[h.query, h.key_value, h.shared_key] for h in (ours, theirs)]
    for leaf in (*leaves[0], *leaves[1]):
        leaf.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "KEPT_PROBABILITIES", kept)
        patch.setattr(causal, "LIVE_PROBABILITIES", 5_000)  # one head of 64 queries and 78 keys
        out = _attend(ours, lengths)
        expected = _one_by_one(theirs, lengths)
        assert torch.allclose(out, expected, atol=1e-12)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
    for a, b in zip(*leaves, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-11)


def test_kept_and_recomputed_probabilities_give_the_same_bits() -> None:
    lengths, found = [200, 90, 30, 20], []
    for kept in (0, 2**26):
        heads = _heads(sum(lengths), torch.float32)
        heads.query.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(causal, "KEPT_PROBABILITIES", kept)
            _attend(heads, lengths).square().sum().backward()
        found.append(heads.query.grad)
    assert torch.equal(*found)


def test_half_precision_takes_the_fused_path() -> None:
    lengths = [70, 3, 40]
    heads = _heads(sum(lengths), torch.float32)
    narrow = _attend(
        replace(heads, **{n: getattr(heads, n).bfloat16() for n in ("query", "key_value", "shared_key")}), lengths
    )
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(narrow.float(), _one_by_one(heads, lengths), atol=0.05)


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of)
def test_the_plan_covers_every_token_once(lengths: list[int]) -> None:
    segments = Segments.plan(lengths, heads=3)
    tokens = sum(lengths)
    x = torch.arange(tokens * 3).view(tokens, 3, 1)
    assert [b.start for b in segments.buckets] == [0, *[b.stop for b in segments.buckets[:-1]]]
    assert segments.buckets[-1].stop == tokens
    back = torch.full_like(x, -1)
    for bucket in segments.buckets:
        assert min(bucket.lengths) >= MIN_FILL * max(bucket.lengths), "more padding than said"
        assert len(bucket.lengths) == 1 or len(bucket.lengths) * max(bucket.lengths) <= BUCKET_PLACES
        laid_out = bucket.lay_out(x[bucket.tokens], zero_padding=True)
        assert laid_out.shape == (len(bucket.lengths) * 3, max(bucket.lengths), 1)
        assert (laid_out > 0).sum() <= sum(bucket.lengths) * 3
        back[bucket.tokens] = bucket.put_back(laid_out, 3)
    assert torch.equal(back, x)
    assert torch.equal(segments.to_caller_order(segments.to_model_order(x)), x)


def test_a_small_plan_by_hand() -> None:
    """Lengths 3, 4, 1: sorted 4, 3, 1; the 1 fills too little of the 4 and gets its own bucket."""
    segments = Segments.plan([3, 4, 1], heads=1)
    assert segments.order is not None and segments.order.tolist() == [3, 4, 5, 6, 0, 1, 2, 7]
    first, second = segments.buckets
    assert (first.start, first.stop, first.lengths) == (0, 7, (4, 3))
    assert first.side_by_side.tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
    assert first.in_stream.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert first.padding.tolist() == [7]
    assert (second.start, second.stop, second.lengths) == (7, 8, (1,))
    assert segments.bounds.tolist() == [0, 4, 7, 8] and segments.bounds.dtype == torch.int32
    assert segments.longest == 4
    assert Segments.plan([4, 4, 2], heads=2).order is None


def test_gather_and_scatter_gradients() -> None:
    slots = torch.tensor([4, 0, 3])
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, slots), (x,))
    assert torch.autograd.gradcheck(lambda y: scatter_rows(y, slots, 6), (y,))
    assert torch.equal(scatter_rows(y, slots, 6)[[4, 0, 3]], y)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_empty_segments_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        Segments.plan(lengths, heads=1)


def test_position_ids_that_start_over_cut_the_row() -> None:
    plan = plan_stream(torch.zeros(1, 7), position_ids=torch.tensor([[0, 1, 2, 0, 0, 1, 2]]))
    assert list(plan.lengths) == [3, 1, 3]
    two_rows = plan_stream(torch.zeros(2, 3), position_ids=torch.tensor([[0, 1, 2], [3, 4, 0]]))
    assert list(two_rows.lengths) == [3, 2, 1]
    shared = plan_stream(torch.zeros(2, 3), position_ids=torch.tensor([[5, 6, 7]]))
    assert list(shared.lengths) == [3, 3]
    assert shared.positions.tolist() == [5, 6, 7, 5, 6, 7]


def test_padded_rows_keep_their_columns_as_positions() -> None:
    plan = plan_stream(torch.zeros(2, 4), attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert list(plan.lengths) == [2, 3]
    assert plan.positions.tolist() == [2, 3, 0, 1, 2]
    assert plan.kept is not None and plan.kept.tolist() == [2, 3, 4, 5, 6]

"""What surrounds the variable-length kernel of GPUs, with a kernel of our own that says what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from policy.segments import Segments
from policy.varlen import runs_varlen, varlen_attention


def kernel(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int,
    *, scale: float, window_size: tuple[int, int], num_splits: int,
) -> Tensor:  # fmt: skip
    """``varlen_attn`` by its documentation, one sequence at a time, as strict as the real one."""
    assert query.shape == key.shape == value.shape and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert starts.dtype == torch.int32 and torch.equal(starts, key_starts) and num_splits == 1
    assert longest == longest_key == int(starts.diff().max()) and int(starts[-1]) == len(query)
    assert window_size == (-1, 0), "causal"
    parts = zip(*(x.split(starts.diff().tolist()) for x in (query, key, value)), strict=True)
    rows = (tuple(x.transpose(0, 1) for x in part) for part in parts)
    return torch.cat([F.scaled_dot_product_attention(*r, is_causal=True, scale=scale).transpose(0, 1) for r in rows])


@pytest.mark.parametrize(("width", "value_width"), [(24, 16), (12, 9), (16, 16), (192, 128)])
def test_values_are_padded_and_cut_again(width: int, value_width: int) -> None:
    lengths = [9, 30, 1]
    segments = Segments.plan(lengths, heads=2)
    ordered = sorted(lengths, reverse=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, d, generator=generator).requires_grad_() for d in (width, width, value_width))
    out = varlen_attention(q, k, v, 0.2, segments, kernel=kernel)
    parts = zip(*(x.split(ordered) for x in (q, k, v)), strict=True)
    rows = (tuple(x.transpose(0, 1) for x in part) for part in parts)
    expected = torch.cat([F.scaled_dot_product_attention(*r, is_causal=True, scale=0.2).transpose(0, 1) for r in rows])
    assert out.shape == (40, 2, value_width)
    assert torch.allclose(out, expected, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_real_kernel_takes_these_arguments() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    given: dict[str, Any] = {"scale": 0.1, "window_size": (-1, 0), "num_splits": 1}
    inspect.signature(varlen_attn).bind(*range(7), **given)


def test_only_gpus_take_this_way() -> None:
    x = torch.zeros(4, 2, 16)
    assert not runs_varlen(x.bfloat16(), x.bfloat16()) and not runs_varlen(x, x)

"""Norms and feed-forward blocks written by hand against what PyTorch differentiates by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from policy import layers
from policy.layers import GatedMlp, RMSNorm, normed_linear, normed_linears, row_blocks

ROWS, WIDTH = 37, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 10 rows and fewer: sums run over several, of two sizes."""
    monkeypatch.setattr(layers, "ROWS", 10)


def plain_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def filled(module: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(double(*parameter.shape, seed=i + 1))
    return module


def assert_alike(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Same values, and same gradients of a random projection of them."""
    found = []
    for outs in (ours, theirs):
        loss = sum((out * double(*out.shape, seed=9 + i).detach()).sum() for i, out in enumerate(outs))
        assert isinstance(loss, Tensor)
        found.append(torch.autograd.grad(loss, leaves))
    for a, b in zip((*ours, *found[0]), (*theirs, *found[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_norm() -> None:
    norm, x = filled(RMSNorm(WIDTH).double()), double(ROWS, WIDTH)
    assert_alike((norm(x),), (plain_norm(x, norm),), [x, norm.weight])


def test_norm_of_more_dimensions() -> None:
    norm, x = filled(RMSNorm(WIDTH).double()), double(3, 7, WIDTH)
    assert_alike((norm(x),), (plain_norm(x, norm),), [x, norm.weight])


def test_norm_and_several_products() -> None:
    norm, x = filled(RMSNorm(WIDTH).double()), double(ROWS, WIDTH)
    matrices = [double(5, WIDTH, seed=3), double(4, WIDTH, seed=4)]
    theirs = tuple(plain_norm(x, norm) @ m.T for m in matrices)
    assert_alike(normed_linears(x, norm, matrices), theirs, [x, norm.weight, *matrices])


def test_norm_and_product_of_a_view() -> None:
    """Columns of a wider tensor, as the latent of keys and values is."""
    norm, wide = filled(RMSNorm(WIDTH).double()), double(ROWS, WIDTH + 3)
    linear = filled(nn.Linear(WIDTH, 5, bias=False).double())
    x = wide[:, :WIDTH]
    assert_alike((normed_linear(x, norm, linear),), (plain_norm(x, norm) @ linear.weight.T,), [wide, linear.weight])


def test_gated_block() -> None:
    mlp, x = filled(GatedMlp(WIDTH, 7).double()), double(ROWS, WIDTH)
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    theirs = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_alike((mlp(x),), (theirs,), [x, gate, up, down])


@pytest.mark.parametrize("build", [lambda: nn.Linear(WIDTH, 5), lambda: nn.Sequential(nn.Linear(WIDTH, 5, bias=False))])
def test_other_linear_layers_are_called(build: Any) -> None:
    """A bias, or a layer that stands in for a plain one (adapters do), is not passed over."""
    norm, linear, x = filled(RMSNorm(WIDTH).double()), filled(build().double()), double(ROWS, WIDTH)
    assert torch.allclose(normed_linear(x, norm, linear), linear(plain_norm(x, norm)))


def test_frozen_matrices_get_no_gradient() -> None:
    norm, x = filled(RMSNorm(WIDTH).double()).requires_grad_(False), double(ROWS, WIDTH)
    mlp = filled(GatedMlp(WIDTH, WIDTH).double()).requires_grad_(False)
    linear = nn.Linear(WIDTH, WIDTH, bias=False).double().requires_grad_(False)
    mlp(normed_linear(x, norm, linear)).sum().backward()
    assert x.grad is not None and linear.weight.grad is None and mlp.up_proj.weight.grad is None


@given(st.integers(1, 5000))
def test_row_blocks_are_even_and_cover_everything(rows: int) -> None:
    blocks = row_blocks(rows)
    assert [b.start for b in blocks] == [0, *[b.stop for b in blocks[:-1]]] and blocks[-1].stop == rows
    sizes = [b.stop - b.start for b in blocks]
    assert max(sizes) <= layers.ROWS and max(sizes) - min(sizes) <= 1
    assert row_blocks(0) == [slice(0, 0)]

"""The mends that are plain tensor code: batch invariance and the packing of experts. No vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rollout.vllm_mends import MENDS, _bmm_out, _mm, active_mends, pad_rows, repack_experts


def product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(a.shape[1], a.shape[0], b.shape[2])  # vLLM writes into a transposed buffer
    _bmm_out(a, b, out=out.transpose(0, 1))
    return out.transpose(0, 1)


@given(rows=st.integers(0, 40), seed=st.integers(0, 100))
def test_each_row_of_a_batched_product_is_the_same_in_every_batch(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(3, 64, 32), torch.randn(3, 32, 48)
    assert torch.equal(product(a[:, :rows], b), product(a, b)[:, :rows])
    weight = torch.randn(48, 32)
    assert torch.equal(_mm(a[0, :rows], weight.t()), _mm(a[0], weight.t())[:rows])


@given(rows=st.integers(1, 40))
def test_the_product_is_the_product(rows: int) -> None:
    torch.manual_seed(rows)
    a, b = torch.randn(2, rows, 16), torch.randn(2, 16, 8)
    torch.testing.assert_close(product(a, b), torch.einsum("brk,bkn->brn", a, b))
    torch.testing.assert_close(_mm(a[0], b[0]), torch.einsum("rk,kn->rn", a[0], b[0]))


def sigmoid_router(logits: Tensor, top: int, *, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = (scores + bias).topk(top).indices
    return scores.gather(1, ids), ids


@given(rows=st.integers(1, 70), experts=st.sampled_from([3, 8, 10]), seed=st.integers(0, 50))
def test_each_row_of_a_router_is_the_same_in_every_batch(rows: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, bias = torch.randn(70, experts) * 3, torch.randn(experts)
    route = pad_rows(sigmoid_router)
    weights, ids = route(logits, 2, bias=bias)
    part_weights, part_ids = route(logits[:rows], 2, bias=bias)
    assert torch.equal(part_weights, weights[:rows]) and torch.equal(part_ids, ids[:rows])
    assert part_weights.shape == (rows, 2)
    expected, _ = sigmoid_router(logits[:rows], 2, bias=bias)
    torch.testing.assert_close(part_weights, expected)


def test_only_layers_with_a_kernel_are_packed() -> None:
    packed: list[nn.Module] = []
    experts = nn.Linear(1, 1)
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=packed.append))
    experts.quant_method = SimpleNamespace(moe_kernel=kernel)  # pyright: ignore[reportArgumentType]
    dense = nn.Linear(1, 1)
    dense.quant_method = SimpleNamespace(moe_kernel=None)  # pyright: ignore[reportArgumentType]
    assert repack_experts(nn.Sequential(dense, experts, nn.ReLU())) == 1
    assert packed == [experts]


def test_mends_are_all_on_unless_the_environment_leaves_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1_ENGINE_MENDS", raising=False)
    assert active_mends() == MENDS
    monkeypatch.setenv("R1_ENGINE_MENDS", "rotary,batch")
    assert active_mends() == {"rotary", "batch"}

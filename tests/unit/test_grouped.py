"""The way that GPUs take through the experts, on a CPU: grouped products against the products one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.experts import Dispatch, routed_product
from policy.grouped import ALIGNMENT, Groups, grouped_mlp, runs_grouped

HIDDEN, INNER, EXPERTS, TOP = 16, 8, 5, 2


def inputs(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gates, experts (the last expert gets no token), gate_up, down."""
    draw = torch.Generator().manual_seed(seed)
    x, gates = torch.randn(tokens, HIDDEN, generator=draw), torch.rand(tokens, TOP, generator=draw)
    experts = torch.rand(tokens, EXPERTS - 1, generator=draw).topk(TOP).indices
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=draw) / 4
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=draw) / 3
    return x, gates, experts, gate_up, down


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_grouped_products_and_their_gradients(tokens: int, seed: int) -> None:
    x, gates, experts, gate_up, down = inputs(tokens, seed)
    dispatch = Dispatch.of(experts, EXPERTS)
    groups = Groups.of(dispatch.place, dispatch.load, TOP)
    results = []
    for grouped in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, gates, gate_up, down)]
        if grouped:
            out = grouped_mlp(leaves[0], leaves[1], (leaves[2], leaves[3]), groups)
        else:
            out, _ = routed_product(leaves[0], leaves[1], experts, leaves[2], leaves[3])
        out.mul(torch.linspace(-1, 1, HIDDEN)).sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=70))
def test_groups_are_aligned_and_hold_every_assignment_once(choice: list[int]) -> None:
    experts = torch.tensor(choice)[:, None]
    dispatch = Dispatch.of(experts, EXPERTS)
    groups = Groups.of(dispatch.place, dispatch.load, 1)
    ends = groups.ends.tolist()
    assert all(end % ALIGNMENT == 0 for end in ends) and groups.ends.dtype == torch.int32
    assert ends[-1] < len(groups.token), "the kernel wants rows behind the last group"
    assert int(groups.real.sum()) == len(choice) == len(set(groups.slot.tolist()))
    for token, (expert, slot) in enumerate(zip(choice, groups.slot.tolist(), strict=True)):
        assert ([0, *ends])[expert] <= slot < ends[expert]
        assert groups.token[slot] == token and groups.real[slot]


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float32), ("meta", torch.bfloat16)]
)
def test_only_gpus_take_this_way(device: str, dtype: torch.dtype) -> None:
    x, gate_up, down = (torch.empty(s, device=device, dtype=dtype) for s in ((4, 16), (2, 16, 16), (2, 16, 8)))
    assert not runs_grouped(x, gate_up, down)

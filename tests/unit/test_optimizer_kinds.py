"""AdamW in 8 bits and offloaded, against AdamW as it is."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy.config import OptimizerConfig
from policy.optimizer import PolicyOptimizer
from policy.optimizer_kinds import check_kind
from tests.unit.test_learner import assert_same_bits, batch, learner, policy, weights

WIDTH = 64  # 64 x 64 weights are the smallest that torchao keeps in 8 bits


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype))
    return nn.Sequential(*layers)


def losses(config: OptimizerConfig, dtype: torch.dtype = torch.float32, steps: int = 40) -> tuple[list[float], Any]:
    """Of learning a fixed random map, and the optimizer."""
    model = network(dtype)
    optimizer = PolicyOptimizer(model, config, steps)
    draw = torch.Generator().manual_seed(1)
    target = torch.randn(WIDTH, WIDTH, generator=draw) / 8
    found = []
    for _ in range(steps):
        x = torch.randn(128, WIDTH, generator=draw)
        loss = (model(x.to(dtype)).float() - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found, optimizer


def state_bytes(optimizer: PolicyOptimizer) -> int:
    def size(tensor: Tensor) -> int:
        parts = [getattr(tensor, name) for name in getattr(tensor, "tensor_attrs", ())]
        return sum(p.nbytes for p in parts) if parts else tensor.nbytes

    moments = optimizer.state_dict()["moments"]
    return sum(size(value) for own in moments.values() for kind, value in own.items() if kind != "step")


def test_eight_bits_learn_alike_in_less_memory() -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "schedule": "linear", "max_grad_norm": None}
    full, whole = losses(OptimizerConfig(**settings))
    eight, small = losses(OptimizerConfig(kind="adamw8bit", **settings))
    assert full[-1] < full[0] / 4, "there is something to learn"
    assert eight[-1] < full[-1] * 1.1 and max(abs(a / b - 1) for a, b in zip(eight, full, strict=True)) < 0.1
    assert state_bytes(whole) == (2 * WIDTH * WIDTH + WIDTH) * 8
    # for each matrix two moments: a byte a number, a scale for each 256, a table of 256; the bias has them in fp32
    assert state_bytes(small) == 2 * 2 * (WIDTH * WIDTH + WIDTH * WIDTH // 256 * 4 + 256 * 4) + WIDTH * 8


def test_a_large_matrix_takes_a_quarter() -> None:
    found = []
    for kind in ("adamw", "adamw8bit"):
        model = nn.Linear(512, 512, bias=False)
        optimizer = PolicyOptimizer(model, OptimizerConfig(kind=kind), 1)
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        found.append(state_bytes(optimizer))
    assert found[1] / found[0] == pytest.approx(0.255, abs=0.001)


def test_eight_bits_follow_the_schedule() -> None:
    """A learning rate of 0 at the end moves nothing; torchao's is a tensor, which a number must not replace."""
    model = network()
    ours = PolicyOptimizer(model, OptimizerConfig(kind="adamw8bit", lr=1e-2, schedule="linear"), 2)
    for step in range(2):
        before = copy.deepcopy(model.state_dict())
        model(torch.ones(3, WIDTH)).square().sum().backward()
        ours.step()
        same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert same == (step == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{"kind": "adamw8bit"}, {"kind": "adamw"}])
def test_a_restored_learner_continues_bit_identically(fields: dict[str, Any], dtype: torch.dtype) -> None:
    def fresh(seed: int) -> Any:
        return learner(policy(dtype, seed=seed, hidden_size=64), lr=1e-2, **fields)

    straight, restored = fresh(0), fresh(1)
    straight.step(batch(4))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=False))
    for ours in (straight, restored):
        ours.step(batch(4, seed=2))
    assert_same_bits(weights(straight.model), weights(restored.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_offloading_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    """Masters elsewhere, gradients handed over after clipping: on a CPU it is the same arithmetic."""
    settings: dict[str, Any] = {"kind": kind, "lr": 1e-2, "max_grad_norm": 0.5}
    stayed, moved = (losses(OptimizerConfig(offload=on, **settings), dtype, steps=6) for on in (False, True))
    assert stayed[0] == moved[0]
    assert moved[1].masters.keys() == {"0.weight", "0.bias", "2.weight"}
    assert all(master.dtype == torch.float32 and master.device.type == "cpu" for master in moved[1].masters.values())


def test_offloaded_gradients_are_summed_reported_and_forgotten() -> None:
    model, x = network(), torch.ones(3, WIDTH)
    ours = PolicyOptimizer(model, OptimizerConfig(offload=True), 5)
    for _ in range(2):
        model(x).sum().backward()
    twice = ours.gradients()
    ours.zero_grad()
    assert ours.gradients() == {}
    model(x).sum().backward()
    once = ours.gradients()
    assert all(torch.allclose(twice[name], 2 * once[name]) for name in twice) and len(twice) == 3


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="this model is on the CPU already: set it to false"):
        learner(policy(), offload=True)
    on_meta = nn.Linear(2, 2, device="meta")
    check_kind(OptimizerConfig(offload=True), on_meta, 1)
    with pytest.raises(ValueError, match="one learner rank, and there are 2"):
        check_kind(OptimizerConfig(offload=True), on_meta, 2)

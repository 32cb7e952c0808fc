"""The optimizer: schedules, clipping, decay; and steps that had nothing to learn from, which move the schedule on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy.config import OptimizerConfig
from policy.optimizer import PolicyOptimizer, learning_rate
from tests.unit.test_learner import (
    assert_same_bits,
    batch,
    gradients,
    learner,
    policy,
    weights,
    worst_difference,
)

LINEAR: dict[str, Any] = {"schedule": "linear", "lr": 1e-3, "total_steps": 4}


def lr_at(position: int, **fields: Any) -> float:
    return learning_rate(OptimizerConfig(lr=1e-3, schedule="linear", **fields), position, 4)


@pytest.mark.parametrize("skipped", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_the_last_step_of_a_stage_has_the_last_learning_rate(skipped: tuple[int, ...], ratio: float) -> None:
    ours = learner(policy(), min_lr_ratio=ratio, **LINEAR)
    for step in range(4):
        metrics = ours.step([] if step in skipped else batch(4, seed=step))
        assert metrics["learner/skipped"] == (step in skipped)
        assert metrics.get("learner/lr") == (None if step in skipped else lr_at(step, min_lr_ratio=ratio))
    assert metrics["learner/lr"] == 1e-3 * ratio
    assert metrics["learner/optimizer_steps"] == ours.optimizer_steps == 2


def test_supervised_steps_without_rows_move_it_too() -> None:
    ours = learner(policy(), **LINEAR)
    for _ in range(3):
        ours.sft_step([])
    assert ours.sft_step(batch(4))["learner/lr"] == lr_at(3) == 0.0


@pytest.mark.parametrize("samples", [0, 1, 2, 5])
def test_a_step_takes_its_mini_batches_from_the_schedule_however_few_samples_it_has(samples: int) -> None:
    ours = learner(policy(), schedule="linear", total_steps=6)
    ours.step(batch(samples), mini_batches=3)
    taken = min(samples, 3)
    assert (ours.optimizer_steps, ours._optimizer.position) == (taken, 3)
    metrics = ours.step(batch(2, seed=1), mini_batches=3)
    # Its two samples make two optimizer steps, at positions 3 and 4 of 0..5.
    assert metrics["learner/lr"] == pytest.approx(1e-3 / 5)
    assert (ours.optimizer_steps, ours._optimizer.position) == (taken + 2, 6)


def test_a_restored_learner_stands_where_the_schedule_stood() -> None:
    straight = learner(policy(), **LINEAR)
    straight.step(batch(4))
    straight.step([])
    state = copy.deepcopy({"model": straight.model.state_dict(), "learner": straight.state_dict()})
    restored = learner(policy(seed=1), **LINEAR)
    restored.model.load_state_dict(state["model"])
    restored.load_state_dict(state["learner"])
    assert (restored.optimizer_steps, restored._optimizer.position) == (1, 2)
    for ours in (straight, restored):
        assert ours.step(batch(4, seed=2))["learner/lr"] == lr_at(2)
        ours.step(batch(4, seed=3), mini_batches=2)
    assert_same_bits(weights(straight.model), weights(restored.model))


def test_an_optimizer_counts_its_steps_and_its_position_apart() -> None:
    model = nn.Linear(2, 1, bias=False)
    config = OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2)
    optimizer = PolicyOptimizer(model, config, total_steps=5)
    lrs = []
    for skipped in (0, 1, 0, 1):  # left out before each step
        optimizer.move_to(optimizer.position + skipped)
        lrs.append(optimizer.lr)
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
    assert lrs == [learning_rate(config, position, 5) for position in (0, 2, 3, 5)] == [0.5, 1.0, 0.5, 0.0]
    assert (optimizer.steps, optimizer.position) == (4, 6)
    other = PolicyOptimizer(nn.Linear(2, 1, bias=False), config, total_steps=5)
    other.load_state_dict(optimizer.state_dict())
    assert (other.steps, other.position, other.lr) == (4, 6, 0.0)


def test_schedules_by_hand() -> None:
    def lrs(**fields: Any) -> list[float]:
        return [learning_rate(OptimizerConfig(lr=1.0, **fields), step, 5) for step in range(7)]

    assert lrs() == [1.0] * 7
    assert lrs(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert lrs(schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0])
    assert lrs(schedule="linear", min_lr_ratio=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5])
    half = math.sqrt(0.5) / 2
    assert lrs(schedule="cosine") == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half, 0.0, 0.0, 0.0])
    assert lrs(schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])


def test_the_gradient_is_clipped_and_its_norm_reported_unclipped() -> None:
    samples = batch()
    _, raw = gradients(learner(policy()), samples)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in raw.values()))
    seen: dict[str, Tensor] = {}
    ours = learner(policy(), max_grad_norm=norm / 10)

    def keep(*_: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in ours.model.named_parameters() if p.grad is not None})

    ours._optimizer._adamw.register_step_pre_hook(keep)
    metrics = ours.step(samples)
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    clipped = math.sqrt(sum(float(g.double().square().sum()) for g in seen.values()))
    assert clipped == pytest.approx(norm / 10, rel=1e-4)


def test_decay_is_for_matrices_only() -> None:
    model = policy()
    learner(model, weight_decay=0.5, lr=1e-8)
    ours = learner(model, weight_decay=0.5)
    groups = ours._optimizer._adamw.param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_bf16_weights_learn_through_fp32_masters() -> None:
    """Weights near 0.1 lie 5e-4 apart in bf16: updates of 2e-5 are lost one by one, and add up in a master."""
    model = policy(torch.bfloat16)
    ours = learner(model, lr=2e-5)
    before = weights(model)
    for _ in range(20):
        ours.step(batch(4), mini_batches=1, temperature=1.0, constant_length=8)
    head, old = model.lm_head.weight.detach(), before["lm_head.weight"]
    large = old.abs() > 0.064
    assert (head != old)[large].float().mean().item() > 0.5
    restored = learner(copy.deepcopy(model), lr=2e-5)
    restored.load_state_dict(copy.deepcopy(ours.state_dict()))
    for one in (ours, restored):
        one.step(batch(4, seed=5), mini_batches=1, temperature=1.0, constant_length=8)
    assert_same_bits(weights(ours.model), weights(restored.model))


def test_bf16_gradients_add_up_in_fp32() -> None:
    def moments(limit: int) -> dict[str, Tensor]:
        ours = learner(policy(torch.bfloat16), micro_batch_tokens=limit, max_grad_norm=None)
        ours.step(batch(16), mini_batches=1, temperature=1.0, constant_length=8)
        masters = ours._optimizer._masters
        return {name: ours._optimizer._adamw.state[master]["exp_avg"] for name, master in masters.items()}

    whole, cut = moments(10_000), moments(10)
    assert {m.dtype for m in whole.values()} == {torch.float32}
    assert worst_difference(whole, cut) < 0.02

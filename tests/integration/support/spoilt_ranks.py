"""Numbers that go wrong on one rank alone: what each of them decides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from policy.batch import Sample
from policy.parallel import Ranks, local_part, shard
from tests.integration.support import ranks as support

VICTIM = 5  # the sample whose advantage is not a number
PARAMETER = "model.layers.1.self_attn.o_proj.weight"


def spoilt(ranks: Ranks) -> list[list[Any]]:
    """What every rank decided in each of five steps: fine, an advantage, a gradient, fine, the weights.

    Gradient and weights are spoilt in the last rank's shard only; the sample is computed by one rank only.
    """
    model = support.policy()
    shard(model, ranks)
    learner = support.learner(model, ranks, 40)
    samples = support.batch(12, seed=0)
    decisions: list[Any] = []

    def take(batch: list[Sample]) -> None:
        metrics = learner.step(batch)
        bad = [(u.what, u.text, u.samples, u.parameters, u.in_a_row, u.stops) for u in learner.bad_updates]
        decisions.append((bad, metrics["learner/optimizer_steps"], metrics["learner/bad_steps"]))

    take(samples)
    take([replace(sample, advantage=math.nan) if i == VICTIM else sample for i, sample in enumerate(samples)])
    step, last = learner._optimizer.step, ranks.rank == ranks.size - 1

    def with_a_bad_gradient() -> float:
        gradient = dict(model.named_parameters())[PARAMETER].grad
        if last and gradient is not None:
            local_part(gradient)[-1:] = math.inf
        return step()

    learner._optimizer.step = with_a_bad_gradient  # type: ignore[method-assign]
    take(samples)
    learner._optimizer.step = step  # type: ignore[method-assign]
    take(samples)

    def ruin(*_: object) -> None:
        if last:
            local_part(dict(model.named_parameters())[PARAMETER].detach())[-1:] = math.nan

    learner._optimizer._adamw.register_step_post_hook(ruin)
    take(samples)
    if ranks.size == 1:
        return [decisions]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, decisions)
    return found

"""What the micro-batches of one learner step add up to."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from policy.batch import MicroBatch
from policy.loss import LossOutput
from policy.scorer import TokenScores


class Tally:
    """Adds up what the micro-batches of one call report."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.lr = 0.0
        self.router_load: Tensor | None = None
        self._counts = {"learner/tokens": 0, "learner/loss_tokens": 0, "learner/sequences": 0}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, micro: MicroBatch, scores: TokenScores, output: LossOutput) -> None:
        self._counts["learner/tokens"] += micro.tokens
        self._counts["learner/loss_tokens"] += micro.loss_tokens
        self._counts["learner/sequences"] += len(micro.segment_lengths)
        sums = {**output.sums, "learner/entropy": scores.entropy.sum()}
        # one transfer from the device for all numbers
        numbers = torch.stack([value.double() for value in (*sums.values(), *output.maxima.values())]).tolist()
        for name, value in zip(sums, numbers, strict=False):
            self._sums[name] = self._sums.get(name, 0.0) + value
        for name, value in zip(output.maxima, numbers[len(sums) :], strict=True):
            self._maxima[name] = max(self._maxima.get(name, -math.inf), value)
        if scores.router_load is not None and len(scores.router_load):
            load = scores.router_load
            self.router_load = load if self.router_load is None else self.router_load + load

    def metrics(self) -> dict[str, float]:
        tokens = self._counts["learner/loss_tokens"]
        return {
            "learner/loss": math.fsum(self.losses) / len(self.losses),
            "learner/grad_norm": math.fsum(self.grad_norms) / len(self.grad_norms),
            "learner/lr": self.lr,
            "learner/skipped": 0.0,
            **{name: total / tokens for name, total in self._sums.items()},
            **self._maxima,
            **{name: float(count) for name, count in self._counts.items()},
            "learner/tokens_per_s": self._counts["learner/tokens"] / (time.perf_counter() - self.started),
        }

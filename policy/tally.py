"""What the micro-batches of one learner step add up to."""

from __future__ import annotations

import math
import time

import torch

from policy.batch import MicroBatch
from policy.loss import LossOutput
from policy.parallel import Ranks
from policy.routing import RouterCounts
from policy.scorer import TokenScores


class Tally:
    """Adds up what the micro-batches of one call report."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.lr = 0.0
        self.pack_fill = 0.0
        self.router: RouterCounts | None = None
        self.balance: float | None = None  # balance loss, summed over sequences
        self._counts: dict[str, float] = {"learner/tokens": 0, "learner/loss_tokens": 0, "learner/sequences": 0}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, micro: MicroBatch, scores: TokenScores, output: LossOutput, weight: float = 1.0) -> None:
        """Adds a micro-batch; one of weight 0 (another rank's, repeated) adds names only."""
        counts = (micro.tokens, micro.loss_tokens, len(micro.segment_lengths))
        for name, count in zip(self._counts, counts, strict=True):
            self._counts[name] += count if weight else 0
        sums = {**output.sums, "learner/entropy": scores.entropy.sum()}
        # one transfer from the device for all numbers
        numbers = torch.stack([value.double() for value in (*sums.values(), *output.maxima.values())]).tolist()
        for name, value in zip(sums, numbers, strict=False):
            self._sums[name] = self._sums.get(name, 0.0) + (value if weight else 0.0)
        for name, value in zip(output.maxima, numbers[len(sums) :], strict=True):
            self._maxima[name] = max(self._maxima.get(name, -math.inf), value if weight else -math.inf)
        if scores.balance is not None:
            self.balance = (self.balance or 0.0) + weight * float(scores.balance.detach())
        if scores.router is not None:
            router = scores.router.times(weight)
            self.router = router if self.router is None else self.router + router

    def take(self, other: Tally) -> None:
        """Adds what another tally has added up (of an update that turned out to be good)."""
        for mine, theirs in ((self._counts, other._counts), (self._sums, other._sums)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0) + value
        for name, value in other._maxima.items():
            self._maxima[name] = max(self._maxima.get(name, -math.inf), value)
        if other.balance is not None:
            self.balance = (self.balance or 0.0) + other.balance
        if other.router is not None:
            self.router = other.router if self.router is None else self.router + other.router

    def over_ranks(self, ranks: Ranks) -> None:
        """Takes in what the other ranks have added up of their shares; they all call this."""
        if ranks.size == 1:
            return
        mine = [*self._counts.values(), *self._sums.values(), self.balance or 0.0]
        summed = iter(ranks.total(torch.tensor(mine, dtype=torch.float64)).tolist())
        self._counts = {name: int(next(summed)) for name in self._counts}
        self._sums = {name: next(summed) for name in self._sums}
        self.balance = None if self.balance is None else next(summed)
        largest = ranks.largest(torch.tensor(list(self._maxima.values()), dtype=torch.float64)).tolist()
        self._maxima = dict(zip(self._maxima, largest, strict=True))
        if self.router is not None:
            self.router = self.router.total(ranks.total)

    def metrics(self) -> dict[str, float]:
        tokens, sequences = self._counts["learner/loss_tokens"], self._counts["learner/sequences"]
        return {
            "learner/loss": math.fsum(self.losses) / len(self.losses),
            "learner/grad_norm": math.fsum(self.grad_norms) / len(self.grad_norms),
            "learner/lr": self.lr,
            "learner/pack_fill": self.pack_fill,
            "learner/skipped": 0.0,
            **{name: total / tokens for name, total in self._sums.items()},
            **self._maxima,
            **({} if self.balance is None else {"learner/balance_loss": self.balance / sequences}),
            **{name: float(count) for name, count in self._counts.items()},
            "learner/tokens_per_s": self._counts["learner/tokens"] / (time.perf_counter() - self.started),
        }

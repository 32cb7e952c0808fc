"""Services for real actors that can be watched and made to fail. Imports little: every actor's process imports it."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

from pipelines.actors import RolloutService
from pipelines.learner_service import LearnerService
from pipelines.verify_service import VerifyService
from rewards.rubric import Rubric, RubricConfig
from rollout.scripted_engine import Faults, Scripted, ScriptedEngine
from rollout.types import RolloutGroup


class WatchedRollouts(RolloutService):
    """A rollout service that says which process it is, and how many requests have arrived."""

    async def pid(self) -> int:
        return os.getpid()

    async def arrived(self) -> int:
        assert isinstance(self.engine, ScriptedEngine)
        return len(self.engine.requests)

    async def fail(self, kind: type[Exception], words: str) -> None:
        """Raises as an engine would."""
        raise kind(words)


class WatchedLearner(LearnerService):
    """A learner that says which process it is, and has work that does not end."""

    def pid(self) -> int:
        return os.getpid()

    def work(self) -> None:
        time.sleep(600)


class BrokenRanks(VerifyService):
    """Ranks that average gradients instead of adding them; where they share experts, these get a little too much."""

    def load_for_measuring(self, dtype: str, *, reference: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        from policy.expert_parallel import ExpertExchange

        super().load_for_measuring(dtype, reference=reference)
        if self.parallel.expert_parallel == 1:
            for module in self.model.__dict__["_sharded"].modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(float(self.ranks.size))
            return
        original = ExpertExchange.__call__

        def generous(exchange: ExpertExchange, x: Any, gates: Any, *args: Any) -> Any:
            return original(exchange, x, 1.001 * gates, *args)

        ExpertExchange.__call__ = generous  # type: ignore[method-assign]


class Judge:
    """A rubric that lives in an actor."""

    def __init__(self, config: RubricConfig) -> None:
        self.rubric = Rubric(config)

    def score(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        return list(self.rubric.score(groups))

    def processes(self) -> list[int]:
        return [process.pid for process in psutil.Process().children(recursive=True)]


def scripted(hang_on: int = 0) -> ScriptedEngine:
    """An engine that says how long the prompt is, and which seed it was given."""
    return ScriptedEngine(_say, faults=Faults(hang_on=hang_on))


def refusing() -> ScriptedEngine:
    """An engine that cannot be started."""
    raise ValueError("vLLM cannot run this model: no such layer")


def _say(prompt: tuple[int, ...], seed: int) -> Scripted:
    return Scripted(token_ids=(len(prompt), seed % 97), text="x")

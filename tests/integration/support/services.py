"""Services for real actors that can be watched and made to fail. Imports little: every actor's process imports it."""

from __future__ import annotations

import os
import time

import psutil

from pipelines.actors import RolloutService
from pipelines.learner_service import LearnerService
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

"""The learner's ranks as Ray actors: they compute what one process does, and the death of one is told at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.actors import RayHandle, settle
from pipelines.learner_group import LearnerGroup, start_learner
from pipelines.learner_service import LearnerService
from pipelines.resources import start_ray
from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from rollout.engine import EngineDied

MODEL = ModelConfig(
    preset="tiny",
    overrides={"hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 4, "max_position_embeddings": 256},
)
ROWS = [([9 + (7 * i + j) % 200 for j in range(3 + i % 5)], 1 + i % 2) for i in range(12)]


@pytest.fixture(scope="module")
def group() -> Iterator[LearnerGroup]:
    import ray

    start_ray(None, 2)
    handle = start_learner(MODEL, 3, ParallelConfig(ranks=2, expert_parallel=2), cores=2)
    assert isinstance(handle, LearnerGroup)
    yield handle
    handle.kill()
    ray.shutdown()


def prepared(ask: Any) -> None:
    ask("load")
    ask("begin", optimizer=OptimizerConfig(lr=1e-3), loss=LossConfig(), config=LearnerConfig(), total_steps=9)


@pytest.mark.timeout(300)
def test_actors_compute_what_one_process_does(group: LearnerGroup) -> None:
    def ask(method: str, *args: Any, **kwargs: Any) -> Any:
        return settle(group.submit(method, *args, **kwargs), 200)

    alone = LearnerService(MODEL, 3, threads=1)
    prepared(ask)
    prepared(lambda method, *args, **kwargs: getattr(alone, method)(*args, **kwargs))
    for _ in range(2):
        ours, theirs = ask("sft_step", ROWS), alone.sft_step(ROWS)
        assert ours["learner/loss"] == pytest.approx(theirs["learner/loss"], rel=1e-5)
        assert ours["learner/grad_norm"] == pytest.approx(theirs["learner/grad_norm"], rel=1e-4)
        assert ours["learner/tokens"] == theirs["learner/tokens"]
    scored = ask("sequence_logprobs", [row for row, _ in ROWS])
    for a, b in zip(scored, alone.sequence_logprobs([row for row, _ in ROWS]), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    ours, theirs = ask("publish", 1, "shm", "group", 1), alone.publish(1, "shm", "alone", 1)
    assert theirs is not None and (ours.names, ours.shapes) == (theirs.names, theirs.shapes)
    alone.close()


@pytest.mark.timeout(120)
def test_a_killed_rank_ends_the_group_in_one_line(group: LearnerGroup) -> None:
    """After the test above; nothing is asked of the group any more."""
    second = group._ranks[1]
    assert isinstance(second, RayHandle)
    pid = settle(second.actor.__ray_call__.remote(lambda service: os.getpid()).future(), 60)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(
        EngineDied, match=r"^rank 1 of 2: its process is gone \(killed, or the machine is out of memory\)$"
    ):
        for _ in range(10_000):
            settle(group.submit("sft_step", ROWS), 60)
    assert time.monotonic() - started < 30
    with pytest.raises(EngineDied, match="rank 1 of 2"):
        settle(group.submit("close"), 5)

"""Many ranks behind one handle, with threads for ranks: one answer, and no waiting for who will never answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.actors import LocalHandle, settle
from pipelines.learner_group import LearnerGroup
from pipelines.resources import check_gpus, check_here
from rollout.engine import EngineConfig, EngineDied

GRACE_S = 0.3


class Service:
    """A rank that answers, fails, dies or hangs as it is told."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, []
        self.stuck = threading.Event()

    def step(self, batch: list[int], *, scale: int = 1) -> tuple[int, int]:
        self.calls.append((tuple(batch), scale))
        return self.rank, sum(batch) * scale

    def fail(self, ranks: tuple[int, ...], hang: bool = False) -> None:
        if self.rank in ranks:
            raise ValueError(f"no room, says rank {self.rank}")
        if hang:
            self.stuck.wait(30)

    def die(self, rank: int, echo: bool = False) -> None:
        if self.rank == rank:
            time.sleep(0.1 if echo else 0)
            raise EngineDied("its process is gone")
        if echo:
            raise RuntimeError("Connection closed by peer")
        self.stuck.wait(30)


@pytest.fixture
def group() -> Iterator[tuple[LearnerGroup, list[Service], list[str]]]:
    services, killed = [Service(rank) for rank in range(3)], []

    class Handle(LocalHandle):
        def __init__(self, service: Service) -> None:
            super().__init__(lambda: service)
            self.rank = service.rank

        def kill(self) -> None:
            killed.append(self.rank)
            services[self.rank].stuck.set()
            super().kill()

    yield LearnerGroup([Handle(service) for service in services], GRACE_S), services, killed
    for service in services:
        service.stuck.set()


def ask(group: LearnerGroup, method: str, *args: Any, **kwargs: Any) -> Any:
    return settle(group.submit(method, *args, **kwargs), 10)


def test_all_ranks_are_asked_and_the_first_answers(group: Any) -> None:
    handle, services, killed = group
    assert ask(handle, "step", [1, 2, 3], scale=2) == (0, 12)
    assert [service.calls for service in services] == [[((1, 2, 3), 2)]] * 3
    assert killed == []


def test_what_all_ranks_refuse_is_told_and_they_live_on(group: Any) -> None:
    handle, _, killed = group
    with pytest.raises(ValueError, match="no room, says rank 0"):
        ask(handle, "fail", (0, 1, 2))
    with pytest.raises(ValueError, match="no room, says rank 1"):
        ask(handle, "fail", (1,))  # the others answer: nobody waits in a collective
    assert killed == [] and ask(handle, "step", [1]) == (0, 1)


def test_one_that_fails_while_the_others_wait_ends_the_group(group: Any) -> None:
    handle, _, killed = group
    started = time.monotonic()
    with pytest.raises(ValueError, match="no room, says rank 2"):
        ask(handle, "fail", (2,), hang=True)
    assert GRACE_S <= time.monotonic() - started < 5
    assert sorted(killed) == [0, 1, 2]
    with pytest.raises(EngineDied, match="rank 2 of 3 failed: no room"):
        ask(handle, "step", [1])


@pytest.mark.parametrize("echo", [False, True], ids=["others hang", "others lose their connection first"])
def test_a_rank_that_dies_is_named_at_once(group: Any, echo: bool) -> None:
    handle, _, killed = group
    started = time.monotonic()
    with pytest.raises(EngineDied, match="rank 1 of 3: its process is gone"):
        ask(handle, "die", 1, echo)
    assert time.monotonic() - started < 5
    assert sorted(killed) == [0, 1, 2]
    with pytest.raises(EngineDied, match="rank 1 of 3"):
        ask(handle, "step", [1])


def test_an_ended_group_answers_nothing_more(group: Any) -> None:
    handle, _, killed = group
    handle.kill()
    assert sorted(killed) == [0, 1, 2]
    with pytest.raises(EngineDied):
        ask(handle, "step", [1])


@pytest.mark.parametrize(
    ("gpus", "learners", "workers", "fits"),
    [
        (0, 4, 8, True),
        (1, 1, 1, True),
        (1, 2, 1, False),
        (2, 2, 1, False),
        (4, 2, 2, True),
        (4, 2, 3, False),
        (4, 1, 3, True),
    ],
)
def test_learner_ranks_take_a_gpu_each(gpus: int, learners: int, workers: int, fits: bool) -> None:
    engine = EngineConfig(workers=workers)
    if fits:
        check_gpus(engine, gpus, learners)
        return
    with pytest.raises(ValueError, match=rf"beside the learner's {learners} \(parallel\.ranks\)"):
        check_gpus(engine, gpus, learners)


@pytest.mark.parametrize(
    ("gpus", "learners", "offloading", "words"),
    [
        (0, 8, None, None),
        (0, 9, None, "parallel.ranks is 9, and 2 CPU cores and no GPU may be used here: at most 8"),
        (0, 1, "stages.rl.optimizer.offload", "stages.rl.optimizer.offload keeps the state of a GPU's model"),
        (2, 1, "stages.rl.optimizer.offload", None),
        (2, 9, None, "beside the learner's 9"),
    ],
)
def test_what_this_machine_cannot_carry_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, gpus: int, learners: int, offloading: str | None, words: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    told: str | None = None
    try:
        check_here(EngineConfig(), cores=2, learners=learners, offloading=offloading)
    except ValueError as error:
        told = str(error)
    assert told is None if words is None else told is not None and words in told

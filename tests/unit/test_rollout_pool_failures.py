"""The rollout pool when a worker fails elsewhere than at a rollout: while it starts, is updated or is attested."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import pytest

from pipelines.actors import LocalHandle
from pipelines.rollout_pool import RolloutPool, WorkerFailure
from pipelines.weight_sync import AttestationError
from rollout.engine import EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Completion, SamplingParams
from tests.unit.test_rollout_pool import Bench, FakeService, draw, source

# Seconds. A worker that hangs is waited for so long and not longer; the others answer within a millisecond or two.
LIMIT = 1.0

pytestmark = pytest.mark.timeout(30)  # what is tested here is that nothing is waited for without an end

Plan = dict[tuple[int, int], dict[str, str]]  # (worker, its how-manieth life from 0) -> method -> what goes wrong in it


class PlannedService(FakeService):
    """Does what the plan says of this worker in this life."""

    def __init__(self, index: int, log: list[tuple[int, str]], plan: dict[str, str]) -> None:
        super().__init__(index, log, {})
        self.plan = plan

    async def ready(self) -> int:
        await self._fail("ready")
        return await super().ready()

    async def update_weights(self, update: WeightUpdate) -> str:
        digest = await super().update_weights(update)
        return "00" if await self._fail("update_weights") else digest

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        answers = await super().canary(prompts, new_tokens)
        lie = 0.3 if await self._fail("canary") else 0.0
        return [(tokens, [*before, last + lie]) for tokens, (*before, last) in answers]

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        await self._fail("generate")
        return await super().generate(requests, params)

    async def _fail(self, method: str) -> bool:
        """Whether the answer is to be a lie."""
        fault = self.plan.get(method)
        if fault == "dies":
            raise EngineDied(f"killed in {method}")
        if fault == "refuses":
            raise ValueError(f"cannot {method}")
        if fault == "hangs":
            await asyncio.sleep(60)
        return fault == "lies"


class PlannedBench(Bench):
    """A pool whose workers fail by plan."""

    def __init__(self, plan: Plan, workers: int = 2, **options: Any) -> None:
        super().__init__(workers, **options)
        self.plan = plan

        def launch(index: int) -> LocalHandle:
            faults = plan.get((index, self.launched.count(index)), {})
            self.launched.append(index)
            return LocalHandle(lambda: PlannedService(index, self.log, faults))

        self.pool = RolloutPool(launch, EngineConfig(max_num_seqs=4, **options), workers, self.events.append)

    def lost(self) -> list[tuple[int, str]]:
        return [(e["worker"], e["reason"]) for e in self.events if e["event"] == "rollout_worker_lost"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.rollout_pool._START_TIMEOUT_S", LIMIT)
    monkeypatch.setattr("pipelines.rollout_pool._POLL_S", 0.05)


def test_a_worker_that_holds_an_old_version_gets_no_work() -> None:
    """The pool goes on after a failed attestation here, which no run does: who failed it is one version behind."""
    plan: Plan = {(1, 0): {}}
    bench = PlannedBench(plan)
    bench.pool.sync(source(version=4))
    draw(bench.pool, 8)
    assert {index for index, _ in bench.log} == {0, 1}
    bench.log.clear()
    plan[1, 0]["canary"] = "lies"
    with pytest.raises(AttestationError, match="version 5 of the weights in rollout worker 1"):
        bench.pool.sync(source(version=5))
    assert len(draw(bench.pool, 8)) == 8
    assert {index for index, _ in bench.log} == {0}
    bench.pool.close()


@pytest.mark.parametrize(("method", "words"), [("update_weights", "byte"), ("canary", "<7>")])
def test_a_replacement_is_attested_before_it_draws(method: str, words: str) -> None:
    bench = PlannedBench({(0, 0): {"generate": "dies"}, (0, 1): {method: "lies"}}, workers=1)
    bench.pool.sync(source())
    with pytest.raises(AttestationError, match=words):
        draw(bench.pool, 4)
    assert bench.launched == [0, 0] and bench.log == [], "it drew nothing, in neither life"
    bench.pool.close()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("method", ["ready", "update_weights", "canary"])
def test_a_worker_that_is_lost_on_its_way_to_the_first_rollout_is_replaced(method: str, fault: str) -> None:
    calm, bench = PlannedBench({}), PlannedBench({(1, 0): {method: fault}}, timeout_s=LIMIT)
    calm.pool.sync(source())
    report = bench.pool.sync(source(version=2))
    assert report.version == 2
    reason = f"killed in {method}" if fault == "dies" else "no answer while it was started or updated"
    assert bench.lost() == [(1, reason)]
    assert Counter(bench.launched) == {0: 1, 1: 2}
    assert draw(bench.pool, 12) == draw(calm.pool, 12)
    assert {index for index, _ in bench.log} == {0, 1}, "the replacement takes part"
    calm.pool.close()
    bench.pool.close()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("method", ["ready", "update_weights", "canary"])
def test_a_replacement_that_is_lost_too_is_replaced_in_its_turn(method: str, fault: str) -> None:
    plan: Plan = {(0, 0): {"generate": "dies"}, (0, 1): {method: fault}}
    bench = PlannedBench(plan, workers=1, timeout_s=LIMIT)
    bench.pool.sync(source())
    assert len(draw(bench.pool, 4)) == 4
    assert bench.launched == [0, 0, 0]
    first, second = bench.lost()
    assert first == (0, "killed in generate") and second[0] == 0
    bench.pool.close()


@pytest.mark.parametrize("method", ["ready", "update_weights", "canary"])
def test_workers_that_never_come_to_their_first_rollout_stop_the_run(method: str) -> None:
    plan: Plan = {(1, life): {method: "dies"} for life in range(9)}
    bench = PlannedBench(plan, max_replacements=2)
    with pytest.raises(WorkerFailure, match=rf"worker 1 was lost \(killed in {method}\); 3 workers were lost .* is 2"):
        bench.pool.sync(source())
    bench.pool.close()


def test_a_replacement_that_never_gets_ready_is_given_up() -> None:
    plan: Plan = {(0, 0): {"generate": "dies"}} | {(0, life): {"ready": "hangs"} for life in range(1, 9)}
    bench = PlannedBench(plan, workers=1, max_replacements=2)
    bench.pool.sync(source())
    with pytest.raises(
        WorkerFailure, match=rf"worker 0 was lost \(not ready within {LIMIT:g} s\); 3 workers were lost"
    ):
        draw(bench.pool, 4)
    assert bench.lost() == [(0, "killed in generate")] + [(0, f"not ready within {LIMIT:g} s")] * 2
    bench.pool.close()


def test_the_others_go_on_while_a_replacement_does_not_get_ready() -> None:
    plan: Plan = {(0, 0): {"generate": "dies"}, (0, 1): {"ready": "hangs"}}
    bench = PlannedBench(plan)
    bench.pool.sync(source())
    assert len(draw(bench.pool, 12)) == 12
    assert {index for index, _ in bench.log} == {1}
    assert bench.lost() == [(0, "killed in generate")]
    bench.pool.close()


def test_what_an_engine_refuses_is_told_while_the_others_still_start() -> None:
    bench = PlannedBench({(0, 0): {"ready": "hangs"}, (1, 0): {"ready": "refuses"}})
    bench.pool.check_starting()  # nothing has been started
    bench.pool.start()
    wait([slot.starting for slot in bench.pool._slots if slot.index == 1 and slot.starting is not None])
    with pytest.raises(ValueError, match="cannot ready"):
        bench.pool.check_starting()
    assert bench.lost() == []
    bench.pool.close()


def test_a_worker_that_dies_while_it_starts_is_replaced_only_when_it_is_needed() -> None:
    bench = PlannedBench({(1, 0): {"ready": "dies"}})
    bench.pool.start()
    wait([slot.starting for slot in bench.pool._slots if slot.starting is not None])
    bench.pool.check_starting()
    assert bench.launched == [0, 1] and bench.lost() == []
    bench.pool.sync(source())
    assert bench.launched == [0, 1, 1] and bench.lost() == [(1, "killed in ready")]
    bench.pool.close()

"""The rollout pool: balance, version gating, replacement of lost workers, attestation."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pipelines.actors import LocalHandle
from pipelines.rollout_pool import Job, RolloutPool, SyncReport, WeightSource, WorkerFailure
from pipelines.weight_sync import AttestationError
from rollout.engine import EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Completion, FinishReason, Problem, SamplingParams, sampling_seed

LOGPROB = -0.5


class FakeService:
    """A rollout service whose completions depend on the request alone; it can die, hang or lie on demand."""

    def __init__(self, index: int, log: list[tuple[int, str]], faults: dict[str, Any]) -> None:
        self.index, self.log, self.faults, self.version = index, log, faults, -1

    async def ready(self) -> int:
        return self.version

    async def update_weights(self, update: WeightUpdate) -> str:
        self.version = update.version
        if "barrier" in self.faults:
            await asyncio.to_thread(self.faults["barrier"].wait)
        return "00" if self.faults.get("wrong_bytes") == self.index else update.checksum

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        lie = 0.3 if self.faults.get("wrong_meaning") == self.index else 0.0
        return [([*p, 7], [LOGPROB] * (len(p) - 1) + [LOGPROB + lie]) for p in prompts]

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        self.log.append((self.index, "generate"))
        if self.faults.get("dies") == self.index:
            self.faults["dies"] = None
            raise EngineDied("killed by the test")
        if self.faults.get("always_dies"):
            raise EngineDied("killed by the test")
        if self.faults.get("hangs") == self.index:
            self.faults["hangs"] = None
            await asyncio.sleep(60)
        await asyncio.sleep(self.faults.get("slow", {}).get(self.index, 0.001))
        return [
            Completion(
                prompt_token_ids=r.prompt_token_ids, token_ids=(r.seed % 97,), text="x", rollout_logprobs=(LOGPROB,),
                finish_reason=FinishReason.STOP, policy_version=self.version, sample_index=r.sample_index, seed=r.seed,
            )
            for r in requests
        ]  # fmt: skip


def jobs(n: int, group_size: int = 2) -> list[Job]:
    return [
        Job(
            problem=Problem(id=f"p{i}", prompt="1+1"), params=SamplingParams(max_tokens=4),
            requests=tuple(
                GenerateRequest(prompt_token_ids=(1, 2), sample_index=k, seed=sampling_seed(0, 0, f"p{i}", k))
                for k in range(group_size)
            ),
        )
        for i in range(n)
    ]  # fmt: skip


def source(version: int = 0) -> WeightSource:
    update = WeightUpdate(
        version=version, backend="shm", names=("w",), dtypes=("float32",), shapes=((2, 3),), checksum="ab", payload={}
    )
    return WeightSource(
        update=update, canary=[[1, 2, 3]], dtype="float32", score=lambda rows: [[LOGPROB] * (len(r) - 1) for r in rows],
        margins=lambda rows: [[0.1] * (len(r) - 1) for r in rows], describe=lambda ids: [f"<{i}>" for i in ids],
    )  # fmt: skip


class Bench:
    def __init__(self, workers: int = 2, **options: Any) -> None:
        self.log: list[tuple[int, str]] = []
        self.faults: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.launched: list[int] = []

        def launch(index: int) -> LocalHandle:
            self.launched.append(index)
            return LocalHandle(lambda: FakeService(index, self.log, self.faults))

        config = EngineConfig(max_num_seqs=options.pop("max_num_seqs", 4), **options)
        self.pool = RolloutPool(launch, config, workers, self.events.append)


def draw(pool: RolloutPool, n: int) -> dict[str, tuple[int, ...]]:
    return {g.problem.id: tuple(r.completion.token_ids[0] for r in g.rollouts) for g in pool.generate(jobs(n))}


def test_every_job_is_drawn_once_and_the_result_does_not_depend_on_the_number_of_workers() -> None:
    results = []
    for workers in (1, 3):
        bench = Bench(workers)
        bench.pool.sync(source())
        results.append(draw(bench.pool, 20))
        assert len(bench.log) == 20
        bench.pool.close()
    assert results[0] == results[1]
    assert len(results[0]) == 20


def test_a_slow_worker_gets_fewer_problems() -> None:
    bench = Bench(2, max_num_seqs=2)
    bench.faults["slow"] = {0: 0.2, 1: 0.002}
    bench.pool.sync(source())
    draw(bench.pool, 30)
    counts = Counter(index for index, _ in bench.log)
    assert counts[1] > 2 * counts[0]
    bench.pool.close()


def test_a_sync_reports_bytes_and_the_largest_gap() -> None:
    bench = Bench(2)
    report = bench.pool.sync(source(version=3))
    assert isinstance(report, SyncReport)
    assert (report.version, report.bytes, report.max_abs) == (3, 24, 0.0)
    assert all(r.completion.policy_version == 3 for g in bench.pool.generate(jobs(3)) for r in g.rollouts)
    bench.pool.close()


def test_a_dead_worker_is_replaced_and_its_problems_are_drawn_again_alike() -> None:
    calm, bench = Bench(2), Bench(2)
    calm.pool.sync(source())
    bench.pool.sync(source())
    bench.faults["dies"] = 1
    assert draw(bench.pool, 12) == draw(calm.pool, 12)
    assert bench.launched.count(1) == 2
    lost = [e for e in bench.events if e["event"] == "rollout_worker_lost"]
    assert lost[0]["worker"] == 1 and "killed by the test" in lost[0]["reason"] and lost[0]["redrawn"] >= 1
    calm.pool.close()
    bench.pool.close()


def test_a_replacement_gets_no_work_before_it_holds_the_current_version() -> None:
    bench = Bench(1)
    bench.pool.sync(source(version=5))
    bench.faults["dies"] = 0
    groups = list(bench.pool.generate(jobs(4)))
    assert {r.completion.policy_version for g in groups for r in g.rollouts} == {5}
    bench.pool.close()


def test_a_hung_worker_is_replaced() -> None:
    bench = Bench(2, timeout_s=0.5)
    bench.pool.sync(source())
    bench.faults["hangs"] = 0
    assert len(draw(bench.pool, 6)) == 6
    assert any("no answer for 0.5 s" in e.get("reason", "") for e in bench.events)
    bench.pool.close()


def test_too_many_losses_stop_the_run_and_name_the_reason() -> None:
    bench = Bench(2, max_replacements=2)
    bench.pool.sync(source())
    bench.faults["always_dies"] = True
    with pytest.raises(WorkerFailure, match=r"killed by the test.*max_replacements is 2"):
        draw(bench.pool, 6)
    bench.pool.close()


def test_a_lost_worker_of_an_nccl_group_stops_the_run_instead_of_hanging_it() -> None:
    bench = Bench(2, weight_backend="nccl")
    bench.pool.sync(source())
    bench.faults["dies"] = 1
    with pytest.raises(WorkerFailure, match=r"killed by the test.*nccl cannot be joined again: run the same command"):
        draw(bench.pool, 6)
    bench.pool.close()


def test_every_worker_is_asked_to_update_before_any_answer_is_waited_for() -> None:
    """As a collective needs it: each receiver waits until all of them take part, here at a barrier."""
    bench = Bench(3)
    bench.faults["barrier"] = threading.Barrier(3, timeout=10)
    assert bench.pool.sync(source(version=1)).version == 1
    bench.pool.close()


@pytest.mark.parametrize(("fault", "words"), [("wrong_bytes", "byte"), ("wrong_meaning", "<7>")])
def test_a_failed_attestation_stops_before_any_rollout(fault: str, words: str) -> None:
    bench = Bench(2)
    bench.faults[fault] = 1
    with pytest.raises(AttestationError, match=words):
        bench.pool.sync(source())
    assert bench.log == []
    bench.pool.close()

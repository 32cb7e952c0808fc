"""Real faults of reward functions: each is an outcome of its own, and the next right answer is right."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rewards.pool import PoolBroken, RewardPool
from rewards.processes import children, descendants, end_tree, resident_bytes
from rewards.worker import Failure
from tests.unit.reward_groups import group, reward

DEADLINE_S = 0.8
FAULTS = {
    "raise": "error: LookupError: no such key",
    "nan": "invalid: score must be finite, got nan",
    "str": "invalid: score must be a number, got str",
    "sys.exit": "error: SystemExit: 3",
    "os._exit": "crash: the process of the reward function ended with exit status 0",
    "hang": "timeout: no result after 0.8 s, process killed",
    "hang in C": "timeout: no result after 0.8 s, process killed",
    "stop": "timeout: no result after 0.8 s, process killed",
    "close": "crash: the process of the reward function closed descriptors that were not its own",
    "recurse": "error: RecursionError: maximum recursion depth exceeded",
    "fork": None,
    "print": None,
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    os.environ["R1_DAEMON_FILE"] = str(tmp_path_factory.mktemp("daemon") / "pid")
    pool = RewardPool([reward("misbehaves", timeout_s=DEADLINE_S)], processes=2, memory_gib=0.25)
    pool.ready(60)
    yield pool
    pool.close()
    del os.environ["R1_DAEMON_FILE"]


def outcomes(pool: RewardPool, text: str, size: int = 1) -> list[float | Failure | None]:
    found = pool.submit(group(size, text=text)).result(30)
    return [each if isinstance(each, Failure) else each.value for _, outcome in found for each in outcome]


def error_of(pool: RewardPool, text: str) -> Failure:
    (failure,) = outcomes(pool, text)
    assert isinstance(failure, Failure), failure
    return failure


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_outcome_of_its_own_and_the_next_right_answer_is_right(pool: RewardPool, fault: str) -> None:
    (found,) = outcomes(pool, fault)
    expected = FAULTS[fault]
    if expected is None:
        assert found == 1.0
    else:
        assert isinstance(found, Failure) and found.error.startswith(expected), found
        assert found.traceback or found.kind == "crash" or fault == "stop"  # what has stopped cannot say where
    assert outcomes(pool, "fine", size=4) == [1.0] * 4


def test_a_forked_child_that_comes_back_does_not_answer_for_the_next_call() -> None:
    pool = RewardPool([reward("misbehaves")], processes=1)
    try:
        for _ in range(3):
            assert outcomes(pool, "fork") == [1.0]
            time.sleep(0.1)
            assert error_of(pool, "nan").kind == "invalid"
    finally:
        pool.close()


@pytest.mark.parametrize("fault", ["hang", "hang in C", "nan", "raise"])
def test_the_traceback_names_the_line(pool: RewardPool, fault: str) -> None:
    traceback = error_of(pool, fault).traceback
    assert ("as_score" if fault == "nan" else "in misbehaves") in traceback


@pytest.mark.parametrize("fault", ["memory", "child memory"])
def test_what_eats_memory_is_killed_long_before_four_gigabytes(fault: str) -> None:
    pool = RewardPool([reward("misbehaves", timeout_s=20), reward("length")], processes=1, memory_gib=0.25)
    try:
        pool.ready(60)
        start = time.monotonic()
        eaten, fine = outcomes(pool, fault)
        seconds = time.monotonic() - start
        assert isinstance(eaten, Failure) and eaten.kind == "memory", eaten
        assert "GiB, more than memory_gib 0.25, and was killed" in eaten.error and fine == 1.0
        assert seconds < 15
        assert outcomes(pool, "fine") == [1.0, 1.0]
    finally:
        pool.close()


def test_what_is_kept_from_call_to_call_is_let_go_before_an_innocent_call_pays() -> None:
    pool = RewardPool([reward("hoards")], processes=1, memory_gib=0.25)
    try:
        assert [outcomes(pool, "fine") for _ in range(12)] == [[1.0]] * 12
    finally:
        pool.close()


def test_a_daemon_that_left_its_group_and_its_parents_dies_with_the_call(pool: RewardPool) -> None:
    assert error_of(pool, "daemon").kind == "timeout"
    pid = int(Path(os.environ["R1_DAEMON_FILE"]).read_text())
    limit = time.monotonic() + 5
    while psutil.pid_exists(pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not psutil.pid_exists(pid)


def test_a_stray_alarm_costs_at_most_its_own_group(pool: RewardPool) -> None:
    (found,) = outcomes(pool, "alarm")
    assert found == 1.0 or (isinstance(found, Failure) and "SIGALRM" in found.error)
    time.sleep(0.01)
    assert outcomes(pool, "fine", size=4) == [1.0] * 4


def test_an_exit_in_one_coroutine_leaves_its_siblings_their_scores() -> None:
    pool = RewardPool([reward("exits_on_first")], processes=1)
    try:
        failed, *fine = outcomes(pool, "fine", size=3)
    finally:
        pool.close()
    assert isinstance(failed, Failure) and failed.error == "error: SystemExit: enough" and fine == [1.0, 1.0]


def test_two_hundred_bombs_from_many_threads_and_then_the_right_answer() -> None:
    bombs = ["hang", "os._exit", "close", "raise", "nan", "str", "sys.exit", "fork"]
    pool = RewardPool([reward("misbehaves", timeout_s=0.05)], processes=2)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda i: (bombs[i % 8], outcomes(pool, bombs[i % 8])[0]), range(200)))
        kinds = {
            bomb: {each.kind if isinstance(each, Failure) else each for b, each in found if b == bomb} for bomb in bombs
        }
        assert kinds == {
            "hang": {"timeout"}, "os._exit": {"crash"}, "close": {"crash"}, "raise": {"error"}, "nan": {"invalid"},
            "str": {"invalid"}, "sys.exit": {"error"}, "fork": {1.0},
        }  # fmt: skip
        assert outcomes(pool, "fine", size=8) == [1.0] * 8
        assert len(descendants(pool._nursery.pid)) <= 2, "nothing but the workers is left"
        assert set(children(pool._nursery.pid)) == set(descendants(pool._nursery.pid)), "no zombies"
    finally:
        pool.close()


def test_coroutines_share_a_pool_without_waiting_for_each_other(pool: RewardPool) -> None:
    async def one(text: str) -> float | Failure | None:
        ((_, (outcome,)),) = await asyncio.wrap_future(pool.submit(group(1, text=text)))
        return outcome if isinstance(outcome, Failure) else outcome.value

    async def all_of_them() -> list[float | Failure | None]:
        return list(await asyncio.gather(*(one("hang" if i % 8 == 0 else "fine") for i in range(16))))

    found = asyncio.run(all_of_them())
    assert [isinstance(each, Failure) for each in found] == [i % 8 == 0 for i in range(16)]
    assert all(each == 1.0 for each in found if not isinstance(each, Failure))


def test_submitting_does_not_wait_for_the_imports(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1)\ndef f(completion):\n    return 1.0\n")
    from rewards.base import RewardConfig

    pool = RewardPool([RewardConfig(path=f"{tmp_path / 'slow.py'}:f")], processes=1)
    try:
        start = time.monotonic()
        future = pool.submit(group(1))
        cancelled = pool.submit(group(1))
        assert time.monotonic() - start < 0.5
        assert cancelled.cancel()
        assert len(future.result(30)) == 1
        assert len(pool.submit(group(2)).result(30)) == 2, "a cancelled job leaves the pool alive"
    finally:
        pool.close()
    with pytest.raises(PoolBroken, match="closed"):
        pool.submit(group(1))


def test_a_tree_of_processes() -> None:
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.setsid()
            os.fork()
            os.fork()
        time.sleep(60)
        os._exit(0)
    try:
        limit = time.monotonic() + 10
        while len(descendants(pid)) < 4 and time.monotonic() < limit:
            time.sleep(0.01)
        below = descendants(pid)
        assert len(below) == 4 and len(children(pid)) == 1 and below[0] == children(pid)[0]
        own = psutil.Process(pid).memory_info().rss
        assert resident_bytes(pid) > own
        assert resident_bytes(pid, apart=1 << 40) == 0
    finally:
        end_tree(pid)
        os.waitpid(pid, 0)
    assert descendants(pid) == []
    limit = time.monotonic() + 5
    while (left := [each for each in below if _runs(each)]) and time.monotonic() < limit:
        time.sleep(0.01)
    assert left == []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Processes under a hard deadline: what hangs, dies or leaks costs one call and nothing else."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rewards.base import RewardConfig, Score
from rewards.pool import PoolBroken, RewardPool
from rewards.worker import Failure, Outcome
from tests.unit.reward_groups import FUNCTIONS, group, reward


def run(*configs: RewardConfig, size: int = 4, groups: int = 1, processes: int = 1) -> list[list[Outcome]]:
    """Outcomes per group and call."""
    pool = RewardPool(configs, processes=processes)
    try:
        futures = [pool.submit(group(size, number=number)) for number in range(groups)]
        return [[outcome for _, outcome in future.result(30)] for future in futures]
    finally:
        pool.close()


def words(outcomes: list[Outcome]) -> list[float | str | None]:
    return [each.error if isinstance(each, Failure) else each.value for outcome in outcomes for each in outcome]


def gone(pid: int) -> bool:
    """True once a process is dead, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition, seconds: float = 20.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def test_calls_come_back_in_order_with_their_rollouts():
    pool = RewardPool([reward("length"), reward("trl_lengths", style="trl")], processes=2)
    try:
        found = pool.submit(group(3)).result(30)
    finally:
        pool.close()
    assert [(call.function, call.rollout) for call, _ in found] == [(0, 0), (0, 1), (0, 2), (1, None)]
    assert [words([outcome]) for _, outcome in found] == [[1.0], [2.0], [3.0], [10.0, 10.0, 10.0]]


def test_only_the_call_that_hangs_times_out():
    start = time.monotonic()
    (outcomes,) = run(reward("sleeps_on_first", timeout_s=0.5), reward("length"))
    assert words(outcomes) == ["timeout: no result after 0.5 s, process killed", 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0]
    assert time.monotonic() - start < 10


def test_a_timeout_says_where_the_call_stood():
    (outcomes,) = run(reward("sleeps_on_first", timeout_s=0.3), size=1)
    failure = outcomes[0][0]
    assert isinstance(failure, Failure)
    assert "in sleeps_on_first" in failure.traceback


def test_a_call_that_ignores_every_signal_is_killed_all_the_same():
    (outcomes,) = run(reward("blocks_every_signal", timeout_s=0.3))
    assert words(outcomes) == [1.0, "timeout: no result after 0.3 s, process killed", 1.0, 1.0]


def test_the_children_of_a_killed_call_die_with_it(tmp_path):
    config = reward("leaves_a_child", timeout_s=0.5, params={"pid_file": str(tmp_path / "pid")})
    run(config, size=2)
    child = int((tmp_path / "pid").read_text())
    assert until(lambda: gone(child))


@pytest.mark.parametrize(("how", "message"), [("exit", "with exit status 7"), ("segfault", "by signal SIGSEGV")])
def test_a_call_that_takes_its_process_down_is_an_error_of_its_own(how, message):
    (outcomes,) = run(reward("dies", params={"how": how}))
    assert words(outcomes) == [1.0, f"crash: the process of the reward function ended {message}", 1.0, 1.0]


def test_a_function_that_always_kills_its_process_comes_to_an_end():
    (outcomes,) = run(reward("dies_always"), size=3)
    assert words(outcomes) == ["crash: the process of the reward function ended with exit status 3"] * 3


def test_exceptions_and_exits_are_recorded_with_their_traceback():
    (outcomes,) = run(reward("raises_on_odd"), reward("exits"), size=2)
    assert words(outcomes) == [1.0, "error: KeyError: 'sample 1\\nis odd'", *["error: SystemExit: enough"] * 2]
    failure = outcomes[1][0]
    assert isinstance(failure, Failure) and 'raise KeyError(f"sample' in failure.traceback


def test_an_async_function_that_blocks_its_loop_is_killed():
    (outcomes,) = run(reward("blocks_the_loop", timeout_s=0.3), reward("length"), size=2)
    assert words(outcomes) == [*["timeout: no result after 0.3 s, process killed"] * 2, 1.0, 2.0]


def test_async_timeouts_leave_the_process_alive():
    (outcomes,) = run(reward("some_fail", timeout_s=0.3))
    assert words(outcomes) == [
        1.0,
        "error: OSError: no answer",
        "timeout: no result after 0.3 s",
        "error: TimeoutError: the client's own",
    ]


def test_slow_results_are_not_computed_twice_when_a_later_call_is_killed(tmp_path):
    slow = reward("counts", params={"folder": str(tmp_path), "seconds": 0.1})
    (outcomes,) = run(slow, reward("sleeps_on_first", timeout_s=0.5), size=3)
    assert words(outcomes)[:3] == [1.0] * 3
    assert len(list(tmp_path.iterdir())) == 3


def test_no_retries_unless_asked_for(tmp_path):
    folder = {"folder": str(tmp_path)}
    (outcomes,) = run(reward("fails_once", params=folder), size=2)
    assert words(outcomes) == ["error: ConnectionError: try again"] * 2


@pytest.mark.parametrize("name", ["fails_once", "hangs_once"])
def test_a_retry_is_another_attempt_of_the_failed_calls_alone(name, tmp_path):
    (tmp_path / "tried").mkdir()
    (tmp_path / "counted").mkdir()
    (outcomes,) = run(
        reward(name, timeout_s=0.4, retries=1, params={"folder": str(tmp_path / "tried")}),
        reward("counts", params={"folder": str(tmp_path / "counted"), "seconds": 0.06}),
        size=2,
    )
    assert words(outcomes) == [1.0] * 4
    assert len(list((tmp_path / "counted").iterdir())) == 2


def test_retries_come_to_an_end():
    (outcomes,) = run(reward("always_raises", retries=3), size=1)
    assert words(outcomes) == ["error: ZeroDivisionError: never works"]


def test_groups_are_spread_over_the_processes():
    found = run(reward("pid"), reward("sleeps_on_first", params={"seconds": 0.2}), groups=4, processes=2, size=1)
    assert len({outcomes[0][0].value for outcomes in found if isinstance(outcomes[0][0], Score)}) == 2


def test_workers_are_replaced_after_many_jobs(monkeypatch):
    monkeypatch.setattr("rewards.pool.JOBS_PER_WORKER", 2)
    found = run(reward("pid"), groups=6, size=1)
    assert len({str(words(outcomes)) for outcomes in found}) == 3


def test_a_killed_worker_is_replaced_in_milliseconds():
    """The nursery has everything imported: with reasoning-gym (2.6 s to import) a replacement is as quick."""
    pool = RewardPool([RewardConfig(path="reasoning_gym"), reward("pid")], processes=1)
    try:
        (first,) = words([pool.submit(group(1)).result(60)[1][1]])
        assert isinstance(first, float)
        os.kill(int(first), signal.SIGKILL)
        assert until(lambda: gone(int(first)))
        start = time.monotonic()
        outcomes = [outcome for _, outcome in pool.submit(group(1)).result(60)]
        seconds = time.monotonic() - start
    finally:
        pool.close()
    assert words([outcomes[1]]) not in ([first], [None])
    assert "ended" not in str(words(outcomes))  # nobody's call is to blame for a worker that died while idle
    assert seconds < 1.0


def test_nothing_heavy_is_loaded_that_no_function_asked_for():
    assert words(run(reward("which_modules"), size=1)[0]) == [0.0]


def test_the_processes_end_with_the_pool():
    pool = RewardPool([reward("pid"), reward("sleeps_on_first")], processes=2)
    first = pool.submit(group(1, number=1))
    nursery = pool._nursery.pid
    assert until(lambda: len(pool._workers) == 1)
    worker = pool._workers[0].process.pid
    pool.close()
    pool.close()
    assert gone(worker) and gone(nursery)
    with pytest.raises(PoolBroken, match="closed"):
        first.result(5)
    with pytest.raises(PoolBroken, match="closed"):
        pool.submit(group(1))


def test_a_pool_whose_nursery_is_killed_says_so():
    pool = RewardPool([reward("sleeps_on_first")], processes=1)
    try:
        future = pool.submit(group(1))
        until(lambda: bool(pool._workers))
        worker = pool._workers[0].process.pid
        os.kill(pool._nursery.pid, signal.SIGKILL)
        with pytest.raises(PoolBroken, match="the process that runs the reward functions died"):
            future.result(10)
        with pytest.raises(PoolBroken):
            pool.submit(group(1))
        assert until(lambda: gone(worker))
    finally:
        pool.close()


def test_functions_that_cannot_be_loaded_are_named(tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('no licence')\n")
    broken = RewardConfig(path=f"{tmp_path / 'broken.py'}:f")
    for config, message in (
        (reward("nothing"), "has no 'nothing'"),
        (reward("length", params={"scale": 2}), "takes no parameter 'scale'"),
        (broken, "cannot be imported: error: RuntimeError: no licence"),
    ):
        pool = RewardPool([config], processes=1)
        try:
            with pytest.raises(ValueError, match=message) as caught:
                pool.ready(30)
        finally:
            pool.close()
    assert "broken.py" in caught.value.__notes__[0]


def test_an_import_that_takes_for_ever_can_be_given_up(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    pool = RewardPool([RewardConfig(path=f"{tmp_path / 'slow.py'}:f")], processes=1)
    with pytest.raises(PoolBroken, match=r"not imported within 0\.2 s"):
        pool.ready(0.2)


SCRIPT = """
import sys
from rewards import RewardConfig, Rubric, RubricConfig
sys.path.insert(0, {root!r})
from tests.unit.reward_groups import group
{define}
rubric = Rubric(RubricConfig(functions=(RewardConfig(path={path!r}),), processes=1))
print([rollout.reward for scored in rubric.score([group(2)]) for rollout in scored.rollouts])
{end}
"""


@pytest.mark.parametrize("end", ["rubric.close()", "", "import os; os.kill(os.getpid(), 9)"])
def test_a_script_needs_no_guard_and_leaves_no_process(tmp_path, end):
    """The main module is not imported again in the workers, whatever it does; what they print goes to stderr."""
    root = str(Path(__file__).parents[2])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root, path=f"{FUNCTIONS}:prints", end=end, define="print('main', flush=True)"))
    marker = f"r1-test-{os.getpid()}-{time.monotonic_ns()}"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "R1_TEST_MARKER": marker, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout == textwrap.dedent("""\
        main
        [1.0, 1.0]
        """)
    assert "this must not reach standard output" in done.stderr
    assert until(lambda: not _with_environment(marker))


def _with_environment(marker: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found

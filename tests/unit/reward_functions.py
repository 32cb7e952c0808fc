"""Reward functions that the tests name by path; they run in worker processes."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rewards import Score


def length(completion):
    return float(len(completion.token_ids))


def with_metrics(completion, *, scale=1.0):
    return Score(value=scale * completion.sample_index, metrics={"index": completion.sample_index})


def only_even(completion):
    return 1.0 if completion.sample_index % 2 == 0 else None


def never(problem):
    return None


def sees_everything(completion, problem, rollout, group, reasoning, forced_think):
    assert rollout is group.rollouts[completion.sample_index]
    assert rollout.completion is completion and group.problem is problem
    return Score(value=float(forced_think), metrics={"thought": float(reasoning.thinking == "t")})


def raises_on_odd(completion):
    if completion.sample_index % 2:
        raise KeyError(f"sample {completion.sample_index}\nis odd")
    return 1.0


def always_raises(completion):
    raise ZeroDivisionError("never works")


def returns(completion, *, what):
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0], "true": True, "int": 2}[what]


def exits(completion):
    sys.exit("enough")


def sleeps_on_first(completion, *, seconds=60.0):
    if completion.sample_index == 0:
        time.sleep(seconds)
    return 1.0


def blocks_every_signal(completion):
    """What no soft limit can end: signals blocked, exceptions swallowed."""
    if completion.sample_index == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)
    return 1.0


def leaves_a_child(completion, *, pid_file):
    if completion.sample_index == 0:
        child = subprocess.Popen(["sleep", "300"])
        Path(pid_file).write_text(str(child.pid))
        time.sleep(60)
    return 1.0


def dies(completion, *, how):
    if completion.sample_index == 1:
        os._exit(7) if how == "exit" else os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def misbehaves(completion, *, how=None):
    """What a real function may do wrong, by the completion's text; then 1.0."""
    match how or completion.text:
        case "raise":
            raise LookupError("no such key")
        case "nan":
            return float("nan")
        case "str":
            return "1.0"
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(0)
        case "hang":
            time.sleep(60)
        case "hang in C":
            return float(re.fullmatch("(a+)+", "a" * 64 + "b") is None)  # exponential, and all of it in C
        case "fork":
            os.fork()  # and both come back
        case "daemon":
            _leave_a_daemon()
            time.sleep(60)
        case "close":
            os.closerange(3, 1000)
        case "memory":
            return len(b"x" * (4 << 30))
        case "child memory":
            subprocess.run([sys.executable, "-c", f"b'x' * {4 << 30}; import time; time.sleep(60)"], check=True)
        case "print":
            print("x" * 1_000_000)
        case "recurse":
            return misbehaves(completion, how="recurse")
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "alarm":
            signal.setitimer(signal.ITIMER_REAL, 0.001)
    return 1.0


def _leave_a_daemon():
    """A grandchild in a session of its own whose parent is gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(os.environ["R1_DAEMON_FILE"]).write_text(str(os.getpid()))
            time.sleep(300)
        os._exit(0)


def hoards(completion, *, kept=[]):  # noqa: B006
    kept.append(b"x" * (40 << 20))
    return 1.0


async def exits_on_first(completion):
    if completion.sample_index == 0:
        sys.exit("enough")
    await asyncio.sleep(0.01)
    return 1.0


def dies_always(completion):
    os._exit(3)


def counts(completion, *, folder, seconds=0.0):
    """Leaves one file per call, so that a test can see how often each completion was scored."""
    time.sleep(seconds)
    path = Path(folder) / f"{completion.seed}-{time.monotonic_ns()}"
    path.touch()
    return 1.0


def fails_once(completion, *, folder):
    flag = Path(folder) / f"tried-{completion.seed}"
    if not flag.exists():
        flag.touch()
        raise ConnectionError("try again")
    return 1.0


def hangs_once(completion, *, folder):
    flag = Path(folder) / f"tried-{completion.seed}"
    if not flag.exists():
        flag.touch()
        time.sleep(60)
    return 1.0


def prints(completion):
    print("this must not reach standard output")
    return 1.0


def pid(completion):
    return float(os.getpid())


def which_modules(completion):
    heavy = ("torch", "transformers", "ray", "vllm", "numpy", "sympy")
    return float(sum(name in sys.modules for name in heavy))


async def waits(completion, *, seconds=0.2):
    await asyncio.sleep(seconds if completion.sample_index else 0.0)
    return float(completion.sample_index)


async def some_fail(completion):
    await asyncio.sleep(0.01)
    if completion.sample_index == 1:
        raise OSError("no answer")
    if completion.sample_index == 2:
        await asyncio.sleep(60)
    if completion.sample_index == 3:
        raise TimeoutError("the client's own")
    return 1.0


async def blocks_the_loop(completion):
    time.sleep(60)


def trl_lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_columns(prompts, completions, completion_ids, solution, answer, level):
    assert len(prompts) == len(completions) == len(completion_ids) == len(solution)
    right = [c.endswith(s) and s == a for c, s, a in zip(completions, solution, answer, strict=True)]
    return [float(level[0]) if each else None for each in right]


def trl_chat(prompts, completions, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [float(len(completion[0]["content"])) for completion in completions]


async def trl_async(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [2.0] * len(completions)


def trl_short(completions, **kwargs):
    return [1.0]


def trl_raises(completions, **kwargs):
    raise RuntimeError("the whole list")


def trl_array(completion_ids, **kwargs):
    import numpy as np

    return np.arange(len(completion_ids), dtype=np.float32)


def trl_logs(completions, log_metric, log_extra):
    log_extra("column", ["a", "b"])
    log_metric("seen", 1)
    log_metric("seen", 2)
    return (1.0, None)


def trl_solution(completions, solution, **kwargs):
    return [float(c.endswith(s)) for c, s in zip(completions, solution, strict=True)]


def trl_odd(completions, what, **kwargs):
    return {"text": "12", "number": 1.0, "dict": {0: 1.0, 1: 1.0}, "nothing": None}[what]


def hands_back_a_coroutine(completion):
    async def later():
        await asyncio.sleep(0)
        return 2.0

    return later()


def make_scaled(factor: float):
    def scaled(completion, plus: float = 0.0):
        return factor * len(completion.token_ids) + plus

    return scaled


def make_nothing():
    return 3


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, bonus=0.0):
    assert set(data_sources) == {"math"} and len(extra_infos) == len(solution_strs)
    right = [float(s.endswith(g)) for s, g in zip(solution_strs, ground_truths, strict=True)]
    return [{"score": value + bonus, "acc": bool(value), "pred": "1"} for value in right]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "math" and extra_info is not None and extra_info["index"] == 4
    return 1.0 if solution_str.endswith(ground_truth) else 0.0


def compute_score_dict(solution_str, ground_truth, **kwargs):
    return {"score": 0.5, "acc": True, "pred": solution_str}


def asks_too_much(completion, trainer_state):
    return 1.0


class Judge:
    def __call__(self, completion):
        return 3.0

    async def later(self, completion):
        return 4.0


judge = Judge()
not_a_function = 3

"""Milliseconds of one program with its tests in the sandbox, against the same program and tests in a bare subprocess.

One program at a time, everything on one core: the reciprocal is programs/s of a core. The goal is stated in
milliseconds (at most 25 more than the bare subprocess), not as a ratio; the notes say whether it is met.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.measure import Comparison, Series, mean_of, take_turns, timed
from benchmarks.options import Options
from rewards.code_tasks import Task
from rewards.code_tests import run_tests
from rewards.probe import probe

_PROGRAM = """
def count_words(text):
    found = {}
    for word in text.split():
        found[word] = found.get(word, 0) + 1
    return found
"""
_ASSERTS = (
    "assert count_words('a b a') == {'a': 2, 'b': 1}",
    "assert count_words('') == {}",
    "assert count_words('x') == {'x': 1}",
)
GOAL_MS = 25.0


def run(options: Options) -> list[Comparison]:
    """See the module."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = probe()
    if not found.level:
        raise RuntimeError(f"no level of isolation works here: {found.missing}")
    task = Task(kind="asserts", entry_point="count_words", asserts=_ASSERTS)
    batch = options.pick(20, 5)

    def sandboxed() -> None:
        for _ in range(batch):
            verdict = run_tests(task, _PROGRAM, level=found.level)
            assert verdict.status == "passed", verdict

    command = [sys.executable, "-I", "-S", "-B", "-c", "\n".join([_PROGRAM, *_ASSERTS])]

    def bare() -> None:
        for _ in range(batch):
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    values = take_turns(
        {"ours": lambda: 1e3 * timed(sandboxed) / batch, "bare": lambda: 1e3 * timed(bare) / batch},
        rounds=options.pick(15, 5),
        warmup=1,
    )
    ours, peer = (
        Series(name=name, values=values[key]) for key, name in (("ours", found.level), ("bare", "subprocess"))
    )
    overhead = ours.median - peer.median
    met = "met" if overhead <= GOAL_MS else "missed"
    return [
        Comparison(
            key="sandbox",
            title="A program and three asserts in the sandbox, against a bare subprocess",
            unit="ms",
            ours=ours,
            peers=(peer,),
            reading="times the milliseconds of a bare subprocess",
            notes={
                "workload": f"{batch} programs a round, one at a time, all on one core; a fresh sandbox for each",
                "overhead": f"{overhead:.1f} ms (goal: at most {GOAL_MS:g} ms, {met})",
                "rate": f"{1e3 / ours.median:.1f} programs/s of a core (mean {1e3 / mean_of(ours.values):.1f})",
                "level": f"{found.level}; a user id per program: {'yes' if found.own_uid else 'no'}",
            },
        )
    ]

"""Does the program that a completion ends with pass the tests of its problem? Run in a sandbox, judged outside of it.

The tests are columns of the problem (``rewards.code_tasks.task_of`` says which); docs/rewards/code_tests.md shows rows
and recipes, docs/sandbox.md what the sandbox covers and what it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rewards.base import Score, checks, requires
from rewards.bounded import BoundedCalls, Overrun
from rewards.code_judge import Verdict, judge
from rewards.code_tasks import Task, task_of
from rewards.isolation import isolate
from rewards.probe import require
from rewards.sandbox import Limits, Status
from rollout.template import Reasoning
from rollout.types import Problem

MAX_PROGRAM = 200_000  # characters
_GRACE_S = 1.0
_SIZES = {"memory_gib": ("memory", 2**30), "output_mib": ("output", 2**20), "parts": ("parts", 1)}
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*$", re.MULTILINE)

# The judge is a process of its own: what a result does to the tests (a power, a repetition) hits that process alone.
_judge = BoundedCalls()


def check_tests(problem: Problem) -> None:
    """Raises ValueError when a problem has no tests that could be run."""
    task_of(problem.metadata)


def check_level(
    level: str = "bubblewrap",
    packages: Sequence[str] = ("numpy",),
    sizes: Mapping[str, float] | None = None,
    **others: object,
) -> None:
    """Raises ValueError when this machine cannot lock programs in as asked for, or nothing is asked for clearly."""
    limits_of(sizes or {})
    require(level, packages)


@requires(check_level)
@checks(check_tests)
def code_tests(
    problem: Problem,
    reasoning: Reasoning,
    *,
    level: str = "bubblewrap",
    partial: bool = False,
    test_s: float = 5.0,
    total_s: float = 8.0,
    packages: Sequence[str] = ("numpy",),
    sizes: Mapping[str, float] | None = None,
) -> Score:
    """1.0 when the last fenced code block after the thinking passes all tests of the problem, else 0.0.

    Metrics: ``answered`` (there was a program), ``tests_passed`` (share of the tests; without ``partial`` those before
    the first failure), and one 0 or 1 for each status: ``wrong_answer``, ``runtime_error``, ``syntax_error``,
    ``timeout``, ``memory_limit``, ``output_limit``, ``killed``.

    Args:
        level: how strongly programs are locked in: rlimits, namespaces or bubblewrap. Below it nothing starts.
        partial: the score is the share of tests that pass.
        test_s: seconds of one test, and of loading the program.
        total_s: seconds of all tests; keep it below the function's own deadline (``timeout_s``).
        packages: what programs may import besides the standard library, where it is installed.
        sizes: ``memory_gib`` (1) that all processes of a program may hold, ``output_mib`` (4) of one result, ``parts``
            (500,000), values of one result; all > 0.

    Raises:
        BadTests, ValueError: the problem's tests cannot be run, whatever the program.
        TooWeak: the machine does not reach the level.
    """
    task = task_of(problem.metadata)
    program = last_program(reasoning)
    statuses = {status.value: 0.0 for status in Status if status is not Status.PASSED}
    if program is None:
        return Score(value=0.0, metrics={"answered": 0.0, "tests_passed": 0.0, **statuses})
    limits = limits_of(sizes or {}, test_s=test_s, total_s=total_s)
    verdict = run_tests(task, program, level=level, packages=packages, limits=limits, stop_early=not partial)
    share = verdict.passed / verdict.tests if verdict.tests else 0.0
    passed = verdict.status is Status.PASSED
    if not passed:
        statuses[verdict.status.value] = 1.0
    value = share if partial else float(passed)
    return Score(value=value, metrics={"answered": 1.0, "tests_passed": share, **statuses})


def limits_of(sizes: Mapping[str, float], **seconds: float) -> Limits:
    """Limits from ``memory_gib``, ``output_mib`` and ``parts``, as far as they are given.

    Raises:
        ValueError: another key, or a value <= 0.
    """
    if unknown := sorted(set(sizes) - set(_SIZES)):
        raise ValueError(f"code_tests: sizes has no {unknown[0]!r}; it has {', '.join(_SIZES)}")
    return Limits(**seconds, **{_SIZES[key][0]: int(value * _SIZES[key][1]) for key, value in sizes.items()})


def run_tests(
    task: Task,
    program: str,
    *,
    level: str,
    packages: Sequence[str] = ("numpy",),
    limits: Limits | None = None,
    stop_early: bool = True,
) -> Verdict:
    """The verdict on a program, reached in a process of its own that this one ends when it takes too long.

    Raises:
        BadTests: the tests do not work.
        TooWeak: the machine does not reach the level.
    """
    limits = limits or Limits()
    if len(program) > MAX_PROGRAM:
        return Verdict(status=Status.OUTPUT_LIMIT, tests=0, passed=0, detail=f"a program of {len(program)} characters")
    seconds = limits.total_s * (2 if task.reference and not task.outputs else 1) + _GRACE_S
    arguments = (task, program, level, tuple(packages), limits, stop_early)
    try:
        return _judge.call(_judged, *arguments, timeout_s=seconds)
    except (Overrun, RecursionError) as error:
        return Verdict(status=Status.TIMEOUT, tests=0, passed=0, detail=f"the tests did not end: {error}")


def _judged(
    task: Task, program: str, level: str, packages: tuple[str, ...], limits: Limits, stop_early: bool
) -> Verdict:
    return judge(task, program, isolate(level, packages), limits, stop_early=stop_early)


def last_program(reasoning: Reasoning) -> str | None:
    """The last complete fenced block after the thinking; None when there is none, or the thinking never closed.

    A block that was opened and never closed is no program: it was cut.
    """
    if not reasoning.closed:
        return None
    found, fence, start = None, "", 0
    for match in _FENCE.finditer(reasoning.answer):
        if not fence:
            fence, start = match[1], match.end() + 1
        elif match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[0].strip().strip(fence[0]):
            found, fence = reasoning.answer[start : match.start()], ""
    return None if found is None or not found.strip() else found

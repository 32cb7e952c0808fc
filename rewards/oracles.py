"""When a result is right: tolerances and the special oracles of HumanEval+ and MBPP+. Plain values in, a bool out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from rewards.code_tasks import Task
from rewards.references import Reference

RTOL, ATOL = 1e-7, 1e-6


def same_lines(expected: str, output: bytes) -> bool:
    """Equal lines, white space at their ends and blank lines at the end left out."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    return lines(expected) == lines(output.decode("utf-8", errors="surrogateescape"))


def agrees(task: Task, given: Any, expected: Any, result: Any) -> bool:
    """Whether a result is right, by the task's oracle."""
    if isinstance(result, Reference):
        return task.oracle == "not_none" and expected is not None
    if task.oracle == "not_none":
        return (result is None) == (expected is None)
    if task.oracle == "set":
        with contextlib.suppress(TypeError):
            return set(result) == set(expected)
        return False
    if task.oracle == "root":
        if type(result) not in (int, float):
            return False
        # Of a steep polynomial the nearest float to a root is far from zero: what the reference found counts too.
        return abs(_polynomial(given[0], result)) <= (task.atol or 1e-4) or close(expected, result, task.atol)
    return close(expected, result, task.atol)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    try:
        return math.fsum(float(c) * float(x) ** power for power, c in enumerate(coefficients))
    except (OverflowError, ValueError):
        return math.inf


def close(expected: Any, result: Any, atol: float = 0.0) -> bool:
    """Equality, with floats of the expected value within 1e-7 relative and ``atol`` (else 1e-6) absolute."""
    if type(expected) in (list, tuple) and type(result) in (list, tuple):
        return len(expected) == len(result) and all(
            close(one, other, atol) for one, other in zip(expected, result, strict=True)
        )
    if type(expected) is dict and type(result) is dict:
        return expected.keys() == result.keys() and all(
            close(each, result[key], atol) for key, each in expected.items()
        )
    if _is_number(expected) and _is_number(result) and (type(expected) in (float, complex) or atol):
        return _near(expected, result, atol or ATOL)
    if hasattr(expected, "shape") or hasattr(result, "shape"):
        import numpy

        return bool(numpy.array_equal(numpy.asarray(expected), numpy.asarray(result)))
    return bool(expected == result)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float, complex, bool)


def _near(expected: Any, result: Any, atol: float) -> bool:
    try:
        if expected == result or (expected != expected and result != result):
            return True
        return abs(complex(result) - complex(expected)) <= atol + RTOL * abs(complex(expected))
    except OverflowError:
        return False

"""The demo task: sums and differences of one-digit numbers, with the running sums as the thinking.

The problems and the judge are reasoning-gym's ``chain_sum``; only the wording changes here. ``compact`` shortens
"State the final answer to the following arithmetic problem: 3 + 5 - 2 =" to ``3+5-2``, so that a byte-level tiny
policy spends its context on the arithmetic. reasoning-gym's entry stays in the metadata, and its own scorer judges.
"""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from rollout.template import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE
from rollout.types import Problem

_NUMBER = re.compile(r"-?\d+")
_EXPRESSION = re.compile(r"-?\d+(?:[+-]-?\d+)*")
_TERM = re.compile(r"(?<=\d)([+-])(-?\d+)")
_SIGNED = re.compile(r"([+-])(\d+)")
_BACKWARDS = re.compile(r"(?:[+-]\d+)+")
_FLIP = {"+": "-", "-": "+"}


def compact(problem: Problem) -> Problem:
    """Rewrites a chain_sum problem to its bare expression: ``3+5-2``; everything else is kept.

    Raises:
        ValueError: the problem does not carry a chain_sum entry of reasoning-gym.
    """
    return replace(problem, prompt=_expression(problem))


def backwards(problem: Problem) -> Problem:
    """Like :func:`compact`, the terms in reverse order, each with its sign: ``3+5-2`` becomes ``-2+5+3``.

    The sum is the same, and the running sums go through it from right to left. So the first term stands right before
    the thinking and the n-th always at the same distance from it, however long the chain is: a small policy finds terms
    by distance, and carries over to longer chains what it learned of short ones.

    Raises:
        ValueError: as :func:`compact`.
    """
    first, rest = parse(_expression(problem))
    terms = [f"{first:+d}", *(f"{operator}{magnitude}" for operator, magnitude in rest)]
    return replace(problem, prompt="".join(reversed(terms)))


def backwards_without_zeros(problem: Problem) -> Problem | None:
    """Like :func:`backwards`, but drops chains with a 0 in them: who skips the 0 is right by accident.

    Where hardly any answer is right such accidents are most of what reinforcement learning sees.

    Raises:
        ValueError: as :func:`compact`.
    """
    written = backwards(problem)
    return None if any(int(digits) == 0 for _, digits in _SIGNED.findall(written.prompt)) else written


def _expression(problem: Problem) -> str:
    try:
        return problem.metadata["entry"]["metadata"]["expression"].replace(" ", "")
    except (KeyError, TypeError):
        raise ValueError(f"problem {problem.id!r} is not one of reasoning_gym:chain_sum (no expression)") from None


def parse(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """First number and the (operator, magnitude) pairs after it: ``3+5--2`` -> (3, [("+", 5), ("+", 2)]).

    Raises:
        ValueError: the text is not a chain of whole numbers joined by + and -.
    """
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"not a sum of whole numbers: {expression!r}")
    first = _NUMBER.match(expression)
    assert first is not None
    steps = [(operator, int(number)) for operator, number in _TERM.findall(expression)]
    return int(first[0]), [(op if n >= 0 else _FLIP[op], abs(n)) for op, n in steps]


def running_sums(problem: Problem, rng: Random | None = None, corrupt: float = 0.0) -> str:
    """A demonstration: each partial sum, then the answer.

    ``3+5-2`` or ``-2+5+3`` -> ``3+5=8;8-2=6</think><answer>6</answer>``; the prompt template has opened the thinking
    already.

    Args:
        problem: one that ``compact`` or ``backwards`` rewrote.
        rng: source of the corruptions; needed only for corrupt > 0.
        corrupt: chance in [0, 1] of each step to be off by one or two. Later steps go on from the wrong value, so that
            the demonstration stays consistent and ends in a wrong answer.

    Raises:
        ValueError: the prompt is not a compact expression, corrupt is not in [0, 1], or has no rng.
    """
    total, rest = _chain(problem)
    steps = []
    for operator, magnitude in rest:
        result = total + (magnitude if operator == "+" else -magnitude) + _slip(rng, corrupt)
        steps.append(f"{total}{operator}{magnitude}={result}")
        total = result
    return f"{';'.join(steps)}{_answer(total)}"


def no_thinking(problem: Problem, rng: Random | None = None, corrupt: float = 0.0) -> str:
    """The control: the same answers without any thinking, ``</think><answer>6</answer>``.

    Same arguments as :func:`running_sums`; corrupt is the chance of the answer to be off by one or two.

    Raises:
        ValueError: as :func:`running_sums`.
    """
    first, rest = _chain(problem)
    total = first + sum(magnitude if operator == "+" else -magnitude for operator, magnitude in rest)
    return _answer(total + _slip(rng, corrupt))


def _chain(problem: Problem) -> tuple[int, list[tuple[str, int]]]:
    """First number and the steps after it, in the order in which the prompt wants them taken."""
    if not _BACKWARDS.fullmatch(problem.prompt):
        return parse(problem.prompt)
    last, *before = reversed(_SIGNED.findall(problem.prompt))
    return int("".join(last)), [(sign, int(digits)) for sign, digits in before]


def _slip(rng: Random | None, corrupt: float) -> int:
    """An error of one or two with chance ``corrupt``, else 0."""
    if not 0 <= corrupt <= 1:
        raise ValueError(f"corrupt must be in [0, 1], got {corrupt}")
    if not corrupt:
        return 0
    if rng is None:
        raise ValueError("corrupt > 0 needs an rng, or the demonstrations could not be drawn again")
    return rng.choice((-2, -1, 1, 2)) if rng.random() < corrupt else 0


def _answer(total: int) -> str:
    return f"{THINK_CLOSE}{ANSWER_OPEN}{total}{ANSWER_CLOSE}"

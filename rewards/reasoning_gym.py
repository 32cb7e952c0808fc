"""reasoning-gym's own scorers as the judge of its own problems."""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
from typing import Any

from rewards.base import Score, checks, preloads
from rollout.template import Reasoning, answer_in_tags
from rollout.types import Problem

# Not a number is equal to everything, or near it, for a scorer that compares distances (complex_arithmetic).
_NAN = re.compile(r"(?<![a-z])nan(?![a-hk-z])", re.IGNORECASE)
_NONSENSE = "no answer at all"


def check_scorer(problem: Problem) -> None:
    """Refuses a problem whose scorer gives full credit to nonsense (some of game_of_life_halting's, in 0.1.25).

    Raises:
        ValueError: it does, or the problem carries no entry of reasoning-gym.
    """
    if judged(problem, _NONSENSE)[0] >= 1.0:
        name = problem.metadata["dataset"]
        raise ValueError(f"problem {problem.id!r}: the scorer of {name} gives full credit to {_NONSENSE!r}")


@checks(check_scorer)
@preloads("reasoning_gym")
def reasoning_gym(problem: Problem, reasoning: Reasoning, *, strict: bool = False) -> Score:
    """What the data set's own scorer gives the final answer; 0.0 without one, and when the thinking never closed.

    The answer is the last ``<answer>…</answer>`` after the thinking, else all text after it. Many scorers give partial
    credit: chain_sum's, for one, gives "16" half a point where "6" is right, because the answer contains it.

    Metrics: ``answered`` (there was an answer at all) and ``unreadable`` (the scorer could not read it).

    Args:
        problem: one that ``rollout.prompts`` loaded from ``reasoning_gym:NAME`` (its metadata holds the entry).
        strict: 1.0 for full credit, 0.0 for anything less.

    Raises:
        ValueError: the problem carries no entry of reasoning-gym. What the scorer raises on its own reference answer
            passes through.
    """
    _check_entry(problem)
    tagged = answer_in_tags(reasoning.answer)
    answer = reasoning.answer if tagged is None else tagged
    if not reasoning.closed or not answer.strip():  # a dozen scorers pay 0.01 to 0.05 for nothing
        return Score(value=0.0, metrics={"answered": 0.0, "unreadable": 0.0})
    value, unreadable = judged(problem, answer)
    if strict:
        value = 1.0 if value >= 1.0 else 0.0
    return Score(value=value, metrics={"answered": 1.0, "unreadable": float(unreadable)})


def judged(problem: Problem, answer: str) -> tuple[float, bool]:
    """The scorer's value, and whether it choked on the answer.

    A few scorers raise on texts of another form than they expect (prime_factorization on anything but numbers). When
    the same scorer takes its own reference answer, the fault is the answer's, and it earns nothing; else it is an
    error. A value that is not finite, and NaN in an answer whose reference has none, earn nothing either.
    """
    _check_entry(problem)
    metadata = problem.metadata
    entry = metadata["entry"]
    scorer = _scorer(metadata["dataset"], json.dumps(dict(metadata["params"]), sort_keys=True))
    if _NAN.search(answer) and not _NAN.search(str(entry.get("answer"))):
        return 0.0, True
    try:
        value = float(scorer.score_answer(answer, entry))
        return (value, False) if math.isfinite(value) else (0.0, True)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError):
        scorer.score_answer(entry["answer"], entry)
        return 0.0, True


def _check_entry(problem: Problem) -> None:
    if not {"dataset", "params", "entry"} <= problem.metadata.keys():
        raise ValueError(f"problem {problem.id!r} ({problem.source}) carries no entry of reasoning-gym to judge by")


@functools.lru_cache(maxsize=64)
def _scorer(name: str, params: str) -> Any:
    # Some scorers read the generator's parameters; the size only bounds an index that scoring never uses.
    return importlib.import_module("reasoning_gym").create_dataset(name, **{**json.loads(params), "size": 1, "seed": 0})

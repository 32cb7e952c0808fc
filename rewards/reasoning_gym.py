"""reasoning-gym's own scorers as the judge of its own problems."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from rewards.base import Score, preloads
from rollout.template import Reasoning, answer_in_tags
from rollout.types import Problem


@preloads("reasoning_gym")
def reasoning_gym(problem: Problem, reasoning: Reasoning, *, strict: bool = False) -> Score:
    """What the data set's own scorer gives the final answer; 0.0 when the thinking never closed.

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
    metadata = problem.metadata
    if not {"dataset", "params", "entry"} <= metadata.keys():
        raise ValueError(f"problem {problem.id!r} ({problem.source}) carries no entry of reasoning-gym to judge by")
    if not reasoning.closed:
        return Score(value=0.0, metrics={"answered": 0.0, "unreadable": 0.0})
    tagged = answer_in_tags(reasoning.answer)
    answer = reasoning.answer if tagged is None else tagged
    scorer = _scorer(metadata["dataset"], json.dumps(dict(metadata["params"]), sort_keys=True))
    value, unreadable = _judged(scorer, answer, metadata["entry"])
    if strict:
        value = 1.0 if value >= 1.0 else 0.0
    return Score(value=value, metrics={"answered": float(bool(answer)), "unreadable": float(unreadable)})


def _judged(scorer: Any, answer: str, entry: dict[str, Any]) -> tuple[float, bool]:
    """The scorer's value, and whether it choked on the answer.

    A few scorers raise on texts of another form than they expect (prime_factorization on anything but numbers). When
    the same scorer takes its own reference answer, the fault is the answer's, and it earns nothing; else it is an
    error.
    """
    try:
        return float(scorer.score_answer(answer, entry)), False
    except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError):
        scorer.score_answer(entry["answer"], entry)
        return 0.0, True


@functools.lru_cache(maxsize=64)
def _scorer(name: str, params: str) -> Any:
    # Some scorers read the generator's parameters; the size only bounds an index that scoring never uses.
    return importlib.import_module("reasoning_gym").create_dataset(name, **{**json.loads(params), "size": 1, "seed": 0})

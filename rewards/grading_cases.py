"""Ground truth for a grader: cases with a verdict each, and how often a reward function agrees.

A case is a row with ``gold``, ``prediction``, ``expected`` (bool), ``contested`` (reasonable graders differ) and
``kind``: ``answer`` (both are bare answers; the prediction is put into a box), ``completion`` (the prediction is a
whole model text) or ``raw`` (both are texts to be read as they are, boxed or not). Graded as in training: in the
processes of a rubric, each call under its deadline.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.accuracy import bare_answer
from rewards.answers import last_parts
from rewards.base import RewardConfig
from rewards.calling import bind
from rewards.rubric import Rubric, RubricConfig
from rollout.template import split_reasoning
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

KINDS = ("answer", "completion", "raw")
_FIELDS = ("gold", "prediction", "expected")
_FORMULAS = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)
_CELLS = {
    (True, True): "true_accept",
    (False, False): "true_reject",
    (False, True): "false_accept",
    (True, False): "false_reject",
}


def confusion(
    paths: Sequence[Path], *, function: RewardConfig | None = None, processes: int = 2, search: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """What a reward function makes of case files.

    Args:
        paths: ``.jsonl`` or ``.jsonl.gz``.
        function: the function; ``accuracy`` when left out. A score >= 1 accepts.

    Returns:
        By path: ``n`` (clear cases), ``true_accept``, ``true_reject``, ``false_accept``, ``false_reject``,
        ``contested`` (counted apart, in none of the four), ``timeouts`` (gave up or overran; counted as rejected),
        ``errors``, ``seconds``.

    Raises:
        ValueError: a file that is not there or a row without what a case needs; names file and line.
    """
    config = function or RewardConfig(path="accuracy")
    texts = {path: list(read_cases(path)) for path in paths}
    found = {}
    for path, cases in texts.items():
        started = time.monotonic()
        row = dict.fromkeys((*_CELLS.values(), "contested", "timeouts", "errors"), 0)
        for bare in (False, True):
            part = [case for case in cases if (case.get("kind") == "raw") == bare]
            for case, verdict in _graded(part, _bare(config, bare, search), processes, search):
                row["timeouts"] += verdict == "timeout"
                row["errors"] += verdict == "error"
                if case.get("contested"):
                    row["contested"] += 1
                else:
                    row[_CELLS[bool(case["expected"]), verdict is True]] += 1
        found[str(path)] = {"n": len(cases) - row["contested"], **row, "seconds": round(time.monotonic() - started, 2)}
    return found


def read_cases(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a case file.

    Raises:
        ValueError: not there, no JSON, a row without gold, prediction and expected, or of an unknown kind.
    """
    if not path.is_file():
        raise ValueError(f"there is no case file {path}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            missing = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{path}, line {number}: a case needs {', '.join(_FIELDS)}; {missing[0]} is missing")
            if row.get("kind", "answer") not in KINDS:
                raise ValueError(f"{path}, line {number}: kind must be one of {', '.join(KINDS)}, got {row['kind']!r}")
            yield row


def gold_of(text: str) -> str:
    """The gold answer in a raw text: its boxes, else its formulas where it is short, else what it claims."""
    if parts := last_parts(text):
        return ", ".join(dict.fromkeys(parts))
    formulas = [double or single for double, single in _FORMULAS.findall(text)]
    if len(formulas) > 1 and len(text) < 60:
        return ", ".join(formulas)
    return bare_answer(split_reasoning(text, forced_think=False)) or text


def _bare(config: RewardConfig, bare: bool, search: Sequence[str]) -> RewardConfig:
    """The function, told that raw texts need no box where it can be told."""
    if not bare or "bare" not in bind(replace(config, params={}), search).accepted:
        return config
    return replace(config, params={"bare": True, **config.params})


def _graded(
    cases: Sequence[Mapping[str, Any]], config: RewardConfig, processes: int, search: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], bool | str]]:
    """Each case with True or False, ``timeout`` or ``error``."""
    if not cases:
        return
    rubric = RubricConfig(functions=(config,), processes=processes, max_error_rate=1.0)
    with Rubric(rubric, forced_think=False, search=search) as judge:
        for case, group in zip(cases, judge.score(map(_group, range(len(cases)), cases)), strict=True):
            [rollout] = group.rollouts
            error = rollout.errors.get(config.name)
            if error is not None:
                yield case, "timeout" if error.startswith("timeout") else "error"
            elif rollout.metrics.get(f"{config.name}/gave_up"):
                yield case, "timeout"
            else:
                yield case, rollout.scores.get(config.name, 0.0) >= 1


def _group(index: int, case: Mapping[str, Any]) -> RolloutGroup:
    kind, gold, text = case.get("kind", "answer"), str(case["gold"]), str(case["prediction"])
    completion = Completion(
        prompt_token_ids=(0,),
        token_ids=(0,),
        text=f"\\boxed{{{text}}}" if kind == "answer" else text,
        rollout_logprobs=(0.0,),
        finish_reason=FinishReason.STOP,
        policy_version=0,
        sample_index=0,
        seed=0,
    )
    problem = Problem(id=str(case.get("id", index)), prompt="", answer=gold_of(gold) if kind == "raw" else gold)
    return RolloutGroup(problem=problem, rollouts=(Rollout(completion=completion),))

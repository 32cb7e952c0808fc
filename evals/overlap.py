"""Which benchmark passages a text shares words with: an index that is built once and asked text by text.

Two rules, after :mod:`evals.wording` has normalised both sides:

* **span**: a run of at least ``n`` words (10, as in arXiv 2501.12948) stands in both, and at least half of ``n`` of
  them are the passage's own. Words are *not* its own inside a common phrase: a run of ``(n + 1) // 2`` words that
  occurs in 1 % of the benchmark's problems, and in at least five ("let x be a real number", a generator's frame).
* **whole**: questions with fewer words, or fewer own words, have no such span. They are compared whole, the signs
  between the words included (``3 + 5 - 2`` is not ``3 - 5 + 2``). One of fewer than ``n`` words must moreover stand by
  itself, between line breaks or the ends of sentences; one of one or two words must be the whole text.

Equal fingerprints (:func:`rollout.prompts.fingerprint`) are a whole match too, whatever the words are.

How it is quick: the passages' short runs of words are hashed once, at every position. Of a text only every
``n - k + 1``-th run of ``k`` is looked up, since a run of ``n`` words contains one of those wherever it begins; a match
is then extended to both sides. Passages that this could miss when they are copied whole are looked for by the whole
rule.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from sys import intern
from typing import Any

from evals.wording import OPERATORS, half_words, normalise, reading, symbols, words
from rollout.prompts import fingerprint

COMMON_SHARE, COMMON_LEAST = 0.01, 5
_BITS = 24  # of a position in a text, in words
_KEY = 3  # words of the run by which a whole question is found
_BEFORE = re.compile(r"(?:^|[\n.?!:;>。।؟]|\b\w{1,2}\))[ \t\r$(\[{'\"“«*_#-]*$")
_AFTER = re.compile(r"[ \t\r$)\]}'\"”»*_=]*(?:$|[\n.?!:;<。।؟])")


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that must not be trained on.

    Attributes:
        benchmark, problem: whose it is.
        text: the question, or a solution.
        part: ``question`` or ``solution``; a solution is never compared whole.
    """

    benchmark: str
    problem: str
    text: str
    part: str = "question"


@dataclass(frozen=True, slots=True)
class Match:
    """What a text shares with a passage.

    Attributes:
        passage: the passage.
        span: the longest run of shared words, normalised.
        words: its length in words (two characters of a script without blanks count as one word).
        share: of the passage's words that stand in shared runs, in (0, 1].
    """

    passage: Passage
    span: str
    words: int
    share: float


@dataclass(slots=True)
class _Text:
    """A passage taken apart: its words and, up to each position, the half-words of all and of its own words."""

    passage: Passage
    words: tuple[str, ...]
    owner: int  # equal for the question and the solutions of a problem, and for problems that say the same
    total: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    signs: list[str] | None = None  # words and signs, made when first needed


class OverlapIndex:
    """The passages of one or several benchmarks, ready to be asked.

    Args:
        passages: what must not be trained on.
        n: words of the shortest span that counts, >= 4.
        training: texts in which phrases are counted as well when it is found out what is common: of a few generated
            problems nobody can tell what their frame is. Read once.

    Raises:
        ValueError: n is too small.
    """

    def __init__(self, passages: Iterable[Passage], *, n: int = 10, training: Iterable[str] = ()) -> None:
        if n < 4:
            raise ValueError(f"a span must be at least 4 words long, got {n}: single words are shared by all texts")
        self.n, self._k = n, (n + 1) // 2
        self._stride = n - self._k + 1
        self._texts = _take_apart(passages)
        # Hash of k words -> where they stand, as text << _BITS | position. Most stand in one place only.
        self._first: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}
        for number, text in enumerate(self._texts):
            for position, key in enumerate(_hashes(text.words, self._k)):
                place = number << _BITS | position
                if self._first.setdefault(key, place) != place:
                    self._more.setdefault(key, []).append(place)
        common = self._common(training)
        unreachable = self._drop_common(common)
        self._whole: dict[int, list[int]] = defaultdict(list)  # hash of the rarest _KEY words -> texts
        self._tiny: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._fingerprints: dict[str, list[int]] = defaultdict(list)
        self._file_whole(unreachable)

    def find(self, text: str) -> list[Match]:
        """The passages that this text shares a span with, or holds whole; one match for each."""
        said = words(normalise(text))
        spans = self._spans(said) if self._may_share(said) else {}
        found = {number: self._match(number, runs) for number, runs in spans.items()}
        for number in self._wholes(text, said):
            length = len(self._texts[number].words)
            found[number] = self._match(number, [(0, length)])
        return list(found.values())

    def _may_share(self, said: list[str]) -> bool:
        return not self._first.keys().isdisjoint(_hashes(said, self._k, self._stride))

    def _places(self, key: int) -> list[tuple[int, int]]:
        """(text, position) of a run of k words."""
        found = [self._first[key], *self._more.get(key, ())] if key in self._first else []
        return [(place >> _BITS, place & (1 << _BITS) - 1) for place in found]

    def _spans(self, said: list[str]) -> dict[int, list[tuple[int, int]]]:
        """By passage, the runs of its positions that count."""
        reached: dict[tuple[int, int], int] = {}  # (passage, offset) -> end of the run that was followed there
        spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, key in enumerate(_hashes(said, self._k, self._stride)):
            place = index * self._stride
            for number, position in self._places(key):
                line = (number, position - place)
                if reached.get(line, -1) > place:
                    continue
                text = self._texts[number]
                start, end = _extend(text.words, said, position, place)
                reached[line] = place + end - position
                # Hashes may collide: a run that is none is too short here.
                if text.total[end] - text.total[start] >= 2 * self.n and text.own[end] - text.own[start] >= self.n:
                    spans[number].append((start, end))
        return spans

    def _wholes(self, text: str, said: list[str]) -> Iterator[int]:
        """Passages that stand whole in the text and are looked for so."""
        candidates: set[int] = set()
        if len(said) < _KEY:
            candidates.update(self._tiny.get(tuple(said), ()))
        elif not self._whole.keys().isdisjoint(_hashes(said, _KEY)):
            for key in set(_hashes(said, _KEY)):
                candidates.update(self._whole.get(key, ()))
        # First by the words alone: most candidates end here.
        joined = f" {' '.join(said)} "
        if candidates := {n for n in candidates if f" {' '.join(self._texts[n].words)} " in joined}:
            # Of "what is x in the diagram?" the figure is most of the question.
            drawn = normalise(text, figures=True)
            heard = symbols(drawn)
            tokens = [token for token, _, _ in heard]
            for number in sorted(candidates):
                if self._stands_in(self._texts[number], drawn, heard, tokens):
                    yield number
        if self._fingerprints and len(text) <= self._longest:
            yield from self._fingerprints.get(fingerprint(text), ())

    def _stands_in(self, text: _Text, normal: str, heard: list[tuple[str, int, int]], tokens: list[str]) -> bool:
        if text.signs is None:
            text.signs = reading(text.passage.text)
        if len(text.words) < _KEY:
            return reading(normal) == text.signs
        length = len(text.signs)
        for start in range(len(tokens) - length + 1):
            if tokens[start] != text.signs[0] or tokens[start : start + length] != text.signs:
                continue
            before, after = tokens[start - 1 : start], tokens[start + length : start + length + 1]
            if text.total[-1] >= 2 * self.n:
                signed = before and (text.signs[0] in OPERATORS or before[0] in OPERATORS)
                if not signed and not OPERATORS.intersection(after):
                    return True
            else:
                first, last = heard[start], heard[start + length - 1]
                if _BEFORE.search(normal[max(0, first[1] - 40) : first[1]]) and _AFTER.match(normal, last[2]):
                    return True
        return False

    def _match(self, number: int, runs: Sequence[tuple[int, int]]) -> Match:
        text = self._texts[number]
        start, end = max(runs, key=lambda run: text.total[run[1]] - text.total[run[0]])
        covered, last = 0, 0
        for first, stop in sorted(runs):
            if stop > last:
                covered += text.total[stop] - text.total[max(first, last)]
                last = stop
        length = (text.total[end] - text.total[start]) // 2
        span = " ".join(text.words[start:end]) or text.passage.text.strip()
        return Match(text.passage, span, length, covered / (text.total[-1] or 1) or 1.0)

    def _common(self, training: Iterable[str]) -> dict[str, set[int]]:
        """By benchmark, the runs of k words that are nobody's own."""
        owners: dict[str, set[int]] = defaultdict(set)
        for text in self._texts:
            owners[text.passage.benchmark].add(text.owner)
        seen: Counter[int] = Counter()
        said_before: set[int] = set()
        for normal in map(normalise, training):
            if (typed := hash("".join(normal.split()))) not in said_before:
                said_before.add(typed)
                seen.update(self._first.keys() & set(_hashes(words(normal), self._k)))
        common: dict[str, set[int]] = {benchmark: set() for benchmark in owners}
        for key in seen.keys() | self._more.keys():
            if 1 + len(self._more.get(key, ())) + seen[key] < COMMON_LEAST:
                continue
            who: dict[str, set[int]] = defaultdict(set)
            for number, _ in self._places(key):
                who[self._texts[number].passage.benchmark].add(self._texts[number].owner)
            for benchmark, problems in who.items():
                size, both = len(owners[benchmark]), len(problems) + seen[key]
                if len(problems) >= _often(size) or both >= _often(size + len(said_before)):
                    common[benchmark].add(key)
        return common

    def _drop_common(self, common: dict[str, set[int]]) -> set[int]:
        """Counts every passage's own words and forgets the common runs; passages that spans cannot be relied on for."""
        unreachable = set()
        for number, text in enumerate(self._texts):
            shared = common[text.passage.benchmark]
            own = [half_words(word) for word in text.words]
            text.total = [0, *accumulate(own)]
            kept = set()
            for position, key in enumerate(_hashes(text.words, self._k)):
                if key in shared:
                    own[position : position + self._k] = [0] * self._k
                else:
                    kept.add(position % self._stride)
            text.own = [0, *accumulate(own)]
            if text.total[-1] < 2 * self.n or text.own[-1] < self.n or len(kept) < self._stride:
                unreachable.add(number)
        for key in set().union(*common.values()):
            kept = [n << _BITS | p for n, p in self._places(key) if key not in common[self._texts[n].passage.benchmark]]
            del self._first[key]
            self._more.pop(key, None)
            if kept:
                self._first[key] = kept[0]
                self._more |= {key: kept[1:]} if kept[1:] else {}
        return unreachable

    def _file_whole(self, unreachable: set[int]) -> None:
        questions = [number for number in range(len(self._texts)) if self._texts[number].passage.part == "question"]
        counts = Counter(
            key for i in unreachable.intersection(questions) for key in _hashes(self._texts[i].words, _KEY)
        )
        self._longest = 0
        for number in questions:
            text = self._texts[number]
            self._fingerprints[fingerprint(text.passage.text)].append(number)
            # Half as much again, for white space that the fingerprint does not count.
            self._longest = max(self._longest, 3 * len(text.passage.text) // 2)
            if number not in unreachable:
                continue
            if keys := list(_hashes(text.words, _KEY)):
                self._whole[min(keys, key=counts.__getitem__)].append(number)
            elif text.words:
                self._tiny[text.words].append(number)


def _take_apart(passages: Iterable[Passage]) -> list[_Text]:
    given = list(passages)
    said = [tuple(map(intern, words(normalise(passage.text)))) for passage in given]
    often = Counter(said)
    texts: list[_Text] = []
    owners: dict[tuple[str, str], int] = {}
    readings: dict[Any, int] = {}
    for passage, these in zip(given, said, strict=True):
        # Grids and boards may share all their words: they say the same only where the signs are the same too.
        reads = tuple(reading(passage.text)) if often[these] > 1 else these
        fallback = readings.setdefault((passage.benchmark, reads), len(owners))
        texts.append(_Text(passage, these, owners.setdefault((passage.benchmark, passage.problem), fallback)))
    return texts


def _hashes(said: Sequence[str], length: int, stride: int = 1) -> Iterator[int]:
    """Hash of each run of ``length`` words that begins at a multiple of ``stride``."""
    return map(hash, zip(*(said[i::stride] for i in range(length)), strict=False))


def _extend(passage: Sequence[str], said: Sequence[str], position: int, place: int) -> tuple[int, int]:
    """The run of equal words around ``passage[position]`` and ``said[place]``, in positions of the passage."""
    start, offset = position, place - position
    while start > 0 and start + offset > 0 and passage[start - 1] == said[start - 1 + offset]:
        start -= 1
    end, stop = position, min(len(passage), len(said) - offset)
    while end < stop and passage[end] == said[end + offset]:
        end += 1
    return start, end


def _often(texts: int) -> int:
    return max(COMMON_LEAST, math.ceil(COMMON_SHARE * texts))

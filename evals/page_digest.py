"""What a page needs of a benchmark's samples: lengths as numbers, counts, and a handful of whole samples.

Samples are read one by one, so that 100,000 of them take no more memory than their numbers.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from evals.samples import Sample, Status

TRUNCATED = "truncated"
LONGEST = "Longest"

PICKS: Mapping[str, Callable[[Sample], bool]] = {
    "First wrong": lambda sample: sample.status == Status.WRONG,
    "First cut at the token limit": lambda sample: sample.finish_reason == "length",
    "First without an answer": lambda sample: sample.status == Status.UNANSWERED,
    "First whose answer could not be read": lambda sample: sample.status == Status.UNPARSED,
    "First refused": lambda sample: sample.status == Status.REFUSED,
    "First timed out": lambda sample: sample.status == Status.TIMEOUT,
    "First that the grader failed on": lambda sample: sample.status == Status.ERROR,
    "First right": lambda sample: sample.status == Status.RIGHT,
}
"""Why a sample is worth a look; the first one is the first in the order of the data, not of drawing."""


@dataclass(slots=True)
class Digest:
    """Of one benchmark.

    Attributes:
        right, wrong: tokens by sample; what the grader failed on is in neither.
        counts: samples by status, and how many were ``truncated``.
        picks: samples to look at by reason, see :data:`PICKS`; also the ``Longest``.
        samples: how many there are.
    """

    right: array[int] = field(default_factory=lambda: array("q"))
    wrong: array[int] = field(default_factory=lambda: array("q"))
    counts: Counter[str] = field(default_factory=Counter)
    picks: dict[str, Sample] = field(default_factory=dict)
    samples: int = 0

    @staticmethod
    def of(samples: Iterable[Sample]) -> Digest:
        """Reads all of them, once."""
        digest = Digest()
        for sample in samples:
            digest.add(sample)
        return digest

    def add(self, sample: Sample) -> None:
        """Takes one more into account; the order does not matter."""
        self.samples += 1
        self.counts[sample.status] += 1
        self.counts[TRUNCATED] += sample.finish_reason == "length"
        if sample.status != Status.ERROR:
            (self.right if sample.status == Status.RIGHT else self.wrong).append(sample.tokens)
        for reason, wanted in PICKS.items():
            if wanted(sample) and (reason not in self.picks or place(sample) < place(self.picks[reason])):
                self.picks[reason] = sample
        longest = self.picks.get(LONGEST)
        if longest is None or (-sample.tokens, place(sample)) < (-longest.tokens, place(longest)):
            self.picks[LONGEST] = sample


def place(sample: Sample) -> tuple[int, str, int]:
    """Where it stands in the data."""
    return sample.doc_id, sample.problem, sample.index

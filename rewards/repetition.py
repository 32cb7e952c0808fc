"""A penalty on text that repeats itself: n-grams (Yeo et al., arXiv 2502.03373) and loops.

    penalty = -max_penalty * max(share of repeated n-grams, share of the text that lies in loops)

Of N n-grams of which D are different, (N - D) / N are repeated. A loop is one piece of text that stands several times
right behind itself: a character, a word, a line, a paragraph.
"""

from __future__ import annotations

import re
from itertools import islice

import regex

from rewards.base import Score
from rollout.types import Completion

# Runs of letters without spaces between words are taken apart into characters, like everything that is no letter.
_UNIT = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[^\W\d]{1,64}|\d{1,64}|[^\w\s]"
)
_LOOP_PERIODS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)  # units and lines: short loops of a few units
_LOOP_MIN = 4  # repetitions of a piece before it is a loop: "no, no, no" is none
_LOOP_UNITS = 12  # a loop of units is at least so long


def repetition(completion: Completion, *, n: int = 20, max_penalty: float = 1.0) -> Score:
    """A penalty in [-max_penalty, 0]: 0 for a text that never repeats ``n`` units in a row and never loops.

    A unit is a word, a number, a punctuation mark, or a character of a script without spaces.

    Metrics: ``ngrams`` and ``loops``, the two shares.

    Args:
        n: length of the n-grams in units, >= 1. Reasoning repeats short phrases by nature: 20 leaves them alone.
        max_penalty: >= 0.

    Raises:
        ValueError: n or max_penalty is out of its range.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if not max_penalty >= 0:
        raise ValueError(f"max_penalty must be >= 0, got {max_penalty}")
    units = _UNIT.findall(completion.text.lower())
    lines = [line.strip() for line in re.split(r"[\r\n]+", completion.text) if line.strip()]
    ngrams, loops = repeated_share(units, n), max(loop_share(units, _LOOP_UNITS), loop_share(lines, 0))
    # adding 0.0 turns -0.0 into 0.0
    return Score(value=-max_penalty * max(ngrams, loops) + 0.0, metrics={"ngrams": ngrams, "loops": loops})


def repeated_share(units: list[str], n: int) -> float:
    """Share of the n-grams that are copies of an earlier one, in [0, 1). Linear in the units, whatever ``n`` is."""
    count = len(units) - n + 1
    if count < 1:
        return 0.0
    # A rolling sum of 61-bit hashes, each position weighted by a power: one step per n-gram.
    modulus, base = (1 << 61) - 1, 0x9E3779B97F4A7C1
    highest = pow(base, n, modulus)
    hashes = [hash(unit) % modulus for unit in units]
    value = 0
    for each in islice(hashes, n):
        value = (value * base + each) % modulus
    seen = {value}
    for gone, come in zip(hashes, islice(hashes, n, None), strict=False):
        value = (value * base + come - gone * highest) % modulus
        seen.add(value)
    return (count - len(seen)) / count


def loop_share(pieces: list[str], at_least: int) -> float:
    """Share of the pieces that stand in a run of one period, repeated at least four times and ``at_least`` long."""
    if not pieces:
        return 0.0
    looping = bytearray(len(pieces))
    for period in _LOOP_PERIODS:
        if len(pieces) < max(at_least, period * _LOOP_MIN):
            continue
        same = bytes(map(str.__eq__, pieces, islice(pieces, period, None)))  # same[i]: piece i is also piece i + period
        wanted = max(at_least, period * _LOOP_MIN) - period
        for match in re.finditer(b"\x01{%d,}" % wanted, same):
            looping[match.start() : match.end() + period] = b"\x01" * (match.end() + period - match.start())
    return looping.count(1) / len(pieces)

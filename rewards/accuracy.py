"""Is the final answer right? Texts and rationals are compared here; the rest is math-verify's.

Order: the last balanced ``\\boxed{…}`` after the thinking, else the last ``<answer>…</answer>``. Nothing inside the
thinking counts, and a completion whose thinking never closed has no answer. Most right answers equal the gold text once
white space and wrapping are removed, so that math-verify (and sympy with it) is asked for the rest only.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rewards.base import Score, preloads
from rollout.template import Reasoning, answer_in_tags
from rollout.types import Problem

# An answer beyond these is refused (0.0 and counted) before a parser sees it: nobody's final answer looks so, and
# what follows could run for ever.
MAX_CHARACTERS = 2_000
MAX_NESTING = 40
MAX_DIGITS = 200
LIMIT_S = 2  # of one parse and of one comparison by math-verify, whole seconds

_BOX = re.compile(r"\\f?boxed\s*\{")
_WRAPPING = re.compile(r"^(?:\\\((.*)\\\)|\\\[(.*)\\\]|\$\$(.*)\$\$|\$(.*)\$)$", re.DOTALL)
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|~")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RATIONAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_TOWER = re.compile(r"\^\s*\{?[^{}^]*\^|\^\s*\{?\s*\d{4,}|\d!\s*!|!\s*\)\s*!")


@preloads("math_verify")
def accuracy(problem: Problem, reasoning: Reasoning) -> Score:
    """1.0 when the final answer equals ``problem.answer`` (a text or a number), else 0.0.

    Metrics: ``answered`` (an answer was found), ``boxes`` (how many were written after the thinking: spraying shows),
    ``refused`` (too long, too deep or too large to parse) and ``gave_up`` (math-verify's own time limit).

    Raises:
        ValueError: the problem has no gold answer, or one that nobody can parse and that the answer does not repeat.
    """
    gold = problem.answer
    if gold is None or not str(gold).strip():
        raise ValueError(f"problem {problem.id!r} has no gold answer")
    boxes = boxed(reasoning.answer) if reasoning.closed else []
    answer = final_answer(reasoning)
    metrics = {"answered": float(bool(answer)), "boxes": float(len(boxes)), "refused": 0.0, "gave_up": 0.0}
    if not answer:
        return Score(value=0.0, metrics=metrics)
    quick = quick_equal(str(gold), answer)
    if quick is not None:
        return Score(value=float(quick), metrics=metrics)
    if _unreasonable(answer):
        return Score(value=0.0, metrics={**metrics, "refused": 1.0})
    verdict = _verify(str(gold), answer)
    if verdict == "bad gold":
        raise ValueError(f"the gold answer {str(gold)[:80]!r} of problem {problem.id!r} cannot be parsed")
    return Score(value=float(verdict is True), metrics={**metrics, "gave_up": float(verdict == "gave up")})


def final_answer(reasoning: Reasoning) -> str | None:
    """The last balanced box after the thinking, else the last ``<answer>…</answer>``; None when there is neither."""
    if not reasoning.closed:
        return None
    boxes = boxed(reasoning.answer)
    return boxes[-1] if boxes else answer_in_tags(reasoning.answer)


def boxed(text: str) -> list[str]:
    """Contents of all balanced ``\\boxed{…}`` of a text, outermost only, in order, stripped."""
    found, position = [], 0
    while match := _BOX.search(text, position):
        end = _closing_brace(text, match.end())
        if end is None:
            position = match.end()
            continue
        found.append(text[match.end() : end].strip())
        position = end + 1
    return found


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before ``start``; escaped braces are text."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def normalised(text: str) -> str:
    """Wrapping (``$…$``), spacing commands, white space and a final full stop removed; thousands commas too."""
    text = text.strip().removesuffix(".")
    while match := _WRAPPING.match(text):
        text = next(group for group in match.groups() if group is not None).strip().removesuffix(".")
    text = "".join(_SPACING.sub("", text).split())
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def quick_equal(gold: str, answer: str) -> bool | None:
    """Equality that needs no parser: same text, or both plain rationals. None when it cannot tell."""
    left, right = normalised(gold), normalised(answer)
    if left and left == right:
        return True
    a, b = _rational(left), _rational(right)
    return None if a is None or b is None else a == b


def _rational(text: str) -> Fraction | None:
    if len(text) > MAX_DIGITS:
        return None
    if match := _FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}"
    if not _RATIONAL.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    bottom = int(denominator or 1)
    return Fraction(numerator) / bottom if bottom else None


def _unreasonable(answer: str) -> bool:
    """Longer, deeper or larger than any final answer; such texts make parsers and simplifiers run for ever."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    long_number = re.search(rf"\d{{{MAX_DIGITS},}}", answer) is not None
    return len(answer) > MAX_CHARACTERS or deepest > MAX_NESTING or long_number or _TOWER.search(answer) is not None


def _verify(gold: str, answer: str) -> bool | str:
    """math-verify's verdict, or ``gave up`` (its time limit, a signal: main thread only) or ``bad gold``."""
    parse, verify = _math_verify()
    target = _parsed_gold(gold)
    if not target:
        return "bad gold"
    start = time.monotonic()
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=LIMIT_S)
    if found and verify(list(target), found, timeout_seconds=LIMIT_S):
        return True
    # It answers an overrun as it answers a wrong or unreadable text; only the clock tells them apart.
    return "gave up" if time.monotonic() - start >= LIMIT_S else False


@functools.cache
def _math_verify() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    from math_verify import parse, verify

    # Its warnings repeat the model's text at full length; the metrics say the same in one number.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify


@functools.lru_cache(maxsize=65_536)
def _parsed_gold(gold: str) -> tuple[Any, ...]:
    return tuple(_math_verify()[0](f"\\boxed{{{gold}}}", parsing_timeout=LIMIT_S))

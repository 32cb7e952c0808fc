"""Is the final answer right? Plain texts and numbers are compared here; everything else in a bounded child process.

Order: the final answer (``rewards.answers``), equal texts and numbers, then structure and symbols
(``rewards.equivalence``, ``rewards.symbolic``), last of all math-verify on what it reads as a whole. The last two run
under a deadline of their own: what a model writes may keep a parser busy for ever, and C code heeds no signal.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from rewards.answers import boxed, final_answer
from rewards.base import Score, checks, preloads
from rewards.bounded import BoundedCalls, Overrun
from rewards.equivalence import equivalent, is_label, is_readable
from rewards.normalise import MAX_DIGITS, balanced, based, compact, normalised, rational, without_text_commands
from rewards.quantities import same_number
from rewards.symbolic import parsed, same_expression
from rollout.template import Reasoning
from rollout.types import Problem

# An answer beyond these is refused (0.0 and counted) before a parser sees it: nobody's final answer looks so, and
# what follows could run for ever.
MAX_CHARACTERS = 2_000
MAX_NESTING = 40

_TOWER = re.compile(
    r"\^\s*\{?\s*\d+\s*\^|\^\s*\{?[^{}^]*\^\s*\{[^{}^]*\^|\^\s*\{?\s*\d{4,}|\d!\s*!|!\s*\)\s*!|\d{4,}\s*!"
)
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS},}}")
_CLAIM = re.compile(
    r"(?:(?:answer|result|réponse|respuesta|ответ|答案)\s*(?:is|est|es|:|：|=|为|是)+|I think (?:it's|it is))"
    r"\s*([^\n]+)",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d_.,])[-+]?(?:\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)(?:/\d+)?\s*%?"
    r"|\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
)
_LETTER = re.compile(r"(?:[a-z]+\s+){0,3}\(?([A-J])\)?(?![A-Za-z\d_'’]|\s+[a-z]{2,}\s+[a-z])")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}|[a-zA-Z]{3,}\s*:|[\u4e00-\u9fff\u3002]")

_calls = BoundedCalls()


def check_gold(problem: Problem) -> None:
    """Raises ValueError when nobody could be right: no gold answer, or one that cannot be read.

    Words count as read: an answer may be a name.
    """
    if fault := _fault(problem.answer):
        raise ValueError(fault)


def _fault(gold: Any) -> str | None:
    text = "" if gold is None else str(gold)
    if not text.strip():
        return "no gold answer"
    plain = normalised(text)
    readable = any(c.isalnum() for c in plain) or plain in (r"\emptyset", r"\infty")
    return None if readable and balanced(plain) else f"a gold answer that cannot be parsed: {text[:80]!r}"


@checks(check_gold, by_answer=True)
@preloads("math_verify", "rewards.symbolic", "sympy", "latex2sympy2_extended")
def accuracy(problem: Problem, reasoning: Reasoning, *, bare: bool = False, limit_s: float = 5.0) -> Score:
    """1.0 when the final answer equals ``problem.answer`` (a text or a number), else 0.0.

    Metrics, all but ``boxes`` 0 or 1: ``answered`` (an answer was found), ``boxes`` (how many were written after the
    thinking: spraying shows), ``refused`` (too long, deep or large to parse), ``gave_up`` (``limit_s`` ran out),
    ``unparsed`` (it is neither words nor anything that a parser knows), ``raised`` (a parser failed on it).

    Args:
        bare: without a box and without tags, the last formula or number counts.
        limit_s: seconds for one comparison, well below the function's own deadline (``timeout_s``).

    Raises:
        ValueError: the problem has no gold answer, or one that nobody can read.
    """
    if fault := _fault(problem.answer):
        raise ValueError(f"problem {problem.id!r} has {fault}")
    gold = str(problem.answer)
    answer = final_answer(reasoning) or (bare_answer(reasoning) if bare else None)
    boxes = boxed(reasoning.answer) if reasoning.closed else []
    metrics: dict[str, float] = {
        "answered": float(bool(answer)),
        "boxes": float(len(boxes)),
        "refused": 0.0,
        "gave_up": 0.0,
        "unparsed": 0.0,
        "raised": 0.0,
    }
    if not answer:
        return Score(value=0.0, metrics=metrics)
    quick = quick_equal(gold, answer) if len(answer) <= MAX_CHARACTERS else None
    if quick is None and unreasonable(answer):
        return Score(value=0.0, metrics={**metrics, "refused": 1.0})
    if quick is None:
        try:
            quick, read, raised = _calls.call(compared, gold, answer, timeout_s=limit_s)
        except Overrun:
            return Score(value=0.0, metrics={**metrics, "gave_up": 1.0})
        metrics |= {"unparsed": float(not read), "raised": float(raised)}
    return Score(value=float(quick), metrics=metrics)


def quick_equal(gold: str, answer: str) -> bool | None:
    """Equality that needs no parser: the same text, or two plain numbers. None when it cannot tell."""
    left, right = (compact(without_text_commands(normalised(text))) for text in (gold, answer))
    if not right:
        return False
    if left == right:
        return True
    bases = based(left), based(right)
    if all(bases):
        return bases[0] == bases[1]
    a, b = rational(left), rational(right)
    return None if a is None or b is None else same_number(a, b)


def compared(gold: str, answer: str) -> tuple[bool, bool, bool]:
    """Whether two answers are equal, whether this one could be read, and whether a parser raised instead of telling.

    Call it under a deadline: it may take for ever.
    """
    try:
        return (True, True, False) if equal(gold, answer) else (False, is_readable(answer, parsed), False)
    except Exception:  # what parsers make of a model's text: the model gets its zero, and it is counted apart
        return False, False, True


def equal(gold: str, answer: str) -> bool:
    """Equality of two answers, however long that takes: call it under a deadline."""
    return equivalent(gold, answer, same_expression) or _math_verify_agrees(gold, answer)


def _math_verify_agrees(gold: str, answer: str) -> bool:
    """math-verify's verdict on expressions that were read as a whole, and that hold something beyond numbers."""
    from math_verify import verify

    # What it warns of (no time limit of its own) is so by design: the child process that this runs in has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    left, right = (without_text_commands(normalised(text)) for text in (gold, answer))
    first, second = parsed(left), parsed(right)
    if (
        first is None
        or second is None
        or not getattr(first, "free_symbols", None)
        or not getattr(second, "free_symbols", None)
    ):
        return False  # numbers were compared more strictly than math-verify does
    return verify([first], [second], float_rounding=15, numeric_precision=30, timeout_seconds=None, strict=True)


def unreasonable(answer: str) -> bool:
    """Longer, deeper or larger than any final answer; such texts make parsers and simplifiers run for ever."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    too_long = len(answer) > MAX_CHARACTERS or _LONG_NUMBER.search(answer) is not None
    return too_long or deepest > MAX_NESTING or _TOWER.search(answer) is not None


def bare_answer(reasoning: Reasoning) -> str | None:
    """What a text without a box claims: a short text as it is, else what follows "the answer is", else the last thing.

    A thing is a formula that is more than a name, a number, or the letter of a choice.
    """
    if not reasoning.closed:
        return None
    text = reasoning.answer[-4 * MAX_CHARACTERS :].strip()
    claims = list(_CLAIM.finditer(text))
    if claims:
        text = claims[-1][1].strip()
    elif len(text) <= 80 and not _PROSE.search(text) and not _FORMULA.search(text):
        return text or None
    if letter := _LETTER.match(text):
        return letter[1]
    found = [(match.end(), next(group for group in match.groups() if group)) for match in _FORMULA.finditer(text)]
    found = [(end, formula.strip()) for end, formula in found if not is_label(formula) and not _PROSE.search(formula)]
    found += [(match.end(), match[0].strip()) for match in _NUMBER.finditer(_FORMULA.sub(_blank, text))]
    return max(found)[1] if found else text or None


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])

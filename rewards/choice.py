"""Multiple choice: is the letter of the final answer the right one?

The letter stands, in this order of precedence, in the last box after the thinking, in the last ``<answer>…</answer>``,
after the last "the answer is", or alone on the last line. Nothing inside the thinking counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from rewards.answers import final_answer
from rewards.base import Score, checks
from rollout.template import Reasoning
from rollout.types import Problem

_LONGEST = 4_000  # characters of the end of an answer that are read

# What may stand around a letter without changing it: LaTeX's and Markdown's ways of emphasis, dollars, quotes.
_DRESS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm)(?![a-zA-Z])|\\[()\[\],;! ]|[*_`${}\"'“”‘’]")
_LETTER = re.compile(r"\s*(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])([)\]]?)(?![A-Za-z0-9]))")
_SEVERAL = re.compile(
    r"\W*(?:(?:and|or|nor|versus|vs)\b|[&/+])|\W*[A-Z](?![A-Za-z0-9])[)\]]?\s*(?:$|[,.;:]|and\b|or\b)"
)
_ENDS = re.compile(r"\s*(?:$|[.,;:!?)(\]—–=-]|(?:because|since|as|is (?:the )?(?:correct|right|best))\b)")
_CLAIM = re.compile(
    r"\b(?:answer|choice|option)\b[*_]*\s*(?:is|are|would be|should be|must be|:|：|=)[\s:*_]*"
    r"|^\W*(?:final |correct |best )?answer\W+",
    re.IGNORECASE | re.MULTILINE,
)
_FILLER = re.compile(
    r"^\W*(?:(?:thus|therefore|clearly|most likely|likely|the|correct|right|option|choice|letter|answer)\b\W*)+",
    re.IGNORECASE,
)


def check_letter(problem: Problem) -> None:
    """Raises ValueError when the gold answer is no letter, or names an option that the problem does not have."""
    if fault := _fault(problem):
        raise ValueError(fault)


def _fault(problem: Problem) -> str | None:
    gold = problem.answer
    if not isinstance(gold, str) or not re.fullmatch(r"[A-Z]", gold):
        return f"the gold answer of a multiple choice must be one letter A to Z, got {str(gold)[:40]!r}"
    options = _options(problem.metadata)
    if options and gold not in options:
        return f"the gold answer is {gold}, and the options are {options[0]} to {options[-1]}"
    return None


def _options(row: Mapping[str, Any]) -> str:
    """The letters of the options that a row lists under ``choices``; empty where it lists none."""
    choices = row.get("choices")
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)] if isinstance(choices, list | tuple) else ""


@checks(check_letter)
def choice(problem: Problem, reasoning: Reasoning) -> Score:
    """1.0 when the final answer is the letter ``problem.answer``, else 0.0.

    Metrics, 0 or 1: ``answered`` (something stands where the answer belongs), ``unparsed`` (it is not one letter, or
    one that no option has).

    Raises:
        ValueError: the gold answer is no letter, or the problem has no such option.
    """
    if fault := _fault(problem):
        raise ValueError(f"problem {problem.id!r}: {fault}")
    claimed = claim(reasoning)
    if claimed is None:
        return Score(value=0.0, metrics={"answered": 0.0, "unparsed": 0.0})
    letter = letter_of(claimed)
    options = _options(problem.metadata)
    if letter is not None and options and letter not in options:
        letter = None
    return Score(value=float(letter == problem.answer), metrics={"answered": 1.0, "unparsed": float(letter is None)})


def final_letter(reasoning: Reasoning) -> str | None:
    """The letter of the final answer, A to Z; None when there is none, or more than one."""
    claimed = claim(reasoning)
    return None if claimed is None else letter_of(claimed)


def claim(reasoning: Reasoning) -> str | None:
    """The text where the final answer stands; None when a completion claims nothing or its thinking never closed."""
    if not reasoning.closed:
        return None
    formal = final_answer(reasoning)
    if formal is not None:
        return formal or None
    text = reasoning.answer[-_LONGEST:].strip()
    ends = [match.end() for match in _CLAIM.finditer(text)]
    if ends:
        return text[ends[-1] :].partition("\n")[0].strip() or None
    last = text.rpartition("\n")[2].strip()
    return last if letter_of(last) else None


def letter_of(text: str) -> str | None:
    """The one letter that an answer names, upper case: ``C``, ``(c)``, ``**C**``, ``\\text{C}``, ``C. a metal``.

    None when it names none or several. A letter before a text needs a sign after it: "A metal" begins with an article.
    """
    plain = _DRESS.sub(" ", unicodedata.normalize("NFKC", text[:_LONGEST])).strip()
    plain = _FILLER.sub("", plain)
    if re.fullmatch(r"[A-Za-z]\s*[).\]:]*", plain):
        return plain[0].upper()
    found = _LETTER.match(plain)
    if found is None:
        return None
    rest = plain[found.end() :]
    bracketed = bool(found[1] or found[3])
    if _SEVERAL.match(rest) or not (bracketed or _ENDS.match(rest)):
        return None
    return (found[1] or found[2]).upper()

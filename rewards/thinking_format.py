"""Does a completion think once, and then answer?"""

from __future__ import annotations

import re
import unicodedata

from rollout.template import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Reasoning, answer_in_tags
from rollout.types import Completion

# Tags in another spelling, which a lenient reader might take for real ones.
_LIKE_TAGS = re.compile(r"<\s?/?\s?(?:think|thinking|answer)\s?/?>", re.IGNORECASE)
_TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)


def thinking_format(
    completion: Completion, reasoning: Reasoning, forced_think: bool, *, answer_tags: bool = True
) -> float:
    """1.0 for exactly one closed thinking that says something, and then an answer that does, else 0.0.

    Where the prompt opens the thinking the completion must not open another; elsewhere it must start with ``<think>``.
    To say something is to hold a letter, a digit or a symbol: white space, punctuation and invisible characters are
    nothing. No tag may stand inside the thinking or the answer, in any spelling.

    Args:
        answer_tags: the answer must be exactly one ``<answer>…</answer>`` with nothing around it; False takes any text.
    """
    text = completion.text
    found = _LIKE_TAGS.findall(text)
    if any(tag not in _TAGS for tag in found):
        return 0.0
    opened = found.count(THINK_OPEN)
    starts_well = opened == 0 if forced_think else opened == 1 and text.lstrip().startswith(THINK_OPEN)
    if not starts_well or found.count(THINK_CLOSE) != 1 or not says_something(reasoning.thinking or ""):
        return 0.0
    if ANSWER_OPEN in (reasoning.thinking or "") or ANSWER_CLOSE in (reasoning.thinking or ""):
        return 0.0
    answer = reasoning.answer
    if not answer_tags:
        return float(says_something(answer) and ANSWER_OPEN not in answer and ANSWER_CLOSE not in answer)
    framed = answer.startswith(ANSWER_OPEN) and answer.endswith(ANSWER_CLOSE)
    once = answer.count(ANSWER_OPEN) == answer.count(ANSWER_CLOSE) == 1
    return float(framed and once and says_something(answer_in_tags(answer) or ""))


def says_something(text: str) -> bool:
    """Whether a text holds a letter, a digit or a symbol (Unicode categories L, N and S)."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)

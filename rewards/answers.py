"""Where the final answer stands: the last balanced ``\\boxed{…}`` after the thinking, else ``<answer>``.

Nothing inside the thinking counts, and a completion whose thinking never closed has no answer. Boxes that only ``and``,
commas and the like separate are one answer in several parts; any other text between two boxes makes the last one the
answer. So a model gains nothing by writing several candidates.
"""

from __future__ import annotations

import re

from rollout.template import Reasoning, answer_in_tags

_BOX = re.compile(r"\\f?boxed\s*\{")
_BETWEEN = re.compile(
    r"(?:[\s$,;.&]|\\[,;:! \\()\[\]]|\\q?quad(?![a-zA-Z])|\\(?:text|mathrm)\s*\{\s*(?:and|or|,)?\s*\}|\b(?:and|or)\b)*"
)
_LONGEST_GAP = 80  # characters between two parts of one answer


def final_answer(reasoning: Reasoning) -> str | None:
    """The text of the final answer, stripped; None when there is none."""
    if not reasoning.closed:
        return None
    parts = last_parts(reasoning.answer)
    return ", ".join(parts) if parts else answer_in_tags(reasoning.answer)


def last_parts(text: str) -> list[str]:
    """Contents of the last ``\\boxed{…}`` and of those before it that only separators part from it."""
    boxes = spans(text)
    parts: list[str] = []
    for index in range(len(boxes) - 1, -1, -1):
        parts.insert(0, text[slice(*boxes[index])].strip())
        gap = text[boxes[index - 1][1] + 1 : _opening(text, boxes[index][0])] if index else None
        if gap is None or len(gap) > _LONGEST_GAP or not _BETWEEN.fullmatch(gap):
            break
    return parts


def boxed(text: str) -> list[str]:
    """Contents of all balanced ``\\boxed{…}`` of a text, outermost only, in order, stripped."""
    return [text[start:end].strip() for start, end in spans(text)]


def spans(text: str) -> list[tuple[int, int]]:
    """Start and end of the content of every balanced box, outermost only, in order. Linear in the text."""
    closing = _closing_braces(text)
    found, position = [], 0
    while match := _BOX.search(text, position):
        end = closing.get(match.end() - 1)
        if end is None:
            position = match.end()
            continue
        found.append((match.end(), end))
        position = end + 1
    return found


def _opening(text: str, start: int) -> int:
    """Where the command of the box begins whose content starts at ``start``."""
    return text.rindex("\\", 0, start - 1)


def _closing_braces(text: str) -> dict[int, int]:
    """Index of each opening brace -> index of the one that closes it; escaped braces are text."""
    pairs: dict[int, int] = {}
    open_braces: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            pairs[open_braces.pop()] = match.start()
    return pairs

r"""What a text says, whatever way it is typed: the words that contamination is measured in.

Normalised away: Unicode compatibility forms (NFKC) and invisible characters, case, white space, punctuation, commas
between thousands, LaTeX spacing, sizes and styles (``\left``, ``\quad``, ``\text``, ``\dfrac``), programs of figures
(``[asy]…[/asy]``) and GSM8K's calculator notes (``<<3*60=180>>``). Numbers are kept, with their decimals. A word is a
run of letters or a number. Scripts that are written without blanks (Chinese, Japanese, Thai, …) give one token per
character, and such a character counts half a word.
"""

from __future__ import annotations

import re
import unicodedata

import regex

# Everything here sees casefolded text. A command ends where no letter follows.
_STYLES = re.compile(
    r"\^\s*\{?\\(?:circ|degree)\}?|\\[()\[\]]|\\(?:left|right|middle|big[lrg]?|bigg[lr]?|displaystyle|textstyle|"
    r"limits|q?quad|[lcvd]?dots[bc]?|circ|degree|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|bb|cal)|mbox|hbox|"
    r"operatorname)(?![a-z])"
)
_SYNONYMS = re.compile(
    r"\\(?:(?P<frac>[dtc]frac)|(?P<binom>[dt]binom)|(?P<sign>cdot|times|div|leq?|geq?|neq?|[lg]t))(?![a-z])"
)
_SIGNS = {
    "cdot": "*", "times": "*", "div": "/", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠",
    "lt": "<", "gt": ">",
}  # fmt: skip
_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\})(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_ALIKE = {"×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "−": "-", "‐": "-", "‑": "-"}
# Most texts that are not ASCII hold only these; without them they take the quick way.
_TYPOGRAPHY = re.compile("[×·⋅∙÷−‐-―‘-‟•…′″«»°£€\xa0]")
_RAISED = re.compile("[⁰¹²³⁴-⁹]+")
_FIGURE = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]", re.DOTALL)
_CALCULATOR = re.compile(r"<<[-+*/(). \d]{1,80}=[-. \d]{1,20}>>")
_INVISIBLE = regex.compile(r"\p{Cf}+")

_NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_ASCII_WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_WORD = regex.compile(rf"(?V1)[{_NO_BLANKS}]\p{{M}}*|\p{{Nd}}+(?:\.\p{{Nd}}+)?|[[\p{{L}}\p{{M}}]--[{_NO_BLANKS}]]+")
_CHARACTER = regex.compile(rf"[{_NO_BLANKS}]")
# Signs that change what a formula, a grid or a board says; not punctuation, hyphens between letters, Markdown's stars.
_SIGN = regex.compile(
    r"(?V1)(?<![a-z])-|-(?![a-z])|(?<!\*)\*(?!\*)|[+/^=<>≤≥≠()\[\]]|(?P<run>[#@%_|[\p{S}--[$^`~+<=>≤≥≠]]])(?P=run)*"
)
OPERATORS = frozenset("+-*/^")


def normalise(text: str, *, figures: bool = False) -> str:
    """The text as :func:`words` and :func:`symbols` want it; with ``figures``, what draws a figure stays."""
    if not text.isascii():
        text = _TYPOGRAPHY.sub(lambda match: _ALIKE.get(match[0], " "), text)
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", _RAISED.sub(r"^\g<0>", text))
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text).casefold())
    if "[asy]" in text and not figures:
        text = _FIGURE.sub(" ", text)
    if "<<" in text:
        text = _CALCULATOR.sub(" ", text)
    if "\\" in text or "{,}" in text:
        text = _LATEX_THOUSANDS.sub("", text)
        text = _SYNONYMS.sub(_synonym, _STYLES.sub(" ", text))
    return _THOUSANDS.sub("", text) if "," in text else text


def _synonym(match: re.Match[str]) -> str:
    return rf"\{match.lastgroup}" if match.lastgroup != "sign" else f" {_SIGNS[match['sign']]} "


def words(normal: str) -> list[str]:
    """The words of a normalised text, in order."""
    return (_ASCII_WORD if normal.isascii() else _WORD).findall(normal)


def symbols(normal: str) -> list[tuple[str, int, int]]:
    """(token, start, end) of the words and of the signs between them: operators, brackets, runs of any other symbol."""
    pattern = _ASCII_WORD if normal.isascii() else _WORD
    found = [*pattern.finditer(normal), *_SIGN.finditer(normal)]
    return sorted(((m[0], m.start(), m.end()) for m in found), key=lambda token: token[1])


def reading(text: str) -> list[str]:
    """How a whole text reads: its words and signs, figures included, without equals signs at the end."""
    tokens = [token for token, _, _ in symbols(normalise(text, figures=True))]
    while tokens and tokens[-1] == "=":
        tokens.pop()
    return tokens


def half_words(word: str) -> int:
    """Weight of a token: 2, and 1 for a character of a script without blanks."""
    return 2 if word.isascii() or not _CHARACTER.match(word) else 1

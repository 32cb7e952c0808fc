"""One spelling for what people write in many: LaTeX of an answer -> plainer LaTeX. Standard library only.

Nothing here decides whether two answers agree; it removes what carries no mathematics (wrapping, spacing, styles,
synonyms) and reads plain numbers.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 200

_WRAPPING = re.compile(r"^(?:\\\((.*)\\\)|\\\[(.*)\\\]|\$\$(.*)\$\$|\$([^$]*)\$|\\f?boxed\s*\{(.*)\})$", re.DOTALL)
_VULGAR = re.compile(r"(\d?)([¼-¾⅐-⅞])")
_WORDS = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\leq", r"\leqslant", "≤", "<="), r"\le "),
    **dict.fromkeys((r"\geq", r"\geqslant", "≥", ">="), r"\ge "),
    **dict.fromkeys((r"\neq", "≠", "!="), r"\ne "),
    **{
        r"\log_e": r"\ln",
        r"\log_{e}": r"\ln",
        r"\lt": "<",
        r"\gt": ">",
        "≈": r"\approx ",
        "∈": r"\in ",
        "∪": r"\cup ",
        "∩": r"\cap ",
    },
    **dict.fromkeys((r"\varnothing", "∅", r"\{\}", r"\empty"), r"\emptyset "),
    **dict.fromkeys((r"\infin", "∞"), r"\infty "),
    **dict.fromkeys((r"\tbinom", r"\dbinom"), r"\binom"),
    **dict.fromkeys((r"\lvert", r"\rvert", r"\vert", r"\mid"), "|"),
    **{"π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "÷": "/", r"\div": "/", "±": r"\pm "},
    **dict.fromkeys((r"\degree", "°", r"^{\circ}", r"^\circ", r"^ \circ"), "°"),
    **dict.fromkeys(
        (r"\displaystyle", r"\textstyle", r"\limits", r"\left", r"\right", r"\bigl", r"\bigr", r"\big"), ""
    ),
    **{r"\%": "%", r"\$": "$", r"\#": "#", "−": "-", "–": "-", "—": "-", "²": "^2", "³": "^3", "\u2044": "/"},
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\ldots": "…", r"\dots": "…", r"\colon": ":", r"\to": r"\to "},
}
_WORD = re.compile(
    "|".join(re.escape(w) + ("(?![a-zA-Z])" if w[-1].isalpha() else "") for w in sorted(_WORDS, key=len, reverse=True))
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname\*?)\s*\{([^{}]*)\}")
_ROMAN = re.compile(r"\\mathrm\s*([a-zA-Z])(?![a-zA-Z])")
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad|~|\\hspace\s*\{[^{}]*\}")
_THIN = re.compile(r"(?<!\\)\\!|(?<!\\)\\ ?$")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,|\{,\}|\\,|\\!,\\!|,\\!\s*|\\ | )\d{3})+(?![\d,]|\s*/)")
_FRACTION = re.compile(r"\\frac\s*(\{|[^\s{}\\])")
_SQRT = re.compile(r"\\sqrt\s*(?:(\d|[a-z](?![a-z]))|\(([^()]*)\))")
_BARE_SQRT = re.compile(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|log|ln|pi|infinity|infty)(?![a-zA-Z])")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}")
_INVISIBLE = {"Cf", "Cc", "Co", "Cs"}  # among them the marks that turn the direction of writing

NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_SIGN = r"[+-]*"
_PLAIN = re.compile(rf"({_SIGN})({NUMBER})")
_SCIENTIFIC = re.compile(rf"({_SIGN})(?:({NUMBER})(?:\\times|\\cdot|\*))?10\^(?:\{{({_SIGN}\d+)\}}|(\d))")
_EXPONENT = re.compile(rf"({_SIGN})({NUMBER})[eE]([+-]?\d+)")
_RATIO = re.compile(
    rf"({_SIGN})(?:\\frac\{{({_SIGN}(?:{NUMBER}))\}}\{{({_SIGN}(?:{NUMBER}))\}}|({NUMBER})/({_SIGN}(?:{NUMBER})))"
)
_MIXED = re.compile(rf"({_SIGN})(\d+)(?:\\frac\{{(\d+)\}}\{{(\d+)\}}| (\d+)/(\d+))")
_REPEATING = re.compile(rf"({_SIGN})(\d*)\.(\d*)(?:\\overline\{{(\d+)\}}|\\dot\{{(\d)\}}|\\overline(\d)|\\dot(\d))")
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{(\d+)\}|(\d)|\{?\(?(\d+)\)?\}?)")


def normalised(text: str) -> str:
    """Plainer LaTeX of the same meaning, without any white space that carries none.

    Empty when nothing is left, or when the text holds invisible characters: what a person reads is then not what
    a program reads.
    """
    text = text.strip()
    if any(unicodedata.category(c) in _INVISIBLE and not c.isspace() for c in text):
        return ""
    text = _VULGAR.sub(lambda m: f"{m[1]} {unicodedata.normalize('NFKC', m[2])}".strip(), text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in unicodedata.normalize("NFKC", text))
    text = _unwrapped(text)
    text = _grouped(text)
    text = _THIN.sub("", _SPACING.sub(" ", text))
    text = _WORD.sub(lambda m: _WORDS[m[0]], text)
    text = _BARE_SQRT.sub(lambda m: "\\" + {"infinity": "infty"}.get(m[1], m[1]) + " ", text)
    text = _ROMAN.sub(r"\1", text)
    for pattern, new in ((_OVER, r"\\frac{\1}{\2}"), (_CHOOSE, r"\\binom{\1}{\2}")):
        text = pattern.sub(new, text)
    text = _SQRT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", _braced_fractions(text))
    return _unwrapped(" ".join(text.split()))


def _grouped(text: str) -> str:
    """Numbers without their thousands separators; a bare comma inside a tuple or set parts two numbers."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = sum(before.count(c) for c in "([") + before.count("\\{") > sum(
            before.count(c) for c in ")]"
        ) + before.count("\\}")
        bare = re.fullmatch(r"[\d,]+", match[0])
        return match[0] if inside and bare else re.sub(r"\D", "", match[0])

    return _GROUPED.sub(joined, text)


def _unwrapped(text: str) -> str:
    while True:
        text = text.strip().removesuffix(".").strip()
        match = _WRAPPING.match(text)
        inner = next((group for group in match.groups() if group is not None), None) if match else None
        if inner is None or (text.startswith("\\") and "boxed" in text[:8] and not balanced(inner)):
            return text
        text = inner


def balanced(text: str) -> bool:
    """Whether every brace has its partner; escaped braces are text."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth < 0:
            return False
    return depth == 0


def _braced_fractions(text: str) -> str:
    r"""``\frac12`` and ``\frac1{x}`` -> ``\frac{1}{2}``, ``\frac{1}{x}``."""
    out, position = [], 0
    for match in re.finditer(r"\\frac(?![a-zA-Z])", text):
        if match.start() < position:
            continue
        out.append(text[position : match.end()])
        position = match.end()
        for _ in range(2):
            while position < len(text) and text[position] == " ":
                position += 1
            if position >= len(text) or text[position] in "{\\":
                break
            out.append("{" + text[position] + "}")
            position += 1
        else:
            continue
        if position < len(text) and text[position] == "{":
            end = matching(text, position)
            if end is not None and end + 1 < len(text):
                after = end + 1
                while after < len(text) and text[after] == " ":
                    after += 1
                if after < len(text) and text[after] not in "{\\ ":
                    out.append(_braced_fractions(text[position : end + 1]) + "{" + text[after] + "}")
                    position = after + 1
    return "".join(out) + text[position:]


def matching(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at ``start``; None when there is none."""
    opening, closing = text[start], {"{": "}", "(": ")", "[": "]"}[text[start]]
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return position
        position += 1
    return None


def without_text_commands(text: str) -> str:
    r"""``\text{…}`` and its like replaced by what they hold."""
    while (new := _TEXT.sub(r" \1 ", text)) != text:
        text = new
    return " ".join(text.split())


def compact(text: str) -> str:
    """Without any white space but that between two words and that between two digits."""
    return re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", re.sub(r"(?<=\d) (?=\d)", "\x00", text)).replace("\x00", " ")


def rational(text: str) -> tuple[Fraction, int | None] | None:
    """The value of a plain number in normalised, compact LaTeX, and its significant digits where it is a decimal.

    Understood: integers, decimals, fractions, mixed numbers, powers of ten, repeating decimals, ``3!`` is not.
    The digits are None for what is exact by its form. None when the text is no plain number.
    """
    if not text or len(text) > MAX_DIGITS:
        return None
    if text.startswith("(") and matching(text, 0) == len(text) - 1:
        return rational(text[1:-1])
    if text.startswith("{") and matching(text, 0) == len(text) - 1:
        return rational(text[1:-1])
    if match := _PLAIN.fullmatch(text):
        return _signed(match[1], Fraction(match[2])), _significant(match[2])
    if (match := _SCIENTIFIC.fullmatch(text)) and abs(exponent := int(match[3] or match[4])) <= MAX_DIGITS:
        mantissa = match[2] or "1"
        return _signed(match[1], Fraction(mantissa) * Fraction(10) ** exponent), _significant(mantissa)
    if (match := _EXPONENT.fullmatch(text)) and abs(int(match[3])) <= MAX_DIGITS:
        return _signed(match[1], Fraction(match[2]) * Fraction(10) ** int(match[3])), _significant(match[2])
    if match := _RATIO.fullmatch(text):
        top, bottom = (match[2], match[3]) if match[2] else (match[4], match[5])
        below = _number(bottom)
        return (_signed(match[1], _number(top) / below), None) if below else None
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = int(match[2]), int(match[3] or match[5]), int(match[4] or match[6])
        return (_signed(match[1], whole + Fraction(top, bottom)), None) if bottom > top > 0 else None
    if match := _REPEATING.fullmatch(text):
        period = next(group for group in match.groups()[3:] if group)
        fixed = Fraction((match[2] or "0") + "." + (match[3] or "0"))
        return _signed(match[1], fixed + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(match[3]))), None
    return None


def _number(text: str) -> Fraction:
    match = _PLAIN.fullmatch(text)
    assert match is not None
    return _signed(match[1], Fraction(match[2]))


def _signed(signs: str, value: Fraction) -> Fraction:
    return -value if signs.count("-") % 2 else value


def _significant(digits: str) -> int | None:
    """Significant digits of a decimal; None for an integer, which is exact."""
    return len(digits.replace(".", "").lstrip("0")) if "." in digits else None


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of ``2516_8``; None when the text is no number with a base."""
    match = _BASED.fullmatch(text)
    if match is None or not any(c.isdigit() for c in match[1]):
        return None
    return match[1].lstrip("0").upper() or "0", int(match[2] or match[3] or match[4])

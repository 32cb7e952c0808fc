"""Numbers with units, currencies, degrees and percent signs; when two numbers are the same.

A missing or extra unit is forgiven, a different one is not. A decimal is exact or agrees to six significant digits
with what it stands for.
"""

from __future__ import annotations

import re
from fractions import Fraction

SIGNIFICANT = 6
_NOISE = Fraction(1, 10**9)

FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "pi", "sqrt", "exp", "min", "max", "gcd", "lcm", "mod", "inf"}
_CURRENCY = "$€£¥₹"
_SHORT_UNITS = (
    "mm|cm|dm|km|m|in|ft|yd|mi|mg|kg|g|lb|lbs|oz|ml|mL|l|L|s|ms|h|hr|hrs|min|mph|kmh|Hz|J|N|W|V|A|K|C|F|Pa|mol|rad|sq"
)
_POWER = r"(?:\s*(?:\^\s*(?:\d|\{\d\})))?"
_UNIT_WORD = rf"(?:[a-zA-Z]{{3,}}|{_SHORT_UNITS}){_POWER}"
_UNIT = re.compile(
    rf"^(.*?[\d)}}°!]|.*?\\pi)\s*((?:{_UNIT_WORD})(?:\s*(?:/|per|\s|\\cdot)\s*(?:{_UNIT_WORD}))*)\.?$", re.DOTALL
)
_SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "mile": "mi",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "gram": "g", "kilogram": "kg", "pound": "lb",
    "liter": "l", "litre": "l", "L": "l", "dollar": "$", "euro": "€", "percent": "%", "pct": "%", "percentage": "%",
    "degree": "°", "deg": "°", "yard": "yd", "buck": "$", "unit": "", "square unit": "",
}  # fmt: skip


def quantity(text: str) -> tuple[str, str]:
    """An answer as number and unit; the unit is empty where there is none."""
    text = text.strip()
    for sign in _CURRENCY:
        if text.startswith(sign) or text.endswith(sign) or text.startswith("-" + sign):
            return text.replace(sign, "", 1).strip(), sign
    if text.endswith("%"):
        return text[:-1].strip(), "%"
    if text.endswith("°") and "\\" not in text.replace("\\frac", "").replace("\\pi", ""):
        return text[:-1].strip(), "°"
    match = _UNIT.fullmatch(text)
    if match is None or match[1].count("(") != match[1].count(")") or match[1].count("{") != match[1].count("}"):
        return text, ""
    stem, unit = match[1].strip(), match[2]
    if unit.strip() in FUNCTIONS or unit.strip() in ("and", "or"):
        return text, ""
    words = [word.strip() for word in re.split(r"\s+", unit) if word.strip()]
    return stem, " ".join(
        _SAME_UNIT.get(
            word.removesuffix("s") if len(word) > 2 else word, word.removesuffix("s") if len(word) > 2 else word
        )
        for word in words
    )


def same_number(gold: tuple[Fraction, int | None], answer: tuple[Fraction, int | None]) -> bool:
    """Exactly equal, or a decimal of at least six significant digits that agrees to six with what it stands for.

    A decimal stands for a number that has no finite decimal, or for another decimal of at least six digits. So a third
    is 0.333333, but neither 7 nor 0.1 has neighbours; 5.00000000001 is 5 (the noise of floating point).

    Each number comes with its significant digits where it is a decimal, as ``normalise.rational`` gives it.
    """
    (a, digits_a), (b, digits_b) = gold, answer
    if a == b:
        return True
    digits = [count for count in (digits_a, digits_b) if count is not None]
    if a == 0 or b == 0 or max(digits, default=0) < SIGNIFICANT:
        return False
    if abs(a - b) <= _NOISE * max(abs(a), abs(b)):
        return True
    exact = a if digits_a is None else b
    if min(digits) < SIGNIFICANT or (len(digits) == 1 and _is_finite_decimal(exact)):
        return False
    unit = last_digit(max(abs(a), abs(b)), SIGNIFICANT)
    return round(a / unit) == round(b / unit) or int(a / unit) == int(b / unit)  # rounded, or cut off


def _is_finite_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def last_digit(value: Fraction, digits: int) -> Fraction:
    """One unit of the last of so many significant digits of a positive number."""
    exponent = len(str(value.numerator)) - len(str(value.denominator))  # within one of the right one
    exponent -= Fraction(10) ** exponent > value
    return Fraction(10) ** (exponent + 1 - digits)

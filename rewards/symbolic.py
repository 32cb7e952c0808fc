"""Do two single expressions mean the same? LaTeX -> sympy, then exact or numeric comparison at high precision.

Expressions agree when they agree at several random points to thirty-five digits (the idea of Schwartz, 1980, and
Zippel, 1979, for polynomials). Nothing is simplified symbolically: simplifiers have no bound on time. A text that does
not parse as a whole has no value; there is no falling back to some number inside it.

The text is untrusted. It goes through latex2sympy2_extended's grammar, never through eval, sympify or parse_expr.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.equivalence import is_label, relation, top_split
from rewards.normalise import NUMBER
from rewards.quantities import SIGNIFICANT, same_number

_DIGITS = 50
_AGREE = 10**-35
_POINTS = 6
_DEGREES = re.compile(rf"({NUMBER})\s*°")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_UNION = re.compile(r"\\cup(?![a-zA-Z])|\bor\b|\\lor(?![a-zA-Z])")
_CUT = re.compile(r"\\cap(?![a-zA-Z])")
_MINUS = re.compile(r"\\setminus(?![a-zA-Z])|\\backslash(?![a-zA-Z])")
_SETS = {
    r"\mathbb{R}": "Reals",
    r"\mathbb R": "Reals",
    r"\emptyset": "EmptySet",
    r"\R": "Reals",
    r"\mathbb{Z}": "Integers",
}


def same_expression(gold: str, answer: str) -> bool:
    """Whether two texts in normalised LaTeX (``rewards.normalise``) agree; False where one of them cannot be read."""
    if _looks_like_set(gold) or _looks_like_set(answer):
        left, right = as_set(gold), as_set(answer)
        return left is not None and right is not None and _same_set(left, right, _decimals(gold, answer))
    (left_terms, left_ops), (right_terms, right_ops) = relation(gold), relation(answer)
    if left_ops or right_ops:
        if set(left_ops) == set(right_ops) == {"="} and len(left_ops) == len(right_ops) == 1:
            return _same_equation(left_terms, right_terms)
        if left_ops == right_ops == ["\\ne"]:
            return _same_equation(left_terms, right_terms)
        return False
    left, right = parsed(gold), parsed(answer)
    return left is not None and right is not None and _equal(left, right, _decimals(gold, answer))


@lru_cache(maxsize=4096)
def parsed(text: str) -> Any:
    """The sympy object of a whole text, None when it is not one."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = text.replace("°", "")
    if not text.strip() or "…" in text or re.search(r"[?@#]|\\infty\s*\\infty", text):
        return None
    try:
        found = latex2sympy(text, conversion_config=ConversionConfig(lowercase_symbols=False))
    except RecursionError:
        raise
    except Exception:  # its parser raises bare exceptions for what it cannot read
        return None
    if isinstance(found, list):
        return None
    constants = {sympy.Symbol("i"): sympy.I, sympy.Symbol("e"): sympy.E}
    if not isinstance(found, sympy.Basic):
        return found
    found = found.subs({s: v for s, v in constants.items() if s in found.free_symbols})
    return found.replace(lambda part: isinstance(part, sympy.Float), lambda part: sympy.Rational(str(part)))


def _equal(left: Any, right: Any, digits: int = 0) -> bool:
    """``digits``: the most significant digits of a decimal in the two texts; from six on, six have to agree."""
    import sympy

    if left == right:
        return left is not sympy.nan
    if any(isinstance(side, sympy.MatrixBase) or hasattr(side, "as_explicit") for side in (left, right)):
        return _same_matrix(left, right, digits)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return False
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for point in _points(symbols):
        a, b = _value(left, point), _value(right, point)
        if a is None or b is None:
            return not digits and left.doit() == right.doit()
        if _close(a, b) or (digits >= SIGNIFICANT and _six_digits(a, b)):
            continue
        if not (_is_noise(left, point, a) and _is_noise(right, point, b)):
            return False
    return True


def _six_digits(left: Any, right: Any) -> bool:
    if not (left.is_real and right.is_real) or not left.is_finite or not right.is_finite:
        return False
    a, b = (Fraction(str(side)) for side in (left, right))
    return same_number((a, SIGNIFICANT), (b, SIGNIFICANT))


def _is_noise(expression: Any, point: dict[Any, Any], value: Any) -> bool:
    """Whether a tiny value is what rounding left of 0: with more digits it is another one."""
    if value == 0:
        return True
    if abs(value) > 10**-30:
        return False
    finer = _value(expression, point, 3 * _DIGITS)
    return finer is None or finer == 0 or not _close(value, finer)


def _decimals(*texts: str) -> int:
    """The most significant digits of a decimal in the texts, 0 when there is none."""
    found = [number for text in texts for number in re.findall(NUMBER, text) if "." in number]
    return max((len(number.replace(".", "").lstrip("0")) for number in found), default=0)


def _points(symbols: Sequence[Any]) -> list[dict[Any, Any]]:
    import sympy

    if not symbols:
        return [{}]
    draw = random.Random(20_240_229)  # fixed: the same answer is judged alike every time
    return [
        {s: sympy.Rational(draw.randint(101, 997) * (1 if index % 2 else draw.choice((1, -1))), 331) for s in symbols}
        for index in range(_POINTS)
    ]


def _value(expression: Any, point: dict[Any, Any], digits: int = _DIGITS) -> Any:
    """The number that an expression is at a point, None when it is none."""
    import sympy

    try:
        value = expression.subs(point) if point else expression
        if value in (sympy.oo, -sympy.oo):
            return value
        if value.has(sympy.nan, sympy.zoo):
            return None
        value = sympy.N(value.doit() if value.has(*_unevaluated()) else value, digits)
        return value if value.is_number and value.is_finite else None
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None  # sympy's ways to say that there is no such number, or none that it can hold


def _unevaluated() -> tuple[type, ...]:
    import sympy

    return sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit


def _close(left: Any, right: Any) -> bool:
    import sympy

    if left in (sympy.oo, -sympy.oo) or right in (sympy.oo, -sympy.oo):
        return left == right
    size = max(abs(left), abs(right))
    return bool(size == 0 or abs(left - right) <= _AGREE * size)


def _same_matrix(left: Any, right: Any, digits: int) -> bool:
    import sympy

    both = [side.doit() if hasattr(side, "doit") else side for side in (left, right)]
    both = [side.as_explicit() if hasattr(side, "as_explicit") else side for side in both]
    if not all(isinstance(side, sympy.MatrixBase) for side in both) or both[0].shape != both[1].shape:
        return False
    return all(_equal(a, b, digits) for a, b in zip(both[0], both[1], strict=True))


def _same_equation(left: Sequence[str], right: Sequence[str]) -> bool:
    """Both say the same when the differences of their sides are in a constant ratio that is not 0."""
    import sympy

    sides = [parsed(text) for text in (*left, *right)]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    first, second = sides[0] - sides[1], sides[2] - sides[3]
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if first.free_symbols != second.free_symbols:
        return False
    values = [(_value(first, point), _value(second, point)) for point in _points(symbols)]
    if any(a is None or b is None or abs(a) < _AGREE or abs(b) < _AGREE for a, b in values):
        return False
    (first_value, second_value), *_ = values
    return all(_close(a * second_value, b * first_value) for a, b in values)


def _looks_like_set(text: str) -> bool:
    if _UNION.search(text) or _CUT.search(text) or _MINUS.search(text) or any(name in text for name in _SETS):
        return True
    return any(op in ("<", ">", "\\le", "\\ge") for op in relation(text)[1]) or _interval(text.strip()) is not None


def as_set(text: str) -> Any:
    """The sympy set of intervals, ``\\{…\\}``, their unions, and inequalities in one variable; None when it is none."""
    import sympy

    text = text.strip()
    terms, operators = relation(text)
    if operators and operators[0] == "\\in" and is_label(terms[0]):
        return as_set(text.split("\\in", 1)[1])
    for pattern, join in ((_UNION, sympy.Union), (_MINUS, None), (_CUT, sympy.Intersection)):
        pieces = top_split(text, pattern)
        if len(pieces) > 1:
            found = [as_set(piece) for piece in pieces]
            if any(each is None for each in found):
                return None
            return join(*found) if join else found[0] - sympy.Union(*found[1:])
    if text in _SETS:
        return getattr(sympy.S, _SETS[text])
    if text.startswith("\\{") and text.endswith("\\}"):
        members = [parsed(item) for item in top_split(text[2:-2], re.compile(","))]
        return None if any(member is None for member in members) else sympy.FiniteSet(*members)
    return _interval(text) if not operators else _inequality(terms, operators)


def _interval(text: str) -> Any:
    import sympy

    if text[:1] not in ("(", "[", "]") or text[-1:] not in (")", "]", "["):
        return None
    ends = top_split(text[1:-1], re.compile("[,;]"))
    if len(ends) != 2:
        return None
    low, high = (parsed(end) for end in ends)
    if not _real(low) or not _real(high):
        return None
    return sympy.Interval(low, high, left_open=text[0] in "(]", right_open=text[-1] in ")[")


def _real(value: Any) -> bool:
    import sympy

    return isinstance(value, sympy.Expr) and not value.free_symbols and value.is_extended_real is not False


def _inequality(terms: Sequence[str], operators: Sequence[str]) -> Any:
    """The solutions of ``a < x \\le b`` and of one inequality in one variable."""
    import sympy

    makers = {"<": sympy.Lt, ">": sympy.Gt, "\\le": sympy.Le, "\\ge": sympy.Ge, "\\ne": sympy.Ne}
    if not set(operators) <= makers.keys():
        return None
    sides = [parsed(term) for term in terms]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    symbols = set().union(*(side.free_symbols for side in sides))
    functions = set().union(*(side.atoms(sympy.core.function.AppliedUndef) for side in sides))
    if len(functions) == 1:  # 0 < f(x) < 1 is about f(x)
        stand_in = sympy.Symbol("f0", real=True)
        sides, symbols = [side.subs(next(iter(functions)), stand_in) for side in sides], {stand_in}
    if len(symbols) != 1:
        return None
    real = sympy.Symbol("x0", real=True)
    sides = [side.subs(next(iter(symbols)), real) for side in sides]
    answer: Any = sympy.S.Reals
    for index, operator in enumerate(operators):
        claim = makers[operator](sides[index], sides[index + 1])
        if claim in (True, False):
            return None
        try:
            answer = answer.intersect(claim.as_set())
        except (NotImplementedError, ValueError, TypeError):
            return None
    return answer


def _same_set(left: Any, right: Any, digits: int) -> bool:
    if left == right:
        return True
    ours, theirs = _pieces(left), _pieces(right)
    return ours is not None and theirs is not None and len(ours) == len(theirs) and all(
        kinds == other_kinds and all(_equal(a, b, digits) for a, b in zip(ends, other_ends, strict=True))
        for (kinds, ends), (other_kinds, other_ends) in zip(ours, theirs, strict=True)
    )  # fmt: skip


def _pieces(found: Any) -> list[tuple[Any, list[Any]]] | None:
    """A union of intervals and points as (kind, ends), in order; None for any other set."""
    import sympy

    parts = found.args if isinstance(found, sympy.Union) else (found,)
    out = []
    for part in parts:
        if isinstance(part, sympy.Interval):
            out.append(((bool(part.left_open), bool(part.right_open)), [part.start, part.end]))
        elif isinstance(part, sympy.FiniteSet):
            out += [(None, [member]) for member in part.args]
        else:
            return None
    try:
        return sorted(out, key=lambda piece: float(piece[1][0]))
    except (TypeError, ValueError):
        return None

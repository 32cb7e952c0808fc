"""Do two answers mean the same? Structure first (lists, tuples, intervals, relations), then the leaves.

Rules. A missing or extra label (``x =``) or unit is forgiven, a different one is not. Solution lists are unordered,
tuples are ordered, open and closed ends differ. A number in another base equals the same digits in the same base
alone. Numbers and units are in ``rewards.quantities``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewards.normalise import based, compact, matching, normalised, rational, without_text_commands
from rewards.quantities import FUNCTIONS, quantity, same_number

MAX_PARTS = 64

_RELATIONS = re.compile(r"\\(?:le|ge|ne|in)(?![a-zA-Z])|[=<>]")
_STRONG = re.compile(r";|\b(?:and|or)\b|\\(?:lor|land|vee|wedge|quad)(?![a-zA-Z])")
_LABEL = re.compile(r"[^\d+*/^]*(?:_(?:\d|\{[^{}]*\})[^\d+*/^]*)*")
_CALL = re.compile(r"([A-Za-z]+(?:_\w|_\{\w+\})?)\(\w+\)")
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CHOICE = re.compile(r"\(([A-J])\)(?:\s*[A-Za-z\d\\].*)?|([A-J])(?:[).:]\s*.*|\s+[A-Z]?[a-z]{2,}.*)?", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_][\w\s,.'’:()-]*")
Leaf = Callable[[str, str], bool]


@dataclass(frozen=True)
class Parts:
    """A text in several parts. ``brackets``: ``()``, ``[)`` …, ``{}`` for sets, empty for a bare list."""

    items: tuple[str, ...]
    brackets: str

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}", "\\{}")


def equivalent(gold: str, answer: str, leaf: Leaf) -> bool:
    """Whether two answers agree by the rules of the module. ``leaf`` decides on two single expressions."""
    left, right = (_exact_part(without_text_commands(normalised(text))) for text in (gold, answer))
    return bool(left and right) and _same(left, right, leaf)


def is_readable(answer: str, parse: Callable[[str], object]) -> bool:
    """Whether an answer is words, or made of parts and terms that ``parse`` gives anything but None for."""
    text = without_text_commands(normalised(answer))
    if not text:
        return False
    if _words(text) or based(compact(text)) or _CHOICE.fullmatch(text):
        return True
    parts = split_parts(text)
    terms = relation(text)[0] if parts is None else list(parts.items)
    if len(terms) > 1 or parts is not None:
        return all(is_readable(term, parse) for term in terms)
    stem = quantity(text)[0]
    return rational(compact(stem)) is not None or _rows(text) is not None or parse(stem) is not None


def _exact_part(text: str) -> str:
    r"""``x = 1/3 \approx 0.33`` without its approximation; ``x \approx 11`` has nothing else."""
    exact, _, rest = text.partition("\\approx")
    return text.replace("\\approx", "=") if not rest or is_label(exact) else exact


def _same(gold: str, answer: str, leaf: Leaf) -> bool:
    left, right = compact(gold), compact(answer)
    if left == right:
        return bool(left)
    if not left or not right:
        return False
    bases = based(left), based(right)
    if any(bases):
        return bases[0] == bases[1]
    for judge in (_same_choice, _same_matrix, _same_words):
        verdict = judge(gold, answer, leaf)
        if verdict is not None:
            return verdict
    if _same_quantity(gold, answer, leaf):
        return True
    for judge in (_same_sets, _same_parts, _same_relation, _same_ratio):
        verdict = judge(gold, answer, leaf)
        if verdict is not None:
            return verdict
    return leaf(gold, answer)


def _same_choice(gold: str, answer: str, leaf: Leaf) -> bool | None:
    """``(B)``, ``B``, ``(B) 42``, ``B. Cecile``: the letter counts. None unless both are choices."""
    left, right = _CHOICE.fullmatch(gold.strip()), _CHOICE.fullmatch(answer.strip())
    return (left[1] or left[2]) == (right[1] or right[2]) if left and right else None


def _same_words(gold: str, answer: str, leaf: Leaf) -> bool | None:
    """Texts without regard to case and punctuation; None unless one side is nothing but words."""
    left, right = _words(gold), _words(answer)
    if left is None and right is None:
        return None
    if left is not None and right is not None:
        return True if left == right else None if max(len(left), len(right)) <= 3 else False
    # A word is no number, and a number no word; a bare list with "and" in it is not words.
    return (
        None
        if any(_STRONG.search(text) or _RELATIONS.search(text) or "\\" in text for text in (gold, answer))
        else False
    )


def _words(text: str) -> str | None:
    text = text.strip()
    if not _WORDS.fullmatch(text) or not re.search(r"[^\W\d_]{2,}", text) or "," in text:
        return None
    names = re.findall(r"[^\W\d_]+", text)
    if names and all(name in FUNCTIONS for name in names):
        return None
    return " ".join(re.sub(r"[^\w\s]", " ", text).casefold().split())


def _same_matrix(gold: str, answer: str, leaf: Leaf) -> bool | None:
    left, right = _rows(gold), _rows(answer)
    if left is None and right is None:
        return None
    left, right = (rows if rows is not None else _as_vector(text) for rows, text in ((left, gold), (right, answer)))
    if left is None or right is None:
        return None  # matrices in a larger expression: the leaf's
    if {len(left), len(right)} != {len(left)} and 1 in (len(left), len(right)):
        left, right = _column(left), _column(right)
    if [len(row) for row in left] != [len(row) for row in right]:
        return False
    return all(
        _same(a, b, leaf) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True)
    )


def _rows(text: str) -> list[list[str]] | None:
    text = text.strip()
    if text[:1] in "([" and text[-1:] in ")]" and "\\begin" in text:
        text = text[1:-1].strip()
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _as_vector(text: str) -> list[list[str]] | None:
    parts = split_parts(text)
    return [list(parts.items)] if parts is not None and parts.brackets == "()" else None


def _column(rows: list[list[str]]) -> list[list[str]]:
    return [[cell] for cell in rows[0]] if len(rows) == 1 else rows


def split_parts(text: str) -> Parts | None:
    """The parts of a list, tuple, set or interval; None for a single expression."""
    text = text.strip()
    brackets, inner = "", text
    if text.startswith("\\{") and text.endswith("\\}"):
        brackets, inner = "\\{}", text[2:-2]
    elif text[:1] == "{" and matching(text, 0) == len(text) - 1:
        brackets, inner = "{}", text[1:-1]
    elif text[:1] in ("(", "[", "]") and text[-1:] in (")", "]", "[") and _level(text[1:-1]):
        brackets, inner = text[0] + text[-1], text[1:-1]
    items = _separated(inner)
    if len(items) == 1 and brackets == "\\{}":
        return Parts((items[0],), brackets)
    return Parts(tuple(items), brackets) if 1 < len(items) <= MAX_PARTS else None


def _level(text: str) -> bool:
    """Whether brackets never close more than they opened; kinds may mix, as they do in intervals."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _separated(text: str) -> list[str]:
    groups = [group.strip().removesuffix(",").strip() for group in top_split(text, _STRONG)]
    groups = [group for group in groups if group]
    parts = [[part.strip() for part in top_split(group, re.compile(","))] for group in groups]
    if len(groups) > 1 and len(parts[0]) > 1 and len({len(each) for each in parts}) == 1:
        return groups  # p = 5, q = 2; p = 7, q = 2: two pairs
    items = [part for each in parts for part in each]
    return items if all(items) else [text]


def top_split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The text cut at separators that stand in no bracket."""
    depth, last, out, position = 0, 0, [], 0
    while position < len(text):
        character = text[position]
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            out.append(text[last:position])
            last = position = match.end()
            continue
        if character == "\\" and position + 1 < len(text) and not text[position + 1].isalpha():
            depth += (text[position + 1] == "{") - (text[position + 1] == "}")
            position += 2
            continue
        depth += (character in "([{") - (character in ")]}")
        position += 1
    return [*out, text[last:]]


def _same_parts(gold: str, answer: str, leaf: Leaf) -> bool | None:
    left, right = split_parts(_unlabelled_whole(gold)), split_parts(_unlabelled_whole(answer))
    left, right = _signs(left, gold), _signs(right, answer)
    if left is None and right is None:
        return None
    if left is None or right is None:
        one, whole = (left, answer) if left is not None else (right, gold)
        assert one is not None
        if len(one.items) == 1:
            return _same(one.items[0], whole, leaf)
        return (
            None
            if rational(compact(whole)) is None and (_decimal_comma(one) or "\\begin" in whole)
            else _as_decimal(one, whole)
        )
    left, right = _distinct(left), _distinct(right)
    if len(left.items) != len(right.items):
        return False
    if {left.brackets, right.brackets} - {"", "{}"} and not _fit(left.brackets, right.brackets):
        return False
    if left.ordered or right.ordered:
        return all(_same(a, b, leaf) for a, b in zip(left.items, right.items, strict=True))
    return _matched(left.items, right.items, leaf)


def _distinct(parts: Parts) -> Parts:
    """A list or set without what stands there twice."""
    return (
        parts if parts.ordered else Parts(tuple({compact(item): item for item in parts.items}.values()), parts.brackets)
    )


def _signs(parts: Parts | None, text: str) -> Parts | None:
    r"""``1 \pm \sqrt2`` as a list of two."""
    if parts is not None and (parts.ordered or not any("\\pm" in item for item in parts.items)):
        return parts
    if parts is None and ("\\pm" not in text or "\\mp" in text):
        return None
    items = parts.items if parts is not None else (text,)
    both: list[str] = []
    for item in items:
        label, relation, value = item.rpartition("=")
        source = value if relation and _LABEL.fullmatch(label) else item
        both += [source.replace("\\pm", "+"), source.replace("\\pm", "-")] if "\\pm" in source else [source]
    return Parts(tuple(both), parts.brackets if parts is not None else "")


def _fit(left: str, right: str) -> bool:
    """A tuple may stand without its brackets; a set is no tuple, and no interval either."""
    kinds = {left, right}
    return left == right or kinds <= {"", "{}", "\\{}"} or kinds <= {"", "{}", "()"}


def _decimal_comma(parts: Parts) -> bool:
    return len(parts.items) == 2 and parts.brackets == "" and all(item.isdigit() for item in parts.items)


def _as_decimal(parts: Parts, whole: str) -> bool:
    """``0,111`` is 0.111 where the other side is a single number."""
    if not _decimal_comma(parts):
        return False
    number, other = rational(".".join(parts.items)), rational(compact(whole))
    return number is not None and other is not None and same_number(number, other)


def _matched(left: Sequence[str], right: Sequence[str], leaf: Leaf) -> bool:
    """Each item of one side agrees with its own one of the other."""
    rest = list(right)
    for item in left:
        found = next((i for i, other in enumerate(rest) if _same(item, other, leaf)), None)
        if found is None:
            return False
        del rest[found]
    return True


def relation(text: str) -> tuple[list[str], list[str]]:
    """Terms and operators of ``a < x \\le b``; one term and no operator for an expression."""
    terms = top_split(text, _RELATIONS)
    if len(terms) == 1:
        return [text.strip()], []
    operators, position = [], 0
    for term in terms[:-1]:
        position += len(term)
        match = _RELATIONS.match(text, position)
        assert match is not None
        operators.append(match[0])
        position = match.end()
    return [term.strip() for term in terms], operators


def _unlabelled_whole(text: str) -> str:
    """``(p, q) = (3, 2)`` and ``x \\in [0, 1)`` without what stands before."""
    terms, operators = relation(text)
    named = operators and set(operators) <= {"=", "\\in"} and is_label(terms[0]) and all(terms)
    several = any(len(_separated(term)) > 1 for term in terms[1:-1])  # x = 1, y = 2
    return terms[-1] if named and not several else text


def is_label(text: str) -> bool:
    """Whether a left-hand side only names what the right-hand side is: ``x``, ``f(x)``, ``AB``, ``(p, q)``, ``A:B``."""
    text = re.sub(r"\\frac|\\angle|\\triangle|\\overline|\\ |\s", "", text.strip())
    return (
        bool(text)
        and "-" not in text
        and _LABEL.fullmatch(text) is not None
        and re.search(r"[^\W\d_]", text) is not None
    )


def _same_relation(gold: str, answer: str, leaf: Leaf) -> bool | None:
    (left, left_ops), (right, right_ops) = relation(gold), relation(answer)
    if not left_ops and not right_ops:
        return None
    equations = [bool(ops) and set(ops) <= {"=", "\\in"} for ops in (left_ops, right_ops)]
    if all(equations):
        if _name(left[0]) == _name(right[0]) and is_label(left[0]) and _same(left[-1], right[-1], leaf):
            return True
        return leaf(gold, answer)
    if not left_ops or not right_ops:
        terms, other, equation = (left, answer, equations[0]) if left_ops else (right, gold, equations[1])
        return equation and is_label(terms[0]) and _same(terms[-1], other, leaf)
    if len(left) == len(right):
        for terms, operators in ((right, right_ops), _turned(right, right_ops)):
            if operators == left_ops and all(_same(a, b, leaf) for a, b in zip(left, terms, strict=True)):
                return True
    return leaf(gold, answer)


def _name(label: str) -> str:
    """``f(x)`` and ``f(t)`` name the same."""
    match = _CALL.fullmatch(compact(label))
    return match[1] if match else compact(label)


def _turned(terms: list[str], operators: list[str]) -> tuple[list[str], list[str]]:
    other = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    return terms[::-1], [other.get(operator, operator) for operator in operators[::-1]]


def _same_sets(gold: str, answer: str, leaf: Leaf) -> bool | None:
    """Unions, intersections and inequalities against intervals: the leaf knows sets. None where neither is one."""
    texts = gold, answer
    composed = [re.search(r"\\(?:cup|cap|setminus|mathbb)(?![a-zA-Z])", text) is not None for text in texts]
    unequal = [any(op in ("<", ">", "\\le", "\\ge", "\\ne") for op in relation(text)[1]) for text in texts]
    lists = [
        _STRONG.search(text) is not None and re.search(r"[<>]|\\[lg]e(?![a-zA-Z])", text) is not None for text in texts
    ]
    if any(composed) or any(lists) or unequal[0] != unequal[1]:
        return leaf(gold, answer)
    return None


def _same_ratio(gold: str, answer: str, leaf: Leaf) -> bool | None:
    left, right = (top_split(text, re.compile(":")) for text in (gold, answer))
    if len(left) == len(right) == 1:
        return None
    a, b = ([rational(compact(part)) for part in side] for side in (left, right))
    if not all(a) or not all(b):
        return False if len(left) != len(right) else all(_same(x, y, leaf) for x, y in zip(left, right, strict=True))
    first, second = [x[0] for x in a if x], [y[0] for y in b if y]
    if len(first) == len(second):
        if 0 in (*first, *second):
            return first == second
        return all(x * second[0] == y * first[0] for x, y in zip(first, second, strict=True))
    if sorted((len(first), len(second))) == [1, 2]:
        pair, single = (first, second[0]) if len(first) == 2 else (second, first[0])
        return pair[1] != 0 and pair[0] / pair[1] == single
    return False


def _same_quantity(gold: str, answer: str, leaf: Leaf) -> bool:
    """Numbers with or without units, and expressions that differ in a unit alone."""
    (left, unit), (right, other) = quantity(gold), quantity(answer)
    if unit and other and unit != other:
        return False
    a, b = rational(compact(left)), rational(compact(right))
    if a is None or b is None:
        changed = (left, right) != (gold.strip(), answer.strip()) and bool(left and right)
        return changed and _same(left, right, leaf)
    if same_number(a, b):
        return True
    if (unit == "%") != (other == "%"):
        scaled = ((a[0] / 100, a[1]), b) if unit == "%" else (a, (b[0] / 100, b[1]))
        return same_number(*scaled)
    return False

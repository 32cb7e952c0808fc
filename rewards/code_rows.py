"""Rows of HumanEval+ and MBPP+ as tasks; rows of HumanEval and MBPP are tasks as they are (``code_tasks.task_of``).

Both give inputs as JSON, which knows neither tuples nor sets nor complex numbers. MBPP+ shows the right types once, in
the asserts of its base tests; what those tell is carried over to all other inputs.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.code_tasks import Task

# The order of what these return is not part of their problem.
_AS_SETS = (
    "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
    "intersection_array", "find_dissimilar", "Diff",
)  # fmt: skip
# These return some match or None.
_NOT_NONE = ("check_str", "text_match_three", "text_starta_endb")
_ROOT = "HumanEval/32"
# Inputs, by their place, whose right result alone has 6 million values or more: a judge would run out of memory.
_TOO_LARGE = {"Mbpp/255": (88, 89, 93, 99, 103)}
_SEVERAL = "*"
_DEEPEST = 4  # levels at which positions are told apart

Kinds = Mapping[tuple[Any, ...], str]
"""Path (position of the argument, then a position or ``*`` per level) -> tuple, set or number."""


def humaneval_plus(row: Mapping[str, Any]) -> Task:
    """Base and further inputs of a HumanEval+ row, judged against its own solution."""
    prompt = str(row["prompt"])
    return Task(
        kind="calls",
        entry_point=row["entry_point"],
        helpers=f"{prompt.rstrip()}\n    pass\n",
        inputs=tuple(map(tuple, [*row["base_input"], *row["plus_input"]])),
        reference=prompt + row["canonical_solution"],
        oracle="root" if row["task_id"] == _ROOT else "equal",
        atol=float(row["atol"]),
    )


def mbpp_plus(row: Mapping[str, Any]) -> Task:
    """Base and further inputs of an MBPP+ row, judged against its own solution."""
    name = row["entry_point"]
    kinds = learned_kinds(str(row["assertion"]), name, row["base_input"])
    left_out = _TOO_LARGE.get(str(row["task_id"]), ())
    inputs = [each for i, each in enumerate([*row["base_input"], *row["plus_input"]]) if i not in left_out]
    return Task(
        kind="calls",
        entry_point=name,
        inputs=tuple(tuple(restored(each, (i,), kinds) for i, each in enumerate(given)) for given in inputs),
        reference=row["canonical_solution"],
        oracle="set" if name in _AS_SETS else "not_none" if name in _NOT_NONE else "equal",
        atol=float(row["atol"]),
    )


def learned_kinds(asserts: str, name: str, inputs: Sequence[Sequence[Any]]) -> Kinds:
    """Types that JSON lost, from calls of ``name`` with literal arguments in the order of ``inputs``."""
    calls = [node for node in ast.walk(ast.parse(asserts)) if isinstance(node, ast.Call)]
    calls = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == name]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    seen: defaultdict[tuple[Any, ...], set[str]] = defaultdict(set)
    for call, given in zip(calls, inputs, strict=False):
        for position, (argument, value) in enumerate(zip(call.args, given, strict=False)):
            try:
                literal = ast.literal_eval(argument)
            except ValueError:  # a sum, a product: a number in any case
                continue
            _learn(literal, value, (position,), seen)
    return {path: next(iter(kinds)) for path, kinds in seen.items() if len(kinds) == 1}


def _learn(literal: Any, value: Any, path: tuple[Any, ...], seen: defaultdict[tuple[Any, ...], set[str]]) -> None:
    if isinstance(literal, int | float | complex):  # other inputs may give the number as a text
        seen[path].add("number")
    if not isinstance(value, list):
        return
    seen[path].add(type(literal).__name__)
    if isinstance(literal, list | tuple):
        for position, (one, other) in enumerate(zip(literal, value, strict=False)):
            for step in (_SEVERAL, position):
                _learn(one, other, (*path, step), seen)


def restored(value: Any, path: tuple[Any, ...], kinds: Kinds, above: str = "") -> Any:
    """A JSON value with the types that were learned: as its siblings, else at its very position.

    Lists deeper than any that was shown are what the list around them is.
    """
    known = (kinds[each] for each in _readings(path) if each in kinds)
    # Where a sibling showed a number, a list is still a list.
    kind = next((each for each in known if not (each == "number" and isinstance(value, list))), above)
    if kind == "number" and isinstance(value, str):
        return _number(value)
    if not isinstance(value, list):
        return value
    if len(path) > _DEEPEST:
        items = [restored(each, path, kinds, kind) for each in value]
    else:
        items = [restored(each, (*path, position), kinds, kind) for position, each in enumerate(value)]
    return set(items) if kind == "set" else tuple(items) if kind == "tuple" else items


def _readings(path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The path with its positions below the argument replaced by ``*``: all of them first, none of them last."""
    found = [path[:1]]
    for step in path[1:]:
        found = [(*each, way) for each in found for way in (_SEVERAL, step)]
    return found


def _number(text: str) -> int | float | complex | str:
    """The number that a text shows; a text that shows none stays one."""
    for kind in (int, float, complex):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""Recipe text -> a tree that remembers where each value was written, and back.

YAML is read by the 1.2 core schema instead of PyYAML's 1.1: ``1e-6`` is a number, ``off`` and ``12:30`` are text,
``010`` is ten. Anchors, aliases and the merge key ``<<`` work. Duplicate keys, several documents and self-referring
anchors are errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be used; one line: where, what is wrong, how to mend it."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: ``file:line``, or ``command line``."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


COMMAND_LINE = Origin("command line")
DEFAULT = Origin("default")


@dataclass(slots=True)
class Node:
    """One value of the tree.

    Attributes:
        value: a scalar, ``dict[str, Node]`` or ``list[Node]``.
        origin: where the value was written (of a mapping: where it begins).
        raw: the text of a scalar as it was typed.
        keys: of a mapping, where each key was written.
    """

    value: Any
    origin: Origin
    raw: str | None = None
    keys: dict[str, Origin] = field(default_factory=dict)


_MOST_NODES = 100_000
_MERGE = "<<"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit types of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol


_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 readers read as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a resolved recipe spells everything out


for _name, _pattern, _first in _CORE_SCHEMA:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


class _FlowDumper(_Dumper):
    """Writes everything on one line."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if "e" in text and "." not in text:  # 1e-06 is text to a YAML 1.1 reader, 1.0e-06 a number to both
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


def _represent_flow_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)
_FlowDumper.add_representer(float, _represent_float)
_FlowDumper.add_representer(str, _represent_flow_text)


def parse_recipe(text: str, source: str) -> Node:
    """Reads a YAML document whose top level is a mapping.

    Args:
        text: the document.
        source: how error messages and origins name it, usually its path.

    Raises:
        RecipeError: not YAML, not a mapping, empty, several documents, a duplicate or non-text key.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = " ".join(filter(None, (error.problem, error.context)))
        raise RecipeError(f"{source}:{line}: this is not valid YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        raise RecipeError(f"{source}: the recipe is empty; it needs at least model and stages")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    _refuse_explosion(node, source)
    return _convert(node, source, "", ())


def _refuse_explosion(node: yaml.Node, source: str) -> None:
    """Aliases become copies: nine levels of ten aliases each would be a thousand million."""
    sizes: dict[int, int] = {}

    def size(of: yaml.Node) -> int:
        if id(of) not in sizes:
            sizes[id(of)] = 1  # what refers to itself is refused later, with its place
            inner = of.value if isinstance(of, yaml.SequenceNode) else []
            if isinstance(of, yaml.MappingNode):
                inner = [part for pair in of.value for part in pair]
            sizes[id(of)] = 1 + sum(map(size, inner))
        return sizes[id(of)]

    try:
        total = size(node)
    except RecursionError:
        raise RecipeError(f"{source}: this is nested too deeply for a recipe") from None
    if total > _MOST_NODES:
        raise RecipeError(f"{source}: with its aliases spelled out it has {total} values, more than {_MOST_NODES}")


def parse_override(text: str) -> tuple[list[str], Node]:
    """Takes ``a.b=value`` apart; the value is read as YAML (``[1, 2]``, ``{a: 1}``, ``null`` work).

    Raises:
        RecipeError: no ``=``, an empty key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"an override is written a.b=value, got {text!r}")
    try:
        node = yaml.compose(value, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise RecipeError(f"command line: {key}: {value!r} is not valid YAML: {reason}") from None
    converted = Node(None, COMMAND_LINE, "") if node is None else _convert(node, COMMAND_LINE.source, key, ())
    if not isinstance(converted.value, (dict, list)):
        converted.raw = value  # a text field takes what was typed, quotes being the shell's
    return parts, converted


def _convert(node: yaml.Node, source: str, path: str, parents: tuple[int, ...]) -> Node:
    """PyYAML's nodes -> ours; an alias becomes a copy, so that an override changes one place only."""
    origin = COMMAND_LINE if source == COMMAND_LINE.source else Origin(source, node.start_mark.line + 1)
    if id(node) in parents:
        raise RecipeError(f"{origin}: {path or 'recipe'}: an anchor refers to itself")
    parents = (*parents, id(node))
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, source, path, parents, origin)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, source, f"{path}.{i}".strip("."), parents) for i, item in enumerate(node.value)]
        return Node(items, origin)
    return Node(_scalar(node, origin, path), origin, node.value)


def _convert_mapping(node: yaml.MappingNode, source: str, path: str, parents: tuple[int, ...], origin: Origin) -> Node:
    values: dict[str, Node] = {}
    keys: dict[str, Origin] = {}
    merged: list[Node] = []
    for key_node, value_node in node.value:
        at = origin if origin is COMMAND_LINE else Origin(source, key_node.start_mark.line + 1)
        key = _scalar(key_node, at, path) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise RecipeError(f"{at}: {path or 'recipe'}: a key must be text, got {key_node.value!r}; quote it")
        if key in values:
            raise RecipeError(f"{at}: {f'{path}.{key}'.strip('.')} is written twice, first at {keys[key]}; remove one")
        value = _convert(value_node, source, f"{path}.{key}".strip("."), parents)
        if key == _MERGE:
            merged += value.value if isinstance(value.value, list) else [value]
            continue
        values[key], keys[key] = value, at
    for block in merged:  # what is written here wins over what is merged in, the first merged over the later
        if not isinstance(block.value, dict):
            raise RecipeError(f"{block.origin}: {path or 'recipe'}: << takes a mapping or a list of them: <<: *anchor")
        values |= {key: value for key, value in block.value.items() if key not in values}
        keys |= {key: at for key, at in block.keys.items() if key not in keys}
    return Node(values, origin, keys=keys)


def _scalar(node: yaml.Node, origin: Origin, path: str) -> Any:
    """The Python value of a scalar node under the core schema.

    Raises:
        RecipeError: an explicit tag other than the core schema's.
    """
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, 0) if text[:2].lower() in ("0o", "0x") else int(text)
        if kind == "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    except ValueError:
        pass
    raise RecipeError(f"{origin}: {path or 'recipe'}: the tag {node.tag!r} does not fit {text!r}; leave the tag out")


def apply_override(root: Node, parts: list[str], value: Node) -> None:
    """Sets one value of the tree. A list element is named by its index, or by its ``name`` or ``kind``.

    Raises:
        RecipeError: an index or name that is not there, a name that fits several elements, or a path into a scalar.
    """
    target = root
    for depth, part in enumerate(parts):
        last, path = depth == len(parts) - 1, ".".join(parts[: depth + 1])
        if isinstance(target.value, list):
            index = _element(target.value, part, path)
            if last:
                target.value[index] = value
            target = target.value[index]
            continue
        if target.value is None:  # a block that was left out or null begins here
            target.value, target.origin, target.keys = {}, COMMAND_LINE, {}
        if not isinstance(target.value, dict):
            raise RecipeError(
                f"command line: {'.'.join(parts)}: {'.'.join(parts[:depth])} is a single value ({target.raw}), "
                f"so it has no {part!r}"
            )
        if last or part not in target.value:
            target.value[part] = value if last else Node({}, COMMAND_LINE)
            target.keys[part] = COMMAND_LINE
        target = target.value[part]


def _element(items: list[Node], part: str, path: str) -> int:
    """Index of the list element that ``part`` names."""
    if part.isdecimal():
        if int(part) < len(items):
            return int(part)
        raise RecipeError(f"command line: {path}: there is no element {part}, the last one is {len(items) - 1}")
    names, kinds = ([_label(item, key) for item in items] for key in ("name", "kind"))
    found = [i for i, name in enumerate(names) if name == part] or [i for i, kind in enumerate(kinds) if kind == part]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(
            f"command line: {path}: {part!r} fits {len(found)} elements; name one by its index "
            f"({', '.join(map(str, found))}) or by its name"
        )
    every = [label for label in (*names, *kinds) if label]
    raise RecipeError(f"command line: {path}: no element is named {part!r}{nearest(part, every)}")


def _label(item: Node, key: str) -> str | None:
    found = item.value.get(key) if isinstance(item.value, dict) else None
    return found.value if found and isinstance(found.value, str) else None


def nearest(word: str, choices: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest choice, else the list of choices."""
    choices = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(word.lower(), [c.lower() for c in choices], n=1, cutoff=0.5)
    if close:
        best = next(choice for choice in choices if choice.lower() == close[0])
        return f"; did you mean {best!r}?"
    return f"; valid here: {', '.join(choices)}" if choices else ""


def dump_yaml(value: Any) -> str:
    """Plain dicts, lists and scalars as YAML in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_scalar(value: Any) -> str:
    """One value (or a list or dict, in flow style) as YAML on a single line."""
    text = yaml.dump(value, Dumper=_FlowDumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()

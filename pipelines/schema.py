"""A tree of values -> frozen dataclasses, checked against their annotations, and their documentation.

Generic over nested dataclasses, tuples, lists, mappings, Optional, unions, Literal and enums. Strict: a bool is not an
int, ``"3"`` is not 3, ``3.0`` is not 3; an int is taken where a float is wanted.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipelines.recipe_source import COMMAND_LINE, DEFAULT, Node, Origin, RecipeError, nearest

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


class Builder:
    """Builds dataclasses from nodes and remembers the origin of every leaf.

    Args:
        special: ``annotation -> builder`` for annotations that the generic rules do not cover; such a builder gets
            ``(node, path)`` and returns the value.

    Attributes:
        origins: dotted path (list elements by index) -> where the value was written. Defaults are filled in too.
    """

    def __init__(self, special: Mapping[Any, Callable[[Node, str], Any]] | None = None) -> None:
        self.origins: dict[str, Origin] = {}
        self.special = dict(special or {})

    def build(self, cls: type, node: Node, path: str = "") -> Any:
        """One dataclass from a mapping.

        Raises:
            RecipeError: unknown or missing keys, wrong types, or a ``ValueError`` of ``__post_init__``.
        """
        label = path or "recipe"
        if not isinstance(node.value, dict):
            raise RecipeError(f"{node.origin}: {label} must be a mapping with keys {', '.join(_names(cls))}")
        for key in node.value:
            if key not in _names(cls):
                at = node.keys.get(key, node.origin)
                raise RecipeError(f"{at}: unknown key {_join(path, key)}{nearest(key, _names(cls))}")
        hints, values = _hints(cls), {}
        for item in fields(cls):
            if item.name in node.value:
                values[item.name] = self.convert(hints[item.name], node.value[item.name], _join(path, item.name))
            elif item.default is MISSING and item.default_factory is MISSING:
                where = "" if not path else f"{path}."
                raise RecipeError(f"{node.origin}: {where}{item.name} is missing: {_sentence(cls, item)}")
        try:
            built = cls(**values)
        except ValueError as error:
            raise RecipeError(f"{_blame(str(error), node)}: {label}: {error}") from None
        for item in fields(cls):
            if item.name not in node.value:
                self._mark_default(getattr(built, item.name), _join(path, item.name))
        return built

    def convert(self, hint: Any, node: Node, path: str) -> Any:
        """One value, whatever its annotation.

        Raises:
            RecipeError: the value does not fit the annotation.
        """
        if hint in self.special:
            return self.special[hint](node, path)
        if is_dataclass(hint) and isinstance(hint, type):
            return self.build(hint, node, path)
        kind = get_origin(hint)
        if kind in (Union, types.UnionType):
            return self._convert_union(hint, node, path)
        if kind in (tuple, list, Sequence):
            return self._convert_sequence(hint, node, path)
        if kind in (dict, Mapping) or hint is dict:
            return self._convert_mapping(hint, node, path)
        if hint is Any:
            return self._convert_any(node, path)
        self.origins[path] = node.origin
        return _scalar(hint, node, path)

    def _convert_union(self, hint: Any, node: Node, path: str) -> Any:
        members = [member for member in get_args(hint) if member is not type(None)]
        if node.value is None and len(members) < len(get_args(hint)):
            self.origins[path] = node.origin
            return None
        if len(members) == 1:
            return self.convert(members[0], node, path)
        for member in members:
            try:
                return self.convert(member, node, path)
            except RecipeError:
                continue
        raise _mismatch(hint, node, path)

    def _convert_sequence(self, hint: Any, node: Node, path: str) -> Any:
        if not isinstance(node.value, list):
            raise _mismatch(hint, node, path)
        kind, args = get_origin(hint), get_args(hint)
        if kind is tuple and args[-1] is not Ellipsis:
            if len(args) != len(node.value):
                raise RecipeError(f"{node.origin}: {path} takes {len(args)} values, got {len(node.value)}")
            hints = list(args)
        else:
            hints = [args[0]] * len(node.value)
        self._mark_empty(node, path)
        pairs = enumerate(zip(hints, node.value, strict=True))
        values = [self.convert(member, item, _join(path, str(i))) for i, (member, item) in pairs]
        return values if kind is list else tuple(values)

    def _convert_mapping(self, hint: Any, node: Node, path: str) -> dict[str, Any]:
        if not isinstance(node.value, dict):
            raise _mismatch(hint, node, path)
        member = get_args(hint)[1] if get_args(hint) else Any
        self._mark_empty(node, path)
        return {key: self.convert(member, item, _join(path, key)) for key, item in node.value.items()}

    def _convert_any(self, node: Node, path: str) -> Any:
        if isinstance(node.value, dict):
            return self._convert_mapping(dict, node, path)
        if isinstance(node.value, list):
            return self._convert_sequence(list[Any], node, path)
        self.origins[path] = node.origin
        return node.value

    def _mark_empty(self, node: Node, path: str) -> None:
        if not node.value:
            self.origins[path] = node.origin

    def _mark_default(self, value: Any, path: str) -> None:
        for leaf in flatten(plain(value), path):
            self.origins[leaf] = DEFAULT


def _scalar(hint: Any, node: Node, path: str) -> Any:
    value = node.value
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        found = [choice for choice in choices if type(choice) is type(value) and choice == value]
        if found:
            return found[0]
        raise _not_among(node, path, [str(choice) for choice in choices])
    if isinstance(hint, type) and issubclass(hint, Enum):
        found = [member for member in hint if member.value == value]
        if found:
            return found[0]
        raise _not_among(node, path, [str(member.value) for member in hint])
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise RecipeError(f"{node.origin}: {path} must be a finite number, got {node.raw}")
        return float(value)
    if hint in (str, Path) and node.origin == COMMAND_LINE and node.raw is not None and not isinstance(value, str):
        return hint(node.raw)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint:
        return value
    if not isinstance(hint, type) or hint not in _NAMES:
        raise AssertionError(f"{path}: no rule for the annotation {hint!r}")
    raise _mismatch(hint, node, path)


def _not_among(node: Node, path: str, choices: list[str]) -> RecipeError:
    shown = node.raw if node.raw is not None else "a list or mapping"
    hint = nearest(str(shown), choices) if isinstance(node.value, str) else ""
    return RecipeError(f"{node.origin}: {path} must be one of {', '.join(choices)}, got {shown}{hint}")


def _mismatch(hint: Any, node: Node, path: str) -> RecipeError:
    """The error for a value of the wrong type, with the mend where it is likely known."""
    value, wanted = node.value, describe(hint)
    if isinstance(value, (dict, list)):
        got = "a mapping" if isinstance(value, dict) else "a list"
    elif isinstance(value, str):
        got = f"the text {value!r}"
    else:
        got = "nothing" if node.raw == "" else str(node.raw)
    mend = ""
    if hint is str and not isinstance(value, (dict, list)):
        mend = f"; write {node.raw!r} in quotes" if node.raw else '; write "" for an empty text'
    elif hint in (int, float, bool) and isinstance(value, str) and re.fullmatch(r"[-+.\d]+|true|false", value):
        mend = "; leave the quotes out"
    elif hint is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        mend = f"; write {int(value)}"
    elif hint is bool and str(value).lower() in ("yes", "no", "on", "off"):
        mend = "; write true or false"
    elif get_origin(hint) in (tuple, list) and not isinstance(value, dict):
        mend = f"; write [{node.raw}]" if node.raw else "; write [] for none"
    return RecipeError(f"{node.origin}: {path} must be {wanted}, got {got}{mend}")


def describe(hint: Any) -> str:
    """An annotation in words: ``int | None`` -> ``a whole number or null``."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        names = [describe(m) for m in get_args(hint) if m is not type(None)]
        return " or ".join(dict.fromkeys(names)) + (" or null" if type(None) in get_args(hint) else "")
    if kind is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if kind in (tuple, list, Sequence):
        members = [m for m in get_args(hint) if m is not Ellipsis]
        fixed = kind is tuple and Ellipsis not in get_args(hint)
        return f"a list of {f'{len(members)} values' if fixed else _plural(describe(members[0]))}"
    if kind in (dict, Mapping):
        return "a mapping"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(member.value) for member in hint)
    if is_dataclass(hint):
        return "a mapping"
    return _NAMES.get(hint, "any value")


def _plural(name: str) -> str:
    return f"{name.removeprefix('a ')}s" if name.startswith("a ") else name


def _blame(message: str, node: Node) -> Origin:
    """The line of the first key that an error message names, else that of the mapping."""
    for word in re.findall(r"[A-Za-z_]\w*", message):
        if word in node.value:
            return node.value[word].origin
    return node.origin


def plain(value: Any) -> Any:
    """Dataclasses, tuples and enums as dicts, lists and scalars, in the order of their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of plain dicts and lists by dotted path; an empty dict or list is a leaf."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = ((str(i), item) for i, item in enumerate(value))
    else:
        return {path: value}
    return {leaf: item for key, child in items for leaf, item in flatten(child, _join(path, key)).items()}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The sentence of every field, from the ``Attributes:`` section of the class's docstring.

    ``a, b: sentence`` documents both; a field without a sentence is absent.
    """
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    current: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        entry = re.match(r"^ {4}([A-Za-z_][\w, ]*): (.*)$", line)
        if entry:
            current = [name.strip() for name in entry[1].split(",")]
            docs.update(dict.fromkeys(current, entry[2].strip()))
        elif line.strip():
            docs.update({name: f"{docs[name]} {line.strip()}" for name in current})
    return docs


def _sentence(cls: type, item: Field[Any]) -> str:
    return field_docs(cls).get(item.name, f"{cls.__name__} needs it")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key

"""``r1 show``: a resolved recipe as YAML, each value with where it came from, on request with what it means."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pipelines.config import LoadedRecipe
from pipelines.recipe_source import dump_scalar
from pipelines.schema import field_docs, plain

_COMMENT_COLUMN, _WIDTH = 44, 110


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    path: str = ""  # of a leaf, for its origin


def render_recipe(loaded: LoadedRecipe, *, docs: bool = False) -> str:
    """The recipe as YAML that ``load_recipe`` reads back; comments say where each value was written.

    Args:
        docs: put the sentence that describes a key above it.
    """
    out = []
    for line in _mapping(loaded.recipe, "", "", docs):
        origin = loaded.origins.get(line.path)
        comment = f"  # {origin}" if origin else ""
        out.append(f"{line.text:<{_COMMENT_COLUMN}}{comment}".rstrip() if comment else line.text)
    return "\n".join(out) + "\n"


def recipe_json(loaded: LoadedRecipe) -> dict[str, Any]:
    """``{"recipe": values, "origins": {dotted path: where}}``."""
    return {"recipe": plain(loaded.recipe), "origins": {path: str(origin) for path, origin in loaded.origins.items()}}


def _mapping(value: Any, path: str, indent: str, docs: bool, first: str | None = None) -> Iterator[_Line]:
    """Lines of a dataclass or dict; ``first`` replaces the indent of the first key (the dash of a list)."""
    known = field_docs(type(value)) if docs and is_dataclass(value) else {}
    for key, child in _items(value):
        lead, first = indent if first is None else first, None
        if key in known:
            yield from (_Line(f"{indent}# {line}") for line in textwrap.wrap(known[key], _WIDTH - len(indent)))
        yield from _entry(f"{lead}{dump_scalar(key)}:", child, f"{path}.{key}" if path else key, indent, docs)


def _entry(head: str, child: Any, path: str, indent: str, docs: bool) -> Iterator[_Line]:
    if is_dataclass(child) or (isinstance(child, Mapping) and child):
        yield _Line(head)
        yield from _mapping(child, path, f"{indent}  ", docs)
    elif _is_list(child) and any(is_dataclass(item) or isinstance(item, (Mapping, list, tuple)) for item in child):
        yield _Line(head)
        for index, item in enumerate(child):
            yield from _element(item, f"{path}.{index}", f"{indent}  ", docs)
    else:
        yield _Line(f"{head} {dump_scalar(plain(child))}", path if not child or not _is_list(child) else f"{path}.0")


def _element(item: Any, path: str, indent: str, docs: bool) -> Iterator[_Line]:
    if is_dataclass(item) or (isinstance(item, Mapping) and item):
        yield from _mapping(item, path, f"{indent}  ", docs, first=f"{indent}- ")
    else:
        yield _Line(f"{indent}- {dump_scalar(plain(item))}", path)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        yield from ((item.name, getattr(value, item.name)) for item in fields(value))
    else:
        yield from value.items()


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))

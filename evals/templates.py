"""A row of columns -> text, by a jinja2 template, the name of a column, or a function.

Templates run in jinja2's sandbox. A name that the row does not have, and a column that is null, are errors: neither
becomes an empty text or the word None. jinja2 is imported by the first template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from evals.hooks import HARNESS, find_function, one_line
from evals.nearest import nearest
from rewards.answers import last_parts


class NoAnswer(ValueError):
    """A row has no value where one is needed."""


def render(template: str, row: Mapping[str, Any], *, place: str, folder: str = "", constant: bool = False) -> Any:
    """What a template makes of a row.

    Args:
        template: jinja2 over the columns of the row; or the bare name of a column, whose value is taken as it is; or a
            function (``!function …``) that is given the row.
        place: names template and row in error messages, e.g. ``gsm8k, row 12: doc_to_text``.
        folder: where the file of a function is looked for.
        constant: a text without anything for jinja2 to do stands for itself, not for a column.

    Raises:
        NoAnswer: a column of the template is null, or a filter finds nothing.
        ValueError: a name that the row does not have, a template that fails, or a function that does.
    """
    if template.startswith(HARNESS):
        function = find_function(template, folder)
        try:
            return function(dict(row))
        except Exception as error:  # a user's code
            raise ValueError(f"{place}: {template} failed: {type(error).__name__}: {one_line(error)}") from error
    if not is_template(template):
        if constant:
            return template
        if template not in row:
            raise ValueError(f"{place}: no column {template!r}; {_columns(row, template)}")
        if row[template] is None:
            raise NoAnswer(f"{place}: the column {template!r} is null")
        return row[template]
    return _rendered(template, row, place)


def is_template(text: str) -> bool:
    """Whether a text holds anything for jinja2 to do."""
    return any(mark in text for mark in ("{{", "{%", "{#"))


def check_template(text: str, place: str) -> None:
    """Refuses what jinja2 cannot read.

    Raises:
        ValueError: names the line of the template and what is wrong there.
    """
    from jinja2 import TemplateSyntaxError

    try:
        _compiled(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{place} is no jinja2 template: line {error.lineno}: {error.message}") from None


def _rendered(template: str, row: Mapping[str, Any], place: str) -> str:
    from jinja2 import UndefinedError

    check_template(template, place)
    try:
        return _compiled(template).render({name: _value(str(name), value) for name, value in row.items()})
    except NoAnswer as error:
        raise NoAnswer(f"{place}: {error}") from None
    except UndefinedError as error:
        name = re.match(r"'([^']+)' is undefined", error.message or "")
        missing = f"no column {name[1]!r}" if name else error.message
        raise ValueError(f"{place} ({_short(template)}): {missing}; {_columns(row, name[1] if name else '')}") from None
    except Exception as error:  # a user's template: what it calls may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place} ({_short(template)}): {kind}{one_line(error)}") from None


def _columns(row: Mapping[str, Any], name: str) -> str:
    close = nearest(name, row)
    names = ", ".join(map(str, row))
    return f"the columns are {names}{close}" if close.startswith("; did") else f"the columns are {names}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


@functools.cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_not_null
    )
    environment.filters |= {"after": after, "last_box": last_box, "regex_replace": regex_replace}
    return environment


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    return _environment().from_string(text)


def _value(name: str, value: Any) -> Any:
    """A column as templates see it: null is false in a condition, and nothing else can be done with it.

    As plain None it would be the text "None" to jinja2's own filters.
    """
    return _null_type()(hint=f"the column {name!r} is null", exc=NoAnswer) if value is None else value


@functools.cache
def _null_type() -> Any:
    from jinja2 import StrictUndefined

    class Null(StrictUndefined):
        def __bool__(self) -> bool:
            return False

    return Null


def _not_null(value: Any) -> Any:
    if value is None:
        raise NoAnswer("a value of the template is null")
    return value


def after(text: Any, mark: str) -> str:
    """Filter: what follows the last ``mark`` in a text, stripped (GSM8K's answer stands after ``####``).

    Raises:
        NoAnswer: the text is null or does not hold the mark.
    """
    _, found, rest = str(_not_null(text)).rpartition(mark)
    if not found:
        raise NoAnswer(f"there is no {mark!r} in the text")
    return rest.strip()


def last_box(text: Any) -> str:
    r"""Filter: content of the last ``\boxed{…}`` of a text (MATH's answer stands there).

    Boxes side by side, with nothing but separators between them, are one answer in several parts.

    Raises:
        NoAnswer: the text is null or has no box.
    """
    text = str(_not_null(text))
    if parts := last_parts(text):
        return ", ".join(parts)
    if bare := re.findall(r"\\boxed\s+([^\s${}\\]+)", text):  # \boxed 2
        return bare[-1].rstrip(".,")
    raise NoAnswer(r"there is no \boxed{…} in the text")


def regex_replace(text: Any, pattern: str, replacement: str, count: int = 0) -> str:
    """Filter: ``re.sub``."""
    return re.sub(pattern, replacement, str(_not_null(text)), count=count)

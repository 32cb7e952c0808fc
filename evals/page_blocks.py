"""What a page is made of, and its two forms: one self-contained HTML file, and Markdown.

Words of ours are plain strings. Whatever came from elsewhere (a completion, an answer, a name out of data) is a
:class:`Code`: both forms show it letter by letter, and nothing in it becomes a tag, a link, an image or a table cell.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from jinja2 import Template

_INLINE_CHARS = 160
_HEAD_CHARS, _TAIL_CHARS = 2500, 1500


@dataclass(frozen=True, slots=True)
class Code:
    """A text that is not ours, in one line of at most ``limit`` characters."""

    text: str
    limit: int = _INLINE_CHARS

    @property
    def shown(self) -> str:
        """What a reader sees: control characters as codes, the rest of a long text as an ellipsis."""
        text = visible(self.text[: self.limit + 1], keep="")
        return text if len(self.text) <= self.limit else f"{text[: self.limit]}…"


Inline = str | Code
"""A piece of a line: ours (plain) or not ours (Code)."""
Line = Inline | tuple[Inline, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """A title; level 2 and 3 (1 is the page's own). ``anchor`` may be linked to and is ours."""

    kind: ClassVar[str] = "heading"
    text: Line
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """A few sentences; ``warning`` sets them off."""

    kind: ClassVar[str] = "paragraph"
    text: Line
    warning: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table whose first column names the row.

    Attributes:
        caption: what it shows, in our words.
        columns: titles of ours.
        rows: as many cells as there are columns.
        left: indices of columns that hold no numbers, besides the first.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Line]]
    left: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.caption}: ragged rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture, only in HTML: its numbers also stand in a table. ``svg`` was drawn by :mod:`evals.plots`."""

    kind: ClassVar[str] = "plot"
    svg: str
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """A long text that is not ours, in its own lines; its middle is left out where it is too long.

    Attributes:
        title: why it is shown; ours.
        about: what is known of it.
        text: the whole of it.
    """

    kind: ClassVar[str] = "quote"
    title: str
    about: Sequence[Line]
    text: str

    @property
    def shown(self) -> str:
        """What a reader sees: control characters as codes."""
        text, left_out = self.text, len(self.text) - _HEAD_CHARS - _TAIL_CHARS
        if left_out > 0:
            text = f"{text[:_HEAD_CHARS]}\n\n[… {left_out:,} characters left out …]\n\n{text[-_TAIL_CHARS:]}"
        return visible(text, keep="\n\t")


Block = Heading | Paragraph | Table | Plot | Quote


def visible(text: str, *, keep: str) -> str:
    """A text in which everything that has no shape of its own is shown as its code, but for ``keep``.

    That covers terminal escapes, marks that turn the direction of writing, NUL, and halves of surrogate pairs, which
    cannot be written to a file at all.
    """
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else f"\\x{ord(c):02x}" for c in text
    )


def to_html(title: Line, blocks: Sequence[Block]) -> str:
    """One HTML file that needs no network and runs no script; light and dark follow the reader's system."""
    contents = [block for block in blocks if isinstance(block, Heading) and block.anchor]
    return _template().render(
        title=_parts(title), blocks=blocks, contents=contents, parts=_parts,
        plain="".join(part if isinstance(part, str) else part.shown for part in _parts(title)),
    )  # fmt: skip


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2")


def to_markdown(title: Line, blocks: Sequence[Block]) -> str:
    """The same in Markdown (with GitHub's tables), without the plots."""
    found = [f"# {_markdown(title)}"]
    for block in blocks:
        match block:
            case Heading():
                found.append(f"{'#' * block.level} {_markdown(block.text)}")
            case Paragraph():
                found.append(("> **Note.** " if block.warning else "") + _markdown(block.text))
            case Table():
                found.append(_markdown_table(block))
            case Quote():
                about = "\n".join(f"- {_markdown(line)}" for line in block.about)
                found.append(f"**{block.title}**\n\n{about}\n\n{_fenced(block.shown)}")
            case Plot():
                pass
    return "\n\n".join(found) + "\n"


def _markdown_table(table: Table) -> str:
    rules = [" --- " if i == 0 or i in table.left else " ---: " for i in range(len(table.columns))]
    lines = [f"| {' | '.join(table.columns)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(map(_markdown, row))} |" for row in table.rows]
    return f"{table.caption}\n\n" + "\n".join(lines)


def _markdown(line: Line) -> str:
    return "".join(part if isinstance(part, str) else _markdown_code(part.shown) for part in _parts(line))


def _markdown_code(text: str) -> str:
    """A code span: nothing is markup in it but a backtick, and in a table a pipe; these are shown as their codes.

    Backslashes before a pipe are read in different ways by different programs, so none is relied on.
    """
    return f"`{text.replace('|', chr(92) + 'x7c').replace('`', chr(92) + 'x60') or ' '}`"


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any row of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _parts(line: Line) -> tuple[Inline, ...]:
    return line if isinstance(line, tuple) else (line,)


def percent(value: Any, ci95: Iterable[Any] | None = None, *, sign: bool = False) -> str:
    """``.412, (.385, .439)`` -> ``41.2 [38.5, 43.9]``: a share in per cent with its 95 % interval."""
    form = "+.1f" if sign else ".1f"
    point = format(100 * float(value), form)
    if ci95 is None:
        return point
    low, high = (format(100 * float(end), form) for end in ci95)
    return f"{point} [{low}, {high}]"


def replace_file(path: Path, text: str) -> None:
    """Replaces a file: afterwards it holds the old text or the new one, never a part.

    Raises:
        OSError: the file cannot be written; the old one is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

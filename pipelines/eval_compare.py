"""``r1 eval compare``: two evaluations paired by problem, as a table, one JSON object, or a page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FLIPS_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("a", metavar="DIR", type=Path, help="the --out folder of the evaluation to start from")
    parser.add_argument("b", metavar="DIR", type=Path, help="the one to hold against it; differences are B - A")
    parser.add_argument("--anyway", action="store_true",
                        help="compare also where protocol, k, benchmark version or data differ")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page that needs no network")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; what it found stands in the returned object, see :func:`evals.compare.compare`.

    Raises:
        ValueError: a folder holds no evaluation, or the two cannot be compared.
        OSError: a file of samples is damaged, or the page cannot be written.
    """
    from evals.compare import compare_folders, comparison_blocks
    from evals.page_blocks import replace_file, to_html

    page: Path | None = options.html.expanduser() if options.html else None
    if page is not None and not page.parent.is_dir():
        raise ValueError(f"--html {page}: there is no folder {page.parent}; make it first")
    found = compare_folders(options.a.expanduser(), options.b.expanduser(), anyway=options.anyway)
    if page is not None:
        replace_file(page, to_html("Comparison of two evaluations", comparison_blocks(found)))
    if not options.json:
        _print(found)
    return found


def _print(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from pipelines.console import printable

    console = Console()
    console.print(comparison_table(found))
    for line in lines(found):
        console.print(Text(printable(line)), soft_wrap=True)


def comparison_table(found: Mapping[str, Any]) -> Any:
    """A row per benchmark: both sides, the difference and its p-value; it fits a terminal of 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from evals.compare import p_text
    from pipelines.console import printable

    several = len(found["benchmarks"]) > 1
    table = Table(title="pass@1 in %, 95 % interval", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                  padding=(0, 0), collapse_padding=True)  # fmt: skip
    table.add_column("benchmark", overflow="fold", style="bold", min_width=14)
    for column in ("A", "B", "B - A", "p", *(("p\nHolm",) if several else ()), "gained\nlost"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["benchmarks"].items():
        colour = "" if row.get("p_holm", row["p_value"]) >= 0.05 else "green" if row["difference"] > 0 else "red"
        k = "/".join(dict.fromkeys(str(row[side]["k"]) for side in "ab"))
        flips = row["flipped"]
        table.add_row(
            Text(f"{printable(name)}\n{row['n']:,} x {k}"),
            *(_figure(row[side]["pass_at_1"], row[side]["ci95"]) for side in "ab"),
            Text(_figure(row["difference"], row["ci95"], sign=True), style=colour),
            p_text(row["p_value"]), *((p_text(row["p_holm"]),) if several else ()),
            f"{len(flips['gained'])}\n{len(flips['lost'])}",
        )  # fmt: skip
    return table


def _figure(value: float, ci95: tuple[float, float], *, sign: bool = False) -> str:
    from evals.page_blocks import percent

    return percent(value, ci95, sign=sign).replace(" ", "\n", 1)


def lines(found: Mapping[str, Any]) -> list[str]:
    """What stands under the table: which is which, what the reader must know, and the problems that flipped."""
    text = [f"A  {found['a']}", f"B  {found['b']}"]
    text += [f"note: {note}" for note in found["notes"]]
    for name, row in found["benchmarks"].items():
        for kind, ids in row["flipped"].items():
            if ids:
                more = f" … ({len(ids) - _FLIPS_SHOWN} more: --json has all)" if len(ids) > _FLIPS_SHOWN else ""
                text.append(f"{name} {kind}: {', '.join(ids[:_FLIPS_SHOWN])}{more}")
    return text

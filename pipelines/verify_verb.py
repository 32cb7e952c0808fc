"""The arguments of ``r1 verify RECIPE``, and the table that it ends with."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.verify_rows import PROPERTIES, Row

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pipelines.config import LoadedRecipe

_LEAST_SAMPLES = 2
_VERDICT = {True: "[green]holds[/]", False: "[bold red]FAILS[/]", None: "[yellow]not measured[/]"}
_BAR = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("--stage", metavar="NAME", help="training stage to verify; the first of RL, else of SFT")
    parser.add_argument(
        "--model", metavar="PATH", help="measure on this model or run folder, not on the recipe's model"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=12, help="sequences to measure on (12)")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=128,
        help="most tokens of a completion, beside the recipe's (128)",
    )
    parser.add_argument(
        "--dtype", choices=("float64", "recipe"), default="float64",
        help="in which cuts and ranks are measured: in float64 (default) a mistake stands out from rounding",
    )  # fmt: skip
    parser.add_argument("--only", metavar="A,B", help=f"measure only these: {', '.join(PROPERTIES)}")
    parser.add_argument("--full", action="store_true", help="also 4 ranks, and 2 x 2 with expert parallel")


def run(loaded: LoadedRecipe, options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; the answer has ``ok`` False when a property does not hold.

    Raises:
        ValueError: an option, the recipe, its model or its data cannot be used.
    """
    only = _chosen(options.only)
    if options.samples < _LEAST_SAMPLES:
        raise ValueError(f"--samples must be >= {_LEAST_SAMPLES}, got {options.samples}: neighbours need each other")
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be >= 1, got {options.max_tokens}")
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from pipelines.verify import VerifyOptions, verify

    disable_progress_bar()  # the model lives in this process, not in an actor whose output nobody sees
    chosen = VerifyOptions(
        stage=options.stage, model=options.model, samples=options.samples, max_tokens=options.max_tokens,
        dtype=options.dtype, only=only, full=options.full,
    )  # fmt: skip
    view = ProgressView(Console(stderr=True))
    with view:
        answer = verify(loaded, chosen, view.note, view.show)
    if not options.json:
        print_answer(answer, Console())
    return answer


def _chosen(only: str | None) -> frozenset[str]:
    if only is None:
        return frozenset(PROPERTIES)
    if not only.strip(" ,"):
        raise ValueError(
            f"--only names no property: leave it out to measure all, or name some of {', '.join(PROPERTIES)}"
        )
    names = [name.strip().replace("-", "_") for name in only.split(",")]
    for name in names:
        if name not in PROPERTIES:
            raise ValueError(f"--only: there is no property {name!r}; there are {', '.join(PROPERTIES)}")
    return frozenset(names)


class ProgressView:
    """What is being measured, on standard error: a spinner on a terminal, a line for each finished row elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("starting") if console.is_terminal else None
        self._began = time.monotonic()

    def __enter__(self) -> ProgressView:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def note(self, text: str) -> None:
        """Something is being done."""
        if self._status is not None:
            self._status.update(f"{text} …")

    def show(self, row: Row) -> None:
        """A row is there."""
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[row.ok]
        worst = "" if row.worst is None else f" {figure(row.worst)} (accepted {figure(row.tolerance)})"
        line = f"{time.monotonic() - self._began:5.0f} s  {PROPERTIES[row.property]}: {verdict}{worst}"
        self._console.print(line, markup=False, highlight=False)


def print_answer(answer: Mapping[str, Any], console: Console) -> None:
    """The table, the pictures of engine and learner, and the verdict."""
    rows: Sequence[Mapping[str, Any]] = answer["rows"]
    console.print(table_of(answer))
    for row in rows:
        if row.get("by_position") and row["ok"] is not None:
            console.print(positions_of(row))
        if row.get("by_layer"):
            console.print(layers_of(row))
    for row in rows:
        if row["ok"] is False:
            console.print(f"{row['title']}: worst at {row['where']}", style="red", markup=False, highlight=False)
    counts = [sum(row["ok"] is verdict for row in rows) for verdict in (True, False, None)]
    said = f"{counts[0]} hold, {counts[1]} fail, {counts[2]} not measured"
    console.print(f"{said}; on {answer['samples']}; {answer['model']}, stage {answer['stage']}", highlight=False)


def table_of(answer: Mapping[str, Any]) -> RenderableType:
    """One line for each property: worst deviation, tolerance, verdict, and the letter of its reason below the table."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"{answer['recipe']}: cuts and ranks in {answer['dtype']}, engine in {answer['engine_dtype']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("property", no_wrap=True)
    for name in ("worst", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", no_wrap=True)
    letters: dict[str, str] = {}
    for row in answer["rows"]:
        letter = letters.setdefault(row["reason"], chr(ord("a") + len(letters)))
        unit = {"nats": " nats", "tensors": " tensors", "share": " share"}.get(row["unit"], "")
        worst = "" if row["ok"] is None else figure(row["worst"])
        accepted = "" if row["tolerance"] is None else figure(row["tolerance"]) + unit
        table.add_row(row["title"], worst, accepted, _VERDICT[row["ok"]], letter)
    reasons = Table.grid(padding=(0, 2))
    for reason, letter in letters.items():
        reasons.add_row(f"  {letter}", Text(reason))
    return Group(table, reasons, "")


def positions_of(row: Mapping[str, Any]) -> RenderableType:
    """|Δlogp| by token position, largest and mean, with bars on a logarithmic scale."""
    from rich.table import Table

    buckets: Sequence[Mapping[str, float]] = row["by_position"]
    table = Table(title=f"|Δlogp| by position, {row['title']} (nats)", box=None, title_justify="left")
    for name in ("tokens at", "mean", "max", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    least = min((b["mean"] for b in buckets if b["mean"] > 0), default=1e-12)
    most = max(row["tolerance"], *(b["max"] for b in buckets))
    for bucket in buckets:
        first, last = int(bucket["from"]), int(bucket["to"])
        span = f"{first}" if first == last else f"{first}-{last}"
        bars = _bar(bucket["mean"], least, most), _bar(bucket["max"], least, most)
        picture = f"{'█' * bars[0]}{'░' * (bars[1] - bars[0])}"
        table.add_row(span, figure(bucket["mean"]), figure(bucket["max"]), picture)
    table.add_row("", "", "accepted", " " * (_bar(row["tolerance"], least, most) - 1) + "│\n")
    return table


def layers_of(row: Mapping[str, Any]) -> RenderableType:
    """Share of the engine's choices of experts that the learner makes too, layer by layer."""
    from rich.table import Table

    table = Table(title="same experts chosen, by layer", box=None, title_justify="left")
    for name in ("layer", "share", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for layer, share in row["by_layer"].items():
        table.add_row(str(layer), f"{share:.6f}", "█" * round(_BAR * share))
    return table


def figure(value: float | None) -> str:
    """Two digits of a deviation; what is not finite is ∞."""
    if value is None or not math.isfinite(value):
        return "∞"
    return "0" if value == 0 else f"{value:.1e}"


def _bar(value: float, least: float, most: float) -> int:
    """Length of a bar between 1 and its full length, logarithmic."""
    if not value > 0 or not most > least:
        return 1
    share = math.log(max(min(value, most), least) / least) / math.log(most / least)
    return 1 + round((_BAR - 1) * share)

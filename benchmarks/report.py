"""Measured comparisons as a table on the terminal, as JSON, and as docs/benchmarks.md. No torch here.

The JSON file keeps every benchmark with the command, the date and the machine of its own run, so that one of them can
be measured again alone; the page is always written from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Comparison, comparison_from_json, comparison_to_json

if TYPE_CHECKING:
    from rich.table import Table

JSON_NAME, PAGE_NAME = "benchmarks.json", "benchmarks.md"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One benchmark as it was run.

    Attributes:
        name: ``grpo`` | ``rollout`` | ``sync`` | ``learner``.
        comparisons: what it found.
        command: what to type to get these figures.
        date: day of the run, YYYY-MM-DD.
        machine: ``machine.describe_machine()``.
        busy: share of the cores that others used just before, 0 .. 1.
        seconds: of the benchmark, start of its processes included.
        quick: smaller workloads: a look, no result.
    """

    name: str
    comparisons: tuple[Comparison, ...]
    command: str
    date: str
    machine: Mapping[str, str]
    busy: float
    seconds: float
    quick: bool = False


def number(value: float) -> str:
    """Three significant digits, thousands grouped: 12,300, 4.56, 0.00123."""
    if value >= 100:
        digits = len(str(int(value)))
        return f"{round(value, 3 - digits):,.0f}"
    if value >= 0.001:
        text = f"{value:#.3g}"
        return text.rstrip(".")
    return f"{value:.2e}"


def span(low: float, high: float) -> str:
    """``low – high``, or nothing when they read the same."""
    first, last = number(low), number(high)
    return f"{first} – {last}" if first != last else ""


def verdict(comparison: Comparison) -> str:
    """The goal and whether it was reached; empty without a goal."""
    if comparison.goal is None:
        return ""
    return f"≥ {comparison.goal:g}: {'reached' if comparison.reached else 'missed'}"


def rows_of(comparison: Comparison) -> list[tuple[str, str, str, str, str, str]]:
    """(side, median, min – max, ratio, ratio by round, goal), one row per side, ours first."""
    ours = comparison.ours
    rows = [(ours.name, number(ours.median), span(ours.low, ours.high), "", "", "")]
    for index, peer in enumerate(comparison.peers):
        by_round = span(*comparison.span(index))
        goal = verdict(comparison) if index == 0 else ""
        rows.append(
            (peer.name, number(peer.median), span(peer.low, peer.high), number(comparison.ratio(index)), by_round, goal)
        )
    return rows


def table(measurements: Sequence[Measurement]) -> Table:
    """Everything in one table for the terminal."""
    from rich.table import Table

    out = Table(title="r1 against its peers: medians, and ours over theirs", title_justify="left")
    for header, justify in (("side", "left"), ("median", "right"), ("min – max", "right"), ("ratio", "right"),
                            ("by round", "right"), ("goal", "left")):  # fmt: skip
        out.add_column(header, justify=justify)  # type: ignore[arg-type]
    for measurement in measurements:
        for comparison in measurement.comparisons:
            out.add_section()
            out.add_row(f"[bold]{comparison.title}[/bold] ({comparison.unit})")
            for row in rows_of(comparison):
                out.add_row(*row)
    return out


def write(measurements: Sequence[Measurement], folder: Path) -> tuple[Path, Path]:
    """Puts the measurements into a folder's JSON file, in the place of older ones of that name; rewrites the page.

    Returns:
        The paths of both.

    Raises:
        ValueError: the JSON file there is none of ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / JSON_NAME, folder / PAGE_NAME
    merged = {m.name: m for m in [*read(data), *measurements]}
    rows = [{**asdict(m), "comparisons": [comparison_to_json(c) for c in m.comparisons]} for m in merged.values()]
    data.write_text(json.dumps({"benchmarks": rows}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    page.write_text(markdown(list(merged.values())), "utf-8")
    return data, page


def read(path: Path) -> list[Measurement]:
    """The measurements of a JSON file; none when there is no file.

    Raises:
        ValueError: it is damaged or none of ours.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text("utf-8"))["benchmarks"]
        return [_measurement(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of measurements ({type(error).__name__}: {error}): delete it"
        ) from error


def markdown(measurements: Sequence[Measurement]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Every figure is a ratio: the sides take turns on the same cores (A B A B), whole rounds each, and what counts "
        "is our median over the peer's. *By round* is the span of the single rounds' ratios. Absolute figures depend "
        "on the machine; compare only within one run. This page is written by `python -m benchmarks` (`make bench`) "
        f"from [{JSON_NAME}]({JSON_NAME}); do not edit it.",
        "",
        "The model is `tiny-5m`: DeepSeek-V3's architecture (MLA, 8 experts of which 2, one shared), 4 layers, 5.4M "
        "parameters, fp32. Its weights are random but for one thing: every token is followed by end-of-sequence with "
        "the same probability. So completion lengths are geometric, cut at the token limit, and each side draws them "
        "from that distribution by sampling, without being told any length.",
    ]
    if any(m.quick for m in measurements):
        lines += ["", "**Quick runs are below: small workloads, few rounds. A look, no result.**"]
    for measurement in measurements:
        lines += ["", f"## {measurement.name}", "", _conditions(measurement)]
        for comparison in measurement.comparisons:
            lines += ["", *_section(comparison)]
    return "\n".join(lines) + "\n"


def _section(comparison: Comparison) -> list[str]:
    header = ["side", f"median, {comparison.unit}", "min – max", f"ours: {comparison.reading}", "by round", "goal"]
    lines = [f"**{comparison.title}**", "", _line(header), _line(["---", "--:", "--:", "--:", "--:", "---"])]
    lines += [_line(row) for row in rows_of(comparison)]
    if comparison.notes:
        lines += ["", *(f"- {name}: {text}" for name, text in comparison.notes.items())]
    return lines


def _conditions(measurement: Measurement) -> str:
    machine = measurement.machine
    words = [machine[key] for key in ("cores", "memory", "system") if key in machine]
    idle = f"others used {measurement.busy:.0%} of the cores just before"
    parts = [f"`{measurement.command}`", measurement.date, *words, idle, f"{measurement.seconds:.0f} s in all"]
    versions = f". {machine['packages']}." if "packages" in machine else "."
    return ("Quick. " if measurement.quick else "") + "; ".join(parts) + versions


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _measurement(row: Mapping[str, Any]) -> Measurement:
    comparisons = tuple(comparison_from_json(c) for c in row["comparisons"])
    return Measurement(**{**row, "comparisons": comparisons})

"""Results for people: a table before and after, a sparkline, and the picture of the learning curve.

rich and matplotlib are imported by the functions that draw, so that importing this module costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.metrics import Estimate, paired_difference
from evals.run import SetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everyone
_GREY = "#6b7280"
_SMALL = {
    "learner/entropy": "entropy, nats per token", "rollout/length_mean": "completion length, tokens",
    "learner/grad_norm": "gradient norm", "mismatch/mean_abs": "engine vs learner, mean |Δlogp|",
}  # fmt: skip
"""Metrics of the small panels and their titles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCurve:
    """What one stage logged.

    Attributes:
        name, kind: of the stage.
        rows: metrics by step.
        results: of an evaluation stage, by held-out set.
        during: evaluations during training: ``(step, results by held-out set)``.
    """

    name: str
    kind: str
    rows: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    results: Mapping[str, SetResult] = field(default_factory=dict)
    during: Sequence[tuple[int, Mapping[str, SetResult]]] = ()


def sparkline(values: Iterable[float], width: int = 60) -> str:
    """Values as a line of bars from the smallest to the largest; the latest ``width`` of them, gaps for NaN."""
    shown = list(values)[-width:]
    finite = [v for v in shown if math.isfinite(v)]
    if not finite:
        return " " * len(shown)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * top)] if math.isfinite(v) else " " for v in shown)


def condense(values: Sequence[float], width: int = 60) -> list[float]:
    """Means of ``width`` equal parts of a series, in order; a shorter series as it is."""
    if len(values) <= width:
        return list(values)
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def before_and_after(stages: Sequence[StageCurve]) -> tuple[dict[str, SetResult], dict[str, SetResult]]:
    """The first and the last result of every held-out set; a set that was evaluated once is only in the first."""
    before: dict[str, SetResult] = {}
    after: dict[str, SetResult] = {}
    for stage in stages:
        for name, result in stage.results.items():
            if name in before:
                after[name] = result
            else:
                before[name] = result
    return before, after


def changes(before: SetResult, after: SetResult) -> tuple[Estimate | None, Estimate | None]:
    """Paired differences after - before of pass@1 and of greedy pass@1; None where a problem in common is missing."""

    def difference(a: Mapping[str, float], b: Mapping[str, float]) -> Estimate | None:
        return paired_difference(a, b) if set(a) & set(b) else None

    sampled = difference(before.by_problem, after.by_problem)
    return sampled, difference(before.greedy_by_problem, after.greedy_by_problem)


def summary_table(before: Mapping[str, SetResult], after: Mapping[str, SetResult]) -> Table:
    """Two rows per held-out set, pass@1 and greedy: before, after and their paired difference, with 95 % intervals.

    Without anything in ``after`` there is one column of figures.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # tight: with names of seven letters it fits a terminal of 80 columns
    table = Table(
        title="Held-out sets, % with 95 % interval over problems", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("set", style="bold", min_width=7, overflow="fold")
    table.add_column("", min_width=6)
    titles = ("before", "after", "difference") if after else ("",)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, first in before.items():
        last = after.get(name)
        sampled, greedy = changes(first, last) if last else (None, None)
        rows: list[tuple[Any, ...]] = [
            (Text(name), "pass@1", _percent(first.pass_at_1, first.ci95),
             _percent(last.pass_at_1, last.ci95) if last else "-", _points(sampled)),
            (Text(f"{first.n} x {first.k}", "dim"), "greedy", _percent(first.greedy, first.greedy_ci95),
             _percent(last.greedy, last.greedy_ci95) if last else "-", _points(greedy)),
        ]  # fmt: skip
        missing = [r.errors + r.unjudged if r else 0 for r in (first, last)]
        if any(missing):
            rows.append((Text(""), "not judged", *(Text(str(count), "red") for count in missing), ""))
        for row in rows:
            table.add_row(*row[: 2 + len(titles)])
        table.add_section()
    return table


def _percent(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "-"
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _points(change: Estimate | None) -> Any:
    from rich.text import Text

    if change is None:
        return "-"
    low, high = change.ci95
    colour = "green" if low > 0 else "red" if high < 0 else ""
    return Text(f"{100 * change.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", style=colour)


def learning_curve(stages: Sequence[StageCurve], path: Path, *, title: str) -> None:
    """Draws the whole run into a PNG: training accuracy, held-out sets before and after, and small panels.

    Args:
        stages: in order; what a run has not logged is left out.
        path: of the picture; its folder is there.
        title: the run's name.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr] - inches
    figure.suptitle(title, x=0.015, ha="left", fontsize=14, fontweight="bold")
    small = [*(("sft/loss",) if _joined(stages, "sft", "learner/loss")[0] else ()), *_SMALL]
    grid = figure.add_gridspec(2, 12, height_ratios=(1.9, 1))
    _draw_training(figure.add_subplot(grid[0, :7]), stages)
    _draw_heldout(figure.add_subplot(grid[0, 7:]), stages)
    inner = grid[1, :].subgridspec(1, len(small))
    for index, metric in enumerate(small):
        _draw_small(figure.add_subplot(inner[0, index]), stages, metric)
    figure.savefig(path, format="png", metadata={"Software": "r1"})


def _joined(stages: Sequence[StageCurve], kind: str, metric: str) -> tuple[list[float], list[float], list[int]]:
    """A metric over all stages of a kind laid end to end: steps, values, and where a later stage begins."""
    steps: list[float] = []
    values: list[float] = []
    borders: list[int] = []
    offset = 0
    for stage in stages:
        if stage.kind != kind:
            continue
        if offset:
            borders.append(offset)
        for step, row in sorted(stage.rows.items()):
            if math.isfinite(row.get(metric, math.nan)):
                steps.append(offset + step)
                values.append(row[metric])
        offset += max(stage.rows, default=-1) + 1
    return steps, values, borders


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; at the ends over what there is."""
    half = window // 2
    return [
        sum(near) / len(near)
        for near in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]  # fmt: skip


def _draw_training(axes: Axes, stages: Sequence[StageCurve]) -> None:
    """Pass rate and reward of the rollouts over the steps of reinforcement learning, with evaluations on the way."""
    drawn = False
    for metric, label, colour in (
        ("reward/pass_rate", "rollouts that pass", _COLOURS[0]), ("reward/mean", "mean reward", _COLOURS[1]),
    ):  # fmt: skip
        steps, values, borders = _joined(stages, "grpo", metric)
        if not values or (drawn and values == _joined(stages, "grpo", "reward/pass_rate")[1]):
            continue
        drawn = True
        axes.plot(steps, values, color=colour, alpha=0.3, lw=1)
        axes.plot(steps, smooth(values, max(1, len(values) // 12) | 1), color=colour, lw=2.2, label=label)
        for border in borders:
            axes.axvline(border - 0.5, color=_GREY, lw=0.8, ls=":")
    offset = 0
    names = list(dict.fromkeys(n for s in stages for _, results in s.during for n in results))
    for stage in (s for s in stages if s.kind == "grpo"):
        for index, name in enumerate(names):
            found = [(offset + step, results[name]) for step, results in stage.during if name in results]
            if found:
                drawn = True
                _draw_points(axes, found, _COLOURS[(2 + index) % len(_COLOURS)], name if not offset else None)
        offset += max(stage.rows, default=-1) + 1
    _style(axes, "Reinforcement learning", "step")
    if drawn:
        axes.legend(frameon=False, loc="best", fontsize=9)
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), max(1.02, high))
    else:
        _nothing(axes, "no steps yet")


def _draw_points(axes: Axes, found: Sequence[tuple[float, SetResult]], colour: str, label: str | None) -> None:
    values = [result.pass_at_1 for _, result in found]
    reach = [[v - r.ci95[0] for v, (_, r) in zip(values, found, strict=True)],
             [r.ci95[1] - v for v, (_, r) in zip(values, found, strict=True)]]  # fmt: skip
    axes.errorbar([x for x, _ in found], values, reach, fmt="o-", ms=5, lw=1, capsize=3, color=colour, label=label)


def _draw_heldout(axes: Axes, stages: Sequence[StageCurve]) -> None:
    """Per held-out set: sampled and greedy pass@1, from before (hollow) to after (filled), with 95 % intervals."""
    before, after = before_and_after(stages)
    _style(axes, "Held-out sets: before ○ and after ●", "pass@1 with 95 % interval")
    if not before:
        _nothing(axes, "not evaluated yet")
        return
    ticks: list[tuple[float, str]] = []
    for index, (name, first) in enumerate(before.items()):
        last = after.get(name)
        label = f"{name}\n{first.n} problems" if first.k == 1 else f"{name}\n{first.n} x {first.k}"
        ticks.append((-index, label))
        for shift, colour, pick in ((0.14, _COLOURS[0], _sampled), (-0.14, _COLOURS[4], _greedy)):
            _draw_pair(axes, shift - index, pick(first), pick(last) if last else None, colour)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(ticks) + 0.45, 0.7)
    axes.set_xlim(-0.04, 1.04)
    axes.grid(visible=True, axis="x", color="#e5e7eb", lw=0.8)
    axes.grid(visible=False, axis="y")
    for label, colour in (("sampled", _COLOURS[0]), ("greedy", _COLOURS[4])):
        axes.plot([], [], "o", color=colour, label=label)
    axes.legend(frameon=False, loc="upper center", ncols=2, fontsize=9, bbox_to_anchor=(0.5, 1.0))


_Point = tuple[float, tuple[float, float]]


def _draw_pair(axes: Axes, y: float, old: _Point | None, new: _Point | None, colour: str) -> None:
    """Before (hollow) and after (filled) on one line, each with its interval and its value in %."""
    near = old is not None and new is not None and abs(new[0] - old[0]) < 0.06
    if old is not None and new is not None and not near:
        arrow = {"arrowstyle": "->", "color": colour, "lw": 1.2, "alpha": 0.55, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", xy=(new[0], y), xytext=(old[0], y), arrowprops=arrow)
    for point, face, lift in ((old, "white", -15 if near else 7), (new, colour, 7)):
        if point is not None:
            value, (low, high) = point
            axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=7, color=colour, lw=1.6,
                          capsize=3, markerfacecolor=face, zorder=3)  # fmt: skip
            axes.annotate(f"{100 * value:.0f}", (value, y), xytext=(0, lift), textcoords="offset points",
                          ha="center", fontsize=8, color=colour)  # fmt: skip


def _sampled(result: SetResult) -> _Point | None:
    return result.pass_at_1, result.ci95


def _greedy(result: SetResult) -> _Point | None:
    return (result.greedy, result.greedy_ci95) if result.greedy is not None and result.greedy_ci95 else None


def _draw_small(axes: Axes, stages: Sequence[StageCurve], metric: str) -> None:
    kind, name, title = ("sft", "learner/loss", "cold start: loss") if metric == "sft/loss" else ("grpo", metric, "")
    steps, values, _ = _joined(stages, kind, name)
    _style(axes, title or _SMALL[metric], "step", small=True)
    if not values:
        _nothing(axes, "not logged")
        return
    axes.plot(steps, values, color=_COLOURS[0], lw=1.3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.offsetText.set_fontsize(8)
    if min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.12 or 1.0)


def _style(axes: Axes, title: str, xlabel: str, *, small: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=9 if small else 11, color="#111827")
    axes.set_xlabel(xlabel, fontsize=8 if small else 9, color=_GREY)
    axes.tick_params(labelsize=8 if small else 9, colors="#374151")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d1d5db")
    axes.grid(visible=True, axis="y", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)


def _nothing(axes: Axes, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=9)

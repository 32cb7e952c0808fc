"""``r1 replay``: computes a stored step of a run again, on the CPU, and compares every figure that was logged of it.

A step follows from the state before it and from its rollouts (or demonstrations), both of which are in the run folder.
On the machine that it ran on, with as many threads, every figure comes out the same to the last bit; elsewhere sums
round differently, and the difference grows with every step that is repeated.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.replay_run import StoredStage

_LEFT_OUT = {
    "times": "not comparable, times and rates",
    "engines": "not recomputed, answers of engines",
    "ranks": "not comparable, they depend on the number of ranks",
}
_DIGITS = 7  # of figures that agree
_NAMED = 8  # sequences in a line
TOLERANCE = {"float32": (1e-3, 1e-5), "bfloat16": (5e-2, 1e-3)}
"""Relative and absolute, by the model's dtype, where bits cannot be expected; a figure passes that keeps either."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the step.

    Attributes:
        name: of the metric.
        logged, recomputed: None: there is none; NaN: it was not finite.
        ok: they agree; None: it was not logged, though the step gives it.
    """

    name: str
    logged: float | None
    recomputed: float | None
    ok: bool | None

    @property
    def deviation(self) -> float:
        """|recomputed - logged|; NaN when one of them is not a number."""
        if self.logged is None or self.recomputed is None:
            return math.nan
        return abs(self.recomputed - self.logged)

    def share_of(self, relative: float, absolute: float) -> float:
        """The deviation over what is allowed; over the figure itself where nothing is."""
        if not self.deviation:
            return 0.0
        if self.logged is None or self.recomputed is None or math.isnan(self.deviation):
            return 0.0 if self.ok else math.inf
        size = max(abs(self.logged), abs(self.recomputed))
        return self.deviation / (max(relative * size, absolute) or size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("step", metavar="STEP", type=int, help="its number in metrics.jsonl, from 0")
    parser.add_argument("--stage", metavar="NAME", help="a training stage; default: the last one that has begun")
    parser.epilog = "Exit status 1 when a figure differs. docs/replay.md says what can be replayed, and how exactly."


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; returns what :func:`report` found.

    Raises:
        ValueError: the step cannot be computed again.
        OSError: something in the run folder is damaged.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs: a replay is the CPU's
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from pipelines.replay_run import StoredStage

    stored = StoredStage(options.run.expanduser(), options.stage)
    # A user's own modules (targets, data rewrites) are found where the run found them.
    sys.path.extend(p for p in (str(Path.cwd()), *stored.recipe_folders) if p not in sys.path)
    shown = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                     console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())  # fmt: skip
    with shown:
        task = shown.add_task("repeating steps", total=None)
        answer = report(stored, options.step, lambda done, total: shown.update(task, completed=done, total=total))
    if not options.json:
        _print(answer)
    return answer


def report(stored: StoredStage, step: int, advance: Any = lambda done, total: None) -> dict[str, Any]:
    """Computes a step again and holds it against the run folder.

    Returns:
        ``{"ok", "run", "stage", "step", "start": {"step", "checkpoint"}, "tolerance": {"relative", "absolute",
        "reason"}, "figures": [{"name", "logged", "recomputed", "ok"}], "compared", "same_bits", "worst",
        "not_compared": {"times", "engines", "ranks"}, "bad": {"kept", "found", "trace"} | None}``.

    Raises:
        ValueError: it cannot be computed again; says which steps can be.
    """
    from pipelines.bad_steps import read_bad_step
    from pipelines.replay_run import Replayer
    from pipelines.tracking import declared_name

    start = stored.start(step)
    threads, relative, absolute, reason = _conditions(stored, step)
    found = Replayer(stored, threads).replay(start, step, advance)
    left_out = _left_out(stored)
    logged = stored.rows.get(step, {})
    # A bad step that stopped the run has no line; one that has a line must have all figures in it.
    figures = compare(logged, found.figures, left_out, relative, absolute) if step in stored.rows else []
    for name, (one, other) in stored.contradictions(step).items():
        if one != other and (one is None or other is None or not _agree(one, other, relative, absolute)):
            figures.append(Figure(name=name, logged=one, recomputed=other, ok=False))
    kept = read_bad_step(stored.path, step)
    bad = None
    if kept is not None or found.bad:
        bad = {"kept": [] if kept is None else kept["updates"], "found": found.bad, "trace": found.trace}
    held = [figure for figure in figures if figure.ok is not None]
    worst = max(held, key=lambda figure: figure.share_of(relative, absolute), default=None)
    return {
        "ok": all(figure.ok for figure in figures) and bool(held or bad) and (bad is None or _same_fault(bad)),
        "run": str(stored.run),
        "stage": stored.stage.name,
        "step": step,
        "start": {"step": start.step, "checkpoint": start.checkpoint and start.checkpoint.name},
        "threads": threads,
        "tolerance": {"relative": relative, "absolute": absolute, "reason": reason},
        "figures": [_plain(figure) for figure in figures],
        "compared": len(held),
        "same_bits": sum(figure.logged == figure.recomputed or figure.deviation == 0 for figure in held),
        "worst": None if worst is None else {**_plain(worst), "deviation": _number(worst.deviation)},
        "not_compared": {why: [n for n in logged if declared_name(n) in names] for why, names in left_out.items()},
        "bad": bad,
    }


def compare(
    logged: Mapping[str, float],
    recomputed: Mapping[str, float],
    left_out: Mapping[str, Collection[str]],
    relative: float,
    absolute: float,
) -> list[Figure]:
    """Every figure that follows from the step's rollouts and weights, in the order in which it was logged.

    Args:
        logged, recomputed: by name; NaN for what was not finite.
        left_out: declared names that are not to be compared, by the reason.
        relative, absolute: tolerances; 0 and 0 asks for the same bits.
    """
    from pipelines.tracking import declared_name

    figures = []
    for name in dict.fromkeys((*logged, *recomputed)):
        if name == "step" or any(declared_name(name) in names for names in left_out.values()):
            continue
        one, other = logged.get(name), recomputed.get(name)
        ok = None if one is None else other is not None and _agree(one, other, relative, absolute)
        figures.append(Figure(name=name, logged=one, recomputed=other, ok=ok))
    return figures


def _agree(one: float, other: float, relative: float, absolute: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return not math.isfinite(one) and not math.isfinite(other)  # infinity is logged as null too
    return math.isclose(one, other, rel_tol=relative, abs_tol=absolute)


def _conditions(stored: StoredStage, step: int) -> tuple[int, float, float, str]:
    """Threads of the learner, the tolerances, and why they are what they are."""
    from pipelines.machine import machine

    machines = stored.machines(step)
    here = machine(stored.recipe, anywhere=True)
    wanted = machines[-1]["cores"] if machines else here["cores"]
    threads = min(wanted, here["cores"])
    now = {**here, "cores": threads, "ranks": 1, "gpu": None}
    differs = [key for key in now if any(then.get(key) != now[key] for then in machines)]
    if machines and not differs:
        return threads, 0.0, 0.0, "the machine, the threads and torch are those of the run: the same bits are expected"
    relative, absolute = TOLERANCE[stored.recipe.model.dtype]
    then = ", ".join(f"{key} {machines[-1].get(key)} then, {now[key]} now" for key in differs)
    return threads, relative, absolute, then or "the run folder does not say which machine it was"


def _same_fault(bad: Mapping[str, Any]) -> bool:
    def told(updates: list[dict[str, Any]]) -> list[Any]:
        return [(update["mini_batch"], update["what"], sorted(update["parameters"])) for update in updates]

    return told(bad["kept"]) == told(bad["found"])


def _left_out(stored: StoredStage) -> dict[str, frozenset[str]]:
    """What is not compared, by the reason."""
    from pipelines.tracking import OF_ENGINES, TIMES
    from policy.glossary import LEARNER_OF_THE_CUT

    alone = stored.recipe.parallel.ranks == 1
    return {"times": TIMES, "engines": OF_ENGINES, "ranks": frozenset() if alone else LEARNER_OF_THE_CUT}


def _plain(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "logged": _number(figure.logged),
        "recomputed": _number(figure.recomputed),
        "ok": figure.ok,
    }


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from pipelines.console import printable

    console = Console()
    if answer["figures"]:
        console.print(figures_table(answer["figures"]))
    for line in lines(answer):
        console.print(Text(printable(line)), soft_wrap=True)


def figures_table(figures: list[dict[str, Any]]) -> Table:
    """One row per figure."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pipelines.console import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure", overflow="fold", ratio=1)
    for column in ("logged", "recomputed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    words = {True: Text("ok"), False: Text("differs", style="red"), None: Text("not logged", style="dim")}
    for row in figures:
        digits = _DIGITS if row["ok"] else 17  # all there are where they matter
        values = (_shown(row[key], digits) for key in ("logged", "recomputed"))
        table.add_row(Text(printable(row["name"])), *values, words[row["ok"]])
    return table


def _shown(value: float | str | None, digits: int) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}g}"


def lines(answer: Mapping[str, Any]) -> list[str]:
    """What stands under the table."""
    start, tolerance, bad = answer["start"], answer["tolerance"], answer["bad"]
    origin = "the stage's first model" if start["checkpoint"] is None else start["checkpoint"]
    repeated = answer["step"] - start["step"]
    text = [f"step {answer['step']} of {answer['stage']}: from {origin}, {repeated} steps repeated before it, "
            f"{answer['threads']} threads"]  # fmt: skip
    if answer["compared"]:
        relative, absolute = tolerance["relative"], tolerance["absolute"]
        allowed = f"{relative:g} relative, or {absolute:g}" if relative else "none"
        text.append(f"allowed deviation: {allowed} ({tolerance['reason']})")
        text.append(f"{answer['same_bits']} of {answer['compared']} figures are the same to the bit")
    elif bad is None:
        text.append("nothing was compared: the step's line in metrics.jsonl has no figure that can be recomputed")
    absent = [row["name"] for row in answer["figures"] if row["ok"] is None]
    if absent:
        text.append(f"not logged, though the step gives them: {', '.join(absent)}")
    for why, names in answer["not_compared"].items():
        if names:
            text.append(f"{_LEFT_OUT[why]}: {', '.join(names)}")
    if bad is not None:
        text += _bad_lines(bad)
    verdict = "the step is what the run folder says" if answer["ok"] else "the step is NOT what the run folder says"
    return [*text, verdict]


def _bad_lines(bad: Mapping[str, Any]) -> list[str]:
    text = []
    for title, updates in (("logged", bad["kept"]), ("found", bad["found"])):
        for update in updates:
            names = ["/".join(map(str, sequence.values())) for sequence in update["sequences"]]
            more = " …" if len(names) > _NAMED else ""
            where = f"; sequences {', '.join(names[:_NAMED])}{more}" if names else ""
            text.append(f"{title}: update {update['mini_batch'] + 1} of the step: {update['text']}{where}")
            if title == "found":
                text.append("  loss by micro-batch: " + ", ".join(_brief(loss) for loss in update["losses"]))
    if not bad["found"]:
        text.append("found: everything was finite; so the cause is neither in the batch nor in the weights before it "
                    "(a fault of the machine, or sums that round differently here)")  # fmt: skip
    if bad["trace"] is not None:
        text.append(f"where it begins: {bad['trace']['sentence']}")
    return text


def _brief(loss: float | str) -> str:
    return loss if isinstance(loss, str) else f"{loss:.4g}"

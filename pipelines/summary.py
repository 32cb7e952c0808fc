"""A run folder -> the table and the picture at the end of a run. Reads only what the run folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.report import StageCurve, before_and_after, condense, learning_curve, sparkline, summary_table
from evals.run import SetResult
from pipelines.files import writing
from pipelines.run_dir import read_json, stage_path
from pipelines.tracking import read_metrics, read_rows

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.config import Recipe

PICTURE = "learning_curve.png"


def stage_curves(run: Path, recipe: Recipe) -> list[StageCurve]:
    """What every stage of a run has logged so far.

    Args:
        run: the run folder.
        recipe: the one that it was made with.

    Raises:
        RunDirError: a damaged file.
    """
    curves = []
    for index, stage in enumerate(recipe.stages):
        folder = stage_path(run, index, stage.kind)
        figures = read_json(folder / "done") or {}
        curves.append(
            StageCurve(
                name=stage.name, kind=stage.kind, rows=read_metrics(folder / "metrics.jsonl"),
                results=set_results(figures.get("results", {})),
                during=[(row["step"], set_results(row["results"])) for row in read_rows(folder / "evals.jsonl")],
            )
        )  # fmt: skip
    return curves


def draw_picture(run: Path, recipe: Recipe) -> Path:
    """Writes ``learning_curve.png`` into the run folder and returns its path.

    Raises:
        RunDirError: the disk is full.
    """
    path = run / PICTURE
    with writing(path):
        learning_curve(stage_curves(run, recipe), path, title=recipe.name)
    return path


def print_summary(run: Path, recipe: Recipe, console: Console) -> None:
    """Prints the held-out table, the curve of the pass rate, and where everything is."""
    curves = stage_curves(run, recipe)
    before, after = before_and_after(curves)
    if before:
        console.print(summary_table(before, after))
    for curve in curves:
        rates = [row["reward/pass_rate"] for _, row in sorted(curve.rows.items()) if "reward/pass_rate" in row]
        if rates:
            means = condense(rates, 40)
            line = f"{curve.name}: pass rate {means[0]:.2f} {sparkline(means)} {means[-1]:.2f}"
            console.print(line, markup=False, highlight=False)
    console.print(f"run folder: {run}", markup=False, highlight=False, soft_wrap=True)
    if (run / PICTURE).exists():
        console.print(f"learning curve: {run / PICTURE}", markup=False, highlight=False, soft_wrap=True)


def set_results(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, SetResult]:
    """Results by held-out set, as a stage's figures hold them."""
    return {name: SetResult.from_json(row) for name, row in rows.items()}

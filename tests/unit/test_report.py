"""The table before and after, the sparkline, the picture, and the same from a run folder."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from evals.metrics import mean_interval
from evals.report import (
    StageCurve,
    before_and_after,
    changes,
    condense,
    learning_curve,
    smooth,
    sparkline,
    summary_table,
)
from evals.run import SetResult
from pipelines.config import load_recipe
from pipelines.files import append_line, write_atomic
from pipelines.run_dir import RunDirError
from pipelines.summary import draw_picture, print_summary, stage_curves

RECIPE = """\
name: small
model: {preset: tiny}
stages:
  - {kind: sft, data: {source: "jsonl:t"}, steps: 3}
  - kind: eval
    name: before
    sets: &sets [{name: hard, data: {source: "jsonl:h"}, rewards: &r {functions: [{path: accuracy}]}}]
  - {kind: grpo, data: {source: "jsonl:t"}, steps: 4, rewards: *r}
  - {kind: eval, name: after, sets: *sets}
"""


def result(name: str, shares: Mapping[str, float], greedy: Mapping[str, float] | None = None, **more: Any) -> SetResult:
    values = list(shares.values())
    extra: dict[str, Any] = {}
    if greedy is not None:
        answers = list(greedy.values())
        extra = {"greedy": sum(answers) / len(answers), "greedy_ci95": mean_interval(answers)}
    return SetResult(
        name=name, judge="a", pass_at_1=sum(values) / len(values), ci95=mean_interval(values), n=len(values), k=8,
        by_problem=shares, greedy_by_problem=greedy or {}, **extra, **more,
    )  # fmt: skip


BEFORE = result("hard", {"a": 0.0, "b": 0.25, "c": 0.5, "d": 0.25}, {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0})
AFTER = result("hard", {"a": 0.75, "b": 1.0, "c": 1.0, "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0})


def text_of(renderable: Any, width: int = 90) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, math.nan, 7.0]) == "▁ █"
    assert sparkline([3, 3]) == "▁▁" and sparkline([]) == "" and sparkline([math.nan]) == " "
    assert sparkline(range(100), width=5) == sparkline(range(95, 100)) and len(sparkline(range(100))) == 60


def test_a_long_series_is_condensed_to_means_of_equal_parts() -> None:
    assert condense([1, 3, 5, 7, 9, 11], 3) == [2, 6, 10]
    assert condense([1, 2, 3], 2) == [1.5, 3]  # halves of three: two and one
    assert condense([4, 5], 60) == [4, 5] and condense([], 5) == []


def test_first_and_last_evaluations() -> None:
    middle = result("hard", {"a": 0.5})
    stages = [
        StageCurve(name="x", kind="eval", results={"hard": BEFORE, "once": BEFORE}),
        StageCurve(name="y", kind="eval", results={"hard": middle}),
        StageCurve(name="z", kind="eval", results={"hard": AFTER}),
    ]
    before, after = before_and_after(stages)
    assert before == {"hard": BEFORE, "once": BEFORE} and after == {"hard": AFTER}


def test_the_table_shows_both_figures_and_the_paired_difference() -> None:
    sampled, greedy = changes(BEFORE, AFTER)
    assert sampled is not None and sampled.value == pytest.approx(0.6875) and sampled.n == 4
    assert greedy is not None and greedy.value == pytest.approx(0.75)
    lines = text_of(summary_table({"hard": BEFORE}, {"hard": AFTER})).splitlines()
    row = next(line for line in lines if "pass@1" in line)
    assert row.split()[:3] == ["hard", "pass@1", "25.0"] and "93.8 [" in row and "+68.8 [" in row
    assert "4 x 8" in next(line for line in lines if "greedy" in line)
    assert "not judged" not in "".join(lines) and max(map(len, lines)) <= 90


def test_a_set_that_is_evaluated_once_and_judge_failures() -> None:
    failed = result("hard [x]", {"a": 0.5, "b": 1.0}, errors=3, unjudged=1)
    text = text_of(summary_table({"hard [x]": failed, "other": BEFORE}, {"other": AFTER}))
    assert "hard [x]" in text and "not judged" in text and " 4 " in text
    alone = text_of(summary_table({"hard": BEFORE}, {}))
    assert "difference" not in alone and "25.0 [" in alone
    assert changes(BEFORE, result("hard", {"z": 1.0})) == (None, None)


def test_smoothing() -> None:
    assert smooth([1.0, 2.0, 3.0], 1) == [1.0, 2.0, 3.0]
    assert smooth([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert smooth([], 5) == []


def curves() -> list[StageCurve]:
    rows = {
        step: {
            "reward/mean": step / 40 + 0.1, "reward/pass_rate": step / 40, "learner/entropy": 1 / (step + 1),
            "rollout/length_mean": 20.0, "learner/grad_norm": math.nan, "mismatch/mean_abs": 3e-7,
        }
        for step in range(30)
    }  # fmt: skip
    return [
        StageCurve(name="sft", kind="sft", rows={step: {"learner/loss": 3 / (1 + step)} for step in range(0, 90, 10)}),
        StageCurve(name="before", kind="eval", results={"hard": BEFORE}),
        StageCurve(name="rl", kind="grpo", rows=rows, during=[(9, {"hard": BEFORE}), (19, {"hard": AFTER})]),
        StageCurve(name="rl2", kind="grpo", rows={step: {"reward/pass_rate": 0.9} for step in range(5)}),
        StageCurve(name="after", kind="eval", results={"hard": AFTER}),
    ]


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, stages: list[StageCurve]) -> Figure:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    learning_curve(stages, path, title="small")
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_the_picture_shows_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, tmp_path / "a.png", curves())
    training, heldout, *small = figure.axes
    legend = training.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rollouts that pass", "mean reward", "hard"]
    raw = training.get_lines()[0]
    assert list(raw.get_xdata())[-5:] == [30, 31, 32, 33, 34], "a second stage follows the first"  # type: ignore[arg-type]
    assert [label.get_text() for label in heldout.get_yticklabels()] == ["hard\n4 x 8"]
    values = {text.get_text() for text in heldout.texts}
    assert {"25", "94", "100"} <= values, "pass@1 before and after, greedy before and after"
    assert [axes.get_title(loc="left") for axes in small] == [
        "cold start: loss", "entropy, nats per token", "completion length, tokens", "gradient norm",
        "engine vs learner, mean |Δlogp|",
    ]  # fmt: skip
    assert [t.get_text() for t in small[3].texts] == ["not logged"], "NaN is not drawn"


def test_a_picture_of_a_run_that_has_hardly_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, tmp_path / "a.png", [])
    assert [text.get_text() for axes in figure.axes[:2] for text in axes.texts] == ["no steps yet", "not evaluated yet"]


def test_importing_the_reports_loads_no_drawing_library() -> None:
    code = "import sys, evals.report; print([m for m in ('matplotlib', 'rich', 'torch', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == "[]"


def test_a_run_folder_becomes_table_and_picture(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    run = tmp_path / "runs" / "small"
    for folder in ("01-sft", "02-eval", "03-grpo", "04-eval"):
        (run / folder).mkdir(parents=True)
    for step in range(3):
        row = {"step": step, "reward/pass_rate": step / 4, "learner/entropy": None}
        append_line(run / "03-grpo" / "metrics.jsonl", json.dumps(row))
    append_line(
        run / "03-grpo" / "evals.jsonl", json.dumps({"step": 1, "results": {"hard": BEFORE.to_json()}})
    )  # fmt: skip
    for folder, found in (("02-eval", BEFORE), ("04-eval", AFTER)):
        write_atomic(run / folder / "done", json.dumps({"results": {"hard": found.to_json()}}))
    stages = stage_curves(run, recipe)
    assert [stage.name for stage in stages] == ["sft", "before", "grpo", "after"]
    assert stages[1].results == {"hard": BEFORE} and stages[2].during == [(1, {"hard": BEFORE})]
    assert draw_picture(run, recipe).read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=90)
    print_summary(run, recipe, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+68.8 [" in shown and "grpo: pass rate 0.00 ▁▅█ 0.50" in shown.replace("▄", "▅")
    assert str(run / "learning_curve.png") in shown.replace("\n", "")
    (run / "learning_curve.png").unlink()
    (run / "learning_curve.png").mkdir()
    with pytest.raises(RunDirError, match="cannot be written"):
        draw_picture(run, recipe)

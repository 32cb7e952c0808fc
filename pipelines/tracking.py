"""What is measured, and where it goes: metrics.jsonl, the live console, and wandb when it is asked for.

Every metric is declared once, with a sentence: the learner's in ``policy.glossary``, those of the reward functions in
``rewards.rubric``, all others here. ``{x}`` in a name
stands for a reward function, a phase, a layer or a held-out set. An undeclared name is refused. ``python -m
pipelines.tracking`` prints the glossary as docs/metrics.md.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import View
from pipelines.files import RunDirError, append_line, read_lines, write_atomic
from policy.glossary import ADVANTAGE_METRICS, LEARNER_METRICS, LEARNER_TIMES
from rewards.rubric import REWARD_METRICS
from rollout.types import RolloutGroup

if TYPE_CHECKING:
    from pipelines.run_dir import StageDir

_OWN_METRICS: dict[str, str] = {
    "rollout/samples": "Completions of this step.",
    "rollout/length_mean": "Mean length of a completion, tokens.",
    "rollout/length_p50": "Median length of a completion, tokens.",
    "rollout/length_max": "Longest completion, tokens.",
    "rollout/truncated": "Share of completions that were cut at max_tokens or at the context.",
    "rollout/tokens_per_s": "Tokens drawn over the seconds of the rollout phase, scoring included (0: all were kept).",
    "staleness/max": "Largest difference between the current policy_version and the one that sampled a rollout.",
    "sync/seconds": "Seconds from the first byte of a weight sync to its last attestation.",
    "sync/bytes": "Bytes of one copy of the weights.",
    "sync/version": "policy_version that every rollout worker holds after the sync.",
    "sync/canary_mean_abs": "Mean |Δlogp| between engine and learner on the canary texts of the sync, nats.",
    "sync/canary_max_abs": "Largest |Δlogp| between engine and learner on the canary texts of the sync, nats.",
    "seconds/{phase}": "Seconds that this step spent in a phase: rollout, journal, learner, sync, eval.",
    "seconds/checkpoint": "Seconds that the run waited for a checkpoint after the step before was logged: for a copy "
    "of the state, or for all of it when it was not written in the background.",
    "seconds/step": "Seconds of the whole step up to the moment it was logged.",
    "eval/{set}/pass_at_1": "Mean over the problems of a held-out set of the mean over their samples that pass.",
    "eval/{set}/ci_low": "Lower end of the 95 % interval of pass_at_1 (over problems).",
    "eval/{set}/ci_high": "Upper end of the 95 % interval of pass_at_1 (over problems).",
    "eval/{set}/greedy": "Share of the problems of a held-out set that pass when decoded greedily.",
    "eval/{set}/truncated": "Share of the samples of a held-out set that were cut at their token limit.",
    "eval/{set}/length_mean": "Mean length of the samples of a held-out set, tokens.",
}

METRICS: dict[str, str] = {**REWARD_METRICS, **_OWN_METRICS, **ADVANTAGE_METRICS, **LEARNER_METRICS}
"""Every metric's name -> one sentence with its unit."""

TIMES = LEARNER_TIMES | {name for name in _OWN_METRICS if name.startswith("seconds/")} | {
    "sync/seconds", "rollout/tokens_per_s",
}  # fmt: skip
"""Seconds and rates: how fast the machine was. Like all names here, as they are declared."""

OF_ENGINES = frozenset(name for name in _OWN_METRICS if name.startswith(("eval/", "sync/canary_")))
"""What engines answered after the step; everything else follows from the step's rollouts and the weights."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the numbers go besides metrics.jsonl, which is always written. Nothing here changes the run.

    Attributes:
        wandb: ``online`` | ``offline`` | ``off``; offline writes into the run folder, for ``wandb sync`` later.
        project: wandb project.
        entity: wandb user or team; null takes the account's default.
        console: show the live view on a terminal; without one, or when false, plain lines are printed.
        sample_every: show a new sample completion every n steps, >= 1.
        line_every_s: at most one plain line in this many seconds, > 0.
    """

    wandb: str = "off"
    project: str = "r1"
    entity: str | None = None
    console: bool = True
    sample_every: int = 1
    line_every_s: float = 5.0

    def __post_init__(self) -> None:
        if self.wandb not in ("online", "offline", "off"):
            raise ValueError(f"wandb must be online, offline or off, got {self.wandb!r}")
        if not self.project:
            raise ValueError("project must not be empty")
        if self.sample_every < 1:
            raise ValueError(f"sample_every must be >= 1, got {self.sample_every}")
        if not self.line_every_s > 0:
            raise ValueError(f"line_every_s must be > 0 seconds, got {self.line_every_s}")


class StepClock:
    """Seconds of one step by phase.

    Example:
        >>> clock = StepClock()
        >>> with clock("rollout"):
        ...     pass
        >>> sorted(clock.metrics())
        ['seconds/rollout', 'seconds/step']
    """

    def __init__(self, before: StepClock | None = None) -> None:
        self._began = time.monotonic()
        self._phases: dict[str, float] = {} if before is None else before._late or {}
        self._late: dict[str, float] | None = None  # once told: what came too late for this step's line

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds what runs inside to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self._phases if self._late is None else self._late
            spent[phase] = spent.get(phase, 0.0) + time.monotonic() - began

    def seconds(self, phase: str) -> float:
        """Seconds spent in a phase so far; 0.0 when it has not begun."""
        return self._phases.get(phase, 0.0)

    def metrics(self) -> dict[str, float]:
        """``seconds/<phase>`` of every phase so far, and ``seconds/step`` since the clock was made.

        What is timed after this goes to the next step's clock.
        """
        phases = {f"seconds/{phase}": value for phase, value in self._phases.items()}
        self._late = {}
        return {**phases, "seconds/step": time.monotonic() - self._began}


class Tracker:
    """Logs one stage. A context manager. A step that is logged already is not logged again.

    Args:
        folder: the stage's folder; what it has logged already is read.
        config: where the numbers go.
        run_name: the recipe's name, the display name in wandb.
        total: steps of the stage (for an evaluation: completions to draw), 0 when that is not known.
        view: shows progress; None shows nothing.
        recipe: the resolved recipe as plain values, for wandb.

    Raises:
        ValueError: wandb was asked for and is not installed or not logged in.
    """

    def __init__(
        self, folder: StageDir, config: TrackingConfig, run_name: str, *, total: int = 0, view: View | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._config, self._view = folder, config, view
        self._rows = read_metrics(folder.metrics)
        self._clock: StepClock | None = None
        self._evaluated = {row["step"] for row in read_rows(folder.path / "evals.jsonl")}
        run_folder = folder.path.parent
        self._wandb = open_wandb(config, run_folder, run_name, recipe or {}) if config.wandb != "off" else None
        if view is not None:
            view.begin(folder.name, folder.kind, total)

    def clock(self, step: int) -> StepClock:
        """A new clock, for one step."""
        del step
        self._clock = StepClock(self._clock)
        return self._clock

    def row(self, step: int) -> Mapping[str, float]:
        """What was logged of a step, also by an earlier process; empty when nothing was."""
        return self._rows.get(step, {})

    def log(self, step: int, metrics: Mapping[str, float], *, done: int | None = None) -> None:
        """Writes one step, unless metrics.jsonl has it (a resumed run repeats what came after its checkpoint).

        Args:
            step: 0-based.
            metrics: values by declared name; NaN and infinity are written as null and noted in events.jsonl.
            done: where the progress bar stands then; step + 1 when left out.

        Raises:
            ValueError: a name that is not declared.
            RunDirError: the disk is full.
        """
        undeclared = [name for name in metrics if describe_metric(name) is None]
        if undeclared:
            raise ValueError(f"metric {undeclared[0]!r} is not declared: give it a sentence in pipelines/tracking.py")
        values = {name: float(value) for name, value in metrics.items()}
        if step not in self._rows:
            self._write(step, values)
        if self._view is not None:
            self._view.advance(step + 1 if done is None else done, values)

    def advance(self, step: int) -> None:
        """Moves the progress bar past a step that is not logged."""
        if self._view is not None:
            self._view.advance(step + 1)

    def advance_eval(self, done: int) -> None:
        """Moves the progress bar of an evaluation to ``done`` finished completions."""
        if self._view is not None:
            self._view.advance(done)

    def sample(self, step: int, group: RolloutGroup) -> None:
        """Shows one completion of a group, every ``tracking.sample_every`` steps."""
        if self._view is not None and step % self._config.sample_every == 0:
            self._view.sample(group)

    def log_eval(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Writes an evaluation during training to the stage's evals.jsonl, once per step.

        Args:
            step: the step after which it was made, 0-based.
            results: by held-out set, as ``evals.run.SetResult.to_json``.

        Returns:
            Its figures as metrics, for the step's own line.
        """
        if step not in self._evaluated:
            row = json.dumps({"step": step, "results": results}, default=str)
            append_line(self._folder.path / "evals.jsonl", row, fsync=True)
            self._evaluated.add(step)
        if self._view is not None:
            for name, row in results.items():
                low, high = row["ci95"]
                self._view.line(f"step {step}: {name} pass@1 {row['pass_at_1']:.3f} [{low:.3f}, {high:.3f}]")
        return eval_metrics(results)

    def headline(self, *names: str) -> dict[str, Any]:
        """Figures of the stage for summary.json.

        Returns:
            ``{"steps": steps logged, name: {"first", "last", "max"}}``; a name that was never logged is left out.
        """
        figures: dict[str, Any] = {"steps": max(self._rows, default=-1) + 1}
        for name in names:
            assert describe_metric(name), f"{name} is not declared, so it can never have been logged"
            values = [value for _, row in sorted(self._rows.items()) if math.isfinite(value := row.get(name, math.nan))]
            if values:
                figures[name] = {"first": values[0], "last": values[-1], "max": max(values)}
        return figures

    def close(self, *, stopped: bool = False) -> None:
        """Ends the progress bar and the wandb run of the stage; safe to call twice."""
        if self._view is not None:
            self._view.end("stopped after" if stopped else "done in")
            self._view = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(stopped=kind is not None)

    def _write(self, step: int, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._folder.note({"event": "non_finite_metrics", "step": step, "metrics": bad})
        row = {"step": step, **{name: None if name in bad else value for name, value in values.items()}}
        append_line(self._folder.metrics, json.dumps(row), fsync=True)
        self._rows[step] = values
        self._send(step, values)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        if self._wandb is not None:
            prefix = self._folder.name
            self._wandb.log({f"{prefix}/step": step, **{f"{prefix}/{name}": value for name, value in values.items()}})


def eval_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``eval/<set>/…`` metrics of evaluation results; what a result lacks is left out."""
    metrics: dict[str, float] = {}
    for name, row in results.items():
        low, high = row["ci95"]
        found = {"pass_at_1": row["pass_at_1"], "ci_low": low, "ci_high": high, "greedy": row.get("greedy")}
        found |= {"truncated": row.get("truncated"), "length_mean": row.get("mean_tokens")}
        metrics |= {f"eval/{name}/{key}": float(value) for key, value in found.items() if value is not None}
    return metrics


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The rows of a metrics.jsonl by step; null reads as NaN.

    Raises:
        RunDirError: a damaged line.
    """
    rows = {}
    for row in read_rows(path):
        rows[row.pop("step")] = {k: math.nan if v is None else float(v) for k, v in row.items()}
    return rows


def describe_metric(name: str) -> str | None:
    """The sentence of a metric, placeholders matched; None when it is not declared."""
    declared = declared_name(name)
    return None if declared is None else METRICS[declared]


def declared_name(name: str) -> str | None:
    """The name under which a metric is declared, placeholders matched; None when it is not."""
    return name if name in METRICS else next((text for pattern, text in _patterns() if pattern.fullmatch(name)), None)


def glossary_markdown() -> str:
    """docs/metrics.md: every metric by its first word."""
    lines = [
        "# Metrics", "",
        "Every number that a run logs, as it stands in `metrics.jsonl` (and in wandb, under the stage's name). "
        "`{…}` stands for a reward function, a phase, a layer or a held-out set. "
        "This page is written by `python -m pipelines.tracking > docs/metrics.md`.",
    ]  # fmt: skip
    for group in dict.fromkeys(name.split("/")[0] for name in METRICS):
        lines += ["", f"## {group}", "", "| metric | what it is |", "| --- | --- |"]
        rows = [(name, text) for name, text in METRICS.items() if name.split("/")[0] == group]
        lines += [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(lines) + "\n"


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:  # with the name that each stands for
    found = []
    for name in METRICS:
        if "{" in name:
            parts = re.split(r"\{(\w+)\}", name)  # the odd ones are placeholders
            found.append((re.compile("".join(".+" if i % 2 else re.escape(p) for i, p in enumerate(parts))), name))
    return found


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a line file that each carry a ``step``; nothing when there is no file.

    Raises:
        RunDirError: a damaged line.
    """
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            raise RunDirError(f"{path}:{number}: this line is damaged; delete it and run again") from None
        yield row


def open_wandb(config: TrackingConfig, run_folder: Path, run_name: str, recipe: Mapping[str, Any]) -> Any:
    """The wandb run of this run folder; all stages and continuations share its id.

    Raises:
        ValueError: wandb is not installed, not logged in, or cannot be reached.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        mend = "pip install wandb, or set tracking.wandb=off"
        raise ValueError(f"tracking.wandb is {config.wandb}, but wandb is not installed: {mend}") from None
    marker = run_folder / "wandb-id"
    if not marker.exists():
        write_atomic(marker, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.project, entity=config.entity, name=run_name, id=marker.read_text("utf-8").strip(),
            mode=config.wandb, resume="allow", dir=run_folder, config=dict(recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"wandb cannot begin ({reason}): run `wandb login`, or set tracking.wandb=offline or tracking.wandb=off"
        ) from None


if __name__ == "__main__":
    sys.stdout.write(glossary_markdown())

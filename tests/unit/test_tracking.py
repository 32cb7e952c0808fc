"""The glossary, the log of a stage, wandb by configuration, and what a person sees."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from evals.run import SetResult
from pipelines.console import LineView, LiveView, Progress, duration, figures, open_view, printable
from pipelines.run_dir import RunDirError, StageDir
from pipelines.tracking import (
    METRICS,
    StepClock,
    Tracker,
    TrackingConfig,
    describe_metric,
    eval_metrics,
    glossary_markdown,
    read_metrics,
)
from policy.glossary import ADVANTAGE_METRICS, LEARNER_METRICS
from rewards.rubric import REWARD_METRICS
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

RESULT = SetResult(
    name="hard", judge="a", pass_at_1=0.5, ci95=(0.4, 0.6), n=4, k=2, greedy=0.25, truncated=0.1, mean_tokens=12.0
)


class Recorder:
    """A view that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, name: str, kind: str, total: int) -> None:
        self.calls.append(("begin", name, kind, total))

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        self.calls.append(("advance", done, dict(metrics or {})))

    def sample(self, group: RolloutGroup) -> None:
        self.calls.append(("sample", group.problem.id))

    def line(self, text: str) -> None:
        self.calls.append(("line", text))

    def end(self, how: str = "done in") -> None:
        self.calls.append(("end",))

    def close(self) -> None:
        self.calls.append(("close",))


@pytest.fixture
def events() -> list[Mapping[str, Any]]:
    return []


@pytest.fixture
def folder(tmp_path: Path, events: list[Mapping[str, Any]]) -> StageDir:
    return StageDir(tmp_path / "02-grpo", "rl", "grpo", events.append)


def group(text: str = "3+5=8", reward: float | None = 1.0) -> RolloutGroup:
    completion = Completion(
        prompt_token_ids=(1,), token_ids=(2,), text=text, rollout_logprobs=(-0.1,), finish_reason=FinishReason.STOP,
        policy_version=0,
    )  # fmt: skip
    rollout = Rollout(completion=completion, reward=reward)
    return RolloutGroup(problem=Problem(id="p1", prompt="3+5 [bold]"), rollouts=(rollout,))


# -- glossary --------------------------------------------------------------------------------------------------------


def test_every_declaration_is_merged_once_and_is_a_sentence() -> None:
    for part in (LEARNER_METRICS, ADVANTAGE_METRICS, REWARD_METRICS):
        assert set(part) <= set(METRICS)
    for name, text in METRICS.items():
        assert re.fullmatch(r"[\w/{}]+", name), name
        assert text[:1].isupper() or text[:1].isdigit() or text.split("/")[0].islower(), name
        assert text.endswith("."), name
        assert "|" not in text.replace("|Δlogp|", "").replace("|old_logprobs - rollout_logprobs|", "") or "KL(" in text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("reward/mean", True), ("reward/my_rewards:concise/mean", True), ("reward/a/b.py:fn/timeouts", True),
        ("router/load_max_over_mean/layer_3", True), ("seconds/rollout", True), ("eval/hard/ci_low", True),
        ("learner/loss", True), ("reward", False), ("learner/lsos", False), ("seconds", False), ("xseconds/a", False),
        ("eval/hard/nothing", False), ("router/load_max_over_mean/layer_", False),
    ],
)  # fmt: skip
def test_names_with_placeholders(name: str, found: bool) -> None:
    assert (describe_metric(name) is not None) == found


def test_the_metrics_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text("utf-8") == glossary_markdown(), "python -m pipelines.tracking > docs/metrics.md"
    for name in METRICS:
        assert f"| `{name}` |" in glossary_markdown()


# -- the log ---------------------------------------------------------------------------------------------------------


def test_one_line_per_step(folder: StageDir) -> None:
    view = Recorder()
    with Tracker(folder, TrackingConfig(), "run", total=3, view=view) as tracker:
        tracker.log(0, {"reward/mean": 0.5, "learner/loss": 1})
        tracker.log(1, {"reward/mean": 0.75})
        tracker.advance(2)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert rows == [{"step": 0, "reward/mean": 0.5, "learner/loss": 1.0}, {"step": 1, "reward/mean": 0.75}]
    assert view.calls == [
        ("begin", "rl", "grpo", 3), ("advance", 1, {"reward/mean": 0.5, "learner/loss": 1.0}),
        ("advance", 2, {"reward/mean": 0.75}), ("advance", 3, {}), ("end",),
    ]  # fmt: skip


def test_an_undeclared_metric_is_refused_before_anything_is_written(folder: StageDir) -> None:
    with pytest.raises(ValueError, match="metric 'learner/lsos' is not declared: give it a sentence"):
        Tracker(folder, TrackingConfig(), "run").log(0, {"learner/loss": 1.0, "learner/lsos": 1.0})
    assert not folder.metrics.exists()


def test_a_resumed_run_logs_no_step_twice(folder: StageDir) -> None:
    first = Tracker(folder, TrackingConfig(), "run")
    for step in range(3):
        first.log(step, {"reward/mean": step / 10})
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "rew')  # killed while writing
    view = Recorder()
    resumed = Tracker(folder, TrackingConfig(), "run", view=view)
    for step in range(1, 5):  # from the last checkpoint
        resumed.log(step, {"reward/mean": step / 10})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(s, s / 10) for s in range(5)]
    assert [call[1] for call in view.calls if call[0] == "advance"] == [2, 3, 4, 5], "the view shows repeated steps"


def test_what_is_not_finite_is_null_and_noted(folder: StageDir, events: list[Mapping[str, Any]]) -> None:
    tracker = Tracker(folder, TrackingConfig(), "run")
    tracker.log(4, {"learner/loss": math.nan, "learner/lr": 0.1, "reward/std": math.inf})
    row = json.loads(folder.metrics.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 4, "learner/loss": None, "learner/lr": 0.1, "reward/std": None}
    assert events == [
        {"stage": "rl", "event": "non_finite_metrics", "step": 4, "metrics": ["learner/loss", "reward/std"]}
    ]
    assert math.isnan(read_metrics(folder.metrics)[4]["learner/loss"])


def test_headline_figures_come_from_all_steps_also_after_a_resume(folder: StageDir) -> None:
    assert Tracker(folder, TrackingConfig(), "run").headline("reward/mean") == {"steps": 0}
    tracker = Tracker(folder, TrackingConfig(), "run")
    for step, value in enumerate((0.1, math.nan, 0.9, 0.4)):
        tracker.log(step, {"reward/mean": value})
    for each in (tracker, Tracker(folder, TrackingConfig(), "run")):
        figures = each.headline("reward/mean", "learner/loss")
        assert figures == {"steps": 4, "reward/mean": {"first": 0.1, "last": 0.4, "max": 0.9}}
    with pytest.raises(AssertionError, match="not declared"):
        tracker.headline("reward/maen")


def test_evaluations_during_training_are_written_once(folder: StageDir) -> None:
    view = Recorder()
    for _ in range(2):
        tracker = Tracker(folder, TrackingConfig(), "run", view=view)
        tracker.log_eval(9, {"hard": RESULT.to_json()})
    rows = [json.loads(line) for line in (folder.path / "evals.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [9]
    assert SetResult.from_json(rows[0]["results"]["hard"]) == RESULT
    assert ("line", "step 9: hard pass@1 0.500 [0.400, 0.600]") in view.calls


def test_metrics_of_an_evaluation_are_declared() -> None:
    metrics = eval_metrics({"hard": RESULT.to_json(), "easy": {"pass_at_1": 1, "ci95": [0.5, 1]}})
    assert metrics["eval/hard/pass_at_1"] == 0.5 and metrics["eval/hard/greedy"] == 0.25
    assert metrics["eval/hard/length_mean"] == 12.0 and "eval/easy/greedy" not in metrics
    assert all(describe_metric(name) for name in metrics)


def test_samples_are_shown_every_so_often(folder: StageDir) -> None:
    view = Recorder()
    tracker = Tracker(folder, TrackingConfig(sample_every=3), "run", view=view)
    for step in range(7):
        tracker.sample(step, group())
    tracker.advance_eval(12)
    assert view.calls[1:] == [("sample", "p1")] * 3 + [("advance", 12, {})]


def test_damaged_metrics_are_named(folder: StageDir) -> None:
    folder.metrics.write_text('{"step": 0}\n[]\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: this line is damaged"):
        Tracker(folder, TrackingConfig(), "run")


def test_a_clock_adds_up_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    clock = StepClock()
    with clock("rollout"):
        pass
    with pytest.raises(KeyError), clock("rollout"):
        raise KeyError
    assert clock.seconds("rollout") == 3.0 and clock.seconds("sync") == 0.0
    assert clock.metrics() == {"seconds/rollout": 3.0, "seconds/step": 10.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wandb": "on"}, "wandb must be online, offline or off, got 'on'"), ({"project": ""}, "project"),
        ({"sample_every": 0}, "sample_every must be >= 1"), ({"line_every_s": 0.0}, "line_every_s must be > 0"),
    ],
)  # fmt: skip
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**values)


# -- wandb -----------------------------------------------------------------------------------------------------------


def fake_wandb(monkeypatch: pytest.MonkeyPatch, error: str = "") -> list[Any]:
    """Puts a module in wandb's place; returns the list of what was done with it."""
    done: list[Any] = []
    module: Any = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **values: values

    def init(**options: Any) -> Any:
        if error:
            raise module.Error(error)
        done.append(options)
        return SimpleNamespace(log=done.append, finish=lambda: done.append("finished"))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return done


def test_wandb_gets_the_same_numbers_and_keeps_its_id(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fake_wandb(monkeypatch)
    config = TrackingConfig(wandb="offline", project="p", entity="e")
    with Tracker(folder, config, "run", recipe={"seed": 3}) as tracker:
        evaluated = tracker.log_eval(0, {"hard": RESULT.to_json()})
        tracker.log(0, {"reward/mean": 0.5, **evaluated})
    options, row, finished = done
    assert (options["mode"], options["project"], options["entity"], options["name"]) == ("offline", "p", "e", "run")
    assert options["config"] == {"seed": 3} and options["resume"] == "allow" and options["dir"] == folder.path.parent
    logged = read_metrics(folder.metrics)[0]
    assert row == {"rl/step": 0, **{f"rl/{name}": value for name, value in logged.items()}}
    assert logged["reward/mean"] == 0.5 and logged["eval/hard/pass_at_1"] == 0.5
    assert finished == "finished"
    with Tracker(folder, config, "run") as tracker:
        tracker.log(0, {"reward/mean": 0.5})  # is there already
    assert done[3]["id"] == options["id"] and done[4:] == ["finished"]


def test_wandb_that_is_missing_or_not_logged_in_is_one_line(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install wandb, or set tracking\.wandb=off"):
        Tracker(folder, TrackingConfig(wandb="online"), "run")
    fake_wandb(monkeypatch, "no API key\nconfigured")
    with pytest.raises(ValueError, match=r"wandb cannot begin \(no API key configured\): run `wandb login`"):
        Tracker(folder, TrackingConfig(wandb="online"), "run")
    Tracker(folder, TrackingConfig(), "run").log(0, {"reward/mean": 1.0})  # off: never touched


# -- console ---------------------------------------------------------------------------------------------------------


def test_plain_lines_are_rare_but_the_last_one_is_printed() -> None:
    now, out = [0.0], io.StringIO()
    view = LineView(out, every_s=5.0, now=lambda: now[0])
    view.begin("rl", "grpo", 20)
    for step in range(1, 21):
        now[0] += 1.0
        view.advance(step, {"reward/mean": step / 20, "rollout/tokens_per_s": 12345.6})
    view.end()
    lines = out.getvalue().splitlines()
    assert lines[0] == "rl: begins, 20 steps"
    assert [line.split()[1] for line in lines[1:-1]] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[2] == "rl: 6/20  1/s  0:14 left  reward 0.3  tok/s 12,346"
    assert lines[-1] == "rl: done in 0:20"


def test_a_resumed_stage_shows_the_rate_of_this_process() -> None:
    now = [100.0]
    progress = Progress(100, lambda: now[0])
    assert progress.text() == "0/100"
    progress.advance(50)
    assert progress.rate is None, "one mark says where it went on, not how fast"
    now[0] += 20
    progress.advance(60)
    assert progress.text() == "60/100  2 s each  1:20 left" and progress.elapsed() == "0:20"


def test_durations_and_figures() -> None:
    assert [duration(s) for s in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    assert figures({"learner/loss": 0.12345, "reward/mean": 0.5, "sync/bytes": 3.0}) == "reward 0.5  loss 0.123"


def test_text_of_the_policy_does_nothing_to_a_terminal() -> None:
    assert printable("a\x1b[2Jb\n✓\x07\u202e") == "a\\x1b[2Jb\n✓\\x07\\x202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_view_draws_whatever_the_policy_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    view = open_view(stream=out)
    assert isinstance(view, LiveView)
    view.close()
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    view = LiveView(console)
    view.begin("cold-start", "sft", 0)
    view.end()
    view.begin("rl", "grpo", 60)
    for step in range(1, 4):
        view.advance(step, {"reward/mean": step / 10, "reward/pass_rate": 0.2, "learner/loss": math.nan})
    view.sample(group("[/bold] [red]\x1b]0;title\x07 ✓", reward=None))
    view.line("[a line]")
    with console.capture() as capture:
        console.print(view._render())
    view.close()
    shown = capture.get()
    assert "cold-start" in shown and "3/60" in shown and "▁▄█" in shown.replace("▅", "▄") and "no reward" in shown
    assert "3+5 [bold]" in shown and "[/bold] [red]\\x1b]0;title\\x07 ✓" in shown and "\x1b]0" not in shown
    assert "[a line]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_without_a_capable_terminal_there_are_lines(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_view(stream=stream), LineView)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_view(stream=stream, live=False), LineView)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return True


def test_a_closed_terminal_never_stops_a_run() -> None:
    view = LineView(Broken())
    view.begin("rl", "grpo", 2)
    view.advance(1)
    view.end()
    live = LiveView(Console(file=io.StringIO(), force_terminal=True))
    live._console.file = Broken()
    live.begin("rl", "grpo", 2)
    live.line("text")
    live.close()

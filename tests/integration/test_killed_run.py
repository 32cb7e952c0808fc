"""kill -9 at any moment, run again: nothing finished is lost, the weights are bit-identical to an undisturbed run's."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from pipelines.tracking import METRICS, describe_metric
from tests.integration.support.killed_run import POINTS

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]
# What must come back as well: experts from the journal to be replayed, and correction biases that move.
ROUTING = ("stages.grpo.router.replay=true", "stages.grpo.router.bias=update", "stages.grpo.router.bias_rate=0.01")


def run(folder: Path, point: str, workers: int = 2) -> tuple[int, str]:
    """Runs the mini recipe in ``folder`` until its end or its death: exit status (-9: killed), standard error.

    One engine starts sooner than two, where nothing is drawn; it would have more cores than each of two, and with
    another number of cores sums round differently in their last bits. What the run printed on standard output is kept
    in ``shown``.
    """
    command = [sys.executable, "-m", "tests.integration.support.killed_run", str(SUPPORT / "mini.yaml"),
               str(folder / "drawn"), point, f"run.dir={folder}", f"engine.workers={workers}", *ROUTING]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, 1, -signal.SIGKILL), done.stdout[-2000:] + done.stderr[-3000:]
    (folder / "shown").write_text(done.stdout)
    return done.returncode, done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollouts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "mini").glob("*/rollouts/*.jsonl"))}


def weights(folder: Path, stage: str) -> dict[str, bytes]:
    tensors = load_file(folder / "mini" / stage / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """An undisturbed run and one that was killed at every point in turn."""
    calm, killed = tmp_path_factory.mktemp("calm"), tmp_path_factory.mktemp("killed")
    assert run(calm, "none") == (0, "")
    status, told = run(killed, "terminate", workers=1)
    assert status == 1 and told.splitlines()[-1:] == ["r1: interrupted; the same command goes on from here"], told
    lose_the_learner(killed)
    for point in POINTS:
        assert run(killed, point)[0] == -signal.SIGKILL, f"the run was not killed at {point}"
    assert run(killed, "engine") == (0, ""), "and to its end, with a new engine in the place of a killed one"
    yield calm, killed


def lose_the_learner(folder: Path) -> None:
    """The learner's process alone is killed, in the middle of a checkpoint; the driver ends by itself and says so."""
    status, told = run(folder, "lost-learner", workers=1)
    assert status == 1
    assert re.fullmatch(
        r"r1: the learner was lost while it was asked to \w+: its process is gone \(killed, or the machine is out of "
        r"memory\); run the same command, it goes on from the last checkpoint\n",
        told,
    ), told
    [torn] = (folder / "mini").glob("*/checkpoints/.partial-step-*")
    [whole] = torn.parent.glob("step-*")
    assert not (torn / "complete.json").exists() and (whole / "complete.json").exists()
    (folder / "whole").write_text(json.dumps([torn.parents[1].name, int(whole.name.removeprefix("step-"))]))


@pytest.mark.timeout(900)
def test_the_weights_are_bit_identical(runs: tuple[Path, Path]) -> None:
    calm, killed = runs
    for stage in ("01-sft", "03-grpo"):
        assert weights(calm, stage) == weights(killed, stage), stage
    assert weights(calm, "01-sft") != weights(calm, "03-grpo")


def test_every_rollout_is_the_same(runs: tuple[Path, Path]) -> None:
    calm, killed = runs
    assert rollouts(calm) == rollouts(killed)
    assert len(rollouts(calm)) == 3 + 2 * 2
    held = [path for path, text in rollouts(calm).items() if '"routed_experts": "' in text]
    assert [Path(path).parts[1] for path in held] == ["03-grpo"] * 3  # of training alone: nothing replays an evaluation


def test_experts_are_replayed_and_biases_have_moved(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        for row in rows(folder / "mini/03-grpo/metrics.jsonl"):
            assert 0.9 < row["router/replay_agreement"] <= 1.0
    before, after = (
        load_file(runs[0] / "mini" / stage / "model" / "model.safetensors") for stage in ("01-sft", "03-grpo")
    )
    moved = [name for name in before if name.endswith("e_score_correction_bias") and before[name].ne(after[name]).any()]
    assert len(moved) == 2


def test_no_finished_rollout_was_drawn_again(runs: tuple[Path, Path]) -> None:
    drawn = {
        name: [int(n) for n in (folder / "drawn").read_text().split()] for name, folder in zip("ck", runs, strict=True)
    }
    assert sum(drawn["c"]) == 3 * 5 + 4 * 6
    # Killed while groups were in flight: the finished ones stayed, the others (at most a batch) were drawn again.
    extra = sum(drawn["k"]) - sum(drawn["c"])
    assert 0 < extra <= 3 * 6, drawn
    # Killed in the rollouts it held 7 groups: all 5 of step 0 and 2 of step 1, so 3 were left to draw.
    assert 3 in drawn["k"], drawn


def test_each_step_is_logged_once_and_every_stage_is_done(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        assert [row["step"] for row in rows(folder / "mini/03-grpo/metrics.jsonl")] == [0, 1, 2]
        assert [stage["status"] for stage in json.loads(summary(folder))["stages"]] == ["done"] * 4


def test_no_process_outlives_its_run(runs: tuple[Path, Path]) -> None:
    listed = [line.split(maxsplit=3) for folder in runs for line in (folder / "processes").read_text().splitlines()]
    assert {point for point, *_ in listed} == {"none", "terminate", "lost-learner", "engine", *POINTS}
    names = {name for point, _, _, name in listed if point == "rollouts"}
    for part in ("raylet", "ray::LearnerService", "ray::RolloutService", "EngineCore"):
        assert any(part in name for name in names), f"{part} is not among {names}"
    started = time.monotonic()
    while left := [row for row in listed if _lives(int(row[1]), float(row[2]))]:
        ours = [row for row in left if "Service" in row[3] or "EngineCore" in row[3] or "python" in row[3]]
        waited = time.monotonic() - started
        assert waited < 20 or not ours, ours
        assert waited < 180, left  # Ray's own agents look after their raylet once in a while
        time.sleep(0.2)


def _lives(pid: int, started: float) -> bool:
    """Whether it is this process, and not a later one of the same number or one that nobody has buried."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_checkpoint_that_a_lost_learner_left_behind_is_not_taken_up(runs: tuple[Path, Path]) -> None:
    _, killed = runs
    stage, step = json.loads((killed / "whole").read_text())
    events = rows(killed / "mini/events.jsonl")
    [lost] = [i for i, event in enumerate(events) if "LearnerDied" in event.get("error", "")]
    resumed = [event["step"] for event in events[lost:] if event["event"] == "resumed" and "step" in event]
    assert (stage, resumed[0]) == ("01-sft", step)
    assert list((killed / "mini").glob("*/checkpoints/.*")) == [], "and in the end it is removed"


LOGGED = ("rollout", "rollouts", "learner", "mismatch", "router", "sync", "staleness", "advantage", "groups")
PHASES = ("rollout", "learner", "sync", "journal", "step")


def test_every_step_of_rl_carries_every_metric_that_is_declared(runs: tuple[Path, Path]) -> None:
    declared = [
        name
        for name in METRICS
        if name.split("/")[0] in LOGGED and name not in ("learner/kl_ref", "learner/balance_loss")
    ]
    wanted = [*declared, *(f"seconds/{phase}" for phase in PHASES), "reward/mean", "reward/std", "reward/pass_rate"]
    assert len(declared) > 35
    for folder in runs:
        for row in rows(folder / "mini/03-grpo/metrics.jsonl"):
            logged = {name: value for name, value in row.items() if name != "step"}
            assert all(isinstance(value, float) for value in logged.values()), logged
            missing = [name for name in wanted if not any(_is(name, other) for other in logged)]
            assert missing == [], f"step {row['step']}"
            assert [name for name in logged if describe_metric(name) is None] == []


def _is(declared: str, logged: str) -> bool:
    """``{i}`` in a declared name stands for anything."""
    return re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(declared)), logged) is not None


def test_engine_and_learner_agree_on_every_sampled_token(runs: tuple[Path, Path]) -> None:
    """Across kills too: what was sampled before one is scored after it by a learner that was loaded anew."""
    for folder in runs:
        steps = rows(folder / "mini/03-grpo/metrics.jsonl")
        assert max(row["mismatch/mean_abs"] for row in steps) <= 1e-5
        assert max(row["staleness/max"] for row in steps) == 0


def test_a_run_ends_with_its_table_and_its_picture(runs: tuple[Path, Path]) -> None:
    calm, _ = runs
    shown = (calm / "shown").read_text()
    assert "\x1b" not in shown, "it is no terminal"
    [head] = [line.split() for line in shown.splitlines() if "before" in line and "after" in line]
    assert head == ["set", "before", "after", "difference"]
    results = {stage["name"]: stage.get("results") for stage in json.loads(summary(calm))["stages"]}
    [sampled] = [line for line in shown.splitlines() if line.split()[:1] == ["short"]]
    for name in ("before", "after"):
        assert f"{100 * results[name]['short']['pass_at_1']:.1f}" in sampled
    picture = calm / "mini/learning_curve.png"
    assert str(picture) in shown and str(calm / "mini") in shown
    assert picture.read_bytes().startswith(b"\x89PNG\r\n") and picture.stat().st_size > 10_000


def summary(folder: Path) -> str:
    return (folder / "mini/summary.json").read_text()


@pytest.mark.timeout(400)
def test_a_finished_run_is_evaluated_again_alike_and_only_once(runs: tuple[Path, Path], tmp_path: Path) -> None:
    calm, _ = runs
    out = tmp_path / "again"
    command = [sys.executable, "-m", "pipelines.cli", "eval", str(calm / "mini"), "--json", "--out", str(out)]

    def evaluate() -> tuple[dict[str, Any], dict[Path, tuple[int, bytes]]]:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(out.glob("*/rollouts/*"))}
        return json.loads(done.stdout), files  # one object and nothing else, or this fails

    answer, files = evaluate()
    result = answer["results"]["short"]
    low, high = result["ci95"]
    assert (result["n"], result["k"]) == (6, 2) and 0 <= low <= result["pass_at_1"] <= high <= 1
    assert 0 <= result["greedy"] <= 1
    [after] = [stage for stage in json.loads(summary(calm))["stages"] if stage["name"] == "after"]
    assert result == after["results"]["short"], "the model in the run folder is what its last stage evaluated"
    assert [path.name for path in files] == ["eval-short-greedy.jsonl", "eval-short-sampled.jsonl"]

    assert evaluate() == (answer, files)


def test_a_killed_engine_is_replaced_and_its_problems_are_drawn_again(runs: tuple[Path, Path]) -> None:
    """That they are drawn alike is what the comparisons of all rollouts and weights above show."""
    events = rows(runs[1] / "mini/events.jsonl")
    [at] = [i for i, event in enumerate(events) if event["event"] == "rollout_worker_lost"]
    assert events[at]["redrawn"] >= 2 and "process of this engine is gone" in events[at]["reason"]
    ready = [event["worker"] for event in events[at:] if event["event"] == "rollout_worker_ready"]
    assert ready == [events[at]["worker"]]


@pytest.mark.timeout(400)
def test_stored_steps_are_computed_again_to_the_last_bit(runs: tuple[Path, Path]) -> None:
    """In another process than the learner's, from the stage's first model, across what was killed in between."""
    calm, killed = runs
    for folder, step in ((calm, 2), (killed, 1)):
        command = [sys.executable, "-m", "pipelines.cli", "replay", str(folder / "mini"), str(step), "--json"]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["ok"], answer["stage"], answer["step"]) == (True, "grpo", step)
        assert answer["tolerance"]["relative"] == 0, answer["tolerance"]["reason"]
        assert answer["same_bits"] == answer["compared"] > 45

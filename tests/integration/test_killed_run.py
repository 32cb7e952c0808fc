"""kill -9 at any moment, run again: nothing finished is lost, the weights are bit-identical to an undisturbed run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.support.killed_run import POINTS

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]


def run(folder: Path, point: str) -> tuple[int, str]:
    """Runs the mini recipe in ``folder`` until its end or its death: exit status (-9: killed), standard error."""
    command = [sys.executable, "-m", "tests.integration.support.killed_run", str(SUPPORT / "mini.yaml"),
               str(folder / "drawn"), point, f"run.dir={folder}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, 1, -signal.SIGKILL), done.stdout[-2000:] + done.stderr[-3000:]
    return done.returncode, done.stderr


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
    status, told = run(killed, "terminate")
    assert status == 1 and told.splitlines()[-1:] == ["r1: interrupted; the same command goes on from here"], told
    for point in POINTS:
        assert run(killed, point)[0] == -signal.SIGKILL, f"the run was not killed at {point}"
    assert run(killed, "none") == (0, "")
    yield calm, killed


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
        steps = [json.loads(line)["step"] for line in (folder / "mini/03-grpo/metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 2]
        summary = json.loads((folder / "mini/summary.json").read_text())
        assert [stage["status"] for stage in summary["stages"]] == ["done"] * 4


def test_no_process_outlives_its_run(runs: tuple[Path, Path]) -> None:
    left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _mentions(pid, [str(f) for f in runs])]
    assert left == []


def _mentions(pid: str, words: list[str]) -> bool:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word.encode() in text for word in words)


@pytest.mark.timeout(400)
def test_a_killed_engine_is_replaced_and_its_problems_are_drawn_again_alike(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, "engine") == (0, "")
    events = [json.loads(line) for line in (tmp_path / "mini/events.jsonl").read_text().splitlines()]
    [lost] = [event for event in events if event["event"] == "rollout_worker_lost"]
    assert lost["redrawn"] >= 2 and "process of this engine is gone" in lost["reason"]
    assert [event["worker"] for event in events if event["event"] == "rollout_worker_ready"][2:] == [lost["worker"]]
    assert rollouts(tmp_path) == rollouts(runs[0])
    assert weights(tmp_path, "03-grpo") == weights(runs[0], "03-grpo")

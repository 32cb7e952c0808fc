"""A whole run on many learner ranks: one is killed, other ranks go on from its checkpoint, its steps are replayed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]


def start(folder: Path, *layout: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "run", str(SUPPORT / "mini.yaml"), f"run.dir={folder}",
               "engine.workers=1", "run.checkpoint_every=1", *layout]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ranks_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "LearnerService" in process.name():
                found.append(process)
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The run's folder, what was told when a rank was killed, and how many seconds after."""
    folder = tmp_path_factory.mktemp("ranks")
    first = start(folder, "parallel.ranks=2", "parallel.expert_parallel=2")
    try:
        checkpoints = folder / "mini/03-grpo/checkpoints"
        while not list(checkpoints.glob("step-*/complete.json")):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.02)
        ranks = ranks_of(first)
        assert len(ranks) == 2
        ranks[1].kill()
        began = time.monotonic()
        _, told = first.communicate(timeout=120)
        took = time.monotonic() - began
    finally:
        first.kill()
    assert first.returncode == 1
    second = start(folder, "parallel.ranks=3")
    try:
        _, errors = second.communicate(timeout=300)
    finally:
        second.kill()
    assert second.returncode == 0, errors
    return folder / "mini", told, took


def test_a_killed_rank_ends_the_run_in_one_line(run: tuple[Path, str, float]) -> None:
    _, told, took = run
    assert told.startswith("r1: ") and told.count("\n") == 1, told
    assert "its process is gone" in told and "it goes on from the last checkpoint" in told
    assert took < 60


def test_another_number_of_ranks_goes_on_from_the_checkpoint(run: tuple[Path, str, float]) -> None:
    folder, _, _ = run
    assert [row["step"] for row in rows(folder / "03-grpo/metrics.jsonl")] == [0, 1, 2]
    layouts = [e["machine"]["ranks"] for e in rows(folder / "events.jsonl") if e["event"] == "stage_started"]
    assert layouts[0] == 2 and layouts[-1] == 3, "it was not begun and ended by other layouts"
    assert [stage["status"] for stage in json.loads((folder / "summary.json").read_text())["stages"]] == ["done"] * 4


def test_the_engine_sampled_from_what_the_ranks_trained(run: tuple[Path, str, float]) -> None:
    folder, _, _ = run
    for row in rows(folder / "03-grpo/metrics.jsonl"):
        assert row["mismatch/max_abs"] < 1e-5


@pytest.mark.parametrize("step", [0, 2])
def test_one_rank_computes_their_steps_again(run: tuple[Path, str, float], step: int) -> None:
    folder, _, _ = run
    command = [sys.executable, "-m", "pipelines.cli", "replay", str(folder), str(step), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True and answer["compared"] > 40
    assert 0 < answer["tolerance"]["relative"] <= 1e-3, "sums of ranks are rounded differently"

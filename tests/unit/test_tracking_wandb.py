"""The real wandb, offline: what it is given stands in its files, and a continuation is the same run to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.run_dir import StageDir
from pipelines.tracking import Tracker, TrackingConfig


@pytest.fixture
def run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run folder beside a wandb that works as a user's does; every other test has it switched off."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    try:
        wandb.init(mode="offline", dir=home, settings=wandb.Settings(silent=True, console="off")).finish()
    except (wandb.Error, OSError) as error:
        pytest.skip(f"wandb cannot start offline here: {error}")
    return tmp_path / "mini"


def log(folder: StageDir, step: int, reward: float) -> None:
    """One process' share of a run."""
    config = TrackingConfig(wandb="offline", project="sums")
    with Tracker(folder, config, "mini", recipe={"seed": 3141}) as tracker:
        tracker.log(step, {"reward/mean": reward})


def written(run_folder: Path) -> dict[Path, bytes]:
    """What wandb wrote, by file, the first one first; its records hold names and numbers as text."""
    files = sorted(run_folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return {path: path.read_bytes() for path in files}


def test_an_offline_run_writes_its_numbers_and_goes_on_under_its_id(run_folder: Path) -> None:
    rl = StageDir(run_folder / "03-grpo", "rl", "grpo", lambda row: None)
    log(rl, 0, 0.28125)
    [(first, content)] = written(run_folder).items()
    for word in (b"rl/reward/mean", b"0.28125", b"rl/step", b"3141", b"sums", b"mini"):
        assert word in content, word

    log(rl, 1, 0.71875)
    before, after = written(run_folder).items()
    assert before == (first, content), "what the first process wrote stays as it is"
    assert b"0.71875" in after[1] and b"0.28125" not in after[1]
    run_id = (run_folder / "wandb-id").read_text()
    assert [path.name for path in (first, after[0])] == [f"run-{run_id}.wandb"] * 2

    log(StageDir(run_folder / "01-sft", "cold-start", "sft", lambda row: None), 0, 0.5)
    *_, (last, content) = written(run_folder).items()
    assert last.name == f"run-{run_id}.wandb" and b"cold-start/reward/mean" in content, "stages share one run"

"""``r1 eval`` on real engines: attested, graded, kept, and drawn once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from evals.samples import read_samples
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import load_policy

ROOT = Path(__file__).parents[2]


def evaluate(model: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "eval", str(model), "--benchmarks", "reasoning_gym:chain_sum",
               "--limit", "4", "--samples", "2", "--max-tokens", "16", "--out", str(out), "--json", *more]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250
    )


def test_a_checkpoint_is_attested_evaluated_and_not_drawn_again(tmp_path: Path) -> None:
    model, tokenizer = load_policy(ModelConfig(preset="tiny"), seed=3)
    save_model(model, tokenizer, tmp_path / "model")
    first = evaluate(tmp_path / "model", tmp_path / "out", "--workers", "1")
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    row = answer["results"]["reasoning_gym:chain_sum"]
    assert (row["n"], row["k"], row["samples"], row["missing"]) == (4, 2, 8, 0)
    assert 0 <= answer["sampler"]["attested"]["max_abs"] < 5e-4
    samples = read_samples(tmp_path / "out/reasoning_gym:chain_sum")
    assert len({sample.key for sample in samples}) == 8 and all(0 < sample.tokens <= 16 for sample in samples)
    events = (tmp_path / "out/events.jsonl").read_text()
    assert "rollout_worker_ready" in events
    assert not [p for p in psutil.process_iter(["name"]) if str(tmp_path) in " ".join(_words(p))]

    again = evaluate(tmp_path / "model", tmp_path / "out", "--workers", "1")
    assert again.returncode == 0 and json.loads(again.stdout)["results"] == answer["results"]
    assert (tmp_path / "out/events.jsonl").read_text() == events, "no engine was started"

    with (tmp_path / "model/config.json").open("a") as file:
        file.write(" ")
    other = evaluate(tmp_path / "model", tmp_path / "out")
    assert other.returncode == 1 and "model.weights was" in other.stderr and other.stderr.count("\n") == 1


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []

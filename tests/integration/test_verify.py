"""`r1 verify` with real engines and real ranks: what holds is proven, and an engine with an upstream bug is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main
from pipelines.verify_rows import PROPERTIES
from tests.integration.support.services import BrokenRanks

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]

# Sharper distributions than an untrained policy has: a wrong kernel shows as on a trained one.
SHARP = {"preset": "tiny", "overrides": {"initializer_range": 0.15}}

WITHOUT_ROTARY = """
import rollout.vllm_start as start

complete = start.engine_arguments

def engine_arguments(*args, **kwargs):
    arguments = complete(*args, **kwargs)
    arguments.pop("compilation_config")
    return arguments

start.engine_arguments = engine_arguments
"""


def small_recipe(folder: Path) -> str:
    """The path of a recipe that is quickly verified."""
    content = yaml.safe_load((SUPPORT / "mini.yaml").read_text()) | {"model": SHARP}
    file = folder / "mini.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def verify(folder: Path, *more: str, path: Path | None = None) -> tuple[int, dict[str, dict[str, Any]], str]:
    """``r1 verify --json`` in a process of its own: exit status, rows by property, standard error.

    Python looks for modules in ``path`` first.
    """
    command = [sys.executable, "-m", "pipelines.cli", "verify", small_recipe(folder), "--json", "--samples", "6", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*([path] if path else []), ROOT)))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=580
    )
    answer = json.loads(done.stdout)
    assert "rows" in answer, done.stderr
    return done.returncode, {row["property"]: row for row in answer["rows"]}, done.stderr


def test_every_property_holds_on_a_small_recipe(tmp_path: Path) -> None:
    """The state is saved and loaded by two ranks, each row about ranks starts its own."""
    status, rows, said = verify(tmp_path, "parallel.ranks=2")
    assert status == 0, said
    assert list(rows) == list(PROPERTIES)
    for name, row in rows.items():
        assert row["ok"] is True and row["worst"] <= row["tolerance"], (name, row)
    for name in ("micro_batch", "packing", "order", "logprob_chunk", "checkpointing", "ranks", "expert_parallel"):
        assert rows[name]["worst"] < 1e-10, (name, rows[name])
    assert rows["ranks"]["layouts"] == ["2 ranks"] and rows["expert_parallel"]["layouts"] == ["experts shared by 2"]
    assert rows["save_load"]["ranks"] == 2 and rows["save_load"]["compared"] > 200
    assert rows["engine_decode"]["tokens"] > 6 * 2 and rows["engine_decode"]["by_position"][0]["from"] == 1
    assert set(rows["routing"]["by_layer"].values()) == {1.0}
    assert len(said.splitlines()) == len(PROPERTIES), "a line for each row, and nothing of any library"


def test_adapters_too(tmp_path: Path) -> None:
    """The engine gets them merged; a state holds them alone."""
    only = "micro_batch,checkpointing,ranks,engine_decode,weight_sync,save_load"
    status, rows, said = verify(tmp_path, "model.lora={rank: 4}", "--only", only)
    assert status == 0, said
    assert {name: row["ok"] for name, row in rows.items()} == dict.fromkeys(only.split(","), True)
    assert max(rows[name]["worst"] for name in ("micro_batch", "checkpointing", "ranks")) < 1e-10
    assert rows["save_load"]["worst"] == 0


def test_ranks_that_do_not_add_up_and_experts_that_give_too_much_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.verify_subject.VerifyService", BrokenRanks)
    path = small_recipe(tmp_path)
    assert (
        main(["verify", path, "--only", "order,ranks,expert_parallel", "--json", "--samples", "6", "run.cpus=2"]) == 1
    )
    rows = {row["property"]: row for row in json.loads(capfd.readouterr().out)["rows"]}
    assert rows["order"]["ok"] is True
    assert rows["ranks"]["ok"] is False and rows["ranks"]["worst"] == pytest.approx(0.5, abs=0.01), "half of a sum"
    assert rows["expert_parallel"]["ok"] is False and 1e-5 < rows["expert_parallel"]["worst"] < 0.1
    assert rows["expert_parallel"]["where"].startswith("experts shared by 2: ")


def test_an_engine_without_the_rotary_mend_fails_and_the_learner_does_not(tmp_path: Path) -> None:
    """Every process loses the mend as it starts, as if it had never been written."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_ROTARY)
    only = "order,engine_decode,engine_prefill,weight_sync"
    status, rows, _ = verify(tmp_path, "--only", only, path=tmp_path)
    assert status == 1
    assert {name: row["ok"] for name, row in rows.items()} == {
        "order": True, "engine_decode": False, "engine_prefill": False, "weight_sync": False,
    }  # fmt: skip
    worst = rows["engine_decode"]
    assert worst["worst"] > worst["tolerance"] and worst["where"].startswith("sample ")

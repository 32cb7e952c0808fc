"""Saved on one layout of ranks, loaded on another: the same tensors, and the same next step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy.checkpoint import load_checkpoint
from policy.config import ModelConfig
from policy.loading import load_policy
from policy.parallel import Ranks
from tests.integration.support.checkpoint_layouts import ADAPTED, LOADING, SAVING, learner, load, save

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout's checkpoint, and what every layout made of them."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in (*SAVING, ADAPTED, "bf16", "failing"):
        (folder / name).mkdir()
    command = [sys.executable, "-m", "tests.integration.support.checkpoint_layouts", str(folder)]
    threads = torch.get_num_threads()
    ranks = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        save(Ranks.alone(), folder / "one")
        _, told = ranks.communicate(timeout=240)
        assert ranks.returncode == 0, told[-3000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    torch.save({name: load(Ranks.alone(), folder / name) for name in (*SAVING, ADAPTED)}, folder / "found-one.pt")
    torch.set_num_threads(threads)
    return folder


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert wrong == []
    assert all(found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("loading", LOADING)
@pytest.mark.parametrize("saving", (*SAVING, ADAPTED))
def test_a_state_is_the_same_on_another_layout(folder: Path, saving: str, loading: str) -> None:
    truth, found = read(folder / saving / "truth.pt"), read(folder / f"found-{loading}.pt")[saving]
    assert found["extra"] == {"step": 2}
    assert_same(found["state"], truth["state"])
    assert found["loss"] == pytest.approx(truth["loss"], rel=0, abs=1e-9)
    assert any(key.startswith("optimizer.moments.") and key.endswith("exp_avg_sq") for key in truth["state"])


def test_only_adapters_are_saved_and_the_folder_beside_them_is_merged(folder: Path) -> None:
    truth = read(folder / ADAPTED / "truth.pt")
    moments = [key for key in truth["state"] if key.startswith("optimizer.moments.")]
    assert moments and all(".lora_" in key for key in moments)
    merged, _ = load_policy(ModelConfig(path=str(folder / ADAPTED / "step-000002" / "model")), seed=0)
    one = learner(Ranks.alone(), seed=0, adapted=True)
    load_checkpoint(folder / ADAPTED / "step-000002", one)
    tokens = torch.tensor([[9, 10, 11, 12, 13]])
    with torch.no_grad():
        expected, found = one.model(tokens).logits, merged.double()(tokens).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)  # the folder is in fp32


def test_the_layouts_trained_alike(folder: Path) -> None:
    """Otherwise a checkpoint of one would tell nothing about the others."""
    losses = [read(folder / name / "truth.pt")["loss"] for name in SAVING]
    assert max(losses) - min(losses) < 1e-9


@pytest.mark.parametrize("saving", SAVING)
def test_the_model_folders_hold_the_weights_of_their_moments(folder: Path, saving: str) -> None:
    truth = read(folder / saving / "truth.pt")
    for place, kept in (
        (folder / saving / "step-000002" / "model", truth["state"]),
        (folder / saving / "model", truth["after"]),
    ):
        model, _ = load_policy(ModelConfig(path=str(place)), seed=0)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[f"model.{name}"].to(tensor.dtype)), name


def test_in_bf16_ranks_and_one_process_share_their_masters(folder: Path) -> None:
    truth = read(folder / "bf16" / "truth.pt")["state"]
    one = learner(Ranks.alone(), seed=7, dtype=torch.bfloat16)
    load_checkpoint(folder / "bf16" / "step-000002", one)
    for name, master in one._optimizer.masters.items():
        assert torch.equal(master, truth[f"model.{name}"]) and master.dtype == torch.float32
        assert torch.equal(one.model.get_parameter(name), master.bfloat16())
    served, _ = load_policy(ModelConfig(path=str(folder / "bf16/step-000002/model"), dtype="bfloat16"), seed=0)
    assert served.config.dtype == torch.bfloat16
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(served.state_dict()[name], tensor), name


def test_a_rank_that_cannot_write_stops_all_of_them_and_leaves_nothing(folder: Path) -> None:
    told = read(folder / "found-ep2.pt")["failing"]
    assert [text.split(" needs")[0] for text in told[:2]] == [f"disk full: {folder}/failing/step-000009"] * 2
    assert told[2:] == ["step-000010"]

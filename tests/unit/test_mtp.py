"""Multi-token-prediction weights: copied or left out, and told; never lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, DeepseekV3ForCausalLM

from pipelines.config import load_recipe
from pipelines.learner_service import LearnerService
from pipelines.problem_sets import ProblemSets
from pipelines.run import check_recipe
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import check_model, check_mtp, load_policy
from policy.mtp import FILE, copy_mtp, describe, is_mtp
from policy.shards import Shards
from tests.unit.released import in_fp8, plain, raw_tensors, released_config, write_folder

CONFIG = released_config()
MTP = "model.layers.3."


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return in_fp8(raw_tensors(CONFIG))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path_factory.mktemp("released"), CONFIG, tensors)


def saved(source: Path, folder: Path, **overrides: Any) -> Path:
    config = ModelConfig(path=str(source), **overrides)
    save_model(*load_policy(config, seed=0), folder, source=config)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, through the safetensors library."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def declared(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"]


def test_names(source: Path) -> None:
    config = AutoConfig.from_pretrained(source)
    for name in ("model.layers.3.eh_proj.weight", "layers.3.enorm.weight", "mtp.layers.0.x", "model.mtp.fc.weight"):
        assert is_mtp(name, config), name
    for name in (
        "model.layers.2.mlp.gate.weight",
        "model.layers.4.enorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ):
        assert not is_mtp(name, config), name


def test_left_out_is_told(source: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    found = [t for name, t in tensors.items() if name.startswith(MTP)]
    size = sum(t.numel() * t.element_size() for t in found)
    report = check_model(ModelConfig(path=str(source)))
    assert report is not None
    assert report == {"event": "mtp_left_out", "folder": str(source), "tensors": len(found), "bytes": size}
    assert "are left out of every model folder (model.mtp=keep copies them)" in describe(report)
    folder = saved(source, tmp_path / "model")
    assert not any(name.startswith(MTP) for name in stored(folder))
    assert declared(folder) == 0
    assert check_mtp(ModelConfig(path=str(folder))) is None


def test_a_run_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check before it starts, which ``--dry-run`` prints, and by its learner, for the run's events."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    report = LearnerService(ModelConfig(path=str(source)), seed=0).load()
    assert report is not None and report["event"] == "mtp_left_out"
    data = "{source: 'reasoning_gym:chain_sum', size: 4}"
    judged = "rewards: {functions: [{path: reasoning_gym}]}"
    sets = f"stages=[{{kind: eval, name: e, sets: [{{name: s, data: {data}, {judged}}}]}}]"
    loaded = load_recipe("r1-tiny", ["model.preset=null", f"model.path={source}", "engine.max_model_len=512", sets])
    assert check_recipe(loaded.recipe, ProblemSets(loaded.recipe))["mtp"] == report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_are_unchanged_but_for_their_dtype(
    source: Path, tmp_path: Path, tensors: dict[str, Tensor], dtype: str
) -> None:
    folder = saved(source, tmp_path / "model", mtp="keep", dtype=dtype)
    found = stored(folder)
    expected = {name: t for name, t in plain(tensors).items() if name.startswith(MTP)}
    assert {name for name in found if name.startswith(MTP)} == expected.keys()
    for name, tensor in expected.items():
        own = torch.float32 if name.endswith("e_score_correction_bias") else getattr(torch, dtype)
        assert torch.equal(found[name], tensor.to(own)) and found[name].dtype == own, name
    assert declared(folder) == 1
    report = check_model(ModelConfig(path=str(source), mtp="keep"))
    assert report is not None and report["event"] == "mtp_kept" and "are copied" in describe(report)


def test_tensors_begin_where_readers_want_them(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """An odd number of bf16 values in an earlier file would put the fp32 correction bias at an odd place."""
    folder = write_folder(tmp_path / "source", CONFIG, tensors, shards=1)
    save_file({f"{MTP}odd": torch.ones(3, dtype=torch.bfloat16)}, folder / "model-00000.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{MTP}odd"] = "model-00000.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kept = saved(folder, tmp_path / "model", mtp="keep", dtype="bfloat16")
    with Shards(kept) as shards:
        assert all(shards[name].start % shards[name].dtype.itemsize == 0 for name in shards if name.startswith(MTP))
    assert load_file(kept / FILE)[f"{MTP}odd"].tolist() == [1, 1, 1]


def test_the_index_names_every_tensor_once(source: Path, tmp_path: Path) -> None:
    folder = saved(source, tmp_path / "model", mtp="keep")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors", FILE}
    assert index["weight_map"].keys() == stored(folder).keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored(folder).values())


def test_a_folder_that_keeps_them_is_a_source_again(source: Path, tmp_path: Path) -> None:
    """Also for transformers, and with the model in several files."""
    first = saved(source, tmp_path / "first", mtp="keep")
    model, _ = load_policy(ModelConfig(path=str(first)), seed=0)
    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(first, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"]
    ids = torch.arange(9, 40)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
    second = tmp_path / "second"
    model.save_pretrained(second, max_shard_size="2MB")
    assert copy_mtp(first, second) == sum(name.startswith(MTP) for name in stored(first))
    with Shards(second) as shards:
        assert len({stored.file for stored in shards.values()}) > 2
    assert {n: t for n, t in stored(second).items() if n.startswith(MTP)}.keys() <= stored(first).keys()
    again, _ = load_policy(ModelConfig(path=str(second), tokenizer=str(first)), seed=0)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_nothing_to_keep_is_an_error(tmp_path: Path, source: Path) -> None:
    folder = saved(source, tmp_path / "model")
    for config in (ModelConfig(path=str(folder), mtp="keep"), ModelConfig(preset="tiny", mtp="keep")):
        with pytest.raises(ValueError, match=r"model.mtp is keep, but .* no multi-token-prediction weights"):
            check_model(config)
    with pytest.raises(ValueError, match=r"to keep: set model.mtp to drop"):
        copy_mtp(folder, folder)


def test_layers_that_no_config_declares_are_not_lost(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_folder(tmp_path, {**CONFIG, "num_nextn_predict_layers": 0}, tensors)
    with pytest.raises(ValueError, match=r"has \d+ tensors that its config knows nothing of, e.g. model.layers.3"):
        check_model(ModelConfig(path=str(folder)))


def test_damaged_scales_are_seen_before_anything_is_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    lacking = {name: t for name, t in tensors.items() if not name.startswith(f"{MTP}self_attn.o_proj.weight_scale")}
    folder = write_folder(tmp_path / "source", CONFIG, lacking)
    target = saved(folder, tmp_path / "model")
    with pytest.raises(ValueError, match=r"o_proj.weight is stored in FP8 and its scales .* are missing"):
        copy_mtp(folder, target)
    assert not (target / FILE).exists()

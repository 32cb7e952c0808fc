"""Model folders that contradict themselves are refused in one line, and alike by the early check and by loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.config import ModelConfig
from policy.fp8 import FP8, block_of, check_scales
from policy.loading import check_model, load_policy
from policy.shards import INDEX, WEIGHTS, Shards
from tests.unit.released import in_fp8, raw_tensors, released_config, write_folder
from tests.unit.test_loading import refusal

WEIGHT = "model.layers.1.self_attn.o_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


@pytest.fixture(scope="module")
def fp8() -> dict[str, Tensor]:
    return in_fp8(raw_tensors(released_config()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, fp8: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole"), released_config(), fp8)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path, **config: Any) -> str:
    return refusal(ModelConfig(path=str(folder), **config))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# --- multi-token prediction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", ["drop", "keep"])
def test_trained_layers_are_not_taken_for_multi_token_prediction(tmp_path: Path, fp8: Any, mtp: str) -> None:
    own = {name: t for name, t in fp8.items() if not name.startswith("model.layers.3.")}
    folder = write_folder(tmp_path, released_config(num_hidden_layers=2), own)
    assert "model.layers.2 is taken for multi-token prediction but has no eh_proj, enorm, hnorm: layers from 2 on" in (
        refused(folder, mtp=mtp)
    )


# --- files ------------------------------------------------------------------------------------------------------------


def change_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def test_a_header_covers_its_data_exactly(tmp_path: Path) -> None:
    def write() -> Path:
        save_file({name: torch.ones(2) for name in "abc"}, tmp_path / WEIGHTS)
        return tmp_path / WEIGHTS

    def moved(header: dict[str, Any]) -> None:
        header["b"]["data_offsets"] = header["a"]["data_offsets"]

    def floats(header: dict[str, Any]) -> None:
        header["b"]["data_offsets"] = [float(at) for at in header["b"]["data_offsets"]]

    def negative(header: dict[str, Any]) -> None:
        header["b"]["shape"] = [-1, -2]

    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (moved, "its header lets others overlap with b"),
        (lambda header: header.pop("b"), "its header leaves bytes out before c"),
        (floats, "whole numbers >= 0 are wanted"),
        (negative, "whole numbers >= 0 are wanted"),
    ]
    assert Shards(write().parent).keys() == {"a", "b", "c"}
    for change, message in changes:
        change_header(write(), change)
        with pytest.raises(ValueError, match=message) as caught:
            Shards(tmp_path)
        assert "\n" not in str(caught.value)
    save_file({"a": torch.ones(2), "none": torch.ones(0), "z": torch.ones(0, 3)}, tmp_path / WEIGHTS)
    assert len(Shards(tmp_path)) == 3, "tensors without elements take no bytes"


def test_a_config_that_speaks_of_fp8_over_plain_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, released_config(), raw_tensors(released_config()))
    assert "its config.json speaks of FP8 weights and none of them is: take quantization_config out" in refused(folder)


def test_an_index_says_where_tensors_lie(folder: Path) -> None:
    change_index(folder, lambda places: places.update(ghost=places[WEIGHT]))
    assert "says that ghost lies in model-0" in refused(folder)
    change_index(folder, lambda places: places.pop("ghost"))
    other = next(f.name for f in sorted(folder.glob("*.safetensors")) if WEIGHT not in load_file(f))
    change_index(folder, lambda places: places.update({WEIGHT: other}))
    assert f"says that {WEIGHT} lies in {other}, and it does not" in refused(folder)
    for text in ('{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', "[]"):
        (folder / INDEX).write_text(text)
        assert "is not an index of safetensors files" in refused(folder)


def test_another_model_beside_the_index(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / WEIGHTS)
    assert f"has {WEIGHTS} beside {INDEX}, which names other files: take the wrong one out" in refused(folder)


def test_adapters_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapters (adapter_config.json), which would be left out: merge them into their base" in (
        refused(folder)
    )


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_files_beside_the_weights(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json cannot be read" in refused(folder)
    (folder / "config.json").write_text(text)
    assert "cannot load" in refused(folder)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be a finite number > 0, got nan"),
        ({"routed_scaling_factor": -1.0}, "routed_scaling_factor must be a finite number > 0, got -1.0"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor"),
        ({"topk_group": 0}, "topk_group must be in 1..n_group = 4, got 0"),
        ({"n_group": 0}, "n_group must be >= 1, got 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_theta": -5}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        (
            {"rope_scaling": {**released_config()["rope_scaling"], "factor": "40"}},
            "rope_parameters.factor must be a finite number > 0",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "two whole numbers >= 1"),
    ],
)
def test_fields_that_cannot_be(folder: Path, fields: dict[str, Any], message: str) -> None:
    change_config(folder, **fields)
    assert message in refused(folder)


# --- FP8 scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s * 0, "is 0.0: a scale must be a positive, finite number"),
        (lambda s: -s, "a scale must be a positive, finite number"),
        (lambda s: s * float("nan"), "is nan: a scale must be"),
        (lambda s: s * float("inf"), "is inf: a scale must be"),
        (lambda s: s.to(FP8), "need [2, 1] in float32 or bfloat16"),
    ],
)
def test_scales_that_are_none(folder: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][SCALE]
    tensors = load_file(file)
    save_file({**tensors, SCALE: change(tensors[SCALE])}, file, metadata={"format": "pt"})
    assert message in refused(folder)


def test_a_block_of_zeros_may_have_a_scale_of_zero() -> None:
    weight, scale = torch.ones(3, 3), torch.ones(2, 2)
    scale[1, 0] = weight[2, :2] = 0
    check_scales("w", scale, weight.to(FP8), (2, 2))
    weight[2, 1] = 1
    with pytest.raises(ValueError, match=r"w\[1, 0\] is 0.0"):
        check_scales("w", scale, weight.to(FP8), (2, 2))


@pytest.mark.parametrize("block", [[0, 128], [-1, 128], ["128", 128], [128.5, 128], [True, 128]])
def test_block_sizes_that_are_none(block: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be two whole numbers >= 1"):
        block_of({"quant_method": "fp8", "weight_block_size": block})


def test_the_whole_folder_is_none_of_these(folder: Path) -> None:
    report = check_model(ModelConfig(path=str(folder)))
    assert report is not None and report["event"] == "mtp_left_out"
    load_policy(ModelConfig(path=str(folder)), seed=0)

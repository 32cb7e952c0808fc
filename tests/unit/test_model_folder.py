"""Model folders written tensor by tensor: the same as transformers writes, in one file or in many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from policy import model_folder
from policy.checkpoint import load_checkpoint, save_checkpoint, save_model
from policy.config import LoraConfig, ModelConfig
from policy.loading import load_policy
from policy.model_folder import ModelWriter, write_files
from policy.tokenizer import build_tokenizer
from tests.unit.plain_learner import TINY, Plain
from tests.unit.released import SHAPE, in_fp8, raw_tensors, released_config, write_folder
from tests.unit.test_learner import DENSE, assert_same_bits, batch, dense, learner, policy, weights


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by safetensors' own library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def deepseek() -> PreTrainedModel:
    """transformers' own model, whose experts are stacked in memory and single in a folder."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE))


def qwen(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**DENSE, "vocab_size": 384, **more}))


MODELS = {
    "ours": policy,
    "ours in bf16": lambda: policy(torch.bfloat16),
    "deepseek": deepseek,
    "qwen2 in bf16": lambda: qwen().to(torch.bfloat16),  # type: ignore[arg-type]
    "qwen2, tied": lambda: qwen(tie_word_embeddings=True),
    "llama": lambda: dense("llama"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_what_transformers_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    monkeypatch.setattr(model_folder, "FILE_BYTES", 10_000)
    save_model(model, build_tokenizer(), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")  # after ours: it changes the model's config
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert_same_bits(ours, theirs)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    config, peer = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert config == peer
    files = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(files) > 3 and [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.values())
    assert all(name in load_file(tmp_path / "ours" / file) for name, file in index["weight_map"].items())
    assert index["weight_map"].keys() == ours.keys()
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not again[1]["missing_keys"] and not again[1]["unexpected_keys"]
    mine, _ = load_policy(ModelConfig(path=str(tmp_path / "ours"), dtype=str(model.dtype).split(".")[1]), seed=3)
    assert_same_bits(contents_of(mine, tmp_path / "again"), ours)


def contents_of(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    save_model(model, build_tokenizer(), folder)
    return contents(folder)


def test_a_file_is_full_before_it_is_over_its_size(tmp_path: Path) -> None:
    layout = [(f"t{i}", torch.float32, (25,)) for i in range(5)]
    write_files(tmp_path, layout, (torch.full((25,), float(i)) for i in range(5)), 250)
    sizes = [sum(t.numel() * 4 for t in load_file(file).values()) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert sizes == [200, 200, 100]
    write_files(tmp_path, [("huge", torch.float32, (99,))], [torch.zeros(99)], 250)
    assert load_file(tmp_path / "model.safetensors")["huge"].shape == (99,)


def test_tensors_of_every_shape_and_dtype_can_be_read_again(tmp_path: Path) -> None:
    given = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "odd": torch.arange(3).bfloat16(),
        "wide": torch.arange(4.0),
        "byte": torch.ones(1, dtype=torch.uint8),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    write_files(tmp_path, [(n, t.dtype, tuple(t.shape)) for n, t in given.items()], given.values(), 1 << 20)
    assert_same_bits(contents(tmp_path), given)


def test_what_is_written_is_what_was_laid_out(tmp_path: Path) -> None:
    layout = [("a", torch.float32, (2,))]
    with pytest.raises(AssertionError):
        write_files(tmp_path, layout, [torch.zeros(3)], 100)
    with pytest.raises(AssertionError, match="more tensors"):
        write_files(tmp_path, layout, [torch.zeros(2), torch.zeros(2)], 100)
    with pytest.raises(ValueError, match="shorter"):
        write_files(tmp_path, [*layout, ("b", torch.float32, (2,))], [torch.zeros(2)], 100)


def test_weights_come_one_at_a_time() -> None:
    """The tensors behind a folder are never there together: nothing holds the ones that were written."""
    model = policy(torch.bfloat16)
    masters = {name: tensor.float() for name, tensor in model.state_dict().items()}
    asked: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return masters[name]

    writer = ModelWriter(model, build_tokenizer())
    tensors = writer.tensors(writer.stored(Lazy(masters)))
    for (name, dtype, shape), tensor in zip(writer.layout, tensors, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
        assert len(asked) <= sum(1 for n, *_ in writer.layout[: writer.layout.index((name, dtype, shape)) + 1])
    assert len(asked) == len(set(asked)), "none is asked for twice"
    assert writer.bytes == sum(p.numel() * p.element_size() for p in model.state_dict().values())


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_adapters_holds_them_and_serves_the_merged_model(tmp_path: Path) -> None:
    save_model(policy(num_hidden_layers=2), build_tokenizer(), tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoraConfig(rank=2, experts=True))

    def fresh(seed: int) -> Any:
        model, _ = load_policy(config, seed=seed)
        return learner(model, lr=1e-2)

    one = fresh(0)
    one.step(batch(4), constant_length=8)
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, learner=one, tokenizer=build_tokenizer(), extra={}, source=config)
    served, _ = load_policy(ModelConfig(path=str(folder / "model")), seed=0)
    sequences = [[11, 12, 13, 14, 15]]
    assert learner(served).sequence_logprobs(sequences)[0] == pytest.approx(
        one.sequence_logprobs(sequences)[0], abs=1e-5
    )
    adapter = json.loads((folder / "model/adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (2, str(tmp_path / "base"))
    kept = load_file(folder / "model/adapter/adapter_model.safetensors")
    assert len(kept) == sum(p.requires_grad for p in one.model.parameters()) and any(t.any() for t in kept.values())
    other = fresh(7)
    load_checkpoint(folder, other)
    for each in (one, other):
        each.step(batch(4, seed=2), constant_length=8)
    assert_same_bits(weights(one.model), weights(other.model))
    save_model(one.model, build_tokenizer(), tmp_path / "exported", source=config)
    assert (tmp_path / "exported/adapter/adapter_config.json").is_file()


def test_a_model_without_adapters_has_no_such_folder(tmp_path: Path) -> None:
    model, tokenizer = load_policy(TINY, seed=0)
    save_checkpoint(tmp_path / "step-000001", learner=Plain(model), tokenizer=tokenizer, extra={}, source=TINY)
    assert not (tmp_path / "step-000001/model/adapter").exists()


# --- multi-token prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_mtp_weights_go_with_every_folder_that_is_written_or_with_none(tmp_path: Path, choice: str) -> None:
    config = released_config()
    write_folder(tmp_path / "released", config, in_fp8(raw_tensors(config)))
    source = ModelConfig(path=str(tmp_path / "released"), mtp=choice)
    model, tokenizer = load_policy(source, seed=0)
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, learner=Plain(model), tokenizer=tokenizer, extra={}, source=source)
    save_model(model, tokenizer, tmp_path / "exported", source=source)
    for written in (folder / "model", tmp_path / "exported"):
        layers = json.loads((written / "config.json").read_text())["num_nextn_predict_layers"]
        kept = [name for name in contents(written) if name.startswith("model.layers.3.")]
        assert (layers, bool(kept)) == ((1, True) if choice == "keep" else (0, False))
    load_checkpoint(folder, Plain(model))  # the file of MTP weights is among those that make it complete
    listed = json.loads((folder / "complete.json").read_text())["files"]
    assert ("model/mtp.safetensors" in listed) == (choice == "keep")

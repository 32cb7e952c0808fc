"""Models people have: released forms, dense families, files in pieces; every name accounted for, nothing held twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from policy.batch import Sample
from policy.checkpoint import save_model
from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
from policy.fp8 import FP8, scale_shape
from policy.learner import Learner
from policy.loading import check_model, load_policy
from policy.model import PolicyModel, checkpoint_tensors
from policy.shards import Shards, write_tensors
from policy.streaming import places, stream_model, streams
from policy.tokenizer import build_tokenizer
from tests.unit.released import MOONLIGHT, SHAPE, in_fp8, plain, raw_tensors, released_config, write_folder

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = dict(
    vocab_size=352, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    initializer_range=0.2,
)  # fmt: skip
DENSE: dict[str, PreTrainedConfig] = {
    f"{config.model_type}-{'tied' if tied else 'untied'}": config
    for tied in (False, True)
    for config in (
        Qwen2Config(**SMALL, tie_word_embeddings=tied),
        Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=tied),
        LlamaConfig(**SMALL, tie_word_embeddings=tied),
    )
}
IDS = torch.arange(9, 49)[None]


def model_of(config: Any, seed: int = 0) -> Any:
    """A random transformers model in which no norm or bias is at its neutral value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def folder_of(model: Any, folder: Path, shard: str = "40KB") -> Path:
    """A folder of many small files, as transformers writes it."""
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


def refusal(config: ModelConfig) -> str:
    """The one line with which a model is refused, early and late."""
    with pytest.raises(ValueError) as late:
        load_policy(config, seed=0)
    with pytest.raises(ValueError) as early:
        check_model(config)
    assert str(early.value) == str(late.value) and "\n" not in str(late.value)
    return str(late.value)


# --- DeepSeek's and Moonshot's released forms -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8() -> dict[str, Tensor]:
    return in_fp8(raw_tensors(released_config()))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, fp8: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path_factory.mktemp("released"), released_config(), fp8)


def test_the_released_form_is_dequantised_bit_for_bit(released: Path, fp8: dict[str, Tensor]) -> None:
    for dtype in ("float32", "bfloat16"):
        model, _ = load_policy(ModelConfig(path=str(released), dtype=dtype), seed=0)
        found, expected = dict(checkpoint_tensors(model)), plain(fp8)
        assert isinstance(model, PolicyModel) and not model.training
        assert found.keys() == {name for name in expected if not name.startswith("model.layers.3.")}
        for name, tensor in found.items():
            own = torch.float32 if name.endswith("e_score_correction_bias") else getattr(torch, dtype)
            assert tensor.dtype == own and torch.equal(tensor, expected[name].to(own)), name


def test_it_computes_what_transformers_computes(released: Path, fp8: dict[str, Tensor], tmp_path: Path) -> None:
    """transformers cannot read the form itself where blocks are cut: it is given the values."""
    values = {name: t for name, t in plain(fp8).items() if not name.startswith("model.layers.3.")}
    config = {key: v for key, v in released_config().items() if key not in ("quantization_config", "auto_map")}
    theirs = DeepseekV3ForCausalLM.from_pretrained(write_folder(tmp_path, config, values), dtype=torch.float32)
    ours, _ = load_policy(ModelConfig(path=str(released)), seed=0)
    logits = theirs(IDS, use_cache=False).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(ours(IDS).logits, logits, rtol=0, atol=2e-4)


def test_what_is_written_says_what_it_is(released: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(released), dtype="bfloat16")
    save_model(*load_policy(config, seed=0), tmp_path / "model", source=config)
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert not written.keys() & {"quantization_config", "auto_map", "rope_scaling", "torch_dtype"}
    assert (written["num_nextn_predict_layers"], written["dtype"]) == (0, "bfloat16")
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")
    rope = {**released_config()["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000}
    assert written["rope_parameters"] == {key: value for key, value in rope.items() if key != "type"}
    for name, tensor in load_file(tmp_path / "model/model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name


def test_correction_biases_in_bf16_are_taken_too(tmp_path: Path) -> None:
    config = released_config(quantization_config=None, num_nextn_predict_layers=0)
    tensors = {name: t.bfloat16() for name, t in raw_tensors(config).items()}
    model, _ = load_policy(ModelConfig(path=str(write_folder(tmp_path, config, tensors))), seed=0)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(dict(model.named_buffers())[name], tensors[name].float())


def test_moonlight_s_form(tmp_path: Path) -> None:
    config = {**SHAPE, **MOONLIGHT}
    folder = write_folder(tmp_path, config, raw_tensors(config))
    assert check_model(ModelConfig(path=str(folder))) is None
    ours, _ = load_policy(ModelConfig(path=str(folder)), seed=0)
    assert isinstance(ours, PolicyModel)
    assert ours.config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS, use_cache=False).logits, rtol=0, atol=2e-4)


def test_a_tokenizer_that_is_code_is_not_run(tmp_path: Path) -> None:
    """Moonlight's: a class in a file of the folder, over tiktoken's ranks."""
    config = {**SHAPE, **MOONLIGHT}
    folder = write_folder(tmp_path, config, raw_tensors(config))
    (folder / "tokenizer.json").unlink()
    names = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    given = {"tokenizer_class": "TikTokenTokenizer", "auto_map": names}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    (folder / "tokenization_moonshot.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = refusal(ModelConfig(path=str(folder)))
    assert message.startswith("model.path: the tokenizer of") and "never run here: set model.tokenizer" in message
    assert not (tmp_path / "ran").exists()
    build_tokenizer().save_pretrained(tmp_path / "other")
    check_model(ModelConfig(path=str(folder), tokenizer=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("field", "value"), [("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2)]
)
def test_a_router_of_another_kind_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    config = {**SHAPE, **MOONLIGHT, field: value}
    folder = write_folder(tmp_path, config, {"x": torch.zeros(1)})
    assert f"{field} must be" in refusal(ModelConfig(path=str(folder)))


# --- dense families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_is_loaded_trained_and_written(family: str, tmp_path: Path) -> None:
    """From many files; scored, one step, and back through transformers."""
    origin = model_of(DENSE[family])
    source = ModelConfig(path=str(folder_of(origin, tmp_path / "source")))
    assert streams(origin.config) and len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    model, tokenizer = load_policy(source, seed=0)
    assert type(model) is type(origin)
    assert torch.equal(model(IDS).logits, origin(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == family.endswith("-tied")

    learner = Learner(
        model, optimizer=OptimizerConfig(lr=1e-2), loss=LossConfig(), config=LearnerConfig(threads=1), total_steps=1
    )
    tokens = IDS[0].tolist()
    [scores] = learner.sequence_logprobs([tokens])
    expected = origin(IDS).logits[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    metrics = learner.sft_step([Sample(token_ids=tuple(tokens), prompt_length=1)])
    assert metrics["learner/loss"] == pytest.approx(-expected.mean().item(), abs=1e-5)
    [better] = learner.sequence_logprobs([tokens])
    assert sum(better) > sum(scores)

    save_model(model, tokenizer, tmp_path / "trained", source=source)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    again, _ = load_policy(ModelConfig(path=str(tmp_path / "trained")), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_stacked_experts_of_other_families_too(tmp_path: Path) -> None:
    experts: dict[str, Any] = dict(head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    config = Qwen3MoeConfig(**SMALL, **experts)
    folder = folder_of(model_of(config), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert streams(config)
    ours, _ = load_policy(ModelConfig(path=str(folder)), seed=0)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_what_transformers_converts_it_loads_and_nothing_is_lost_there(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    origin = model_of(config)
    folder = folder_of(origin, tmp_path, "1GB")
    assert not streams(config)
    ours, _ = load_policy(ModelConfig(path=str(folder)), seed=0)
    assert torch.equal(ours(IDS).logits, origin(IDS).logits)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has, beyond its config, 1 weights, e.g. model.extra.weight, which would be"):
        load_policy(ModelConfig(path=str(folder)), seed=0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_other_quantisations_are_refused(family: str, tmp_path: Path) -> None:
    """Whoever would load it."""
    config: Any = LlamaConfig(**SMALL) if family == "llama" else MixtralConfig(**SMALL, num_local_experts=4)
    folder = folder_of(model_of(config), tmp_path, "1GB")
    written = json.loads((folder / "config.json").read_text())
    quantised = {**written, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    message = refusal(ModelConfig(path=str(folder)))
    assert message.startswith(f"model.path: {folder}: ") and message.endswith("take the checkpoint in bfloat16")


def test_its_own_sampling_defaults_come_along(tmp_path: Path) -> None:
    folder = folder_of(model_of(DENSE["qwen2-untied"]), tmp_path)
    GenerationConfig(temperature=0.6, top_p=0.95, do_sample=True, eos_token_id=[1, 5]).save_pretrained(folder)
    model, _ = load_policy(ModelConfig(path=str(folder)), seed=0)
    assert model.generation_config is not None
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.6, [1, 5])


# --- every name is accounted for --------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder_of(model_of(DENSE["llama-tied"]), tmp_path / "llama", "1GB")


def change(folder: Path, **tensors: Tensor | None) -> ModelConfig:
    """Replaces, adds or (None) removes tensors; double underscores stand for dots."""
    path = folder / "model.safetensors"
    found: dict[str, Any] = {**load_file(path), **{name.replace("__", "."): t for name, t in tensors.items()}}
    save_file({name: t for name, t in found.items() if t is not None}, path)
    return ModelConfig(path=str(folder))


def test_a_missing_weight(llama: Path) -> None:
    assert "lacks 1 weights, e.g. model.norm.weight, which would be random" in refusal(
        change(llama, model__norm__weight=None)
    )


def test_a_surplus_weight(llama: Path) -> None:
    assert "has 2 tensors that its config knows nothing of, e.g. model.a.weight: they would be lost" in refusal(
        change(llama, model__a__weight=torch.zeros(2), model__b__weight=torch.zeros(2))
    )


def test_another_shape(llama: Path) -> None:
    assert "model.norm.weight has shape [63], config.json asks for [64]" in refusal(
        change(llama, model__norm__weight=torch.zeros(63))
    )


def test_what_is_no_weight(llama: Path) -> None:
    message = refusal(change(llama, model__norm__weight=torch.zeros(64, dtype=torch.int32)))
    assert "model.norm.weight holds torch.int32, which is no weight" in message


def test_fp8_without_a_config_for_it(llama: Path) -> None:
    weight = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    assert "no quantization_config" in refusal(change(llama, model__layers__0__self_attn__q_proj__weight=weight))


def test_a_tied_head_may_be_stored_twice_but_not_differently(llama: Path) -> None:
    table = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    load_policy(change(llama, lm_head__weight=table.clone()), seed=0)
    assert "ties lm_head.weight to model.embed_tokens.weight, but holds different values" in refusal(
        change(llama, lm_head__weight=table + 1)
    )


def test_old_tables_of_angles_are_passed_over(llama: Path) -> None:
    config = change(llama, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    model, _ = load_policy(config, seed=0)
    assert model.model.rotary_emb.inv_freq.any()


def test_places_are_the_model_itself() -> None:
    """One per name that is stored, over the whole of the memory."""
    model = PolicyModel(DeepseekV3Config(**SHAPE))
    found = dict(places(model))
    assert found.keys() == dict(checkpoint_tensors(model)).keys()
    with torch.no_grad():
        for place in found.values():
            place.fill_(7)
    assert all(bool((tensor == 7).all()) for tensor in model.state_dict().values())


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = folder_of(model_of(DENSE["qwen2-tied"]), tmp_path / "whole")
    config, second = ModelConfig(path=str(folder)), sorted(folder.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    for damage, message in (
        (whole[:-1], "is cut off or damaged: its header speaks of"),
        (whole[:20], "is cut off or no safetensors file"),
        (b"", "is cut off or no safetensors file"),
        (whole.replace(b'"F32"', b'"F99"'), "is cut off or no safetensors file"),
        (whole.replace(b'"F32"', b'"F64"'), "is cut off or no safetensors file"),
    ):
        second.write_bytes(damage)
        assert f"{second} {message}" in refusal(config)
    second.unlink()
    assert f"weight files are missing, e.g. {second.name}" in refusal(config)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "is not an index of safetensors files" in refusal(config)
    (folder / "model.safetensors.index.json").unlink()
    assert "has no weights (model.safetensors or model.safetensors.index.json)" in refusal(config)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = folder_of(model_of(DENSE["qwen2-tied"]), tmp_path / "whole")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    assert f"lies both in {first.name} and in {second.name}" in refusal(ModelConfig(path=str(folder)))


def test_own_files_are_the_library_s(tmp_path: Path) -> None:
    """Both ways, for every dtype, scalars and empty tensors among them."""
    dtypes = (torch.float64, torch.float32, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint8)
    tensors = {f"{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    layout = [(name, t.dtype, tuple(t.shape)) for name, t in ordered]
    write_tensors(tmp_path / "model.safetensors", layout, (t for _, t in ordered))
    theirs = load_file(tmp_path / "model.safetensors")
    with Shards(tmp_path) as shards:
        assert shards.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            for found in (theirs[name], shards.read(name)):
                assert found.dtype == tensor.dtype and found.shape == tensor.shape
                assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        assert shards.bytes(shards) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_cast_in_pieces_is_the_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policy.shards._PIECE", 64)
    tensor = torch.randn(37, 11)
    save_file({"a": tensor, "b": torch.tensor(3.0), "c": torch.zeros(0, 2)}, tmp_path / "model.safetensors")
    with Shards(tmp_path) as shards:
        place = torch.zeros(2, 37, 11, dtype=torch.bfloat16)
        shards.read_into("a", place[1])
        assert torch.equal(place[1], tensor.bfloat16()) and not place[0].any()
        strided = torch.zeros(11, 37).T
        shards.read_into("a", strided)
        assert torch.equal(strided, tensor)
        scalar, empty = torch.zeros((), dtype=torch.float64), torch.ones(0, 2, dtype=torch.float64)
        shards.read_into("b", scalar)
        shards.read_into("c", empty)
        assert scalar.item() == 3.0


# --- memory -----------------------------------------------------------------------------------------------------------

# What a process holds at most while it loads each folder, over what it held before, and the bytes of the model. Each in
# a child of its own: what one has let go of would hide what the next one takes.
PEAKS = """
import json, os, sys, torch
from pathlib import Path
from transformers import AutoConfig
from policy.shards import Shards
from policy.streaming import stream_model

def held(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    with Shards(Path(folder)) as shards:
        model = stream_model(shards, AutoConfig.from_pretrained(folder), torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps([held("VmHWM") - before, size]), flush=True)
    os._exit(0)
"""


def zeros_in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of decoder layers as FP8, without the work of finding scales."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2 and "gate.weight" not in name:
            found[name] = torch.zeros(tensor.shape, dtype=FP8)
            found[f"{name}_scale_inv"] = torch.ones(scale_shape(tuple(tensor.shape), (128, 128)))
    return found


def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    """Loading takes the model's bytes and a few MB, whether it reads bf16, casts fp32 or dequantises FP8."""
    shape = dict(hidden_size=1024, intermediate_size=2048, moe_intermediate_size=768, num_hidden_layers=2)
    config = released_config(**shape, vocab_size=8192, num_nextn_predict_layers=0)
    with torch.device("meta"):
        outline = dict(checkpoint_tensors(PolicyModel(DeepseekV3Config(**{**SHAPE, **shape, "vocab_size": 8192}))))
    bf16 = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in outline.items()}
    plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
    folders = [
        write_folder(tmp_path / "bf16", plain_config, bf16),
        write_folder(tmp_path / "fp32", plain_config, {name: t.float() for name, t in bf16.items()}, shards=1),
        write_folder(tmp_path / "fp8", config, zeros_in_fp8(bf16)),
    ]
    command = [sys.executable, "-c", PEAKS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    for folder, (peak, size) in zip(folders, map(json.loads, done.stdout.splitlines()), strict=True):
        print(f"{folder.name}: {peak / size:.2f} of {size / 2**20:.0f} MiB")
        assert size > 64 << 20
        assert peak < 1.25 * size + (24 << 20), folder.name  # twice would be 2 * size


def test_an_empty_model_costs_nothing_to_fill_with_zeros(tmp_path: Path) -> None:
    """Nothing is initialised on the way: what is not read would show as whatever the memory held."""
    folder = folder_of(model_of(DENSE["qwen3-untied"]), tmp_path)
    state = torch.get_rng_state()
    with Shards(folder) as shards:
        stream_model(shards, AutoConfig.from_pretrained(folder), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32

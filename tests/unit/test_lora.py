"""Adapters: only they train, the base never changes by a bit, everyone else gets them merged, PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from pipelines.config import load_recipe
from pipelines.learner_service import LearnerService
from pipelines.weight_sync import sent_tensors
from policy.batch import Sample, pack
from policy.checkpoint import save_model
from policy.config import LearnerConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig
from policy.learner import Learner
from policy.loading import check_model, load_policy
from policy.lora import adapters_off, add_adapters, has_adapters, is_adapter, merged_state, save_adapter
from policy.model import PolicyModel, checkpoint_tensors
from policy.scorer import TokenScorer, reference_policy
from policy.tokenizer import build_tokenizer
from tests.unit.model_zoo import make_policy, ragged, relative_gap
from tests.unit.test_learner_service import SEQUENCES, SMALL, groups

DENSE: dict[str, Any] = dict(
    vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip
IDS, MASK = ragged([19, 7, 12])


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "policy":
        return make_policy("q_lora")
    if kind == "qwen3_moe":
        experts: dict[str, Any] = dict(head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
        config: Any = Qwen3MoeConfig(**DENSE, **experts)
    else:
        config = (LlamaConfig if kind == "llama" else Qwen2Config)(**DENSE, tie_word_embeddings=kind == "qwen2")
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


def base_of(model: Any) -> dict[str, Tensor]:
    return {n.replace(".base_layer", ""): t.clone() for n, t in model.state_dict().items() if not is_adapter(n)}


def trained(kind: str, **lora: Any) -> Any:
    """A model whose adapters have moved far: their product is as large as what they adapt."""
    model = model_of(kind)
    add_adapters(model, LoraConfig(**{"rank": 3, "alpha": 6.0, **lora}), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.2)
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CASES = [("policy", False), ("policy", True), ("llama", False), ("qwen2", False), ("qwen3_moe", True)]


@pytest.mark.parametrize(("kind", "experts"), CASES)
def test_fresh_adapters_change_nothing_and_only_they_train(kind: str, experts: bool) -> None:
    model = model_of(kind)
    before, base = logits(model), base_of(model)
    state = torch.get_rng_state()
    add_adapters(model, LoraConfig(rank=3, experts=experts), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is type(model_of(kind)) and has_adapters(model)
    assert relative_gap(logits(model), before) < 1e-5
    learner = Learner(
        model, optimizer=OptimizerConfig(lr=1e-2), loss=LossConfig(), config=LearnerConfig(threads=1), total_steps=9
    )
    rows = [Sample(token_ids=tuple(row[m.bool()].tolist()), prompt_length=1) for row, m in zip(IDS, MASK, strict=True)]
    first = {n: p.detach().clone() for n, p in model.named_parameters() if is_adapter(n)}
    losses = [learner.sft_step(rows)["learner/loss"] for _ in range(4)]  # A moves from the second step on: B was zero
    assert losses[-1] < losses[0] - 0.01
    assert all(p.requires_grad == is_adapter(n) for n, p in model.named_parameters())
    assert not any(torch.equal(p, first[n]) for n, p in model.named_parameters() if is_adapter(n))
    assert same(base_of(model), base)


def test_the_first_values_depend_on_the_seed_alone() -> None:
    def values(seed: int) -> list[Tensor]:
        model = model_of("policy")
        add_adapters(model, LoraConfig(experts=True), seed)
        return [p for n, p in model.named_parameters() if ".lora_A." in n]

    assert all(torch.equal(a, b) for a, b in zip(values(1), values(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(values(1), values(2), strict=True))


def test_all_linear_layers_but_the_head_get_some() -> None:
    """Those of dense and shared experts too, which PEFT would drop, and give theirs to the routed experts instead."""
    model = model_of("policy")
    add_adapters(model, LoraConfig(), seed=0)
    found = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    gated = ("gate_proj", "up_proj", "down_proj")
    assert found == {
        *(f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in attention),
        *(f"model.layers.0.mlp.{name}" for name in gated),
        *(f"model.layers.{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in gated),
    }
    some = model_of("policy")
    add_adapters(some, LoraConfig(targets=("o_proj", "up_proj")), seed=0)
    kinds = {
        name.partition(".lora_A.")[0].rpartition(".")[2] for name, _ in some.named_parameters() if "lora_A" in name
    }
    assert kinds == {"o_proj", "up_proj"}


@pytest.mark.parametrize(("kind", "experts"), CASES)
def test_merged_weights_are_the_adapted_model(kind: str, experts: bool) -> None:
    model = trained(kind, experts=experts)
    base, adapted = base_of(model), logits(model)
    merged = {name: t.detach() for name, t in merged_state(model, model.state_dict()).items()}
    plain = model_of(kind)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert relative_gap(logits(model_of(kind)), adapted) > 0.1
    assert relative_gap(logits(plain), adapted) < 1e-5
    assert same(base_of(model), base), "merging must not touch the base"
    sent = dict(checkpoint_tensors(model))
    expected = dict(checkpoint_tensors(plain))
    assert same(sent, expected)


def test_the_product_by_hand() -> None:
    model = trained("policy", experts=True)
    state = model.state_dict()
    merged = dict(checkpoint_tensors(model))
    name = "model.layers.1.self_attn.o_proj"
    a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
    assert a.shape[0] == b.shape[1] == 3
    torch.testing.assert_close(merged[f"{name}.weight"], state[f"{name}.base_layer.weight"] + 6.0 / 3 * b @ a)
    name = "model.layers.1.mlp.experts"  # down_proj is the outer wrapper, gate_up_proj the inner one
    a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
    base = state[f"{name}.base_layer.base_layer.down_proj"]
    own_a, own_b = a[5 * 3 : 6 * 3], b[:, 5::8]  # of expert 5 of 8
    torch.testing.assert_close(merged[f"{name}.5.down_proj.weight"], base[5] + 6.0 / 3 * own_b @ own_a)


def test_without_adapters_the_live_weights_are_sent() -> None:
    model = make_policy()
    state = model.state_dict()
    assert merged_state(model, state) is state


def test_bf16_keeps_its_adapters_in_fp32_and_merges_once_rounded() -> None:
    config = ModelConfig(preset="tiny", overrides=SMALL, dtype="bfloat16", lora=LoraConfig(rank=2))
    model, _ = load_policy(config, seed=0)
    assert {p.dtype for n, p in model.named_parameters() if is_adapter(n)} == {torch.float32}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    state, name = model.state_dict(), "model.layers.0.self_attn.o_proj"
    a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
    exact = state[f"{name}.base_layer.weight"].float() + 32.0 / 2 * b @ a
    sent = dict(sent_tensors(model, "bfloat16"))
    assert torch.equal(sent[f"{name}.weight"], exact.bfloat16())
    assert sent["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["policy", "qwen2"])
def test_the_reference_is_the_base_without_a_copy(kind: str) -> None:
    """Scored between a forward pass and its backward, it is bit for bit the model before there were adapters."""
    model = trained(kind, experts=kind == "policy")
    assert reference_policy(model) is model
    fresh = model_of(kind)
    add_adapters(fresh, LoraConfig(experts=kind == "policy"), seed=9)  # the same path through the layers
    rows = [Sample(token_ids=tuple(row[m.bool()].tolist()), prompt_length=1) for row, m in zip(IDS, MASK, strict=True)]
    [micro] = pack(rows, 999)
    policy, reference = TokenScorer(model, chunk=64), TokenScorer(model, chunk=64, adapters=False)
    scores = policy(micro, 1.0)
    with torch.no_grad():
        found = reference(micro, 1.0).logprobs
        assert torch.equal(found, TokenScorer(fresh, chunk=64)(micro, 1.0).logprobs)
    assert (found - scores.logprobs).abs().max() > 0.1
    scores.logprobs.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if is_adapter(n)}
    assert all(g is not None and bool(g.any()) for g in gradients.values())
    copies = {n: g.clone() for n, g in gradients.items() if g is not None}
    model.zero_grad()
    policy(micro, 1.0).logprobs.sum().backward()
    assert all(torch.equal(copies[n], p.grad) for n, p in model.named_parameters() if p.grad is not None)


def test_adapters_are_on_again_after_a_failure() -> None:
    model = trained("policy")
    on = logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        assert relative_gap(logits(model), on) > 0.1
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)
    assert all(p.requires_grad == is_adapter(n) for n, p in model.named_parameters())


@pytest.mark.parametrize(("kind", "experts"), CASES)
def test_peft_reads_the_adapters_alone(kind: str, experts: bool, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "base")
    model = trained(kind, experts=experts)
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_gap(logits(theirs), logits(model)) < 1e-5
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["peft_type"]) == (3, 6.0, 0.0, "LORA")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(targets=("q_a_prj",)), r"no linear layer 'q_a_prj' below its head .did you mean 'q_a_proj'"),
        (LoraConfig(targets=("lm_head",)), "no linear layer 'lm_head' below its head"),
        (LoraConfig(targets=("embed_tokens",)), "no linear layer 'embed_tokens'"),
    ],
)
def test_targets_that_are_not_there(lora: LoraConfig, message: str) -> None:
    overrides = {**SMALL, "q_lora_rank": 8}
    config = ModelConfig(preset="tiny", overrides=overrides, lora=lora)
    for call in (lambda: load_policy(config, seed=0), lambda: check_model(config)):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_experts_where_there_are_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**DENSE, "vocab_size": 320})).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora=LoraConfig(experts=True))
    for call in (lambda: load_policy(config, seed=0), lambda: check_model(config)):
        with pytest.raises(ValueError, match=r"model.lora.experts is true, but the model has no stacked experts"):
            call()


def test_experts_are_not_shared_out_with_adapters() -> None:
    keys = ["model.lora.experts=true", "parallel.ranks=2", "parallel.expert_parallel=2"]
    with pytest.raises(ValueError, match=r"set parallel.expert_parallel to 1, or experts to false"):
        load_recipe("r1-tiny", keys)
    assert load_recipe("r1-tiny", keys[:2]).recipe.model.lora == LoraConfig(experts=True)


# --- a learner with adapters ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def service(dtype: str = "float32") -> LearnerService:
    lora = LoraConfig(rank=4, alpha=8.0, experts=True)
    found = LearnerService(ModelConfig(preset="tiny", overrides=SMALL, dtype=dtype, lora=lora), seed=3, threads=1)
    assert found.load() is None
    return found


def begin(learner: LearnerService) -> None:
    learner.begin(
        optimizer=OptimizerConfig(lr=1e-2), loss=LossConfig(kl_coef=0.5),
        config=LearnerConfig(micro_batch_tokens=64), total_steps=4,
    )  # fmt: skip


def step(learner: LearnerService, number: int) -> dict[str, float]:
    return learner.grpo_step(groups(number), mask_truncated=False, mini_batches=1, temperature=1.0, constant_length=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_follow_each_other(dtype: str, tmp_path: Path) -> None:
    """A stage's reference is its first model; its result is a plain model with the adapters beside it."""
    learner = service(dtype)
    begin(learner)
    base = base_of(learner.model)
    drift = [step(learner, number)["learner/kl_ref"] for number in range(3)]
    assert drift[0] == 0.0 and min(drift[1:]) > 1e-3
    update = learner.publish(1, "shm", "lora-test", 1)
    assert update is not None and not any("lora" in name or "base_layer" in name for name in update.names)
    learner.close()
    assert same(base_of(learner.model), base)

    learner.export(str(tmp_path / "model"))
    before = learner.sequence_logprobs(SEQUENCES)
    plain, _ = load_policy(ModelConfig(path=str(tmp_path / "model"), dtype=dtype), seed=0)
    assert isinstance(plain, PolicyModel) and not has_adapters(plain)
    adapter = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None  # random weights: on no disk

    learner.load_model(str(tmp_path / "model"))
    begin(learner)
    after = learner.sequence_logprobs(SEQUENCES)
    gap = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert gap < (1e-5 if dtype == "float32" else 0.05)
    assert step(learner, 3)["learner/kl_ref"] == 0.0
    learner.export(str(tmp_path / "second"))
    adapter = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "model")


def test_a_resume_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight = service()
    begin(straight)
    step(straight, 0)
    straight.save(str(tmp_path / "step-000001"), {"step": 1})
    expected = [step(straight, number)["learner/kl_ref"] for number in (1, 2)]
    straight.close()
    resumed = service()
    begin(resumed)
    assert resumed.restore(str(tmp_path / "step-000001")) == {"step": 1}
    assert [step(resumed, number)["learner/kl_ref"] for number in (1, 2)] == expected
    assert same(dict(straight.model.state_dict()), dict(resumed.model.state_dict()))


def test_a_folder_of_a_dense_model_with_adapters(tmp_path: Path) -> None:
    source = ModelConfig(path=str(tmp_path / "base"), lora=LoraConfig(rank=3))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**DENSE, "vocab_size": 320})).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_policy(source, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.2)
    save_model(model, tokenizer, tmp_path / "model", source=source)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative_gap(logits(merged), logits(model)) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "model/adapter").eval()
    assert relative_gap(logits(theirs), logits(model)) < 1e-5

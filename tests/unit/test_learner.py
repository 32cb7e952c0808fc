import io
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from policy.batch import Sample, pack
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from policy.glossary import LEARNER_METRICS
from policy.learner import Learner
from policy.model import PolicyModel
from policy.presets import preset_config
from policy.scorer import TokenScorer, frozen_copy

DENSE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
}
DENSE_MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"mlp_bias": True, "attention_bias": True}),
    "phi": (PhiForCausalLM, PhiConfig, {"attention_dropout": 0.5, "embd_pdrop": 0.5}),  # a head with a bias, dropout
}


def policy(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PolicyModel:
    torch.manual_seed(seed)
    small = {
        "hidden_size": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    model = PolicyModel(preset_config("tiny", **{**small, "initializer_range": 0.1, **overrides}))
    return model.double() if dtype == torch.float64 else model.to(dtype)  # pyright: ignore[reportArgumentType]


def dense(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, config_type, more = DENSE_MODELS[name]
    model = model_type(config_type(**{**DENSE, **more})).to(dtype)
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model


def batch(count: int = 12, seed: int = 0, *, logprob: float = -5.8) -> list[Sample]:
    draw = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt, completion = draw.randint(1, 6), draw.randint(1, 12)
        samples.append(
            Sample(
                token_ids=tuple(draw.randrange(9, 320) for _ in range(prompt + completion)),
                prompt_length=prompt,
                rollout_logprobs=tuple(draw.gauss(logprob, 0.2) for _ in range(completion)),
                advantage=draw.gauss(0, 1),
            )
        )
    return samples


def learner(model: PreTrainedModel, *, reference: PreTrainedModel | None = None, **fields: Any) -> Learner:
    """A learner whose config fields are given flat."""

    def of(kind: type) -> dict[str, Any]:
        return {name: fields[name] for name in kind.__dataclass_fields__ if name in fields}

    return Learner(
        model,
        optimizer=OptimizerConfig(**{"lr": 1e-3, **of(OptimizerConfig)}),
        loss=LossConfig(**of(LossConfig)),
        config=LearnerConfig(**{"threads": 1, **of(LearnerConfig)}),
        total_steps=fields.get("total_steps", 10),
        reference=reference,
        router=fields.get("router"),
    )


def gradients(learner: Learner, samples: list[Sample], **call: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What one step would do, without doing it: its metrics and its gradient before clipping."""
    found: dict[str, Tensor] = {}

    class Caught(Exception):
        pass

    def catch() -> float:
        found.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})
        learner._optimizer.zero_grad()
        learner._optimizer.steps += 1
        return 0.0

    learner._optimizer.step = catch  # type: ignore[method-assign]
    return learner.step(samples, **call), found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- the cut does not matter ----------------------------------------------------------------------------------------


def worst_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    scale = max(float(g.abs().max()) for g in one.values())
    return max(float((g - other[name]).abs().max()) for name, g in one.items()) / scale


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 400),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
    st.sampled_from(["token", "sequence", "constant"]),
    st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]),
    st.sampled_from(["policy", "qwen2"]),
)
def test_loss_and_gradient_do_not_depend_on_the_cut(limit, chunk, draw, aggregation, precision, kind) -> None:
    dtype, tolerance = precision
    if kind == "qwen2" and dtype == torch.float64:
        tolerance = 1e-6  # transformers computes norms and rotary angles in fp32 whatever the dtype
    model = policy(dtype) if kind == "policy" else dense("qwen2", dtype)
    reference = policy(dtype, seed=1) if kind == "policy" else frozen_copy(dense("qwen3", dtype))
    samples = batch()
    shuffled = draw.sample(samples, len(samples))
    fields = {"aggregation": aggregation, "kl_coef": 0.1, "reference": reference}
    whole, one = gradients(learner(model, **fields), samples, constant_length=20)
    cut, other = gradients(
        learner(model, micro_batch_tokens=limit, logprob_chunk=chunk, **fields), shuffled, constant_length=20
    )
    assert cut["learner/loss"] == pytest.approx(whole["learner/loss"], rel=tolerance, abs=tolerance)
    assert worst_difference(one, other) < tolerance
    for name in ("learner/entropy", "learner/kl_ref", "mismatch/mean_abs", "mismatch/k3", "learner/tokens"):
        assert cut[name] == pytest.approx(whole[name], rel=max(tolerance, 1e-6))


def test_a_loss_averaged_over_micro_batches_would_be_seen() -> None:
    """The test above can fail: a denominator per micro-batch changes the gradient by far more than rounding."""
    samples = batch()
    _, one = gradients(learner(policy(torch.float64)), samples)
    halves = [gradients(learner(policy(torch.float64)), part)[1] for part in (samples[:4], samples[4:])]
    wrong = {name: (halves[0][name] + halves[1][name]) / 2 for name in one}
    assert worst_difference(one, wrong) > 1e-2


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_dense_models_give_the_logprobs_of_their_own_forward(name: str) -> None:
    model = dense(name)
    samples = batch(6)
    scorer = TokenScorer(model, chunk=7)
    for micro in pack(samples, 40):
        ours = scorer(micro, 0.7).logprobs
        for position, index in enumerate(micro.sequence_index.unique_consecutive().tolist()):
            assert index == micro.sample_index[position]
            sample = samples[index]
            logits = model(torch.tensor([sample.token_ids])).logits[0, :-1].float() / 0.7
            targets = torch.tensor(sample.token_ids[1:])
            theirs = logits.log_softmax(-1).gather(1, targets[:, None])[sample.prompt_length - 1 :, 0]
            torch.testing.assert_close(ours[micro.sequence_index == index], theirs, rtol=0, atol=1e-5)


def test_policy_model_gives_the_logprobs_of_its_own_forward() -> None:
    model = policy()
    sequences = [list(s.token_ids) for s in batch(6)]
    found = learner(model, micro_batch_tokens=40).sequence_logprobs(sequences, temperature=0.7)
    for tokens, logprobs in zip(sequences, found, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, :-1] / 0.7
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert len(logprobs) == len(tokens) - 1
        assert logprobs == pytest.approx(theirs.tolist(), abs=1e-5)


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [policy, lambda: dense("qwen3")], ids=["policy", "qwen3"])
def test_a_step_raises_what_had_a_positive_advantage(model) -> None:
    ours = learner(model(), lr=3e-3)
    good, bad = (replace(s, advantage=a) for s, a in zip(batch(2), (1.0, -1.0), strict=True))

    def score() -> list[float]:
        return [sum(x) for x in ours.sequence_logprobs([good.token_ids, bad.token_ids])]

    before = score()
    for _ in range(3):
        ours.step([good, bad], mini_batches=1, temperature=1.0, constant_length=8)
    after = score()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_sft_loss_is_the_mean_over_completion_tokens_and_falls() -> None:
    ours = learner(policy(), lr=3e-3, micro_batch_tokens=30)
    samples = [replace(s, rollout_logprobs=None) for s in batch(8)]
    logprobs = ours.sequence_logprobs([s.token_ids for s in samples])
    completion = [p for s, row in zip(samples, logprobs, strict=True) for p in row[s.prompt_length - 1 :]]
    losses = [ours.sft_step(samples)["learner/loss"] for _ in range(8)]
    assert losses[0] == pytest.approx(-math.fsum(completion) / len(completion), rel=1e-5)
    assert losses[-1] < losses[0] - 0.2


def test_mini_batches_keep_the_old_logprobs_of_before_the_first_update() -> None:
    samples = batch(8)
    ours = learner(policy(), lr=1e-2)
    before = ours.sequence_logprobs([s.token_ids for s in samples])
    # the mismatch is between the sampler and the policy before the update: exactly zero here, for all mini-batches
    exact = [
        replace(s, rollout_logprobs=tuple(row[s.prompt_length - 1 :])) for s, row in zip(samples, before, strict=True)
    ]
    metrics = ours.step(exact, mini_batches=4, temperature=1.0, constant_length=8)
    assert metrics["learner/optimizer_steps"] == 4
    assert metrics["mismatch/max_abs"] < 1e-5
    assert metrics["learner/approx_kl"] > 1e-6  # the later mini-batches do see a policy that has moved
    assert metrics["learner/ratio_max"] > 1.0


def test_one_mini_batch_costs_one_forward_per_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = PolicyModel.hidden_states
    monkeypatch.setattr(PolicyModel, "hidden_states", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    ours = learner(policy(), micro_batch_tokens=40)
    samples = batch(12)
    micros = len(pack(samples, 40))
    metrics = ours.step(samples, mini_batches=1, temperature=1.0, constant_length=8)
    assert len(calls) == micros > 1
    assert metrics["learner/ratio_max"] == 1.0
    assert metrics["learner/approx_kl"] == 0.0


def test_more_mini_batches_than_samples() -> None:
    ours = learner(policy())
    assert ours.step(batch(2), mini_batches=5, temperature=1.0, constant_length=8)["learner/optimizer_steps"] == 2


def test_kl_pulls_back_to_the_reference() -> None:
    model = policy()
    reference = frozen_copy(model)
    before = weights(reference)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    ours = learner(model, reference=reference, kl_coef=1.0, lr=3e-3)
    samples = [replace(s, advantage=0.0) for s in batch(8)]
    kls = [ours.step(samples, mini_batches=1, temperature=1.0, constant_length=8)["learner/kl_ref"] for _ in range(6)]
    assert kls[-1] < 0.9 * kls[0]
    assert_same_bits(before, weights(reference))


def test_router_bias_is_frozen_and_load_is_reported() -> None:
    model = policy()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, 8))
    before = {n: b.clone() for n, b in model.named_buffers()}
    metrics = learner(model).step(batch(), mini_batches=1, temperature=1.0, constant_length=8)
    assert_same_bits(before, dict(model.named_buffers()))
    loads = {n: v for n, v in metrics.items() if n.startswith("router/load_max")}
    assert loads.keys() == {f"router/load_max_over_mean/layer_{i}" for i in (1, 2)}  # layer 0 is dense
    assert all(1.0 <= v <= 8.0 for v in loads.values())
    with torch.no_grad():  # this bias sends every token to experts 0 and 1: 2 of 8 carry all, max / mean = 4
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[:2] += 100
    metrics = learner(model).step(batch(), mini_batches=1, temperature=1.0, constant_length=8)
    assert metrics["router/load_max_over_mean/layer_1"] == 4.0


def test_a_router_bias_that_is_a_parameter_is_frozen_too() -> None:
    model = dense("qwen2")
    model.model.e_score_correction_bias = nn.Parameter(torch.ones(4))
    learner(model)
    assert not model.model.e_score_correction_bias.requires_grad


# --- metrics --------------------------------------------------------------------------------------------------------


def declared(name: str) -> str:
    return re.sub(r"layer_\d+$", "layer_{i}", name)


def test_every_metric_is_declared_and_every_declared_one_is_returned() -> None:
    model = policy()
    router = RouterConfig(balance_coef=0.1, replay=True)
    ours = learner(model, reference=frozen_copy(model), kl_coef=0.1, router=router)
    samples = [replace(s, routed_experts=torch.arange(2).expand(len(s.token_ids) - 1, 2, 2)) for s in batch()]
    rl = ours.step(samples, mini_batches=2, temperature=1.0, constant_length=8)
    sft = ours.sft_step([replace(s, rollout_logprobs=None) for s in batch()])
    empty = ours.step([], mini_batches=2, temperature=1.0, constant_length=8)
    assert {declared(name) for name in rl} == LEARNER_METRICS.keys()
    for metrics in (sft, empty):
        assert {declared(name) for name in metrics} <= LEARNER_METRICS.keys()
    for value in (*rl.values(), *sft.values(), *empty.values()):
        assert isinstance(value, float)
        assert math.isfinite(value)


def test_counts() -> None:
    samples = batch(5)
    metrics = learner(policy()).step(samples, mini_batches=2, temperature=1.0, constant_length=8)
    assert metrics["learner/sequences"] == 5
    assert metrics["learner/tokens"] == sum(len(s.token_ids) - 1 for s in samples)
    assert metrics["learner/loss_tokens"] == sum(len(s.token_ids) - s.prompt_length for s in samples)


@pytest.mark.parametrize("call", [lambda ours: ours.step([]), lambda ours: ours.sft_step([])])
def test_an_empty_batch_changes_nothing_and_says_so(call) -> None:
    model = policy()
    before = weights(model)
    metrics = call(learner(model))
    assert (metrics["learner/skipped"], metrics["learner/optimizer_steps"], metrics["learner/tokens"]) == (1, 0, 0)
    assert_same_bits(before, weights(model))


# --- reproducible, resumable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "qwen2-tied"])
def test_a_restored_learner_continues_bit_identically(kind: str) -> None:
    def fresh() -> PreTrainedModel:
        return policy() if kind == "policy" else dense(kind)

    fields: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 2, "micro_batch_tokens": 60, "weight_decay": 0.1}
    straight = learner(fresh(), **fields)
    for seed in range(4):
        straight.step(batch(seed=seed), mini_batches=2, temperature=0.9, constant_length=8)

    first = learner(fresh(), **fields)
    for seed in range(2):
        first.step(batch(seed=seed), mini_batches=2, temperature=0.9, constant_length=8)
    saved = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "learner": first.state_dict()}, saved)
    torch.manual_seed(999)
    second = learner(fresh(), **fields)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["learner"])
    for seed in range(2, 4):
        second.step(batch(seed=seed), mini_batches=2, temperature=0.9, constant_length=8)

    assert second.optimizer_steps == straight.optimizer_steps == 8
    assert_same_bits(weights(straight.model), weights(second.model))


def test_restoring_brings_back_the_random_state() -> None:
    ours = learner(policy())
    state = ours.state_dict()
    expected = torch.rand(3)
    ours.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_state_and_batch_give_the_same_bits(threads: int) -> None:
    def run() -> tuple[dict[str, float], dict[str, Tensor]]:
        ours = learner(policy(hidden_size=96), threads=threads)
        metrics = ours.step(batch(16), mini_batches=2, temperature=1.0, constant_length=8)
        return metrics, weights(ours.model)

    try:
        (one, one_weights), (other, other_weights) = run(), run()
    finally:
        torch.set_num_threads(1)
    assert {**one, "learner/tokens_per_s": 0.0} == {**other, "learner/tokens_per_s": 0.0}
    assert_same_bits(one_weights, other_weights)


def test_a_state_of_another_model_is_refused() -> None:
    state = learner(policy(n_routed_experts=4)).state_dict()
    with pytest.raises(ValueError, match="another model: 8 tensors are missing or have other shapes"):
        learner(policy()).load_state_dict(state)
    ours = learner(policy())
    ours.step(batch(2))
    moments = ours.state_dict()["optimizer"]["moments"]
    with pytest.raises(ValueError, match=r"moments of other\.weight, which this optimizer does not train"):
        ours.prepare_moments({**moments, "other.weight": {}})


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mini_batches": 0}, "mini_batches must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"constant_length": 0}, "constant_length must be >= 1"),
    ],
)
def test_arguments_out_of_range(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(policy()).step(batch(2), **call)


def test_configurations_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="has no reference policy"):
        learner(policy(), kl_coef=0.1)
    with pytest.raises(ValueError, match="total_steps must be >= 1"):
        learner(policy(), total_steps=0)
    with pytest.raises(ValueError, match="nothing to train"):
        learner(frozen_copy(policy()))
    with pytest.raises(ValueError, match="not a causal language model"):
        learner(dense("qwen2").model)
    with pytest.raises(ValueError, match="no rollout_logprobs"):
        learner(policy()).step([replace(s, rollout_logprobs=None) for s in batch(2)])


@pytest.mark.parametrize(
    ("spread", "cap", "words"),
    [
        (2.0, 5.0, "final_logit_softcapping 5.0"),
        (0.02, 30.0, "final_logit_softcapping 30.0"),  # so small are the logits that the cap does not show
    ],
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(spread: float, cap: float, words: str) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**{**DENSE, "initializer_range": spread}, final_logit_softcapping=cap))
    with pytest.raises(ValueError, match=words):
        learner(model)


def test_a_model_whose_config_does_not_tell_is_found_out_by_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policy.scorer._CHANGES_LOGITS", ())
    model = Gemma2ForCausalLM(Gemma2Config(**{**DENSE, "initializer_range": 2.0}, final_logit_softcapping=5.0))
    with pytest.raises(ValueError, match="soft-capping or scaling"):
        learner(model)


def test_tokens_outside_the_vocabulary_never_reach_the_model() -> None:
    ours, samples = learner(policy()), batch()
    samples[3] = replace(samples[3], token_ids=(*samples[3].token_ids[:-1], 10**6))
    for call in (ours.step, ours.sft_step, ours.gradients):
        with pytest.raises(ValueError, match="of sample 3 is 1000000, the model has"):
            call(samples)
    assert ours.optimizer_steps == 0

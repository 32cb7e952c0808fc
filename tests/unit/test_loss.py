"""The loss against numbers worked by hand and against TRL's own ``GRPOTrainer._compute_loss``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from policy.batch import Sample, pack
from policy.config import LossConfig
from policy.loss import Denominators, LossInputs, LossOutput, grpo_loss, k3
from policy.scorer import TokenScorer
from policy.tokenizer import build_tokenizer

LN = math.log

# Two sequences of 2 and 1 tokens, advantages +1 and -2. Ratios current / old: 1.5 and 0.5, then 0.5.
OLD = [LN(0.2), LN(0.4), LN(0.8)]
NOW = [LN(0.3), LN(0.2), LN(0.4)]


def hand(config: LossConfig, *, constant: int = 10, **more: list[float]) -> tuple[LossOutput, Tensor]:
    """The loss of the two sequences and its gradient with respect to the log-probabilities."""
    logprobs = torch.tensor(NOW, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        old_logprobs=torch.tensor(OLD, dtype=torch.float64),
        advantages=torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64),
        sequence_lengths=torch.tensor([2, 2, 1]),
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in more.items()},
    )
    output = grpo_loss(logprobs, inputs, Denominators(tokens=3, sequences=2, constant=constant), config)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def plain(**fields: Any) -> LossConfig:
    return LossConfig(**{"importance_cap": None, **fields})


# per token: -min(1.5, 1.2) = -1.2 (clipped); -min(.5, .8) = -.5; -min(-1.0, -1.6) = 1.6 (clipped)
@pytest.mark.parametrize(
    ("aggregation", "loss", "weights"),
    [
        ("token", (-1.2 - 0.5 + 1.6) / 3, [1 / 3, 1 / 3, 1 / 3]),
        ("sequence", ((-1.2 - 0.5) / 2 + 1.6) / 2, [1 / 4, 1 / 4, 1 / 2]),
        ("constant", (-1.2 - 0.5 + 1.6) / (2 * 10), [1 / 20, 1 / 20, 1 / 20]),
    ],
)
def test_aggregations_by_hand(aggregation: str, loss: float, weights: list[float]) -> None:
    output, gradient = hand(plain(aggregation=aggregation))
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    # only the unclipped second token has a gradient: -ratio * advantage = -.5
    assert gradient.tolist() == pytest.approx([0.0, -0.5 * weights[1], 0.0], abs=1e-12)


def test_clip_bounds_are_separate() -> None:
    output, _ = hand(plain(clip_low=0.6, clip_high=0.3))
    # 1.5 is cut to 1.3; .5 is above 1 - .6 and stays: +1.0 for the last token
    assert output.loss.item() == pytest.approx((-1.3 - 0.5 + 1.0) / 3)
    assert (output.sums["learner/clip_fraction_low"].item(), output.sums["learner/clip_fraction_high"].item()) == (0, 1)
    output, _ = hand(plain(clip_low=0.2, clip_high=10.0))  # DeepSeek-R1's upper clip
    assert output.loss.item() == pytest.approx((-1.5 - 0.5 + 1.6) / 3)
    assert (output.sums["learner/clip_fraction_low"].item(), output.sums["learner/clip_fraction_high"].item()) == (1, 0)


def test_kl_by_hand() -> None:
    ref = [LN(0.6), LN(0.2), LN(0.2)]  # ref / now: 2, 1, 1/2; k3 = x - ln x - 1
    terms = [1 - LN(2), 0.0, LN(2) - 0.5]
    policy = (-1.2 - 0.5 + 1.6) / 3
    output, gradient = hand(plain(kl_coef=0.3), ref_logprobs=ref)
    assert output.loss.item() == pytest.approx(policy + 0.3 * sum(terms) / 3)
    assert output.sums["learner/kl_ref"].item() == pytest.approx(sum(terms))
    # d k3 / d logprob = 1 - ref / now
    assert gradient.tolist() == pytest.approx([0.3 * -1 / 3, -0.5 / 3, 0.3 * 0.5 / 3])
    output, gradient = hand(plain(kl_coef=0.3, kl_form="unbiased"), ref_logprobs=ref)
    assert output.loss.item() == pytest.approx(policy + 0.3 * (1.5 * terms[0] + 0.5 * terms[2]) / 3)
    # d (ratio k3) / d logprob = ratio * (k3 + 1 - ref / now) = -ratio * ln(ref / now): the true KL's integrand
    assert gradient.tolist() == pytest.approx([0.3 * -1.5 * LN(2) / 3, -0.5 / 3, 0.3 * 0.5 * LN(2) / 3])


def test_importance_weight_by_hand() -> None:
    rollout = [LN(0.05), LN(0.4), LN(1.6)]  # old / rollout: 4 (cut at 2), 1, 1/2
    output, gradient = hand(plain(importance_cap=2.0), rollout_logprobs=rollout)
    assert output.loss.item() == pytest.approx((2 * -1.2 - 0.5 + 0.5 * 1.6) / 3)
    assert gradient.tolist() == pytest.approx([0.0, -0.5 / 3, 0.0], abs=1e-12)
    assert output.sums["mismatch/capped_fraction"].item() == 1
    assert output.sums["mismatch/mean_abs"].item() == pytest.approx(LN(4) + LN(2))
    assert output.maxima["mismatch/max_abs"].item() == pytest.approx(LN(4))
    assert output.sums["mismatch/k3"].item() == pytest.approx((4 - 1 - LN(4)) + (0.5 - 1 + LN(2)))


def test_importance_weight_leaves_the_kl_term_alone() -> None:
    ref, rollout = [LN(0.6), LN(0.2), LN(0.2)], [LN(0.05), LN(0.4), LN(1.6)]
    with_kl, _ = hand(plain(importance_cap=2.0, kl_coef=0.3), rollout_logprobs=rollout, ref_logprobs=ref)
    without, _ = hand(plain(importance_cap=2.0), rollout_logprobs=rollout)
    kl = 0.3 * ((1 - LN(2)) + (LN(2) - 0.5)) / 3
    assert with_kl.loss.item() - without.loss.item() == pytest.approx(kl)


def test_mismatch_is_measured_without_the_weight_too() -> None:
    rollout = [LN(0.05), LN(0.4), LN(1.6)]
    output, _ = hand(plain(), rollout_logprobs=rollout)
    assert output.loss.item() == pytest.approx((-1.2 - 0.5 + 1.6) / 3)
    assert "mismatch/mean_abs" in output.sums
    assert "mismatch/capped_fraction" not in output.sums


def test_drift_metrics_by_hand() -> None:
    output, _ = hand(plain())
    # now / old: 1.5, .5, .5
    assert output.sums["learner/approx_kl"].item() == pytest.approx((0.5 - LN(1.5)) + 2 * (-0.5 + LN(2)))
    assert output.maxima["learner/ratio_max"].item() == pytest.approx(1.5)


def test_k3_of_a_small_difference_keeps_its_digits() -> None:
    d = torch.tensor(1e-5, dtype=torch.float32)
    assert k3(d).item() == pytest.approx(0.5e-10, rel=0.2)  # exp(d) - d - 1 gives 0 or 1e-7 here
    assert (k3(torch.linspace(-1, 1, 101, dtype=torch.float64)) >= 0).all()


def test_missing_logprobs_are_refused() -> None:
    with pytest.raises(ValueError, match="no rollout_logprobs"):
        hand(LossConfig(importance_cap=2.0))
    with pytest.raises(ValueError, match="no ref_logprobs"):
        hand(plain(kl_coef=0.1))


# --- TRL's loss on the same batch -----------------------------------------------------------------------------------

PROMPT, LONGEST, LENGTHS = 4, 7, (7, 3, 5, 1, 7, 2)
ADVANTAGES = (1.0, -1.3, 0.4, 2.0, -0.6, -1.1)
TEMPERATURE = 0.8


def tiny_qwen(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).double()


def samples() -> list[Sample]:
    g = torch.Generator().manual_seed(7)
    return [
        Sample(
            token_ids=tuple(torch.randint(9, 320, (PROMPT + length,), generator=g).tolist()),
            prompt_length=PROMPT,
            rollout_logprobs=tuple(torch.randn(length, generator=g).sub(6.0).tolist()),
            advantage=advantage,
        )
        for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True)
    ]


def padded(values: list[list[float]], fill: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[*v, *[fill] * (LONGEST - len(v))] for v in values], dtype=dtype)


def per_sample(flat: Tensor, index: Tensor) -> list[list[float]]:
    return [flat[index == i].tolist() for i in range(len(LENGTHS))]


class Peers:
    """One model under our loss and under TRL's, with the same old, reference and sampler log-probabilities."""

    def __init__(self, trainer_type: Any, config_type: Any, dataset: Any, folder: str) -> None:
        self.model = tiny_qwen(0)
        arguments = config_type(
            output_dir=folder,
            num_generations=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            temperature=TEMPERATURE,
            max_completion_length=LONGEST,
        )
        self.trainer = trainer_type(
            self.model,
            reward_funcs=lambda **_: [0.0],
            args=arguments,
            train_dataset=dataset.from_list([{"prompt": "a"}] * 4),
            processing_class=build_tokenizer(),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.scorer = TokenScorer(self.model, chunk=5)
        (self.micro,) = pack(samples(), 10_000)
        with torch.no_grad():
            now = self.scorer(self.micro, TEMPERATURE).logprobs
            self.ref = TokenScorer(tiny_qwen(1), chunk=5)(self.micro, TEMPERATURE).logprobs
        g = torch.Generator().manual_seed(3)
        self.old = now + 0.3 * torch.randn(len(now), generator=g, dtype=torch.float64)
        self.rollout = self.old + 0.5 * torch.randn(len(now), generator=g, dtype=torch.float64)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def ours(self, config: LossConfig) -> tuple[LossOutput, dict[str, Tensor], Tensor]:
        scores = self.scorer(self.micro, TEMPERATURE)
        inputs = LossInputs(
            old_logprobs=self.old,
            advantages=self.micro.advantages,
            sequence_lengths=self.micro.sequence_lengths,
            rollout_logprobs=self.rollout,
            ref_logprobs=self.ref,
        )
        output = grpo_loss(scores.logprobs, inputs, Denominators.of([self.micro], LONGEST), config)
        return output, self.gradients(output.loss), scores.entropy

    def theirs(self, loss_type: str, config: LossConfig) -> tuple[float, dict[str, Tensor], dict[str, float]]:
        """TRL takes the softmax in fp32, whatever the model's dtype: agreement is to fp32's rounding."""
        trainer = self.trainer
        trainer.loss_type = loss_type
        trainer.epsilon_low, trainer.epsilon_high = config.clip_low, config.clip_high
        trainer.beta = config.kl_coef
        trainer.args.use_bias_correction_kl = config.kl_form == "unbiased"
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = config.importance_cap is not None
        trainer._metrics["eval"].clear()
        tokens = [s.token_ids for s in samples()]
        mask = padded([[1] * n for n in LENGTHS], 0, torch.int64)
        index = self.micro.sequence_index
        batch = {
            "prompt_ids": torch.tensor([t[:PROMPT] for t in tokens]),
            "prompt_mask": torch.ones(len(tokens), PROMPT, dtype=torch.int64),
            "completion_ids": padded([list(t[PROMPT:]) for t in tokens], 2, torch.int64),
            "completion_mask": mask,
            "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": padded(per_sample(self.old, index), 0.0, torch.float64),
            "ref_per_token_logps": padded(per_sample(self.ref, index), 0.0, torch.float64),
        }
        if config.importance_cap is not None:  # as TRL's token_truncate mode computes it before the loss
            weight = torch.exp(self.old - self.rollout).clamp(max=config.importance_cap)
            batch["importance_sampling_ratio"] = padded(per_sample(weight, index), 1.0, torch.float64)
        loss = trainer._compute_loss(self.model, batch)
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        return loss.item(), self.gradients(loss), metrics


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    return Peers(trl.GRPOTrainer, trl.GRPOConfig, datasets.Dataset, str(tmp_path_factory.mktemp("trl")))


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"clip_low": 0.2, "clip_high": 0.2, "importance_cap": None},
        {"clip_low": 0.1, "clip_high": 0.28, "importance_cap": 1.2},
        {"kl_coef": 0.5, "kl_form": "k3", "importance_cap": None},
        {"kl_coef": 0.5, "kl_form": "unbiased", "importance_cap": 1.2},
    ],
    ids=["clip", "clip+weight", "kl-k3", "kl-unbiased+weight"],
)
def test_loss_and_gradients_are_trls(peers: Peers, loss_type: str, aggregation: str, fields: dict[str, Any]) -> None:
    config = LossConfig(aggregation=aggregation, **fields)
    ours, our_gradients, entropy = peers.ours(config)
    loss, gradients, metrics = peers.theirs(loss_type, config)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-5 * scale)
    tokens = peers.micro.loss_tokens
    assert entropy.mean().item() == pytest.approx(metrics["entropy"], rel=1e-5)
    low, high = ours.sums["learner/clip_fraction_low"], ours.sums["learner/clip_fraction_high"]
    assert low.item() / tokens == pytest.approx(metrics["clip_ratio/low_mean"])
    assert high.item() / tokens == pytest.approx(metrics["clip_ratio/high_mean"])
    assert 0 < low < tokens and 0 < high < tokens  # the batch does exercise both clips
    if config.kl_coef:
        assert ours.sums["learner/kl_ref"].item() / tokens == pytest.approx(metrics["kl"], rel=1e-5)

"""The learner's process, without the process: stages that follow each other on one model, resumes, empty steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.learner_service import LearnerService
from policy.checkpoint import CheckpointError
from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup
from tests.unit.test_learner import assert_same_bits, weights

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 4,
    "initializer_range": 0.1,
}
SEQUENCES = [[11, 12, 13, 14], [20, 21, 22]]


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """A service sets what holds for its whole process; other tests run in this one."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def service(dtype: str = "float32") -> LearnerService:
    """A learner that has made its model; the same one every time."""
    learner = LearnerService(ModelConfig(preset="tiny", overrides=SMALL, dtype=dtype), seed=3, threads=1)
    learner.load()
    return learner


def begin(learner: LearnerService, *, kl_coef: float = 0.0, total_steps: int = 4) -> None:
    learner.begin(
        optimizer=OptimizerConfig(lr=1e-2, schedule="linear", min_lr_ratio=0.5),
        loss=LossConfig(kl_coef=kl_coef),
        config=LearnerConfig(micro_batch_tokens=64),
        total_steps=total_steps,
    )


def groups(step: int = 0, *, truncated: bool = False) -> list[RolloutGroup]:
    """Two groups of three rollouts with advantages, others at every step."""
    draw = random.Random(step)
    found = []
    for name in "ab":
        prompt = tuple(draw.randrange(9, 320) for _ in range(3))
        rollouts = []
        for index, advantage in enumerate((1.0, 0.0, -1.0)):
            tokens = tuple(draw.randrange(9, 320) for _ in range(draw.randint(2, 8)))
            completion = Completion(
                prompt_token_ids=prompt, token_ids=tokens, text="t",
                rollout_logprobs=tuple(draw.gauss(-5.8, 0.2) for _ in tokens), policy_version=step, sample_index=index,
                finish_reason=FinishReason.LENGTH if truncated else FinishReason.STOP,
            )  # fmt: skip
            rollouts.append(Rollout(completion=completion, reward=advantage, advantage=advantage))
        found.append(RolloutGroup(problem=Problem(id=name, prompt="p"), rollouts=tuple(rollouts)))
    return found


def step(learner: LearnerService, number: int, *, mask_truncated: bool = False, **given: Any) -> dict[str, float]:
    return learner.grpo_step(
        groups(number, **given), mask_truncated=mask_truncated, mini_batches=1, temperature=1.0, constant_length=8
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_first_model_of_the_stage_also_after_a_resume(dtype: str, tmp_path: Path) -> None:
    straight = service(dtype)
    begin(straight, kl_coef=0.5)
    first = step(straight, 0)
    straight.save(str(tmp_path / "step-000001"), {"step": 1})
    expected = [step(straight, number) for number in (1, 2)]

    torch.manual_seed(999)  # a new process knows nothing of the old one's random state
    resumed = service(dtype)
    begin(resumed, kl_coef=0.5)
    assert resumed.restore(str(tmp_path / "step-000001")) == {"step": 1}
    found = [step(resumed, number) for number in (1, 2)]

    assert [row["learner/kl_ref"] for row in found] == [row["learner/kl_ref"] for row in expected]
    assert [row["learner/lr"] for row in found] == [row["learner/lr"] for row in expected]
    assert first["learner/kl_ref"] == 0.0
    assert found[0]["learner/kl_ref"] > 1e-3, "0 would mean that the checkpoint became the reference"
    assert_same_bits(weights(straight.model), weights(resumed.model))


def test_sequences_are_scored_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eval stage that comes first attests its engines, and has no use for an optimizer."""
    idle = service()
    with monkeypatch.context() as patch:
        for name in ("policy.learner.Learner", "policy.optimizer.PolicyOptimizer", "torch.optim.AdamW"):
            patch.setattr(name, lambda *_, **__: pytest.fail("a learner was made"))
        early = idle.sequence_logprobs(SEQUENCES)
        hot = idle.sequence_logprobs(SEQUENCES, 2.0)
    assert idle.learner is None
    assert [len(row) for row in early] == [3, 2]
    logits = idle.model(torch.tensor([SEQUENCES[0]])).logits[0, :-1]
    for temperature, rows in ((1.0, early), (2.0, hot)):
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(SEQUENCES[0][1:])[:, None])[:, 0]
        assert rows[0] == pytest.approx(expected.tolist(), abs=1e-5)
    begin(idle)
    assert idle.sequence_logprobs(SEQUENCES) == early


def test_two_stages_train_one_model_in_bf16(tmp_path: Path) -> None:
    """The first learner's hooks move gradients into its own masters; left in place they would take the second's."""
    twice = service("bfloat16")
    before = twice.sequence_logprobs(SEQUENCES)
    begin(twice)
    step(twice, 0)
    assert twice.sequence_logprobs(SEQUENCES) != before
    twice.export(str(tmp_path / "model"))
    begin(twice)
    metrics = step(twice, 1)
    assert metrics["learner/optimizer_steps"] == 1

    once = service("bfloat16")
    once.load_model(str(tmp_path / "model"))
    start = weights(once.model)
    begin(once)
    assert step(once, 1)["learner/grad_norm"] == metrics["learner/grad_norm"]
    assert_same_bits(weights(once.model), weights(twice.model))
    assert any(not torch.equal(value, start[name]) for name, value in weights(once.model).items())


def test_an_earlier_stage_leaves_nothing_of_its_optimizer(tmp_path: Path) -> None:
    """The second stage begins with its own schedule and without the first one's moments, also in fp32."""
    twice = service()
    begin(twice, total_steps=2)
    for number in (0, 1):
        step(twice, number)
    twice.export(str(tmp_path / "model"))
    twice.load_model(str(tmp_path / "model"))
    assert twice.learner is None
    once = service()
    once.load_model(str(tmp_path / "model"))
    for learner in (twice, once):
        begin(learner)
        assert step(learner, 2)["learner/lr"] == 1e-2
    assert_same_bits(weights(once.model), weights(twice.model))


def test_a_step_that_is_truncated_and_masked_throughout_leaves_the_weights_alone() -> None:
    learner = service()
    begin(learner)
    step(learner, 0)  # with moments, an optimizer step without gradients would still move the weights
    before = weights(learner.model)
    metrics = step(learner, 1, truncated=True, mask_truncated=True)
    assert (metrics["learner/skipped"], metrics["learner/optimizer_steps"]) == (1, 1)
    assert_same_bits(before, weights(learner.model))
    assert step(learner, 1, truncated=True)["learner/skipped"] == 0
    assert any(not torch.equal(value, before[name]) for name, value in weights(learner.model).items())


def test_a_checkpoint_in_the_background_holds_the_moment_of_its_call(tmp_path: Path) -> None:
    """And a stage's model, which is written after it, the moment of its own."""
    learner = service()
    begin(learner)
    step(learner, 0)
    saved = weights(learner.model)
    learner.save(str(tmp_path / "step-000001"), {"step": 1}, background=True)
    step(learner, 1)
    learner.export(str(tmp_path / "model"))
    exported = service()
    exported.load_model(str(tmp_path / "model"))
    assert_same_bits(weights(exported.model), weights(learner.model))
    resumed = service()
    begin(resumed)
    assert resumed.restore(str(tmp_path / "step-000001")) == {"step": 1}
    assert_same_bits(weights(resumed.model), saved)
    step(resumed, 1)
    assert_same_bits(weights(resumed.model), weights(learner.model))


def test_closing_waits_for_a_checkpoint_and_tells_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = service()
    begin(learner)
    learner.save(str(tmp_path / "step-000001"), {}, background=True)
    learner.close()
    assert (tmp_path / "step-000001" / "complete.json").is_file()
    monkeypatch.setattr("policy.whole_folder._flush", lambda _: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    learner.save(str(tmp_path / "step-000002"), {}, background=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002: .*Permission denied"):
        learner.close()
    learner.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]

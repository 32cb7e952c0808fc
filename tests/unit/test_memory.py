"""The largest tensor of a training step: logits of all its tokens would be many times as large as anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from policy.learner import Learner
from policy.scorer import frozen_copy
from tests.unit.test_learner import batch, learner, policy
from tests.unit.test_logprobs import LargestTensor

VOCABULARY, CHUNK = 8192, 4
HIDDEN = 8  # so that the head and its gradient, hidden x vocabulary, are small too


def policy_model(dtype: torch.dtype) -> PreTrainedModel:
    return policy(
        dtype, vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, moe_intermediate_size=8,
    )  # fmt: skip


def qwen2(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return Qwen2ForCausalLM(Qwen2Config(**shape)).to(dtype)  # type: ignore[arg-type]


def learner_of(model: PreTrainedModel) -> Learner:
    """One micro-batch holds everything, so that nothing but the chunk keeps the logits small."""
    return learner(
        model, logprob_chunk=CHUNK, micro_batch_tokens=100_000, kl_coef=0.1, reference=frozen_copy(model), lr=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [policy_model, qwen2])
def test_a_step_never_holds_the_logits_of_all_tokens(build: Any, dtype: torch.dtype) -> None:
    samples = batch(80)
    ours = learner_of(build(dtype))
    with LargestTensor() as seen:
        metrics = ours.step(samples, mini_batches=2, temperature=0.9, constant_length=16)
    tokens = int(metrics["learner/loss_tokens"])
    assert tokens > 400 and metrics["learner/skipped"] == 0
    assert seen.elements >= CHUNK * VOCABULARY, "the instrument saw the head"
    assert seen.elements <= HIDDEN * VOCABULARY, "nothing is larger than the head's own weights"
    # Half of the tokens are in each mini-batch, whose logits are made four times: old, reference, current, backward.
    assert tokens / 2 * VOCABULARY / 20 > HIDDEN * VOCABULARY


@pytest.mark.parametrize("build", [policy_model, qwen2])
def test_scoring_never_holds_them_either(build: Any) -> None:
    ours = learner_of(build(torch.float32))
    sequences = [sample.token_ids for sample in batch(80)]
    with LargestTensor() as seen:
        ours.sequence_logprobs(sequences)
    assert CHUNK * VOCABULARY <= seen.elements <= HIDDEN * VOCABULARY


@pytest.mark.parametrize("build", [policy_model, qwen2])
def test_a_model_that_is_asked_for_its_logits_does_hold_them(build: Any) -> None:
    """What the two tests above look for, made by the models' own forward."""
    model = build(torch.float32)
    ids: Tensor = torch.randint(0, VOCABULARY, (20, 16))
    with LargestTensor() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.elements >= ids.numel() * VOCABULARY

"""What ``r1 verify`` measures of the learner: each property holds, and is seen to break when it is broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policy import learner as learner_module
from policy import parallel as parallel_module
from policy import scorer as scorer_module
from policy.batch import Sample
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from policy.invariance import (
    Bench,
    Deviation,
    Outcome,
    checkpointing,
    compare,
    gradient_tolerance,
    logprob_chunks,
    logprob_tolerance,
    loss_scale,
    measured_model,
    micro_batches,
    nearby_reference,
    neighbours,
    orders,
    packing,
    plain_outcome,
    whole,
    whole_step,
)
from policy.learner import Learner
from policy.loss import Denominators
from policy.moe import MoE
from policy.segments import Segments
from tests.unit.test_learner import batch, dense, policy

SAMPLES = batch(6)
ADAM = OptimizerConfig(lr=1e-3)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(
    dtype: torch.dtype = torch.float64, *, model: Any = None, router: RouterConfig | None = None, **loss: Any
) -> Bench:
    model = policy(dtype) if model is None else model
    return Bench(
        model=model,
        loss=LossConfig(**loss),
        config=LearnerConfig(threads=1, micro_batch_tokens=40, logprob_chunk=16),
        router=router or RouterConfig(),
        reference=nearby_reference(model, 0) if loss.get("kl_coef") else None,
        temperature=0.8,
        constant_length=20,
    )


def base(on: Bench, samples: Sequence[Sample] = SAMPLES) -> Outcome:
    return on.outcome(samples, **whole(samples, on.config))


MEASURES: dict[str, Callable[[Bench], Deviation]] = {
    "micro_batch": lambda on: micro_batches(on, SAMPLES, base(on)),
    "packing": lambda on: packing(on, SAMPLES),
    "neighbours": lambda on: neighbours(on, SAMPLES),
    "order": lambda on: orders(on, SAMPLES, base(on), 0),
    "logprob_chunk": lambda on: logprob_chunks(on, SAMPLES, base(on)),
    "checkpointing": lambda on: checkpointing(on, SAMPLES, base(on)),
    "step": lambda on: whole_step(on, SAMPLES, ADAM, 3),
    "sft": lambda on: whole_step(on, SAMPLES, ADAM, 0),
}


# -- it holds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "loss", [{}, {"aggregation": "sequence", "kl_coef": 0.1}, {"aggregation": "constant"}], ids=str
)
def test_it_holds_in_float64(name: str, loss: dict[str, Any]) -> None:
    assert MEASURES[name](bench(**loss)).worst < 1e-11


@pytest.mark.parametrize("name", MEASURES)
def test_it_holds_in_float32(name: str) -> None:
    on = bench(torch.float32)
    tolerance, _ = (
        logprob_tolerance(torch.float32, on.model)
        if name == "neighbours"
        else gradient_tolerance(torch.float32, 40, on.model)
    )
    assert MEASURES[name](on).worst < tolerance


@pytest.mark.parametrize("name", ["micro_batch", "packing", "order", "logprob_chunk", "step"])
def test_it_holds_for_a_dense_model_of_transformers(name: str) -> None:
    on = bench(model=dense("qwen2", torch.float64))
    assert MEASURES[name](on).worst < gradient_tolerance(torch.float64, 40, on.model)[0]


def test_it_holds_with_the_balance_loss() -> None:
    on = bench(router=RouterConfig(balance_coef=0.3))
    for name in ("micro_batch", "order"):
        assert MEASURES[name](on).worst < 1e-11
    without = base(bench())
    assert compare(base(on), without, 1.0, "").worst > 1e-6, "the balance loss is part of what was compared"


# -- each property broken once ---------------------------------------------------------------------------------------


def denominators_of_each_micro_batch(patch: pytest.MonkeyPatch) -> None:
    original = learner_module.grpo_loss

    def averaged(logprobs: Tensor, inputs: Any, denominators: Denominators, config: LossConfig) -> Any:
        return original(logprobs, inputs, replace(denominators, tokens=len(logprobs)), config)

    patch.setattr(learner_module, "grpo_loss", averaged)


def attention_across_sequences(patch: pytest.MonkeyPatch) -> None:
    original = Segments.plan

    def merged(lengths: Sequence[int], heads: int, device: Any = "cpu") -> Segments:
        return original([sum(lengths)], heads, device)

    patch.setattr(Segments, "plan", merged)


def the_first_sample_counts_twice(patch: pytest.MonkeyPatch) -> None:
    original = parallel_module.pack

    def weighted(samples: Sequence[Sample], limit: int, **options: Any) -> Any:
        return original([replace(samples[0], advantage=2 * samples[0].advantage), *samples[1:]], limit, **options)

    patch.setattr(parallel_module, "pack", weighted)


def the_last_token_of_a_chunk_is_lost(patch: pytest.MonkeyPatch) -> None:
    original = scorer_module.token_logprobs

    def lossy(hidden: Tensor, *args: Any, chunk: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logprobs, entropy = original(hidden, *args, chunk=chunk, **kwargs)
        kept = torch.ones_like(logprobs)
        kept[chunk - 1 : len(kept) - 1 : chunk] = 0.0
        return logprobs * kept, entropy

    patch.setattr(scorer_module, "token_logprobs", lossy)


def noise_that_is_not_the_same_again(patch: pytest.MonkeyPatch) -> None:
    """Dropout whose random state is not kept: nothing happens until activations are computed again."""
    original = MoE.forward

    def noisy(self: MoE, x: Tensor, *args: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # in the middle of a backward pass
        return original(self, x * 1.01 if again else x, *args)

    patch.setattr(MoE, "forward", noisy)


def old_logprobs_of_another_micro_batch(patch: pytest.MonkeyPatch) -> None:
    original = Learner._logprobs

    def shifted(self: Learner, *args: Any) -> list[Tensor]:
        return [found + 0.1 * place for place, found in enumerate(original(self, *args))]

    patch.setattr(Learner, "_logprobs", shifted)


def sft_averages_over_micro_batches(patch: pytest.MonkeyPatch) -> None:
    original = Learner._backward

    def averaged(self: Learner, micros: Any, temperature: float, loss_of: Any, *args: Any) -> float:
        def scaled(index: int, micro: Any, scores: Any) -> Any:
            output, inputs = loss_of(index, micro, scores)
            return replace(output, loss=output.loss * micro.loss_tokens), inputs

        return original(self, micros, temperature, scaled, *args)

    patch.setattr(Learner, "_backward", averaged)


def nothing_is_recomputed(patch: pytest.MonkeyPatch) -> None:
    original = Bench.outcome

    def kept(self: Bench, samples: Any, **cut: Any) -> Outcome:
        return original(self, samples, **{**cut, "activation_checkpointing": "none"})

    patch.setattr(Bench, "outcome", kept)


FAULTS: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("micro_batch", denominators_of_each_micro_batch),
    ("micro_batch", attention_across_sequences),
    ("packing", attention_across_sequences),
    ("neighbours", attention_across_sequences),
    ("order", the_first_sample_counts_twice),
    ("logprob_chunk", the_last_token_of_a_chunk_is_lost),
    ("checkpointing", noise_that_is_not_the_same_again),
    ("checkpointing", nothing_is_recomputed),
    ("step", old_logprobs_of_another_micro_batch),
    ("sft", sft_averages_over_micro_batches),
]


@pytest.mark.parametrize(("name", "breaks"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_breaks_it_is_seen(
    name: str, breaks: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    on = bench(dtype)
    assert MEASURES[name](on).worst > 10 * gradient_tolerance(dtype, 40, on.model)[0]


def test_a_head_that_scales_its_logits_is_seen_by_the_plain_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut is wrong alike: only the path that shares nothing with the learner tells."""
    original = scorer_module.token_logprobs

    def hotter(*args: Any, temperature: float, **kwargs: Any) -> Any:
        return original(*args, temperature=1.02 * temperature, **kwargs)

    monkeypatch.setattr(scorer_module, "token_logprobs", hotter)
    on = bench()
    assert MEASURES["micro_batch"](on).worst < 1e-11
    assert MEASURES["packing"](on).worst > 1e-4


# -- the norms -------------------------------------------------------------------------------------------------------


def test_each_parameter_is_measured_against_itself_and_the_loss_against_its_terms() -> None:
    one = Outcome(1.0, {"large": torch.tensor([100.0, 0.0]), "small": torch.tensor([1.0, 0.5])})
    other = Outcome(1.0, {"large": torch.tensor([100.0, 0.01]), "small": torch.tensor([1.0, 0.51])})
    found = compare(one, other, 1.0, "so")
    assert found.where == "so: small" and found.worst == pytest.approx(0.01)
    found = compare(one, Outcome(1.2, one.gradients), 4.0, "so")
    assert found.where == "so: loss" and found.worst == pytest.approx(0.05)


def test_what_cancels_to_nothing_is_measured_against_the_floor() -> None:
    one = Outcome(0.0, {"large": torch.tensor([10.0]), "nothing": torch.tensor([1e-17])})
    other = Outcome(0.0, {"large": torch.tensor([10.0]), "nothing": torch.tensor([-1e-17])})
    assert compare(one, other, 1.0, "").worst == pytest.approx(2e-15)  # 2e-17 / (1e-3 * 10)


def test_what_is_not_a_number_is_the_worst() -> None:
    one = Outcome(0.0, {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])})
    other = Outcome(0.0, {"a": torch.tensor([math.nan]), "b": torch.tensor([3.0])})
    assert math.isnan(compare(one, other, 1.0, "").worst)
    assert Deviation.largest([Deviation(math.nan, "a"), Deviation(5.0, "b")]).where == "a"


def test_a_gradient_that_only_one_way_has_is_the_worst() -> None:
    one = Outcome(0.0, {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])})
    assert compare(one, Outcome(0.0, {"a": torch.tensor([1.0])}), 1.0, "").worst == math.inf


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", (2 * 0.5 + 1 * 2.0) / 3),  # two tokens of |A| .5 and one of |A| 2
        ("sequence", (0.5 + 2.0) / 2),
        ("constant", (2 * 0.5 + 1 * 2.0) / (2 * 20)),
    ],
)
def test_the_scale_of_a_loss_by_hand(aggregation: str, expected: float) -> None:
    samples = [
        Sample(token_ids=(1, 2, 3), prompt_length=1, advantage=-0.5),
        Sample(token_ids=(1, 2), prompt_length=1, advantage=2.0),
    ]
    assert loss_scale(samples, LossConfig(aggregation=aggregation), 20) == pytest.approx(expected)


def test_measuring_leaves_the_model_as_it_was() -> None:
    on = bench(kl_coef=0.1)
    before = {name: value.clone() for name, value in on.model.state_dict().items()}
    for measure in MEASURES.values():
        measure(on)
    plain_outcome(on, SAMPLES)
    assert all(torch.equal(value, before[name]) for name, value in on.model.state_dict().items())
    assert all(p.grad is None for p in on.model.parameters())
    one, other = on.outcome(SAMPLES), on.outcome(SAMPLES)
    assert one.loss == other.loss and compare(one, other, 1.0, "").worst == 0.0


def test_a_wider_copy_is_wide_throughout_and_leaves_the_original() -> None:
    model = policy(torch.bfloat16)
    wide = measured_model(model, torch.float64)
    assert model.dtype == torch.bfloat16 and {t.dtype for t in wide.state_dict().values()} == {torch.float64}
    assert measured_model(wide, torch.float64) is wide


def test_a_reference_is_near_and_not_the_model_itself() -> None:
    model = policy(torch.float64)
    reference = nearby_reference(model, 0)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        moved, size = float((a - b).detach().abs().max()), float(a.detach().abs().max())
        assert 0 < moved < 0.1 * size or size == 0, name
    assert not any(p.requires_grad for p in reference.parameters())

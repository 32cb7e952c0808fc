"""Numbers that go wrong: each kind is caught in the update that made it, which changes nothing but the schedule."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy.batch import Sample
from policy.config import OptimizerConfig
from policy.errors import NonFiniteError
from policy.guards import KINDS, Watch, all_finite, check_loaded, named, not_finite
from policy.learner import Learner
from policy.optimizer import PolicyOptimizer
from policy.scorer import frozen_copy
from tests.unit.test_learner import assert_same_bits, batch, learner, policy, weights

NAN, INF = math.nan, math.inf


def state_of(ours: Learner) -> dict[str, Tensor]:
    """Weights and moments, copied."""
    moments = {
        f"{parameter}.{kind}": value
        for parameter, own in ours.state_dict()["optimizer"]["moments"].items()
        for kind, value in own.items()
    }
    return copy.deepcopy({**weights(ours.model), **moments})


def spoilt(samples: list[Sample], index: int, **changes: Any) -> list[Sample]:
    return [replace(sample, **changes) if i == index else sample for i, sample in enumerate(samples)]


def one_token(sample: Sample, value: float) -> tuple[float, ...]:
    """The sampler's log-probabilities with another value for the last token."""
    assert sample.rollout_logprobs is not None
    return (*sample.rollout_logprobs[:-1], value)


def bad_gradients(model: nn.Module, name: str, factor: float, when: Callable[[], bool] = lambda: True) -> None:
    dict(model.named_parameters())[name].register_hook(lambda g: g * factor if when() else g)


# -- each kind, injected for real ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["advantages", "rollout_logprobs"])
def test_what_comes_in_is_found_and_traced_to_its_sample(what: str, value: float) -> None:
    ours = learner(policy(), micro_batch_tokens=40)
    ours.step(batch())
    before = state_of(ours)
    samples = batch(seed=1)
    change = {"advantage": value} if what == "advantages" else {"rollout_logprobs": one_token(samples[5], value)}
    metrics = ours.step(spoilt(samples, 5, **change))
    [bad] = ours.bad_updates
    assert (bad.what, bad.samples, bad.mini_batch, bad.optimizer_step, bad.position) == (what, (5,), 0, 2, 1)
    assert f"{what} are not finite in micro-batch {bad.micro_batches[0] + 1} of {len(bad.losses)} (1 of" in bad.text
    assert (metrics["learner/bad_steps"], metrics["learner/skipped"], metrics["learner/optimizer_steps"]) == (1, 0, 1)
    assert_same_bits(before, state_of(ours))
    assert all(p.grad is None for p in ours.model.parameters())


def test_a_sampler_that_held_a_token_for_impossible_hides_behind_the_cap_and_is_found_all_the_same() -> None:
    """exp(old - (-inf)) is cut at importance_cap: loss and gradient are finite, and wrong."""
    ours = learner(policy(), importance_cap=2.0)
    samples = batch()
    ours.step(spoilt(samples, 0, rollout_logprobs=one_token(samples[0], -INF)))
    [bad] = ours.bad_updates
    assert bad.what == "rollout_logprobs" and all(math.isfinite(loss) for loss in bad.losses)


def test_log_probabilities_that_are_not_finite_name_their_sequences() -> None:
    model = policy()
    samples = [replace(s, token_ids=(*s.token_ids[:-1], 7)) for s in batch(6)]
    samples[4] = replace(samples[4], token_ids=(*samples[4].token_ids[:-1], 9))
    with torch.no_grad():
        model.lm_head.weight[9] = INF  # the logit of token 9 is infinite, and so no distribution is one
    ours = learner(model)
    ours.step(samples)
    [bad] = ours.bad_updates
    assert bad.what == "old_logprobs" and bad.samples == tuple(range(6))  # the normaliser is broken everywhere


def test_a_reference_that_is_not_finite_is_told_from_the_policy() -> None:
    model = policy()
    reference = frozen_copy(model)
    with torch.no_grad():
        reference.get_parameter("model.norm.weight")[0] = NAN
    ours = learner(model, reference=reference, kl_coef=0.1)
    ours.step(batch())
    assert [bad.what for bad in ours.bad_updates] == ["ref_logprobs"]


def test_a_loss_that_overflows_out_of_finite_parts_is_the_loss() -> None:
    ours = learner(policy(torch.float64), micro_batch_tokens=30)
    ours.step(spoilt(batch(8), 2, advantage=1e308, rollout_logprobs=(-8.0,) * len(batch(8)[2].rollout_logprobs or ())))
    [bad] = ours.bad_updates
    assert bad.what == "loss" and 2 in bad.samples and len(bad.micro_batches) == 1
    assert [not math.isfinite(loss) for loss in bad.losses].index(True) == bad.micro_batches[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_names_its_parameter(dtype: torch.dtype) -> None:
    ours = learner(policy(dtype))
    ours.step(batch())
    before = state_of(ours)
    bad_gradients(ours.model, "model.norm.weight", INF)
    ours.step(batch(seed=1))
    [bad] = ours.bad_updates
    assert (bad.what, bad.parameters, bad.samples) == ("gradient", ("model.norm.weight",), ())
    assert bad.text == "gradients are not finite in model.norm.weight"
    assert_same_bits(before, state_of(ours))
    assert ours.optimizer_steps == 1


@pytest.mark.parametrize(("clip", "skipped"), [(None, True), (1.0, False)])
def test_a_gradient_whose_square_would_overflow_the_second_moment_is_not_let_in(clip: Any, skipped: bool) -> None:
    """With clipping it never gets there; without, the weight's second moment would be infinite for ever."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    optimizer = PolicyOptimizer(model, OptimizerConfig(lr=1e-3, max_grad_norm=clip), total_steps=2)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((1, 2), 1e30, dtype=torch.float64)
    if skipped:
        with pytest.raises(NonFiniteError, match=r"in their norm, 1\.41421e\+30 \(overflow\)"):
            optimizer.step()
        assert torch.equal(before, model.weight)
    else:
        optimizer.step()
        moments = [own["exp_avg_sq"] for own in optimizer.state_dict()["moments"].values()]
        assert all(moment.isfinite().all() for moment in moments) and not torch.equal(before, model.weight)


def test_weights_that_the_update_ruined_stop_the_learner_for_good() -> None:
    ours = learner(policy())
    ours._optimizer._adamw.register_step_post_hook(lambda *_: ours.model.lm_head.weight.data[3].fill_(NAN))
    metrics = ours.step(batch(), mini_batches=3)
    [bad] = ours.bad_updates
    assert (bad.what, bad.parameters, bad.stops) == ("weights", ("lm_head.weight",), True)
    assert metrics["learner/bad_steps"] == 1
    for forbidden in (lambda: ours.step(batch()), lambda: ours.sft_step(batch()), ours.state_dict):
        with pytest.raises(NonFiniteError, match=r"has stopped: the update left weights not finite in lm_head\.weight"):
            forbidden()


# -- counting ---------------------------------------------------------------------------------------------------------


def test_one_mini_batch_of_several_is_skipped_and_the_others_count_alone() -> None:
    samples = batch(9)
    ours, clean = (learner(policy(), total_steps=3, schedule="linear") for _ in range(2))
    dealt = clean._deal(9, 3)
    victim = dealt[1][0]
    positions: list[int] = []
    ours._optimizer._adamw.register_step_pre_hook(lambda *_: positions.append(ours._optimizer.position))
    metrics = ours.step(spoilt(samples, victim, advantage=NAN), mini_batches=3)
    [bad] = ours.bad_updates
    assert (bad.mini_batch, bad.samples, bad.position) == (1, (victim,), 1)
    assert (metrics["learner/bad_steps"], metrics["learner/optimizer_steps"]) == (1, 2)
    assert (positions, ours._optimizer.position) == ([0, 2], 3), "the schedule moved on"
    assert metrics["learner/sequences"] == 6
    assert all(math.isfinite(value) for value in metrics.values())

    # The same as if the mini-batch had never been there.
    original = clean._update
    clean._update = lambda *given: clean._optimizer.skip() if given[-1] is dealt[1] else original(*given)  # type: ignore[method-assign]
    clean._deal = lambda *_: dealt  # type: ignore[method-assign]
    clean.step(samples, mini_batches=3)
    assert_same_bits(state_of(clean), state_of(ours))


@pytest.mark.parametrize("limit", [0, 2])
def test_it_stops_after_the_set_number_in_a_row(limit: int) -> None:
    ours = learner(policy(), max_bad_steps=limit)
    broken = spoilt(batch(4), 0, advantage=NAN)
    for count in range(1, limit + 1):
        ours.step(broken)
        assert [(bad.in_a_row, bad.stops) for bad in ours.bad_updates] == [(count, False)]
    if limit:
        ours.step(batch(4))
        assert ours.bad_updates == []
        for _ in range(limit):
            ours.step(broken)
    ours.step([])  # nothing to learn from: neither good nor bad
    ours.step(broken)
    assert [(bad.in_a_row, bad.stops) for bad in ours.bad_updates] == [(limit + 1, True)]
    with pytest.raises(NonFiniteError, match="this learner has stopped: advantages are not finite"):
        ours.step(batch(4))


def test_the_mini_batches_after_the_last_straw_are_not_tried() -> None:
    ours = learner(policy(), max_bad_steps=1)
    ours.step([replace(sample, advantage=NAN) for sample in batch(8)], mini_batches=4)
    assert [(bad.mini_batch, bad.in_a_row, bad.stops) for bad in ours.bad_updates] == [(0, 1, False), (1, 2, True)]


def test_a_resumed_learner_counts_on() -> None:
    ours = learner(policy())
    broken = spoilt(batch(4), 0, advantage=NAN)
    ours.step(broken)
    ours.step(broken)
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    resumed = learner(policy())
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    resumed.step(broken)
    assert [(bad.in_a_row, bad.stops) for bad in resumed.bad_updates] == [(3, True)]


def test_supervised_steps_are_guarded_too() -> None:
    ours = learner(policy())
    samples = [replace(s, rollout_logprobs=None) for s in batch(6)]
    bad_gradients(ours.model, "lm_head.weight", NAN, lambda: ours.optimizer_steps == 1)
    before = [ours.sft_step(samples)["learner/bad_steps"], state_of(ours)]
    assert ours.sft_step(samples)["learner/bad_steps"] == 1
    assert before[0] == 0
    assert_same_bits(before[1], state_of(ours))  # type: ignore[arg-type]
    assert (ours.optimizer_steps, ours._optimizer.position) == (1, 2)


# -- leaves ----------------------------------------------------------------------------------------------------------


def test_all_ranks_decide_on_what_any_of_them_saw() -> None:
    """``largest`` stands for the other rank, which saw its third sequence go wrong."""
    watch = Watch(samples=4, micro_batches=2)
    watch.check()

    def other(flags: Tensor) -> Tensor:
        theirs = torch.zeros_like(flags)
        theirs[KINDS.index("logprobs"), [2, 4 + 1]] = 1
        return torch.maximum(flags, theirs)

    with pytest.raises(NonFiniteError, match=r"logprobs are not finite in micro-batch 2 of 2 \(1 of .* 4 seq") as error:
        watch.check(other)
    assert (error.value.samples, error.value.micro_batches) == ((2,), (1,))
    assert all_finite([torch.ones(3)]) and not all_finite([torch.ones(3)], lambda norm: norm * NAN)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_number_among_many_is_found(value: float) -> None:
    tensors = {"a": torch.ones(40, 30), "b": torch.full((7,), 3e38), "c": torch.empty(0)}
    assert all_finite(list(tensors.values())), "large ones are fine, although their squares overflow"
    assert not_finite(tensors) == []
    tensors["a"][39, 29] = value
    assert not all_finite(list(tensors.values()))
    assert not_finite(tensors) == ["a"]
    assert all_finite([])


def test_a_model_that_was_broken_already_is_refused_in_one_line() -> None:
    model = policy()
    check_loaded(model, "models/x")
    for parameter in list(model.parameters())[:5]:
        parameter.data.view(-1)[0] = NAN
    with pytest.raises(ValueError, match=r"models/x has weights that are NaN or infinite \(.* and 2 more\): the"):
        check_loaded(model, "models/x")
    other = policy()
    dict(other.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"][0] = INF
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        check_loaded(other, "models/x")


def test_names_are_cut_short() -> None:
    assert named(["a"]) == "a"
    assert named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"

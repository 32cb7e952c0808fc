"""The sequence-wise balance loss: by hand, against plain autograd, by finite differences, however a batch is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.balance import SequenceIndex, sequence_balance
from policy.batch import Sample, pack
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from policy.learner import Learner
from policy.model import PolicyModel
from policy.moe import Router
from policy.scorer import TokenScorer
from tests.unit.model_zoo import make_policy
from tests.unit.test_learner import batch, policy


def plainly(scores: Tensor, lengths: list[int], top_k: int) -> Tensor:
    """The formula at the top of policy/balance.py as it stands there, one sequence, token and expert at a time."""
    total, experts = scores.new_zeros(()), scores.shape[1]
    for part in scores.split(lengths):
        for i in range(experts):
            chosen = sum(float(i in sorted(range(experts), key=lambda j: -row[j].item())[:top_k]) for row in part)
            f = experts / (top_k * len(part)) * chosen
            p = sum((row[i] / row.sum() for row in part), scores.new_zeros(())) / len(part)
            total = total + f * p
    return total


def test_by_hand() -> None:
    """E 4, K 2, two tokens, scores (4 3 2 1) / 10 and (4 1 2 3) / 10, which are their own shares.

    Experts {0, 1} and {0, 3} are chosen: f = 4 / (2 x 2) x (2, 1, 0, 1). P = (.4, .2, .2, .2). L = .8 + .2 + 0 + .2.
    """
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.2, 0.3]])
    assert float(sequence_balance(scores, SequenceIndex.of([2]), 2)) == pytest.approx(1.2)
    # Two sequences of one token: f = (2, 2, 0, 0) and (2, 0, 0, 2), P the token's own shares: 1.4 each.
    assert float(sequence_balance(scores, SequenceIndex.of([1, 1]), 2)) == pytest.approx(2.8)


def test_even_is_one_and_one_expert_alone_is_e_over_k() -> None:
    even = torch.eye(4) * 0.5 + 0.1
    assert float(sequence_balance(even, SequenceIndex.of([4]), 1)) == pytest.approx(1.0)
    alone = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 5)
    assert float(sequence_balance(alone, SequenceIndex.of([5]), 1)) == pytest.approx(4.0)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99), top_k=st.integers(1, 4))
def test_value_and_gradient_are_those_of_the_plain_formula_in_any_order(
    lengths: list[int], seed: int, top_k: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.rand(sum(lengths), 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = sequence_balance(scores, SequenceIndex.of(lengths), top_k), plainly(scores, lengths, top_k)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    mine, its = (torch.autograd.grad(value, scores)[0] for value in (ours, theirs))
    assert torch.allclose(mine, its, atol=1e-12)
    order = torch.randperm(len(scores))
    index = SequenceIndex.of(lengths)
    shuffled = sequence_balance(scores[order], replace(index, of_token=index.of_token[order]), top_k)
    assert shuffled.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    scores = torch.rand(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sequence_balance(s, SequenceIndex.of([3, 4]), 2), (scores,))


def _balance(model: PolicyModel, samples: list[Sample], tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Balance loss of a batch in micro-batches of ``tokens``, and its gradient."""
    scorer, total = TokenScorer(model, chunk=64), 0.0
    model.zero_grad()
    for micro in pack(samples, tokens):
        found = scorer(micro, 1.0, balance=True).balance
        assert found is not None
        found.backward()
        total += float(found.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_model_reports_the_loss_of_its_layers_however_the_batch_is_cut() -> None:
    """Sequences alone, in a random order, give the router scores; the plain formula the loss of each layer."""
    model, samples = policy(torch.float64), batch(9)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    expected = 0.0
    for sample in samples:
        seen: list[Tensor] = []

        def look(_: Any, arguments: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(arguments[0])

        hooks = [router.register_forward_pre_hook(look) for router in routers]
        with torch.no_grad():
            model.hidden_states(torch.tensor([sample.token_ids[:-1]]), segment_lengths=[len(sample.token_ids) - 1])
        for hook in hooks:
            hook.remove()
        for router, x in zip(routers, seen, strict=True):
            scores = torch.sigmoid(x @ router.weight.T).detach()
            expected += float(plainly(scores, [len(x)], router.top_k))
    whole, reference = _balance(model, samples, 10_000)
    assert whole == pytest.approx(expected, rel=1e-12)
    for some, tokens in ((samples[::-1], 10_000), (samples, 1), (samples[3:] + samples[:3], 25)):
        total, found = _balance(model, some, tokens)
        assert total == pytest.approx(whole, rel=1e-12)
        assert found.keys() == reference.keys()
        assert all(torch.allclose(found[name], reference[name], atol=1e-11) for name in reference)


def test_a_model_finds_the_sequences_in_any_order_of_lengths() -> None:
    """The model's own stream is sorted by length; the caller's is not."""
    model, lengths = make_policy("plain").double(), [3, 9, 1, 5, 9]
    ids = torch.randint(1, 53, (1, sum(lengths)))

    def balance(ids: Tensor, lengths: list[int]) -> list[float]:
        reports = model.hidden_states(ids, segment_lengths=lengths, balance=True).router_reports
        return [float(report.balance.detach()) for report in reports if report.balance is not None]

    alone = [balance(part, [n]) for part, n in zip(ids.split(lengths, dim=1), lengths, strict=True)]
    assert balance(ids, lengths) == pytest.approx([sum(layer) for layer in zip(*alone, strict=True)], rel=1e-12)
    assert len(alone[0]) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_loss_and_its_gradient(reentrant: bool) -> None:
    model = make_policy("plain").double()
    samples = [replace(s, token_ids=tuple(t % 53 for t in s.token_ids)) for s in batch(5)]
    plain, reference = _balance(model, samples, 40)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    scorer, total = TokenScorer(model, chunk=64), 0.0
    model.train()  # transformers checkpoints in training mode only
    model.zero_grad()
    for micro in pack(samples, 40):
        part = scorer(micro, 1.0, balance=True).balance
        assert part is not None
        part.backward()
        total += float(part.detach())
    assert total == plain
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    assert not any(found[name].any() for name in found.keys() - reference.keys())  # reentrant: zeros instead of None


def _learner(model: PolicyModel, coefficient: float, tokens: int = 10_000) -> Learner:
    return Learner(
        model,
        optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=None),
        loss=LossConfig(),
        config=LearnerConfig(threads=1, micro_batch_tokens=tokens),
        total_steps=4,
        router=RouterConfig(balance_coef=coefficient),
    )


def _step(coefficient: float, tokens: int = 10_000, method: str = "step") -> tuple[dict[str, float], dict[str, Tensor]]:
    model = policy(torch.float64)
    metrics = getattr(_learner(model, coefficient, tokens), method)(batch(9))
    return metrics, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["step", "sft_step"])
def test_the_learner_adds_its_mean_over_sequences_times_the_coefficient(method: str) -> None:
    whole, weights = _step(0.5, method=method)
    without, _ = _step(0.0, method=method)
    expected = _balance(policy(torch.float64), batch(9), 10_000)[0] / 9
    assert whole["learner/balance_loss"] == pytest.approx(expected, rel=1e-12)
    assert whole["learner/loss"] - without["learner/loss"] == pytest.approx(0.5 * expected, rel=1e-9)
    for tokens in (1, 30):
        metrics, found = _step(0.5, tokens, method)
        assert metrics["learner/loss"] == pytest.approx(whole["learner/loss"], rel=1e-12)
        assert metrics["learner/balance_loss"] == pytest.approx(expected, rel=1e-12)
        assert metrics["learner/grad_norm"] == pytest.approx(whole["learner/grad_norm"], rel=1e-9)
        assert all(torch.allclose(found[name], weights[name], atol=1e-9) for name in weights)


def test_without_a_coefficient_it_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("policy.moe.sequence_balance", refuse)
    assert "learner/balance_loss" not in _step(0.0)[0]
    with pytest.raises(AssertionError, match="computed"):
        _step(0.1)


def test_it_evens_out_what_the_experts_get() -> None:
    """Trained on nothing else, each sequence's loss comes down towards 1 a layer."""
    model, samples = policy(), [replace(s, advantage=0.0) for s in batch(12)]
    learner = Learner(
        model,
        optimizer=OptimizerConfig(lr=3e-3),
        loss=LossConfig(),
        config=LearnerConfig(threads=1),
        total_steps=30,
        router=RouterConfig(balance_coef=1.0),
    )
    figures = [learner.step(samples)["learner/balance_loss"] for _ in range(30)]
    assert figures[-1] < figures[0] - 0.2 and figures[-1] > 1.0

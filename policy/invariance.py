"""How far loss and gradient move when the same samples are cut, packed, ordered or computed in another way.

Every function here computes the loss of one mini-batch and its gradient twice or more, by ways that must agree, and
says how far they are apart. Nothing is updated but copies.

The norms. A gradient deviates by ``max|g1 - g2| / max(max|g1|, FLOOR * largest entry of any gradient)``, parameter by
parameter: each against its own size, so that a small router is not hidden behind a large embedding; the floor keeps
what cancels to almost nothing from being measured against itself. A loss deviates by ``|l1 - l2|`` over the sum of the
absolute terms that it is made of (:func:`loss_scale`): advantages of both signs cancel in the loss itself.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from policy.batch import Sample
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from policy.learner import Learner
from policy.loss import Denominators, LossInputs, grpo_loss, token_weights
from policy.model import PolicyModel
from policy.parallel import Ranks
from policy.scorer import TokenScorer

FLOOR = 1e-3
"""A gradient is measured against at least this share of the largest entry of all gradients."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of computing came to.

    Attributes:
        loss: of the whole mini-batch.
        gradients: by parameter name, before clipping.
    """

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Deviation:
    """The largest deviation that was seen, and where: ``way: loss`` or ``way: parameter``."""

    worst: float
    where: str

    @classmethod
    def largest(cls, found: Sequence[Deviation]) -> Deviation:
        """The worst of several; one that is not a number is worse than any."""
        return max(found, key=lambda each: math.inf if math.isnan(each.worst) else each.worst)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model and everything that its loss depends on beside the samples.

    Attributes:
        model: in the dtype in which is measured; its weights stay as they are.
        loss: which GRPO loss.
        config: how the recipe cuts and computes.
        router: bias, balance loss and replay.
        reference: the policy of the KL term; needed when ``loss.kl_coef`` > 0.
        temperature: the sampler's, > 0.
        constant_length: denominator of the ``constant`` aggregation, tokens.
        ranks: this process among those that compute together; None: alone.
    """

    model: PreTrainedModel
    loss: LossConfig
    config: LearnerConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    reference: PreTrainedModel | None = None
    temperature: float = 1.0
    constant_length: int = 1
    ranks: Ranks | None = None

    @contextmanager
    def learner(
        self, model: PreTrainedModel | None = None, optimizer: OptimizerConfig | None = None, **cut: Any
    ) -> Iterator[Learner]:
        """A learner over the model, with some fields of its config replaced; lets go of the model afterwards."""
        made = Learner(
            self.model if model is None else model,
            optimizer=optimizer or OptimizerConfig(),
            loss=self.loss,
            config=replace(self.config, **cut),
            total_steps=8,
            reference=self.reference,
            router=self.router,
            ranks=self.ranks,
        )
        try:
            yield made
        finally:
            made.release()

    def outcome(self, samples: Sequence[Sample], **cut: Any) -> Outcome:
        """Loss and gradient as the learner computes them, with some fields of its config replaced."""
        with self.learner(**cut) as learner:
            found = learner.gradients(samples, temperature=self.temperature, constant_length=self.constant_length)
        return Outcome(*found)


def compare(one: Outcome, other: Outcome, scale: float, way: str) -> Deviation:
    """How far ``other`` is from ``one``, by the norms at the top of this file. ``way`` names it in ``where``."""
    found = [Deviation(abs(one.loss - other.loss) / scale, f"{way}: loss")]
    largest = max(float(g.abs().max()) for g in one.gradients.values())
    for name in one.gradients.keys() | other.gradients.keys():
        if name not in one.gradients or name not in other.gradients:
            found.append(Deviation(math.inf, f"{way}: {name} has a gradient only one of the ways"))
            continue
        mine, theirs = one.gradients[name], other.gradients[name].to(one.gradients[name].device)
        own = max(float(mine.abs().max()), FLOOR * largest)
        gap = float((mine.double() - theirs.double()).abs().max())
        found.append(Deviation(gap / own if own else gap, f"{way}: {name}"))
    return Deviation.largest(found)


def loss_scale(samples: Sequence[Sample], loss: LossConfig, constant_length: int) -> float:
    """The sum of the absolute terms of the loss at a ratio of one: what its rounding is measured against."""
    lengths = torch.tensor([len(s.token_ids) - s.prompt_length for s in samples])
    sizes = torch.tensor([abs(s.advantage) for s in samples], dtype=torch.float64)
    denominators = _denominators(samples, loss.constant_length or constant_length)
    return float((sizes * lengths * token_weights(lengths, denominators, loss.aggregation)).sum()) or 1.0


def micro_batches(bench: Bench, samples: Sequence[Sample], base: Outcome) -> Deviation:
    """One sequence to a micro-batch, and some cuts between, against ``base`` (all in one)."""
    total = sum(len(s.token_ids) for s in samples)
    longest = max(len(s.token_ids) for s in samples)
    limits = {"one sequence each": 1, "a third each": max(longest, total // 3), "half each": max(longest, total // 2)}
    return _against(bench, samples, base, {way: {"micro_batch_tokens": limit} for way, limit in limits.items()})


def logprob_chunks(bench: Bench, samples: Sequence[Sample], base: Outcome) -> Deviation:
    """Chunks of the log-probabilities that end inside and between sequences, and the recipe's own."""
    sizes = dict.fromkeys((7, max(2, _tokens(samples) - 1), bench.config.logprob_chunk))
    return _against(bench, samples, base, {f"chunks of {size}": {"logprob_chunk": size} for size in sizes})


def checkpointing(bench: Bench, samples: Sequence[Sample], base: Outcome) -> Deviation:
    """Activations computed again in the backward pass, against kept ones; sees to it that they are."""
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += torch.is_grad_enabled()  # not those that only look at the model

    layers = recomputed_layers(bench.model)
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        ways = {"recomputed by layer": {"activation_checkpointing": "layer"}}
        found = _against(bench, samples, base, ways)
    finally:
        for hook in hooks:
            hook.remove()
    if runs != 2 * len(layers):
        return Deviation(math.inf, f"recomputed by layer: {len(layers)} layers ran {runs} times, not twice each")
    return found


def recomputed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers whose activations can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def orders(bench: Bench, samples: Sequence[Sample], base: Outcome, seed: int) -> Deviation:
    """The samples backwards in one piece, and shuffled, cut into several micro-batches."""
    limit = max(max(len(s.token_ids) for s in samples), sum(len(s.token_ids) for s in samples) // 3)
    start, scale = whole(samples, bench.config), loss_scale(samples, bench.loss, bench.constant_length)
    found = [compare(base, bench.outcome(list(reversed(samples)), **start), scale, "backwards")]
    for turn in (1, 2):
        shuffled = random.Random(seed + turn).sample(list(samples), len(samples))
        outcome = bench.outcome(shuffled, **{**start, "micro_batch_tokens": limit})
        found.append(compare(base, outcome, scale, f"shuffled ({turn})"))
    return Deviation.largest(found)


def packing(bench: Bench, samples: Sequence[Sample]) -> Deviation:
    """The packed batch against every sequence alone, computed plainly (:func:`plain_outcome`).

    Without balance loss and replay on either side: the plain way has no part in them.
    """
    bench = replace(bench, router=replace(bench.router, balance_coef=0.0, replay=False))
    packed = bench.outcome(samples, **whole(samples, bench.config))
    scale = loss_scale(samples, bench.loss, bench.constant_length)
    return compare(plain_outcome(bench, samples), packed, scale, "packed against alone")


def neighbours(bench: Bench, samples: Sequence[Sample]) -> Deviation:
    """Largest |Δlogp| (nats) of a sequence's tokens: alone, packed beside the others, and beside others than those."""
    sequences = [sample.token_ids for sample in samples]
    scorer = TokenScorer(bench.model, chunk=bench.config.logprob_chunk, fp32_head=bench.config.fp32_head)
    room = max(map(len, sequences)) * len(sequences)

    def score(rows: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return scorer.sequence_logprobs(rows, bench.temperature, room)

    alone = [score([ids])[0] for ids in sequences]
    found = _apart(alone, score(sequences), range(len(sequences)), "packed with the others")
    for half in (0, 1):  # every second one keeps its tokens, those between them are turned round
        rows = [ids if index % 2 == half else ids[::-1] for index, ids in enumerate(sequences)]
        found += _apart(alone, score(rows), range(half, len(sequences), 2), "packed with other neighbours")
    return Deviation.largest(found)


def whole_step(bench: Bench, samples: Sequence[Sample], optimizer: OptimizerConfig, mini_batches: int) -> Deviation:
    """The weights after a whole step (later mini-batches, their old log-probabilities, clipping, AdamW) by two cuts.

    Each parameter's difference, beyond the rounding of the weight itself, over the largest change of that parameter.
    The learning rate is 0.1, so that later mini-batches meet another policy and clip. AdamW's eps is 1: with a tiny one
    its first steps are the gradient's sign, and the sign of what is zero up to rounding is a matter of chance.

    Args:
        mini_batches: 0 takes a step of supervised fine-tuning.
    """
    calm = replace(
        optimizer, lr=0.1, eps=1.0, schedule="constant", warmup_steps=0, kind="adamw", offload=False,
        max_grad_norm=optimizer.max_grad_norm or 1.0,
    )  # fmt: skip
    start = {name: value.detach().clone() for name, value in bench.model.named_parameters() if value.requires_grad}
    after: list[dict[str, Tensor]] = []
    for cut in (whole(samples, bench.config), {"micro_batch_tokens": 1, "logprob_chunk": 5}):
        model = cast(PreTrainedModel, copy.deepcopy(bench.model))
        with bench.learner(model, calm, **cut) as learner:
            if mini_batches:
                learner.step(
                    samples, mini_batches=mini_batches, temperature=bench.temperature,
                    constant_length=bench.constant_length,
                )  # fmt: skip
            else:
                learner.sft_step(samples)
        after.append({name: value.detach() for name, value in model.named_parameters()})
    return _moves(start, *after)


def plain_outcome(bench: Bench, samples: Sequence[Sample]) -> Outcome:
    """Loss and gradient the long way: each sequence alone through the model's own ``forward`` and all its logits.

    Shares nothing with the learner but the model and the formula of the loss: no packing, no chunks, no scorer.
    """
    model = bench.model.eval()
    model.zero_grad()
    denominators = _denominators(samples, bench.loss.constant_length or bench.constant_length)
    total = 0.0
    for sample in samples:
        logprobs = _plain_logprobs(model, sample, bench.temperature)
        reference = None
        if bench.reference is not None:
            with torch.no_grad():
                reference = _plain_logprobs(bench.reference, sample, bench.temperature)
        count, device = len(logprobs), logprobs.device
        sampled = sample.rollout_logprobs
        inputs = LossInputs(
            old_logprobs=logprobs.detach(),
            advantages=torch.full((count,), sample.advantage, dtype=torch.float64, device=device),
            sequence_lengths=torch.full((count,), count, device=device),
            rollout_logprobs=None if sampled is None else torch.tensor(sampled, dtype=torch.float64, device=device),
            ref_logprobs=reference,
        )
        share = grpo_loss(logprobs, inputs, denominators, bench.loss).loss
        share.backward()
        total += float(share.detach())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Outcome(total, found)


def measured_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in another dtype, buffers too; the model itself when it has that dtype."""
    if model.dtype == dtype:
        return model
    return cast(PreTrainedModel, copy.deepcopy(model).to(dtype))  # type: ignore[arg-type]


def nearby_reference(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A reference policy beside the model: every weight a hundredth off. The model itself would have a KL of zero."""
    reference = cast(PreTrainedModel, copy.deepcopy(model)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        parameter.mul_(1 + 0.01 * noise)
    return reference


def whole(samples: Sequence[Sample], config: LearnerConfig) -> dict[str, Any]:
    """The cut that everything is compared with: all in one micro-batch, one chunk, activations kept."""
    longest = max(len(s.token_ids) for s in samples)
    return {
        "micro_batch_tokens": longest * len(samples),
        "logprob_chunk": max(_tokens(samples), 1),
        "activation_checkpointing": "none",
    }


def gradient_tolerance(dtype: torch.dtype, tokens: int, model: PreTrainedModel) -> tuple[float, str]:
    """What rounding alone may do to a loss or a gradient, by the norms above, and why.

    Args:
        dtype: in which is measured.
        tokens: that a gradient is summed over.
        model: transformers' own models compute norms and rotary angles in fp32 whatever their dtype.
    """
    if dtype == torch.float64:
        if isinstance(model, PolicyModel):
            return 1e-9, "float64 rounds at 1e-16; sums in another order, through all layers, stay below 1e-11"
        return 1e-6, "float64, but this model computes norms and rotary angles in float32, which rounds at 6e-8"
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:
        bound = 16 * eps * math.sqrt(max(tokens, 1))
        return bound, f"16 x eps ({eps:.0e}) x sqrt({tokens} tokens): sums of that many terms in another order"
    return 0.25, f"bfloat16 rounds at {eps / 2:.0e} in every layer: this finds gross errors only"


def logprob_tolerance(dtype: torch.dtype, model: PreTrainedModel) -> tuple[float, str]:
    """The same for log-probabilities, nats."""
    if dtype == torch.float64 and isinstance(model, PolicyModel):
        return 1e-10, "float64 rounds at 1e-16; products of other shapes, through all layers, stay below 1e-12"
    if dtype in (torch.float64, torch.float32):
        return 1e-4, "float32 rounds at 6e-8; products of other shapes, through all layers, stay below 1e-5 nats"
    return 0.25, "bfloat16 rounds at 4e-3 in every layer: this finds gross errors only"


def _against(bench: Bench, samples: Sequence[Sample], base: Outcome, ways: dict[str, dict[str, Any]]) -> Deviation:
    """The worst of several cuts against ``base``, whose cut is :func:`whole`."""
    scale, start = loss_scale(samples, bench.loss, bench.constant_length), whole(samples, bench.config)
    return Deviation.largest(
        [compare(base, bench.outcome(samples, **{**start, **cut}), scale, way) for way, cut in ways.items()]
    )


def _apart(
    alone: Sequence[Sequence[float]], packed: Sequence[Sequence[float]], which: Iterable[int], way: str
) -> list[Deviation]:
    return [
        Deviation(abs(a - b), f"{way}: token {at + 1} of sample {index + 1}")
        for index in which
        for at, (a, b) in enumerate(zip(alone[index], packed[index], strict=True))
    ]


def _moves(start: dict[str, Tensor], one: dict[str, Tensor], other: dict[str, Tensor]) -> Deviation:
    found = []
    largest = max(float((one[name] - value).abs().max()) for name, value in start.items())
    for name, value in start.items():
        moved = max(float((one[name] - value).abs().max()), FLOOR * largest)
        rounding = torch.finfo(value.dtype).eps * float(one[name].abs().max())
        gap = float((one[name].double() - other[name].double()).abs().max())
        gap = 0.0 if gap <= rounding else gap - rounding  # a NaN stays one
        found.append(Deviation(gap / moved if moved else gap, f"one sequence each against all in one: {name}"))
    return Deviation.largest(found)


def _plain_logprobs(model: PreTrainedModel, sample: Sample, temperature: float) -> Tensor:
    """Log-probabilities of the completion's tokens, nats, with gradient."""
    device = next(model.parameters()).device
    ids = torch.tensor([sample.token_ids], device=device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, sample.prompt_length - 1 :]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = (wide / temperature).log_softmax(-1)
    return found.gather(1, ids[0, sample.prompt_length :, None])[:, 0]


def _denominators(samples: Sequence[Sample], constant_length: int) -> Denominators:
    return Denominators(tokens=_tokens(samples), sequences=len(samples), constant=constant_length)


def _tokens(samples: Sequence[Sample]) -> int:
    """Tokens under the loss."""
    return sum(len(s.token_ids) - s.prompt_length for s in samples)

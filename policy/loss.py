"""The GRPO loss: tensors in, values out.

For the sampled tokens t of the sequences i of one mini-batch, with advantage A_i::

    ratio_t = exp(logprobs_t - old_logprobs_t)
    w_t     = min(exp(old_logprobs_t - rollout_logprobs_t), importance_cap)                        (no gradient)
    kl_t    = exp(ref_t - logprobs_t) - (ref_t - logprobs_t) - 1                                   (k3)
              the same times ratio_t                                                               (unbiased)
    L_t     = -w_t * min(ratio_t * A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) * A_i) + kl_coef * kl_t

    token     loss = sum_t L_t / tokens                           tokens = all sampled tokens of the mini-batch
    sequence  loss = sum_i (sum_{t in i} L_t / |i|) / sequences   |i| = sampled tokens of sequence i
    constant  loss = sum_t L_t / (sequences * constant_length)    constant_length = a fixed number of tokens

Sources:
    GRPO, DeepSeekMath, arXiv 2402.03300, eq. 3 and 4: the clipped ratio, the k3 penalty (J. Schulman, "Approximating KL
        divergence", 2020), the ``sequence`` mean. DeepSeek-R1, arXiv 2501.12948, runs it with KL weight 0.001, clip 10.
    DAPO, arXiv 2503.14476: ``token``, the higher upper clip, masking of truncated completions.
    Dr. GRPO, arXiv 2503.20783: ``constant``, and advantages without a std.
    DeepSeek-V3.2, arXiv 2512.02556: k3 times the ratio, whose gradient is that of the true KL.
    F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025: w_t.

Deviations:
    1. Denominators belong to the whole mini-batch and are passed in. A micro-batch returns its share; the shares
       add up to the loss, however the mini-batch is cut. DAPO's "token" is over a mini-batch here too, not a group.
    2. Sequences that do not train (failed reward, dropped group, masked truncation) are not in the batch and count in
       no denominator. TRL keeps them with advantage or mask 0, so that its loss is smaller by the share they take.
    3. The ratio is per token, never per sequence (GSPO is another algorithm).
    4. w_t multiplies the policy term only, not the KL term, and is cut from above only: a token that the learner
       holds for less likely than the sampler did keeps its small weight.
    5. The clipped fractions count the tokens whose gradient the clip took away: below with A < 0, above with A > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.batch import MicroBatch
from policy.config import LossConfig


@dataclass(frozen=True, slots=True)
class Denominators:
    """What the aggregations divide by, over the whole mini-batch.

    Attributes:
        tokens: tokens under the loss.
        sequences: sequences under the loss.
        constant: tokens that stand for one sequence in the ``constant`` aggregation.
    """

    tokens: int
    sequences: int
    constant: int = 1

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch], constant_length: int = 1) -> Denominators:
        """The denominators of a mini-batch that was cut into ``micro_batches``."""
        return cls(
            tokens=sum(micro.loss_tokens for micro in micro_batches),
            sequences=sum(len(micro.segment_lengths) for micro in micro_batches),
            constant=constant_length,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What the loss takes beside the current log-probabilities: one entry per token under the loss, all [M].

    Attributes:
        old_logprobs: the learner's before the update.
        advantages: of the sequence that each token belongs to.
        sequence_lengths: tokens under the loss in that sequence (whole, wherever the batch was cut).
        rollout_logprobs: the sampler's; needed when ``importance_cap`` is set.
        ref_logprobs: the reference policy's; needed when ``kl_coef`` > 0.
    """

    old_logprobs: Tensor
    advantages: Tensor
    sequence_lengths: Tensor
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The share of one micro-batch.

    Attributes:
        loss: scalar with gradient; the shares of a mini-batch add up to its loss.
        sums: metric -> sum over the tokens (0-d, no gradient); divide by the tokens of all micro-batches.
        maxima: metric -> maximum over the tokens (0-d, no gradient).
    """

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


def grpo_loss(logprobs: Tensor, inputs: LossInputs, denominators: Denominators, config: LossConfig) -> LossOutput:
    """The GRPO loss of one micro-batch, as the formula at the top of this file.

    Args:
        logprobs: current log-probabilities of the tokens under the loss, nats, with gradient. [M]
        inputs: everything else that is per token.
        denominators: of the whole mini-batch.
        config: clip range, aggregation, KL and importance weight.

    Raises:
        ValueError: ``importance_cap`` is set and rollout_logprobs are missing, or ``kl_coef`` > 0 and
            ref_logprobs are.
    """
    current = logprobs.detach()
    old = inputs.old_logprobs.detach().to(current.dtype)
    advantages = inputs.advantages.to(current.dtype)
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)

    drift, value = current - old, ratio.detach()
    sums = {
        "learner/clip_fraction_low": ((value < 1 - config.clip_low) & (advantages < 0)).sum(),
        "learner/clip_fraction_high": ((value > 1 + config.clip_high) & (advantages > 0)).sum(),
        "learner/approx_kl": k3(drift).sum(),
    }
    maxima = {"learner/ratio_max": value.amax()}
    if inputs.rollout_logprobs is not None:
        mismatch = old - inputs.rollout_logprobs.to(current.dtype)
        sums["mismatch/mean_abs"] = mismatch.abs().sum()
        sums["mismatch/k3"] = k3(mismatch).sum()
        maxima["mismatch/max_abs"] = mismatch.abs().amax()
        if config.importance_cap is not None:
            weight = torch.exp(mismatch)
            sums["mismatch/capped_fraction"] = (weight > config.importance_cap).sum()
            per_token = per_token * weight.clamp(max=config.importance_cap)
    elif config.importance_cap is not None:
        raise ValueError("loss.importance_cap is set but the samples have no rollout_logprobs: set it to null")
    if config.kl_coef > 0:
        if inputs.ref_logprobs is None:
            raise ValueError("loss.kl_coef is above 0 but there are no ref_logprobs: give the learner a reference")
        kl = k3(inputs.ref_logprobs.detach().to(current.dtype) - logprobs)
        if config.kl_form == "unbiased":
            kl = kl * ratio
        sums["learner/kl_ref"] = kl.detach().sum()
        per_token = per_token + config.kl_coef * kl
    # summed in fp64: a sum over millions of tokens must not depend on where a micro-batch ends
    weights = token_weights(inputs.sequence_lengths, denominators, config.aggregation)
    loss = (per_token.double() * weights).sum()
    return LossOutput(loss, sums, maxima)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimate exp(d) - d - 1 of KL(p || q) from samples of p, with d = log q - log p. Never negative."""
    # expm1(d) - d keeps the digits that exp(d) - d - 1 loses to cancellation for the small d of a healthy run
    return torch.expm1(log_ratio) - log_ratio


def token_weights(sequence_lengths: Tensor, denominators: Denominators, aggregation: str) -> Tensor | float:
    """What each token's loss is multiplied by before the sum: one number, or one per token. [M] int64 -> [M] float64"""
    if aggregation == "token":
        return 1.0 / denominators.tokens
    if aggregation == "sequence":
        return 1.0 / (sequence_lengths.double() * denominators.sequences)
    assert aggregation == "constant", aggregation
    return 1.0 / (denominators.sequences * denominators.constant)

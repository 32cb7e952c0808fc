"""The learner: a batch of samples in, new weights and the numbers about them out.

One step, for each of ``mini_batches`` parts of the batch::

    pack -> [per micro-batch: logprobs -> loss -> backward] -> clip -> AdamW

Old log-probabilities are the learner's own from before the first update. For the first mini-batch these are the
current ones, detached; only the later mini-batches pay a forward pass for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.batch import MicroBatch, Sample, pack
from policy.config import LearnerConfig, LossConfig, OptimizerConfig
from policy.loss import Denominators, LossInputs, LossOutput, grpo_loss
from policy.optimizer import NonFiniteError, PolicyOptimizer
from policy.scorer import TokenScorer, TokenScores
from policy.tally import Tally

# (index of the micro-batch in its mini-batch, the micro-batch, its scores) -> its share of the loss
_LossOf = Callable[[int, MicroBatch, TokenScores], LossOutput]


class Learner:
    """Trains one model. Same state and same batch give the same bits on a CPU with the same number of threads.

    Args:
        model: a ``PolicyModel`` or any transformers causal LM; trained in place, dropout off.
        optimizer: AdamW and its schedule.
        loss: which GRPO loss (unused by :meth:`sft_step`).
        config: how a batch is cut and computed.
        total_steps: optimizer steps of the stage (steps x mini_batches), which the schedule spans.
        reference: the policy that the KL term holds on to; needed when ``loss.kl_coef`` > 0
            (``policy.scorer.frozen_copy`` of the stage's first model, also after a resume).

    Raises:
        ValueError: no reference although ``kl_coef`` > 0, or a model that cannot be scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        config: LearnerConfig,
        total_steps: int,
        reference: PreTrainedModel | None = None,
    ) -> None:
        if loss.kl_coef > 0 and reference is None:
            raise ValueError(
                f"loss.kl_coef is {loss.kl_coef} but the learner has no reference policy: pass one, or set it to 0"
            )
        torch.set_num_threads(config.threads or _cores())
        self.model = model
        self._loss, self._config = loss, config
        self._scorer = TokenScorer(model, chunk=config.logprob_chunk, fp32_head=config.fp32_head)
        self._optimizer = PolicyOptimizer(model, optimizer, total_steps)
        self._reference: TokenScorer | None = None
        if reference is not None and loss.kl_coef > 0:
            assert reference is not model
            reference.requires_grad_(False)
            self._reference = TokenScorer(reference, chunk=config.logprob_chunk, fp32_head=config.fp32_head)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._optimizer.steps

    def step(
        self, samples: Sequence[Sample], *, mini_batches: int = 1, temperature: float = 1.0, constant_length: int = 1
    ) -> dict[str, float]:
        """One GRPO step: ``mini_batches`` optimizer steps over disjoint parts of the batch.

        With more than one mini-batch the samples are dealt out in a random order that follows from the number of
        optimizer steps taken, so that siblings spread and a resumed run deals alike.

        Args:
            samples: sequences with advantages (``samples_from_groups``); empty is legal and updates nothing.
            mini_batches: >= 1; more than there are samples leaves the surplus out.
            temperature: the sampler's, > 0; the learner's distributions are scaled alike.
            constant_length: denominator of the ``constant`` aggregation, used when the config leaves it 0.

        Returns:
            Metrics; names and units in ``policy.glossary.LEARNER_METRICS``.

        Raises:
            ValueError: an argument out of range, or samples without rollout_logprobs while importance_cap is set.
            NonFiniteError: a loss or gradient is NaN or infinite; the optimizer step that it names did not happen.
        """
        if mini_batches < 1:
            raise ValueError(f"mini_batches must be >= 1, got {mini_batches}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0 to learn from samples, got {temperature}")
        length = self._loss.constant_length or constant_length
        if length < 1:
            raise ValueError(f"constant_length must be >= 1, got {length}")
        end = self._optimizer.position + mini_batches
        if not samples:
            return self._skipped(end)
        tally = Tally()
        parts = [self._pack(part) for part in self._deal(samples, mini_batches)]
        old: list[list[Tensor] | None] = [None, *(self._logprobs(part, temperature) for part in parts[1:])]
        for micros, old_logprobs in zip(parts, old, strict=True):
            denominators = Denominators.of(micros, length)

            def loss_of(
                index: int,
                micro: MicroBatch,
                scores: TokenScores,
                old_logprobs: list[Tensor] | None = old_logprobs,
                denominators: Denominators = denominators,
            ) -> LossOutput:
                inputs = LossInputs(
                    old_logprobs=scores.logprobs.detach() if old_logprobs is None else old_logprobs[index],
                    advantages=micro.advantages,
                    sequence_lengths=micro.sequence_lengths,
                    rollout_logprobs=micro.rollout_logprobs,
                    ref_logprobs=self._ref_logprobs(micro, temperature),
                )
                return grpo_loss(scores.logprobs, inputs, denominators, self._loss)

            self._update(micros, temperature, loss_of, tally)
        self._optimizer.move_to(end)  # there may be fewer samples than mini-batches
        return self._metrics(tally)

    def release(self) -> None:
        """Lets go of the model, so that another learner may train it; this one must not be used again."""
        self._optimizer.release()

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One supervised optimizer step: mean cross-entropy over all completion tokens of the batch.

        Raises:
            NonFiniteError: as :meth:`step`.
        """
        if not samples:
            return self._skipped(self._optimizer.position + 1)
        tally = Tally()
        micros = self._pack(samples)
        tokens = Denominators.of(micros).tokens

        def loss_of(index: int, micro: MicroBatch, scores: TokenScores) -> LossOutput:
            return LossOutput(-scores.logprobs.double().sum() / tokens, {}, {})

        self._update(micros, 1.0, loss_of, tally)
        return self._metrics(tally)

    def sequence_logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """See :meth:`TokenScorer.sequence_logprobs`."""
        return self._scorer.sequence_logprobs(sequences, temperature, self._config.micro_batch_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights that a bit-identical continuation needs: moments, schedule, counters, RNG.

        The tensors are the live ones: save or copy them before the next step.
        """
        return {"optimizer": self._optimizer.state_dict(), "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`; the model holds the weights of the same moment.

        Raises:
            ValueError: the state belongs to another model.
        """
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def _pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return [micro.to(self._scorer.device) for micro in pack(samples, self._config.micro_batch_tokens)]

    def _deal(self, samples: Sequence[Sample], mini_batches: int) -> list[list[Sample]]:
        if mini_batches == 1:
            return [list(samples)]
        generator = torch.Generator().manual_seed(self._optimizer.steps)
        order = torch.randperm(len(samples), generator=generator)
        parts = [[samples[int(i)] for i in part] for part in order.tensor_split(mini_batches)]
        return [part for part in parts if part]

    @torch.no_grad()
    def _logprobs(self, micros: list[MicroBatch], temperature: float) -> list[Tensor]:
        return [self._scorer(micro, temperature).logprobs for micro in micros]

    @torch.no_grad()
    def _ref_logprobs(self, micro: MicroBatch, temperature: float) -> Tensor | None:
        return None if self._reference is None else self._reference(micro, temperature).logprobs

    def _update(self, micros: list[MicroBatch], temperature: float, loss_of: _LossOf, tally: Tally) -> None:
        """One optimizer step over the micro-batches of a mini-batch."""
        total = 0.0
        for index, micro in enumerate(micros):
            scores = self._scorer(micro, temperature)
            output = loss_of(index, micro, scores)
            share = float(output.loss.detach())
            if not math.isfinite(share):
                self._optimizer.zero_grad()
                raise NonFiniteError(
                    f"the loss is {share} in micro-batch {index + 1} of {len(micros)} at optimizer step "
                    f"{self._optimizer.steps + 1}; the weights are unchanged: lower the learning rate, or look at "
                    "the batch's advantages and log-probabilities"
                )
            output.loss.backward()
            total += share
            tally.add(micro, scores, output)
        tally.lr = self._optimizer.lr
        tally.grad_norms.append(self._optimizer.step())
        tally.losses.append(total)

    def _skipped(self, end: int) -> dict[str, float]:
        self._optimizer.move_to(end)
        return {
            "learner/skipped": 1.0,
            "learner/tokens": 0.0,
            "learner/loss_tokens": 0.0,
            "learner/sequences": 0.0,
            "learner/optimizer_steps": float(self._optimizer.steps),
        }

    def _metrics(self, tally: Tally) -> dict[str, float]:
        metrics = tally.metrics()
        metrics["learner/optimizer_steps"] = float(self._optimizer.steps)
        if tally.router_load is not None:
            load = tally.router_load.double()
            # dense layers come first and have no router: name a layer by its place in the model
            first = self.model.config.num_hidden_layers - len(load)
            for index, ratio in enumerate((load.amax(1) / load.mean(1)).tolist()):
                metrics[f"router/load_max_over_mean/layer_{first + index}"] = ratio
        return metrics


def _cores() -> int:
    """Cores that this process may use (a cluster or container may give it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

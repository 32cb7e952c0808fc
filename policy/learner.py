"""The learner: a batch of samples in, new weights and the numbers about them out.

One step, for each of ``mini_batches`` parts of the batch::

    pack -> [per micro-batch: logprobs -> loss -> backward] -> clip -> AdamW

Old log-probabilities are the learner's own from before the first update. For the first mini-batch these are the
current ones, detached; only the later mini-batches pay a forward pass for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.allocator import keep_freed_memory
from policy.batch import MicroBatch, Sample, check_token_ids, pack_fill
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from policy.errors import NonFiniteError
from policy.guards import BadUpdate, Guard, Watch
from policy.loss import Denominators, LossInputs, LossOutput, grpo_loss
from policy.optimizer import PolicyOptimizer
from policy.optimizer_kinds import check_kind
from policy.parallel import Ranks, pack_for
from policy.recompute import recompute_layers
from policy.routing import BiasBalancer, check_router
from policy.scorer import TokenScorer, TokenScores
from policy.tally import Tally

# (index of the micro-batch among this rank's, the micro-batch, its scores) -> its share of the loss, and of what
_LossOf = Callable[[int, MicroBatch, TokenScores], tuple[LossOutput, LossInputs | None]]


class Learner:
    """Trains one model. Same state and same batch give the same bits on a CPU with the same number of threads.

    Args:
        model: a ``PolicyModel`` or any transformers causal LM; trained in place, dropout off.
        optimizer: AdamW and its schedule.
        loss: which GRPO loss (unused by :meth:`sft_step`).
        config: how a batch is cut and computed.
        total_steps: optimizer steps of the stage (steps x mini_batches), which the schedule spans.
        reference: the policy that the KL term holds on to; needed when ``loss.kl_coef`` > 0
            (``policy.scorer.reference_policy`` of the stage's first model, also after a resume).
        router: what becomes of the routers of a mixture of experts; None: they are left as they are.
        ranks: this process among those that train ``model`` together (``policy.parallel.shard``). All of them call
            every method alike and are given the same whole batch; each computes its share, and all return the same.

    Raises:
        ValueError: no reference although ``kl_coef`` > 0, a model that cannot be scored, or one without the router
            that ``router`` asks something of.
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
        router: RouterConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if loss.kl_coef > 0 and reference is None:
            raise ValueError(
                f"loss.kl_coef is {loss.kl_coef} but the learner has no reference policy: pass one, or set it to 0"
            )
        torch.set_num_threads(config.threads or _cores())
        keep_freed_memory()
        self.model = model
        self._loss, self._config, self._ranks = loss, config, ranks or Ranks.alone()
        self._router = router or RouterConfig()
        check_router(self._router, model)
        self._scorer = TokenScorer(
            model, chunk=config.logprob_chunk, fp32_head=config.fp32_head, replay=self._router.replay
        )
        recompute_layers(model, config.activation_checkpointing)  # after the scorer, which sets the mode of all layers
        check_kind(optimizer, model, self._ranks.size)
        self._bias = BiasBalancer(model, self._router)
        self._optimizer = PolicyOptimizer(model, optimizer, total_steps, self._ranks)
        self._guard = Guard(config.max_bad_steps)
        self._reference: TokenScorer | None = None
        if reference is not None and loss.kl_coef > 0:
            shared = reference is model  # the base of a model with adapters
            if not shared:
                reference.requires_grad_(False)
            self._reference = TokenScorer(
                reference, chunk=config.logprob_chunk, fp32_head=config.fp32_head, adapters=not shared
            )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._optimizer.steps

    def recall_bad_updates(self, mini_batches: Collection[int]) -> None:
        """Says which updates of the next batches to skip: those that a run skipped whose steps are repeated here."""
        self._guard.recalled = frozenset(mini_batches)

    @property
    def bad_updates(self) -> list[BadUpdate]:
        """The updates of the last batch that were skipped because something in them was not finite."""
        return self._guard.bad

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
            ValueError: an argument out of range, samples without rollout_logprobs while importance_cap is set, or
                samples without routed_experts while these are to be replayed.
            NonFiniteError: an earlier batch stopped this learner (its ``bad_updates`` said so).
        """
        if mini_batches < 1:
            raise ValueError(f"mini_batches must be >= 1, got {mini_batches}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0 to learn from samples, got {temperature}")
        self._check_replay(samples)
        self._check_tokens(samples)
        length = self._loss.constant_length or constant_length
        if length < 1:
            raise ValueError(f"constant_length must be >= 1, got {length}")
        self._guard.begin()
        end = self._optimizer.position + mini_batches
        if not samples:
            return self._skipped(end)
        tally = Tally()
        dealt = self._deal(len(samples), mini_batches)
        parts = [self._pack([samples[i] for i in part]) for part in dealt]
        tally.pack_fill = pack_fill([micro for part in parts for micro in part], self._config.micro_batch_tokens)
        old: list[list[Tensor] | None] = [None, *(self._logprobs(part, temperature) for part in parts[1:])]
        for part, micros, old_logprobs in zip(dealt, parts, old, strict=True):
            if self._guard.stopped:
                break
            loss_of = self._grpo(Denominators.of(micros, length), temperature, old_logprobs)
            self._update(micros, temperature, loss_of, tally, part)
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
        self._check_tokens(samples)
        self._guard.begin()
        if not samples:
            return self._skipped(self._optimizer.position + 1)
        tally = Tally()
        micros = self._pack(samples)
        tally.pack_fill = pack_fill(micros, self._config.micro_batch_tokens)
        tokens = Denominators.of(micros).tokens

        def loss_of(index: int, micro: MicroBatch, scores: TokenScores) -> tuple[LossOutput, None]:
            return LossOutput(-scores.logprobs.double().sum() / tokens, {}, {}), None

        self._update(micros, 1.0, loss_of, tally, range(len(samples)))
        return self._metrics(tally)

    def gradients(
        self, samples: Sequence[Sample], *, temperature: float = 1.0, constant_length: int = 1
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss of one mini-batch and its gradient by parameter name, whole on every rank; nothing is updated.

        Args:
            samples: one or more, with advantages.
            temperature, constant_length: as in :meth:`step`.
        """
        self._check_replay(samples)
        self._check_tokens(samples)
        micros = self._pack(samples)
        denominators = Denominators.of(micros, self._loss.constant_length or constant_length)
        watch = Watch(len(samples), len(micros))
        loss = self._backward(micros, temperature, self._grpo(denominators, temperature, None), watch, Tally())
        gradients = self._optimizer.gradients()
        self._optimizer.zero_grad()
        return loss, gradients

    def sequence_logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """See :meth:`TokenScorer.sequence_logprobs`."""
        return self._scorer.sequence_logprobs(sequences, temperature, self._config.micro_batch_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs: weights, moments, schedule, counters, random numbers.

        ``model`` holds parameters and buffers under the model's names, in place of bf16 weights their fp32 masters.
        The tensors are the live ones, of a sharded model this rank's parts: save or copy them before the next step.

        Raises:
            NonFiniteError: the learner has stopped; nothing of it is to be kept.
        """
        self._guard.check()
        state = self.model.state_dict()
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())  # tied ones once
        return {
            "model": {name: state[name] for name, _ in tensors if name in state} | self._optimizer.masters,
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "bad_in_a_row": self._guard.in_a_row,
        }

    def prepare_moments(self, names: Collection[str]) -> None:
        """See :meth:`PolicyOptimizer.prepare_moments`."""
        self._optimizer.prepare_moments(names)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state_dict`, this learner's own (filled in place) or another's.

        Raises:
            ValueError: the state belongs to another model.
        """
        own = self.state_dict()["model"]
        wrong = {n for n in own.keys() | state["model"].keys() if _shape(own, n) != _shape(state["model"], n)}
        if wrong:
            raise ValueError(
                f"the state belongs to another model: {len(wrong)} tensors are missing or have other shapes, e.g. "
                f"{min(wrong)}"
            )
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state["model"][name])
        self._optimizer.adopt_masters()
        torch.set_rng_state(state["rng"])
        self._guard.in_a_row = state["bad_in_a_row"]

    def _pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return pack_for(self._ranks, samples, self._config.micro_batch_tokens, padded=self._scorer.pads)

    def _check_tokens(self, samples: Sequence[Sample]) -> None:
        check_token_ids(samples, self.model.config.get_text_config().vocab_size)

    def _check_replay(self, samples: Sequence[Sample]) -> None:
        missing = sum(sample.routed_experts is None for sample in samples)
        if self._router.replay and missing:
            raise ValueError(
                f"router.replay is on, but {missing} of {len(samples)} samples have no routed_experts: draw them with "
                "an engine that returns them (engine.return_routed_experts), or set replay to false"
            )

    def _deal(self, samples: int, mini_batches: int) -> list[list[int]]:
        """Which samples each mini-batch takes."""
        if mini_batches == 1:
            return [list(range(samples))]
        generator = torch.Generator().manual_seed(self._optimizer.steps)
        order = torch.randperm(samples, generator=generator)
        return [part.tolist() for part in order.tensor_split(mini_batches) if len(part)]

    def _own(self, micros: list[MicroBatch]) -> Iterator[tuple[int, MicroBatch, float]]:
        """This rank's micro-batches on its device, with their places in the mini-batch and their weights."""
        places = {id(micro): place for place, micro in enumerate(micros)}
        for micro, weight in self._ranks.share(micros):
            yield places[id(micro)], micro.to(self._scorer.device), weight

    @torch.no_grad()
    def _logprobs(self, micros: list[MicroBatch], temperature: float) -> list[Tensor]:
        return [self._scorer(micro, temperature).logprobs for _, micro, _ in self._own(micros)]

    @torch.no_grad()
    def _ref_logprobs(self, micro: MicroBatch, temperature: float) -> Tensor | None:
        return None if self._reference is None else self._reference(micro, temperature).logprobs

    def _update(
        self,
        micros: list[MicroBatch],
        temperature: float,
        loss_of: _LossOf,
        tally: Tally,
        samples: Sequence[int],
    ) -> None:
        """One optimizer step over the micro-batches of a mini-batch; what is not finite skips it (policy/guards.py)."""
        watch, found = Watch(len(samples), len(micros)), Tally()
        total = self._backward(micros, temperature, loss_of, watch, found)
        number, position, lr = self._optimizer.steps + 1, self._optimizer.position, self._optimizer.lr
        try:
            watch.check(self._ranks.largest)
            self._guard.check_recalled()
            norm = self._optimizer.step()
        except NonFiniteError as error:
            if error.what != "weights":
                self._optimizer.skip()
            self._guard.add(error, samples, losses=tuple(watch.losses), optimizer_step=number, position=position)
            return
        self._guard.good()
        if self._router.bias == "update":
            assert found.router is not None
            self._bias.step(found.router.total(self._ranks.total))
        tally.take(found)
        tally.lr = lr
        tally.grad_norms.append(norm)
        tally.losses.append(total)

    def _backward(
        self, micros: list[MicroBatch], temperature: float, loss_of: _LossOf, watch: Watch, tally: Tally
    ) -> float:
        """Adds this rank's share of the gradient of a mini-batch to the model's; returns the loss of the whole."""
        total = torch.zeros((), dtype=torch.float64)
        sequences = sum(len(micro.segment_lengths) for micro in micros)
        for index, (place, micro, weight) in enumerate(self._own(micros)):
            scores = self._scorer(micro, temperature, balance=self._router.balance_coef > 0)
            output, inputs = loss_of(index, micro, scores)
            loss = output.loss
            if scores.balance is not None:
                loss = loss + scores.balance * (self._router.balance_coef / sequences)
            share = float(loss.detach())
            watch.look(place, micro, scores.logprobs, share, inputs)
            (loss * weight).backward()
            total += share * weight
            tally.add(micro, scores, output, weight)
        return float(self._ranks.total(total))

    def _grpo(self, denominators: Denominators, temperature: float, old_logprobs: list[Tensor] | None) -> _LossOf:
        """The GRPO loss of a mini-batch; without ``old_logprobs`` the current ones are those of before the update."""

        def loss_of(index: int, micro: MicroBatch, scores: TokenScores) -> tuple[LossOutput, LossInputs]:
            inputs = LossInputs(
                old_logprobs=scores.logprobs.detach() if old_logprobs is None else old_logprobs[index],
                advantages=micro.advantages,
                sequence_lengths=micro.sequence_lengths,
                rollout_logprobs=micro.rollout_logprobs,
                ref_logprobs=self._ref_logprobs(micro, temperature),
            )
            return grpo_loss(scores.logprobs, inputs, denominators, self._loss), inputs

        return loss_of

    def _skipped(self, end: int) -> dict[str, float]:
        self._optimizer.move_to(end)
        return {
            "learner/skipped": 1.0,
            "learner/bad_steps": 0.0,
            "learner/tokens": 0.0,
            "learner/loss_tokens": 0.0,
            "learner/sequences": 0.0,
            "learner/optimizer_steps": float(self._optimizer.steps),
        }

    def _metrics(self, tally: Tally) -> dict[str, float]:
        bad = float(len(self._guard.bad))
        if not tally.losses:
            return {**self._skipped(self._optimizer.position), "learner/skipped": 0.0, "learner/bad_steps": bad}
        tally.over_ranks(self._ranks)
        metrics = tally.metrics()
        metrics["learner/bad_steps"] = bad
        metrics["learner/optimizer_steps"] = float(self._optimizer.steps)
        if tally.router is not None:
            config = self.model.config  # dense layers come first and have no router
            first = config.num_hidden_layers - len(tally.router.load)
            metrics |= tally.router.metrics(first, config.num_experts_per_tok)
        return metrics


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _cores() -> int:
    """Cores that this process may use (a cluster or container may give it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

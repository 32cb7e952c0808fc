"""``LearnerService``: the learner behind a handle. Runs in this process (tests) or in a Ray actor (a run)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
from rollout.engine import WeightUpdate
from rollout.types import RolloutGroup


class LearnerService:
    """Owns the policy's weights: trains them, saves them, publishes them."""

    def __init__(self, model: ModelConfig, seed: int, threads: int = 0) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.config, self.seed, self.threads = model, seed, threads
        self.model: Any = None
        self.tokenizer: Any = None
        self.learner: Any = None
        self.sender: Any = None

    def load(self) -> None:
        """Loads the recipe's model, or makes it (not while it is constructed: Ray would hide what goes wrong).

        Raises:
            ValueError: the model is not there, is incomplete, or does not fit its tokenizer.
        """
        self.model, self.tokenizer = self._load(self.config)

    def export(self, folder: str) -> None:
        """Writes the current weights, config and tokenizer as a Hugging Face folder (atomically)."""
        from policy.checkpoint import save_model

        save_model(self.model, self.tokenizer, Path(folder))

    def load_model(self, folder: str) -> None:
        """Takes over the weights of a folder; the optimizer of an earlier stage is forgotten."""
        self._drop_sender()
        self._drop_learner()
        self.model, self.tokenizer = self._load(self._at(folder))

    def begin(self, *, optimizer: OptimizerConfig, loss: LossConfig, config: LearnerConfig, total_steps: int) -> None:
        """Starts a training stage: a fresh optimizer, and a frozen reference when the loss asks for one."""
        from policy.learner import Learner
        from policy.scorer import frozen_copy

        self._drop_learner()
        config = replace(config, threads=config.threads or self.threads)
        reference = frozen_copy(self.model) if loss.kl_coef > 0 else None
        self.learner = Learner(
            self.model, optimizer=optimizer, loss=loss, config=config, total_steps=total_steps, reference=reference
        )

    def sft_step(self, rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, float]:
        """One step on ``(token_ids, prompt_length)`` rows; returns the metrics."""
        from policy.batch import Sample

        samples = [Sample(token_ids=tuple(ids), prompt_length=n) for ids, n in rows]
        return self.learner.sft_step(samples)

    def grpo_step(
        self,
        groups: Sequence[RolloutGroup],
        *,
        mask_truncated: bool,
        mini_batches: int,
        temperature: float,
        constant_length: int,
    ) -> dict[str, float]:
        """Packs the groups and takes ``mini_batches`` optimizer steps on them; returns the metrics."""
        from policy.batch import samples_from_groups

        samples = samples_from_groups(groups, mask_truncated=mask_truncated)
        return self.learner.step(
            samples, mini_batches=mini_batches, temperature=temperature, constant_length=constant_length
        )

    def sequence_logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probabilities (nats) of tokens 1..T-1 of each sequence under the current weights."""
        if self.learner is not None:
            return self.learner.sequence_logprobs(sequences, temperature)
        from policy.scorer import TokenScorer  # nothing is trained in this run, or not yet

        return TokenScorer(self.model, chunk=LearnerConfig().logprob_chunk).sequence_logprobs(sequences, temperature)

    def router_margins(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """How near to a tie the routing of tokens 0..T-2 of each sequence is under the current weights."""
        from policy.scorer import TokenScorer

        return TokenScorer(self.model, chunk=LearnerConfig().logprob_chunk).router_margins(sequences)

    def publish(self, version: int, backend: str, run_id: str, receivers: int) -> WeightUpdate:
        """Makes the current weights available to rollout workers (on ``receivers`` GPUs) as ``version``."""
        from pipelines.weight_sync import WeightSender

        if self.sender is None:
            self.sender = WeightSender(
                self.model, backend=backend, dtype=self.config.dtype, run_id=run_id, receivers=receivers
            )
        return self.sender.publish(version)

    def save(self, folder: str, extra: dict[str, Any]) -> None:
        """Writes the complete state (weights, optimizer, schedule, random state, ``extra``) atomically."""
        from policy.checkpoint import save_checkpoint

        save_checkpoint(
            Path(folder),
            model=self.model,
            tokenizer=self.tokenizer,
            learner_state=self.learner.state_dict(),
            extra=extra,
        )

    def restore(self, folder: str) -> dict[str, Any]:
        """Reads back what :meth:`save` wrote, after :meth:`begin`; returns ``extra``."""
        from policy.checkpoint import load_checkpoint
        from policy.loading import load_policy

        checkpoint = load_checkpoint(Path(folder))
        saved, _ = load_policy(self._at(checkpoint.model_folder), self.seed)
        self.model.load_state_dict(saved.state_dict())
        self.learner.load_state_dict(checkpoint.learner_state)
        return checkpoint.extra

    def close(self) -> None:
        """Removes what the sender left in shared memory."""
        self._drop_sender()

    def _load(self, config: ModelConfig) -> tuple[Any, Any]:
        """Model and tokenizer, the model on the GPU that this process was given, if any."""
        import torch

        from policy.loading import load_policy

        model, tokenizer = load_policy(config, self.seed)
        return (torch.nn.Module.cuda(model) if torch.cuda.is_available() else model), tokenizer

    def _at(self, folder: str | Path) -> ModelConfig:
        return replace(self.config, preset=None, path=str(folder), overrides={}, tokenizer=None)

    def _drop_learner(self) -> None:
        if self.learner is not None:
            self.learner.release()
            self.learner = None

    def _drop_sender(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None

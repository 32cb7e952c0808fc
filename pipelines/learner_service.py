"""``LearnerService``: the learner behind a handle. Runs in this process (tests) or in a Ray actor (a run)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig, RouterConfig
from rollout.engine import WeightUpdate
from rollout.types import RolloutGroup

if TYPE_CHECKING:
    from policy.guards import BadUpdate


class LearnerService:
    """Owns the policy's weights: trains them, saves them, publishes them."""

    def __init__(
        self, model: ModelConfig, seed: int, threads: int = 0, parallel: ParallelConfig | None = None, rank: int = 0
    ) -> None:
        import torch

        from policy.parallel import Ranks

        if threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.config, self.seed, self.threads = model, seed, threads
        self.parallel, self.rank, self.ranks = parallel or ParallelConfig(), rank, Ranks.alone()
        self._store: Any = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.learner: Any = None
        self.sender: Any = None
        self.saver: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """Opens the place where the ranks meet, on this machine; host and port."""
        import ray.util

        from policy.parallel import meeting_place

        host = ray.util.get_node_ip_address()
        self._store = meeting_place(host, 0, self.parallel.ranks, here=True)
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Meets the other ranks; before anything else when there are several."""
        from policy.parallel import Ranks, meeting_place

        store = self._store or meeting_place(host, port, self.parallel.ranks, here=False)
        self.ranks = Ranks.join(self.parallel, self.rank, store)

    def load(self) -> dict[str, Any] | None:
        """Loads the recipe's model, or makes it (not while it is constructed: Ray would hide what goes wrong).

        Returns:
            What became of its multi-token-prediction weights, for the run's events; None when it has none.

        Raises:
            ValueError: the model is not there, is incomplete, holds weights that are NaN or infinite, or does not fit
                its tokenizer.
        """
        from policy.loading import check_mtp

        self.model, self.tokenizer = self._load(self.config)
        return check_mtp(self.config)

    def export(self, folder: str) -> None:
        """Writes the current weights, config and tokenizer as a Hugging Face folder (atomically)."""
        self._saver().export(self.model, self.tokenizer, Path(folder))

    def load_model(self, folder: str) -> None:
        """Takes over the weights of a folder; the optimizer of an earlier stage is forgotten."""
        self._drop_sender()
        self._drop_learner()
        self.model = None
        gc.collect()  # a sharded model and its root hold each other; both models would be in memory
        self.model, self.tokenizer = self._load(self._at(folder))

    def begin(
        self,
        *,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        config: LearnerConfig,
        total_steps: int,
        router: RouterConfig | None = None,
    ) -> None:
        """Starts a training stage: a fresh optimizer, and a frozen reference when the loss asks for one."""
        from policy.learner import Learner
        from policy.scorer import reference_policy

        self._drop_learner()
        config = replace(config, threads=config.threads or self.threads)
        reference = reference_policy(self.model) if loss.kl_coef > 0 else None
        self.learner = Learner(
            self.model, optimizer=optimizer, loss=loss, config=config, total_steps=total_steps, reference=reference,
            router=router, ranks=self.ranks,
        )  # fmt: skip

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

    def bad_updates(self) -> Sequence[BadUpdate]:
        """What the last step skipped because it was not finite."""
        return self.learner.bad_updates

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

    def publish(self, version: int, backend: str, run_id: str, receivers: int) -> WeightUpdate | None:
        """Makes the current weights available to rollout workers (on ``receivers`` GPUs) as ``version``.

        The first rank's answer says how; the others only take part.
        """
        from pipelines.weight_sync import sender

        if self.sender is None:
            self.sender = sender(
                self.model, backend=backend, dtype=self.config.dtype, run_id=run_id, receivers=receivers
            )
        return self.sender.publish(version)

    def save(self, folder: str, extra: dict[str, Any], *, background: bool = False) -> None:
        """Saves the complete state (weights, optimizer, schedule, random state, ``extra``) atomically.

        In the background this returns when a copy is taken; what goes wrong then is told by the next call of this, of
        :meth:`export` or of :meth:`close`.

        Raises:
            CheckpointError: this save or the one before it failed.
        """
        self._saver().save(
            Path(folder), learner=self.learner, tokenizer=self.tokenizer, extra=extra, background=background
        )

    def restore(self, folder: str) -> dict[str, Any]:
        """Reads back what :meth:`save` wrote, on whatever ranks, after :meth:`begin`; returns ``extra``."""
        from policy.checkpoint import load_checkpoint

        return load_checkpoint(Path(folder), self.learner)

    def close(self) -> None:
        """Waits for a checkpoint that is being written and removes what the sender left in shared memory.

        Raises:
            CheckpointError: the checkpoint failed.
        """
        try:
            if self.saver is not None:
                self.saver.wait()
        finally:
            self._drop_sender()

    def _load(self, config: ModelConfig) -> tuple[Any, Any]:
        """Model and tokenizer, the model on the GPU that this process was given, if any, and sharded over the ranks.

        Of a sharded model a rank holds its part and one whole layer at most, from the disk on.
        """
        from policy.guards import check_loaded
        from policy.loading import open_policy

        policy = open_policy(config, self.seed)
        self._place(policy.model, policy.fill)
        policy.close()
        check_loaded(policy.model, policy.source)
        return policy.model, policy.tokenizer

    def _place(self, model: Any, fill: Callable[[Any], None] = lambda part: None) -> None:
        """Moves a model to where this process computes, and shards it over the ranks."""
        import torch

        from policy.parallel import shard

        shard(model, self.ranks, fill)  # layer by layer, each straight to its GPU
        if self.ranks.size == 1 and torch.cuda.is_available():
            torch.nn.Module.cuda(model)

    def _at(self, folder: str | Path) -> ModelConfig:
        return replace(self.config, preset=None, path=str(folder), overrides={}, tokenizer=None)

    def _saver(self) -> Any:
        from policy.saver import Saver

        if self.saver is None:
            self.saver = Saver.of(self.model, self.config)
        return self.saver

    def _drop_learner(self) -> None:
        if self.learner is not None:
            self.learner.release()
            self.learner = None

    def _drop_sender(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None

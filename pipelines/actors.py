"""The processes of a run: one learner, several rollout workers, and how the driver reaches them.

``LearnerService`` and ``RolloutService`` are plain classes. ``LocalHandle`` runs one of them in this process
(tests), ``RayHandle`` in a Ray actor of its own; both answer ``submit(method, ...)`` with a future, so the
driver's code does not know which it holds.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
from rollout.engine import Engine, EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Completion, RolloutGroup, SamplingParams


class Handle(Protocol):
    """A service somewhere: in this process or in an actor."""

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Calls a method there; the future carries its result or its exception."""
        ...

    def kill(self) -> None:
        """Ends the service at once, whatever it is doing."""
        ...


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
        from policy.checkpoint import load_checkpoint, load_policy

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

        from policy.checkpoint import load_policy

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


class RolloutService:
    """One engine and the weights it holds."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.engine: Engine | None = None

    async def ready(self) -> int:
        """Starts the engine (once) and returns its policy_version."""
        if self.engine is None:
            engine = self._start()
            self.engine = await engine if inspect.isawaitable(engine) else engine
        assert self.engine is not None
        return self.engine.policy_version

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        """One completion per request, in request order."""
        return await self._engine().generate(requests, params)

    async def update_weights(self, update: WeightUpdate) -> str:
        """Takes over the weights; returns the digest of the received bytes."""
        return await self._engine().update_weights(update)

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Greedy continuations with the engine's own log-probabilities of every token after the first."""
        return await self._engine().canary(prompts, new_tokens)

    async def close(self) -> None:
        """Frees the engine."""
        if self.engine is not None:
            await self.engine.close()

    def _engine(self) -> Engine:
        if self.engine is None:
            raise EngineDied("the engine has not been started")
        return self.engine


class LocalHandle:
    """Runs a service on an event loop in a thread of this process."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._dead = False
        self._service = asyncio.run_coroutine_threadsafe(self._call(build), self._loop).result()

    @staticmethod
    async def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`Handle`."""
        if self._dead:
            failed: Future[Any] = Future()
            failed.set_exception(EngineDied("the service was killed"))
            return failed
        bound = getattr(self._service, method)
        return asyncio.run_coroutine_threadsafe(self._call(bound, *args, **kwargs), self._loop)

    def kill(self) -> None:
        """See :class:`Handle`; what is running is abandoned."""
        self._dead = True
        self._loop.call_soon_threadsafe(self._loop.stop)


class RayHandle:
    """Runs a service in a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`Handle`."""
        return getattr(self.actor, method).remote(*args, **kwargs).future()

    def kill(self) -> None:
        """See :class:`Handle`."""
        import ray

        ray.kill(self.actor)


def settle(future: Future[Any], timeout: float | None = None) -> Any:
    """The result of a future, with Ray's wrappers taken off its exception.

    Raises:
        EngineDied: the actor or its engine is gone.
        TimeoutError: no result within ``timeout`` seconds.
        Exception: whatever the service raised, as it raised it.
    """
    try:
        return future.result(timeout)
    except Exception as error:  # the Ray actor boundary: unwrapped and raised again
        if not any(base.__module__.startswith("ray.") for base in type(error).__mro__):
            raise
        import ray.exceptions as rx

        if isinstance(error, rx.RayTaskError):  # Ray makes it an instance of its cause's class too
            raise error.cause from None
        if isinstance(error, (rx.RayActorError, rx.WorkerCrashedError, rx.NodeDiedError)):
            raise EngineDied("its process is gone (killed, or the machine is out of memory)") from None
        raise


def start_vllm(
    folder: str, config: EngineConfig, dtype: str, seed: int, cores: str | None, worker: int
) -> Awaitable[Engine]:
    """Starts a vLLM engine over a model folder; what ``RolloutService`` calls inside its actor."""
    from rollout.vllm_engine import VllmEngine

    return VllmEngine.create(folder, config, dtype=dtype, seed=seed, cores=cores, worker=worker)

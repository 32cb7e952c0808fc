"""Engines over a checkpoint that nobody trains: what ``r1 eval`` draws completions from.

Each engine reads the checkpoint itself. Before the first completion its log-probabilities of a canary text are compared
with those of this project's own forward pass over the same folder, in a process that ends once they agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.actors import Handle, RayHandle, settle
from pipelines.launch import Launcher
from pipelines.learner_service import LearnerService
from pipelines.resources import actor, count_gpus, own_cores, start_ray
from pipelines.rollout_pool import Job, RolloutPool, SyncReport, WeightSource, canary_prompts
from policy.config import ModelConfig
from policy.loading import check_model
from rollout.engine import EngineConfig
from rollout.types import RolloutGroup

_CANARY_PROMPTS = 2
_EXAMPLE_LENGTH = 48  # tokens of a real prompt that an attestation looks at


class CheckpointEngines:
    """Several engines over one model folder, in Ray actors.

    Args:
        folder: a Hugging Face folder on this machine.
        engine: number of engines, sizes, limits.
        dtype: ``float32`` | ``bfloat16``.
        seed: of vLLM and of the canary.
        note: receives what happened (a worker started, died, was replaced).
        attest: compare with the own forward pass first; needs memory for one more copy of the weights for that time.
        cpus: cores to use; 0 takes all.
        ray_address: an existing cluster's; None starts Ray here.

    Raises:
        ValueError: the folder holds no model, or one that vLLM cannot run here.
    """

    def __init__(
        self,
        folder: Path,
        engine: EngineConfig,
        *,
        dtype: str,
        seed: int,
        note: Callable[[dict[str, Any]], None],
        attest: bool = True,
        cpus: int = 0,
        ray_address: str | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self._model = ModelConfig(path=str(folder), dtype=dtype)
        check_model(self._model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._engine, self._seed, self._attest = engine, seed, attest
        self._reference: Handle | None = None
        self._cores = own_cores(cpus)
        start_ray(ray_address, len(self._cores))
        _check_gpus(engine, count_gpus())
        self._launch = Launcher(folder=folder, engine=engine, dtype=dtype, seed=seed, cores=self._cores, learners=0)
        self.count = self._launch.count()
        self._pool = RolloutPool(self._launch, engine, self.count, note)

    def start(self) -> None:
        """Begins to start every engine, and the reference beside them; returns at once."""
        self._pool.start()
        if self._attest:
            self._start_reference()

    def ready(self, prompts: Sequence[Sequence[int]]) -> SyncReport:
        """Waits for every engine and attests it on some of the prompts that will be asked.

        Raises:
            AttestationError: an engine does not compute what the checkpoint says.
            ValueError, WorkerFailure: the engines cannot be started.
        """
        chosen = random.Random(self._seed).sample(list(prompts), min(_CANARY_PROMPTS, len(prompts)))
        ends = [list(prompt)[-_EXAMPLE_LENGTH:] for prompt in chosen]
        canary = canary_prompts(ends, self.tokenizer, self._engine.max_model_len, self._seed)
        source = WeightSource(
            update=None, canary=canary if self._attest else (), dtype=self._model.dtype,
            score=lambda ids: self._ask_reference("sequence_logprobs", ids),
            margins=lambda ids: self._ask_reference("router_margins", ids),
            describe=lambda ids: self.tokenizer.convert_ids_to_tokens(list(ids)),
        )  # fmt: skip
        report = self._pool.sync(source)
        self._end_reference()
        return report

    def draw(self, jobs: Iterable[Job]) -> Iterator[RolloutGroup]:
        """Yields each job's completions as a group, as they finish, in any order.

        Raises:
            ValueError: a prompt does not fit into the context.
            WorkerFailure: too many engines died.
        """
        yield from self._pool.generate(jobs)
        self._end_reference()

    def close(self) -> None:
        """Ends every process."""
        import ray

        try:
            self._end_reference()
            self._pool.close()
        finally:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_reference(self) -> Handle:
        if self._reference is None:
            # On the CPU, wherever the engines run: it is asked for a hundred tokens.
            service = actor(LearnerService, max_concurrency=1, num_gpus=0).remote(
                self._model, self._seed, len(self._cores)
            )
            self._reference = RayHandle(service)
            self._loaded = self._reference.submit("load")
        return self._reference

    def _ask_reference(self, method: str, *arguments: Any) -> Any:
        reference = self._start_reference()  # again, when an engine was replaced
        settle(self._loaded)
        return settle(reference.submit(method, *arguments))

    def _end_reference(self) -> None:
        if self._reference is not None:
            self._reference.kill()
            self._reference = None


def fitting(engine: EngineConfig, *, longest_prompt: int, max_tokens: int, positions: int | None) -> EngineConfig:
    """The engine with a context for the longest prompt and its completion, as far as the model has positions.

    Args:
        engine: its ``max_model_len`` is replaced.
        longest_prompt, max_tokens: tokens.
        positions: the model's ``max_position_embeddings``; None when it names none.

    Raises:
        ValueError: the longest prompt alone does not fit.
    """
    wanted = longest_prompt + max_tokens + 1
    context = max(32, wanted if positions is None else min(wanted, positions))
    if longest_prompt + 1 > context:
        raise ValueError(f"a prompt takes {longest_prompt} tokens and the model has only {positions} positions")
    return replace(engine, max_model_len=context)


def _check_gpus(engine: EngineConfig, gpus: int) -> None:
    ranks = max(1, engine.workers) * engine.tensor_parallel
    if gpus and ranks > gpus:
        raise ValueError(
            f"engine.workers x engine.tensor_parallel asks for {ranks} GPUs, and there are {gpus}: lower them"
        )

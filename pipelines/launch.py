"""How rollout workers are laid out: how many, on which cores or GPUs of a machine or cluster, over which model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.actors import Handle, RayHandle, RolloutService, start_vllm
from pipelines.resources import actor, count_gpus, gpus_of_one
from rollout.engine import EngineConfig
from rollout.vllm_start import check_latent


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Starts rollout worker i; ``launcher(i)`` again replaces it.

    Attributes:
        folder: the Hugging Face folder that every engine loads.
        engine: sizes and limits.
        dtype: ``float32`` | ``bfloat16``.
        seed: of vLLM itself.
        cores: what all workers share, when they run on CPUs.
        learners: ranks of a learner beside the workers, which take a GPU each, or one of them half of the only one.
    """

    folder: Path
    engine: EngineConfig
    dtype: str
    seed: int
    cores: Sequence[int]
    learners: int = 1

    def count(self) -> int:
        """Number of workers: as configured, else one per core (at most 4) or as many as the GPUs hold."""
        if self.engine.workers:
            return self.engine.workers
        gpus = count_gpus()
        free = gpus - self.learners
        return max(1, free // self.engine.tensor_parallel) if gpus else min(4, len(self.cores))

    def __call__(self, index: int) -> Handle:
        """Starts worker ``index`` with its own cores or GPUs; returns before it is ready.

        Raises:
            ValueError: a model that vLLM does not run on a CPU.
        """
        count, cores = self.count(), self.cores
        own = cores[index * len(cores) // count : (index + 1) * len(cores) // count] or [cores[index % len(cores)]]
        gpus = count_gpus()
        each = gpus_of_one(gpus) if self.learners else min(gpus, 1)
        bind = None if gpus else ",".join(map(str, own))
        if not gpus:
            check_latent(self.folder)
        start = partial(start_vllm, str(self.folder), self.engine, self.dtype, self.seed, bind, index)
        options = {"num_gpus": each * self.engine.tensor_parallel, "max_concurrency": 256}
        return RayHandle(actor(RolloutService, **options).remote(start))

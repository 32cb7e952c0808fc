"""The Engine protocol: what samples completions, whatever stands behind it.

``rollout.vllm_engine`` is the real one, ``rollout.scripted_engine`` a deterministic one without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.types import Completion, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One completion to draw.

    Attributes:
        prompt_token_ids: the rendered prompt. [T_prompt]
        sample_index: position among the siblings, copied into the completion.
        seed: sampling seed of this request alone.
        routed_experts: return the experts that each token was sent to; the engine was started with
            ``return_routed_experts``.
    """

    prompt_token_ids: tuple[int, ...]
    sample_index: int
    seed: int
    routed_experts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightUpdate:
    """What a receiver needs to take over one version of the weights (no tensors: they travel by the backend).

    Attributes:
        version: the policy_version after the update.
        backend: ``shm`` | ``nccl`` | ``ipc``.
        names, dtypes, shapes: one entry per parameter or buffer, in sending order.
        checksum: hex digest over all bytes in that order; the receiver recomputes it.
        payload: backend-specific (for ``shm``: path, offsets and byte counts).
    """

    version: int
    backend: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    checksum: str
    payload: dict[str, Any]


class EngineDied(RuntimeError):
    """The engine (or the process that held it) is gone; what it was drawing must be drawn again elsewhere."""


class Engine(Protocol):
    """Samples completions with one version of the weights at a time."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next request will use (-1 before the first update)."""
        ...

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        """Draws one completion per request, in request order.

        Raises:
            ValueError: a prompt leaves no room for a single new token in the context.
        """
        ...

    async def update_weights(self, update: WeightUpdate) -> str:
        """Takes over the weights and returns the hex digest of the bytes that were received."""
        ...

    async def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of tokens 1..T-1 given those before them. [T] -> [T-1]"""
        ...

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Continues each prompt greedily and returns ``(tokens [T], log-probabilities of tokens 1..T-1 [T-1])``.

        Both the prompt's (prefill) and the new tokens' (decode) log-probabilities are the engine's, at temperature 1.
        """
        ...

    async def close(self) -> None:
        """Frees the engine; safe to call twice."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How rollout workers are laid out and run.

    Attributes:
        workers: number of rollout workers (engines); 0 = one per core on a CPU (at most 4), one per GPU beside the
            learner's. With another number each has other cores, and sums round differently in their last bits.
        max_model_len: context in tokens, prompt and completion together, >= 32.
        max_num_seqs: most sequences that one engine decodes at once.
        kv_cache_gib: KV cache of a CPU engine, GiB.
        gpu_memory_utilization: share of the GPU given to an engine, (0, 1].
        tensor_parallel: GPUs per engine.
        enforce_eager: skip graph compilation (starts sooner, decodes slower); null: yes on a CPU, no on a GPU.
        timeout_s: a group that takes longer marks its worker as hung; it is replaced. Seconds.
        max_replacements: the run stops after this many replaced workers in one run.
        weight_backend: ``shm`` (one host), ``nccl`` or ``ipc`` (GPUs): how weights travel.
        attest_tolerance: largest |Δlogp| between engine and learner on the canary, nats; 0 takes the dtype's default.
        return_routed_experts: rollouts carry the experts of each of their tokens, into the run folder too (tokens x MoE
            layers x experts of a token, about a byte each); ``router.replay`` of a stage turns it on by itself.
    """

    workers: int = 0
    max_model_len: int = 1024
    max_num_seqs: int = 256
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    tensor_parallel: int = 1
    enforce_eager: bool | None = None
    timeout_s: float = 1800.0
    max_replacements: int = 3
    weight_backend: str = "shm"
    attest_tolerance: float = 0.0
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        if self.weight_backend not in ("shm", "nccl", "ipc"):
            raise ValueError(f"weight_backend must be shm, nccl or ipc, got {self.weight_backend!r}")
        for name in ("max_model_len", "max_num_seqs", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.max_model_len < 32:
            raise ValueError(f"max_model_len must be >= 32 (an attestation takes 17 of them), got {self.max_model_len}")
        if self.workers < 0:
            raise ValueError(f"workers must be >= 0, got {self.workers}")
        for name in ("max_replacements", "attest_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        for name in ("kv_cache_gib", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")

"""vLLM as it comes, in one process on given cores: the peer of the rollout workers.

Its own defaults, none of our mends, no actor; the sampling work is the same (a seed per request, log-probabilities of
the sampled tokens), and no text is made of the tokens, which spares it a little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer import Port


@dataclass(frozen=True, kw_only=True)
class BareConfig:
    """Sizes of a bare engine, the same as those of the rollout workers.

    Attributes:
        folder: the model.
        cores: CPU cores of this process and its engine.
        max_model_len, max_num_seqs, kv_cache_gib: as ``EngineConfig`` has them.
    """

    folder: Path
    cores: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: float


@dataclass(frozen=True, kw_only=True)
class BareJob:
    """Completions to draw: one per (prompt token ids, seed)."""

    requests: tuple[tuple[tuple[int, ...], int], ...]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class BareAnswer:
    """Seconds of ``LLM.generate`` and the lengths of what it drew, tokens."""

    seconds: float
    lengths: tuple[int, ...]


def serve(port: Port, config: BareConfig) -> None:
    """Answers ``"ready"`` when the engine is up, then each :class:`BareJob` with a :class:`BareAnswer`."""
    llm = _start(config)
    port.receive()
    port.send("ready")
    while True:
        job: BareJob = port.receive()
        began = time.perf_counter()
        outputs = llm.generate(*_inputs(job), use_tqdm=False)
        seconds = time.perf_counter() - began
        port.send(BareAnswer(seconds=seconds, lengths=tuple(len(o.outputs[0].token_ids) for o in outputs)))


def _start(config: BareConfig) -> Any:
    os.sched_setaffinity(0, config.cores)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, config.cores))
    os.environ["OMP_NUM_THREADS"] = str(len(config.cores))
    os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM

    return LLM(
        model=str(config.folder),
        dtype="float32",
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def _inputs(job: BareJob) -> tuple[list[Any], list[Any]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(ids)} for ids, _ in job.requests]
    params = [
        SamplingParams(temperature=1.0, max_tokens=job.max_tokens, seed=seed, logprobs=0, detokenize=False)
        for _, seed in job.requests
    ]
    return prompts, params


def split(requests: Sequence[Any], parts: int) -> list[tuple[Any, ...]]:
    """Requests dealt out to ``parts`` engines in turn, as even in number as can be."""
    return [tuple(requests[i::parts]) for i in range(parts)]

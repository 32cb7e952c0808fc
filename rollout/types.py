"""The shared vocabulary of r1: what a problem, a completion and a rollout are.

Standard library only, so that every package may import it without weight. All types are frozen:
a stage of the pipeline returns new values (``dataclasses.replace``) instead of changing old ones.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the policy ended it itself: end-of-sequence token or a stop string
    LENGTH = "length"  # truncated by max_tokens or by the context


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One task for the policy.

    Attributes:
        id: unique within its source and stable over runs; part of every sampling seed.
        prompt: what the user asks, before any chat template.
        answer: the gold answer in the form that the reward function expects (None when it needs none).
        source: where it came from, e.g. ``reasoning_gym:chain_sum`` or ``jsonl:train.jsonl``.
        metadata: further columns of the row (JSON-serialisable).
    """

    id: str
    prompt: str
    answer: Any = None
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy; > 0 divides the logits.
        top_p: nucleus mass in (0, 1].
        top_k: 0 keeps every token.
        max_tokens: most tokens of one completion (>= 1).
        stop: strings that end a completion (kept out of the text).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine sampled for one prompt.

    Attributes:
        prompt_token_ids: the prompt as the engine saw it, template included. [T_prompt]
        token_ids: the sampled tokens, end-of-sequence included when it was sampled. [T]
        text: the decoded tokens, special tokens kept, end-of-sequence left out.
        rollout_logprobs: log-probability (nats) of each sampled token under the sampler's own
            distribution, after temperature / top-p / top-k. [T]
        finish_reason: why it ended.
        policy_version: version of the weights that sampled it.
        sample_index: position among the siblings of its problem, 0-based.
        seed: the sampling seed of the request.
        routed_experts: the experts that the sampler's mixture of experts sent each token to, as ``pack_experts`` writes
            them; None when they were not asked for. One row for each token that was fed: the prompt and the completion
            without its last token, which is sampled and never fed. [T_prompt + T - 1, MoE layers, K]
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    sample_index: int = 0
    seed: int = 0
    routed_experts: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A completion with its scores.

    Attributes:
        completion: what was sampled.
        scores: value by reward function; a function that did not apply, failed or timed out is absent.
        errors: ``name -> "KIND: …"`` of the functions that failed; KIND is error, invalid, crash, memory or timeout.
            Never turned into a score.
        metrics: further numbers that the reward functions report.
        reward: weighted sum of the scores; None when any function failed (the rollout never trains).
        advantage: filled by ``group_advantages``; None while unknown or when the rollout is left out.
    """

    completion: Completion
    scores: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All siblings sampled for one problem (``group_size`` of them, in sample order)."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


def sampling_seed(run_seed: int, step: int, problem_id: str, sample_index: int) -> int:
    """Seed of one request in [0, 2^63): a hash of what is sampled, never of who samples it.

    Results therefore do not depend on which worker drew them, in which order, or in which batch.
    """
    key = f"{run_seed}/{step}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


_PACKED = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})x([12]):([A-Za-z0-9+/=]*)")


def pack_experts(ids: bytes, shape: tuple[int, int, int], width: int) -> str:
    """Expert ids as one line of text, for a journal: ``<tokens>x<layers>x<K>x<width>:<base64 of zlib>``.

    About 1.3 characters an id with 256 experts that are used evenly, fewer with fewer experts.

    Args:
        ids: the ids, row by row, each an unsigned little-endian number.
        shape: tokens, MoE layers, experts of a token.
        width: bytes of an id, 1 or 2.

    Raises:
        ValueError: the bytes do not fill the shape.
    """
    tokens, layers, top_k = shape
    if width not in (1, 2) or len(ids) != tokens * layers * top_k * width:
        raise ValueError(f"{len(ids)} bytes are not {tokens} x {layers} x {top_k} ids of {width} bytes")
    packed = base64.b64encode(zlib.compress(ids, 1)).decode()
    return f"{tokens}x{layers}x{top_k}x{width}:{packed}"


def unpack_experts(text: str) -> tuple[bytes, tuple[int, int, int], int]:
    """Inverse of :func:`pack_experts`.

    Raises:
        ValueError: the text was not written by it, or is damaged.
    """
    damaged = ValueError(f"routed_experts {str(text)[:40]!r} is damaged: draw the rollout again")
    match = _PACKED.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise damaged
    tokens, layers, top_k, width = map(int, match.groups()[:4])
    size, reader = tokens * layers * top_k * width, zlib.decompressobj()
    try:
        ids = reader.decompress(base64.b64decode(match[5], validate=True), size + 1)  # no more memory than it may take
    except (ValueError, zlib.error) as error:
        raise damaged from error
    if len(ids) != size or not reader.eof or reader.unused_data:
        raise damaged
    return ids, (tokens, layers, top_k), width


def group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """A JSON-serialisable form that ``group_from_json`` reads back without loss (floats by repr)."""
    return asdict(group)


def group_from_json(row: Mapping[str, Any]) -> RolloutGroup:
    """Inverse of :func:`group_to_json`.

    Raises:
        KeyError, TypeError: the row was not written by :func:`group_to_json`.
    """
    rollouts = []
    for item in row["rollouts"]:
        c = dict(item["completion"])
        for key in ("prompt_token_ids", "token_ids", "rollout_logprobs"):
            c[key] = tuple(c[key])
        c["finish_reason"] = FinishReason(c["finish_reason"])
        rollouts.append(Rollout(**{**item, "completion": Completion(**c)}))
    return RolloutGroup(problem=Problem(**row["problem"]), rollouts=tuple(rollouts))

"""A deterministic engine without a model: what it says is a function of the prompt and the seed.

It satisfies ``rollout.engine.Engine`` and fails on demand, so that everything around an engine can be tested in
milliseconds: who asks what with which seed, versions and checksums of weight updates, slow, failing, hanging workers.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rollout.engine import GenerateRequest, WeightUpdate
from rollout.types import Completion, FinishReason, SamplingParams, pack_experts

_CHECKSUM = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scripted:
    """What the script says for one request.

    Attributes:
        token_ids: sampled tokens, end-of-sequence included when it ends by itself. [T]
        text: the decoded tokens without end-of-sequence.
        logprobs: nats, one per token; None invents a reproducible one per token. [T]
        routed_experts: experts of the prompt's tokens and then of the sampled ones but the last, for requests that ask
            for them. [T_prompt + T - 1][MoE layers][K], ids below 256
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None
    routed_experts: tuple[tuple[tuple[int, ...], ...], ...] | None = None


Script = Callable[[tuple[int, ...], int], Scripted]  # (prompt token ids, seed) -> what is said


@dataclass(kw_only=True)
class Faults:
    """What goes wrong, and when. Requests are counted from 1 over the whole life of the engine.

    Attributes:
        delay_s: every request takes so long, seconds; they overlap as in a real engine.
        raise_on: number of the request whose ``generate`` raises RuntimeError; 0 never.
        hang_on: number of the request whose ``generate`` never returns; 0 never.
        lose_update: version of an update that is confirmed but not taken over (stale weights); None loses none.
        wrong_digest: version of an update that is answered with the digest of other bytes; None for none.
    """

    delay_s: float = 0.0
    raise_on: int = 0
    hang_on: int = 0
    lose_update: int | None = None
    wrong_digest: int | None = None


@dataclass
class ScriptedEngine:
    """Engine over a script.

    Attributes:
        script: pure function of prompt and seed.
        faults: see :class:`Faults`.
        max_model_len: context in tokens; a completion that reaches it ends with ``length``.
        requests: every request that arrived, in order.
        updates: every update that arrived, in order.
    """

    script: Script
    faults: Faults = field(default_factory=Faults)
    max_model_len: int = 1024
    requests: list[GenerateRequest] = field(default_factory=list)
    updates: list[WeightUpdate] = field(default_factory=list)
    closed: bool = False
    _version: int = -1

    @property
    def policy_version(self) -> int:
        """Version of the last update that was taken over (-1 before the first)."""
        return self._version

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order; cut at ``max_tokens`` and at the context. ``stop`` is not looked at.

        Raises:
            ValueError: a prompt leaves no room for a new token.
            RuntimeError: the engine is closed, or ``faults.raise_on`` says so.
        """
        self._check_open()
        return list(await asyncio.gather(*(self._answer(request, params) for request in requests)))

    async def update_weights(self, update: WeightUpdate) -> str:
        """Takes over the version and confirms the checksum that was sent, as a real receiver of the same bytes would.

        Raises:
            ValueError: names, dtypes and shapes differ in number, or the checksum is no hex digest.
        """
        self._check_open()
        if not len(update.names) == len(update.dtypes) == len(update.shapes):
            raise ValueError(
                f"a weight update needs one dtype and one shape per name, got {len(update.names)} names, "
                f"{len(update.dtypes)} dtypes, {len(update.shapes)} shapes"
            )
        if not _CHECKSUM.fullmatch(update.checksum):
            raise ValueError(f"the checksum of a weight update must be a hex digest, got {update.checksum!r}")
        self.updates.append(update)
        if update.version != self.faults.lose_update:
            self._version = update.version
        if update.version == self.faults.wrong_digest:
            return hashlib.blake2b(update.checksum.encode(), digest_size=len(update.checksum) // 2).hexdigest()
        return update.checksum

    async def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        """Reproducible log-probabilities that depend on the tokens before and on the weights' version. [T] -> [T-1]"""
        self._check_open()
        return [invented_logprob(token_ids[: i + 1], self._version) for i in range(1, len(token_ids))]

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Continues each prompt by the script under seed 0; the log-probabilities are those of ``score_tokens``."""
        self._check_open()
        texts = [[*prompt, *self.script(tuple(prompt), 0).token_ids[:new_tokens]] for prompt in prompts]
        return [(text, await self.score_tokens(text)) for text in texts]

    async def close(self) -> None:
        """Safe to call twice; every later call is refused."""
        self.closed = True

    async def _answer(self, request: GenerateRequest, params: SamplingParams) -> Completion:
        room = self.max_model_len - len(request.prompt_token_ids)
        if room < 1:
            length = len(request.prompt_token_ids)
            raise ValueError(f"a prompt of {length} tokens leaves no room in a context of {self.max_model_len}")
        version = self._version
        self.requests.append(request)
        number = len(self.requests)
        if self.faults.delay_s:
            await asyncio.sleep(self.faults.delay_s)
        if number == self.faults.raise_on:
            raise RuntimeError(f"scripted failure of request {number}")
        if number == self.faults.hang_on:
            await asyncio.Event().wait()
        said = self.script(request.prompt_token_ids, request.seed)
        logprobs = said.logprobs
        if logprobs is None:
            context = request.prompt_token_ids + said.token_ids
            start = len(request.prompt_token_ids)
            logprobs = tuple(invented_logprob(context[: start + i + 1], 0) for i in range(len(said.token_ids)))
        assert len(logprobs) == len(said.token_ids), "a script gives one log-probability per token"
        completion = Completion(
            prompt_token_ids=request.prompt_token_ids,
            token_ids=said.token_ids,
            text=said.text,
            rollout_logprobs=logprobs,
            finish_reason=FinishReason.STOP,
            policy_version=version,
            sample_index=request.sample_index,
            seed=request.seed,
        )
        limit = min(room, params.max_tokens)
        completion = completion if len(said.token_ids) <= limit else _truncated(completion, limit)
        if not request.routed_experts:
            return completion
        assert said.routed_experts is not None, "the script gives no experts, and they were asked for"
        return replace(completion, routed_experts=_experts(completion, said.routed_experts))

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the engine is closed")


def _truncated(completion: Completion, limit: int) -> Completion:
    """The first ``limit`` tokens; the text is cut in proportion, for a script knows no tokenizer."""
    share = limit / len(completion.token_ids)
    return replace(
        completion,
        token_ids=completion.token_ids[:limit],
        rollout_logprobs=completion.rollout_logprobs[:limit],
        text=completion.text[: math.floor(len(completion.text) * share)],
        finish_reason=FinishReason.LENGTH,
    )


def _experts(completion: Completion, script: tuple[tuple[tuple[int, ...], ...], ...]) -> str:
    """The script's experts of the tokens that were fed, as text."""
    fed = script[: len(completion.prompt_token_ids) + len(completion.token_ids) - 1]
    flat = bytes(expert for token in fed for layer in token for expert in layer)
    return pack_experts(flat, (len(fed), len(fed[0]), len(fed[0][0])), 1)


def invented_logprob(token_ids: Sequence[int], version: int) -> float:
    """A number in (-5, 0] that only the tokens up to and including the last one, and the version, decide."""
    key = f"{version}/{tuple(token_ids)}".encode()
    return -5.0 * int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64

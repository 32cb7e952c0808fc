"""Where ``r1 eval`` gets its completions from: engines over a checkpoint, or an endpoint that somebody else runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evals.protocol import Protocol as EvalProtocol
from rollout.engine import EngineConfig
from rollout.template import THINK_OPEN, forces_thinking, prompt_text
from rollout.types import Problem, SamplingParams

if TYPE_CHECKING:
    from pipelines.eval_engines import CheckpointEngines
    from pipelines.rollout_pool import Job, SyncReport
    from rollout.endpoint_protocol import EndpointConfig


_SLOWEST_S = 0.5  # seconds of a token, at worst, in an engine that is not hung
_TOGETHER = 4096  # tokens, at most, of the samples of one problem that are asked for in one call


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One completion to draw: sample ``index`` of a problem, with its seed."""

    problem: Problem
    index: int
    seed: int
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A completion as it is kept until it is graded.

    Attributes:
        problem, index, seed: of the request.
        text: the completion, special tokens kept.
        tokens: its length; what the endpoint says, or 0 where that says nothing.
        finish_reason: ``stop`` | ``length``.
    """

    problem: Problem
    index: int
    seed: int
    text: str
    tokens: int
    finish_reason: str


class Sampler(Protocol):
    """Draws completions of prompts that were shown to it before."""

    @property
    def forced_think(self) -> bool:
        """The prompts end in ``<think>``: completions start inside the thinking."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What draws, for the results: model, dtype, engines; or the endpoint."""
        ...

    def start(self, problems: Sequence[Problem]) -> None:
        """Renders the prompts and begins to start what draws.

        Raises:
            ValueError: a prompt that does not fit, or a model that cannot be run.
        """
        ...

    def draw(self, asks: Iterable[Ask]) -> Iterator[Drawn]:
        """Yields the completions as they finish, in any order."""
        ...

    def close(self) -> None:
        """Ends what was started; safe to call twice."""
        ...


class EngineSampler:
    """Engines over a checkpoint folder.

    Args:
        folder: a Hugging Face folder on this machine.
        protocol: template, thinking and sampling.
        engine: number of engines, sizes, limits.
        dtype: ``float32`` | ``bfloat16``.
        seed: of the evaluation.
        note: receives what happened, for events.jsonl.
        attest: compare the engines with the own forward pass before the first completion.
        keep_context: ``engine.max_model_len`` was asked for; else it is fitted to prompts and token limit.

    Raises:
        ValueError: no model that can be evaluated here.
    """

    def __init__(
        self,
        folder: Path,
        protocol: EvalProtocol,
        engine: EngineConfig,
        *,
        dtype: str,
        seed: int,
        note: Callable[[dict[str, Any]], None],
        attest: bool = True,
        keep_context: bool = False,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from policy.config import ModelConfig
        from policy.loading import check_model

        check_model(ModelConfig(path=str(folder), dtype=dtype))
        self._folder, self._protocol, self._engine, self._dtype = folder, protocol, engine, dtype
        self._seed, self._note, self._attest, self._keep_context = seed, note, attest, keep_context
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder).get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._engines: CheckpointEngines | None = None
        self._report: SyncReport | None = None
        self.forced_think = False

    def describe(self) -> Mapping[str, Any]:
        """See :class:`Sampler`."""
        report = self._report if self._attest else None
        attested = {"mean_abs": report.mean_abs, "max_abs": report.max_abs} if report else False
        return {
            "kind": "engines", "dtype": self._dtype, "workers": self._engines.count if self._engines else 0,
            "tensor_parallel": self._engine.tensor_parallel, "max_model_len": self._engine.max_model_len,
            "attested": attested,
        }  # fmt: skip

    def start(self, problems: Sequence[Problem]) -> None:
        """See :class:`Sampler`."""
        from pipelines.eval_engines import CheckpointEngines, fitting

        thinking: set[bool] = set()
        for problem in problems:
            text = rendered(problem, self._tokenizer, self._protocol)
            thinking.add(forces_thinking(text))
            ids = self._tokenizer.encode(text, add_special_tokens=self._protocol.template != "chat")
            self._prompts[_key(problem)] = tuple(ids)
        self.forced_think = thinking == {True}
        longest = max(self._prompts, key=lambda key: len(self._prompts[key]))
        try:
            fitted = fitting(
                self._engine, longest_prompt=len(self._prompts[longest]),
                max_tokens=self._protocol.sampling.max_tokens, positions=self._positions,
            )  # fmt: skip
            self._engine = self._engine if self._keep_context else fitted
        except ValueError as error:
            raise ValueError(
                f"{longest}: {error}; take a model with a longer context, or leave the problem out (process_docs)"
            ) from None
        room = self._engine.max_model_len - len(self._prompts[longest]) - 1
        if room < self._protocol.sampling.max_tokens:
            told = f"completions end at the context of {self._engine.max_model_len} tokens, at the latest after {room} "
            limit = self._protocol.sampling.max_tokens
            print(f"{told}where the prompt is longest: {limit} do not fit", file=sys.stderr)
        # A sample of tens of thousands of tokens may take hours beside many others.
        patience = max(self._engine.timeout_s, _SLOWEST_S * self._protocol.sampling.max_tokens)
        self._engine = replace(self._engine, timeout_s=patience)
        self._engines = CheckpointEngines(
            self._folder, self._engine, dtype=self._dtype, seed=self._seed, note=self._note, attest=self._attest,
        )  # fmt: skip
        self._engines.start()

    def ready(self) -> None:
        """Waits until every engine is up and attested; the first call alone takes time.

        Raises:
            AttestationError: an engine does not compute what the checkpoint says.
            WorkerFailure: too many engines died.
        """
        assert self._engines is not None
        if self._report is None:
            self._report = self._engines.ready(list(self._prompts.values()))

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """The prompt of a problem that :meth:`start` was shown. [T_prompt]"""
        return self._prompts[_key(problem)]

    def draw(self, asks: Iterable[Ask]) -> Iterator[Drawn]:
        """See :class:`Sampler`.

        Raises:
            AttestationError: an engine does not compute what the checkpoint says.
            WorkerFailure: too many engines died.
        """
        self.ready()
        assert self._engines is not None
        for group in self._engines.draw(self._jobs(asks)):
            for completion in (rollout.completion for rollout in group.rollouts):
                yield Drawn(
                    problem=group.problem, index=completion.sample_index, seed=completion.seed, text=completion.text,
                    tokens=len(completion.token_ids), finish_reason=completion.finish_reason.value,
                )  # fmt: skip

    def _jobs(self, asks: Iterable[Ask]) -> Iterator[Job]:
        """Samples of one problem travel together where that costs a kill little: they are kept when all have ended."""
        from pipelines.rollout_pool import Job
        from rollout.engine import GenerateRequest

        def same(ask: Ask) -> tuple[str, SamplingParams]:
            return _key(ask.problem), ask.params

        for _, together in groupby(asks, key=same):
            while part := tuple(islice(together, max(1, _TOGETHER // self._protocol.sampling.max_tokens))):
                yield Job(
                    problem=part[0].problem, params=part[0].params,
                    requests=tuple(
                        GenerateRequest(
                            prompt_token_ids=self.prompt(ask.problem), sample_index=ask.index, seed=ask.seed)
                        for ask in part),
                )  # fmt: skip

    def close(self) -> None:
        """See :class:`Sampler`."""
        if self._engines is not None:
            self._engines.close()
            self._engines = None


class EndpointSampler:
    """An OpenAI-compatible endpoint: ``chat`` sends messages, ``completions`` the rendered prompt.

    Args:
        config: where, and how patiently.
        protocol: template ``chat`` sends the problem as the user's message; ``raw`` and ``r1-zero`` a text.
    """

    def __init__(self, config: EndpointConfig, protocol: EvalProtocol) -> None:
        self._config = replace(config, kind="chat" if protocol.template == "chat" else "completions")
        self._protocol = protocol
        self._open: Any = None
        # Why completions ended in its own words: an evaluation knows stop and length.
        self._ends: Counter[str] = Counter()
        self._uncounted = 0  # completions whose length it does not tell
        # A server hides the thinking, closes it with a tag, or has none: only what it sends says which.
        self.forced_think = False

    def describe(self) -> Mapping[str, Any]:
        """See :class:`Sampler`."""
        faults = dict(self._open.faults) if self._open is not None else {}
        return {
            "kind": "endpoint", "url": self._config.url, "api": self._config.kind, "faults": faults,
            "finish_reasons": dict(self._ends), "uncounted": self._uncounted,
        }  # fmt: skip

    def start(self, problems: Sequence[Problem]) -> None:
        """See :class:`Sampler`; connects to nothing yet."""
        from rollout.endpoint import Endpoint

        self._open = Endpoint(self._config)

    def draw(self, asks: Iterable[Ask]) -> Iterator[Drawn]:
        """See :class:`Sampler`.

        Raises:
            EndpointError: the endpoint cannot be used, or does not come back; what had finished was yielded.
        """
        from rollout.endpoint_protocol import EndpointJob

        chat = self._config.kind == "chat"
        jobs = (
            EndpointJob(
                problem=ask.problem,
                text="" if chat else prompt_text(ask.problem, _NoTokenizer(), self._protocol.template),
                messages=({"role": "user", "content": ask.problem.prompt},) if chat else (),
                sample_index=ask.index, seed=ask.seed, params=ask.params,
            )
            for ask in asks
        )  # fmt: skip
        for job, drawn in self._open.draw(jobs):
            # More than were asked for is no count.
            tokens = drawn.tokens if drawn.tokens is not None and 0 <= drawn.tokens <= job.params.max_tokens else 0
            self._ends[drawn.finish_reason] += 1
            self._uncounted += not tokens and bool(drawn.text)
            yield Drawn(
                problem=job.problem, index=job.sample_index, seed=job.seed, text=drawn.text, tokens=tokens,
                finish_reason="length" if drawn.finish_reason in ("length", "max_tokens") else "stop",
            )  # fmt: skip

    def close(self) -> None:
        """See :class:`Sampler`."""
        if self._open is not None:
            self._open.close()


class _NoTokenizer:
    """Templates other than ``chat`` are plain text."""

    chat_template = None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise AssertionError("an endpoint renders its own chat template")

    def encode(self, text: str, **options: Any) -> list[int]:
        raise AssertionError("an endpoint has its own tokenizer")


def rendered(problem: Problem, tokenizer: Any, protocol: EvalProtocol) -> str:
    """The prompt as the model reads it; with ``force_think`` a chat prompt ends in ``<think>``."""
    text = prompt_text(problem, tokenizer, protocol.template)
    if protocol.template == "chat" and protocol.force_think and not forces_thinking(text):
        return f"{text}{THINK_OPEN}\n"
    return text


def _key(problem: Problem) -> str:
    return f"{problem.source}, problem {problem.id}"

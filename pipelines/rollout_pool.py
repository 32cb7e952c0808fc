"""The rollout pool: several engines, one version of the weights, problems balanced over them.

*Consumes* jobs (a problem and its requests), *waits for* the first worker that finishes something, is *unblocked by*
a finished group, a started worker or a dead one, and *produces* groups as they finish. A worker receives jobs only
while it holds the current, attested version; one that died or hung is replaced and its jobs are drawn again, with the
same seeds, so that the result is the same.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pipelines.actors import Handle, settle
from pipelines.weight_sync import AttestationError, attest_bytes, attest_meaning, before_ties
from rollout.engine import EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Problem, Rollout, RolloutGroup, SamplingParams

_POLL_S = 1.0  # how often hung workers are looked for while nothing finishes
_START_TIMEOUT_S = 900.0
CANARY_TOKENS = 16
"""New tokens per prompt of an attestation by meaning."""
_NOISE_LENGTH = 24


class WorkerFailure(RuntimeError):
    """Rollout workers failed more often than ``engine.max_replacements`` allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All samples to draw for one problem."""

    problem: Problem
    requests: tuple[GenerateRequest, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one attested weight sync cost and showed.

    Attributes:
        version: the policy_version that every worker now holds.
        seconds: from the first byte to the last attestation.
        bytes: bytes of one copy of the weights.
        mean_abs, max_abs: |Δlogp| between engine and learner over the canary tokens, nats.
        checksum: hex digest of the weights.
    """

    version: int
    seconds: float
    bytes: int
    mean_abs: float
    max_abs: float
    checksum: str


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """What the pool needs from the learner to bring a worker up to date.

    Attributes:
        update: the published version; None where engines keep the weights that they have read themselves.
        canary: prompts for the attestation by meaning; none leaves it out, where an evaluation was told to.
        score: log-probabilities of tokens 1..T-1 of given sequences under the published weights.
        margins: how near to a tie the routing of their tokens 0..T-2 is; asked for only when they differ.
        describe: token ids -> readable tokens, for the error message.
        dtype: of the engines, for the default tolerance.
    """

    update: WeightUpdate | None
    canary: Sequence[Sequence[int]]
    score: Callable[[Sequence[Sequence[int]]], list[list[float]]]
    margins: Callable[[Sequence[Sequence[int]]], list[list[float]]]
    describe: Callable[[Sequence[int]], list[str]]
    dtype: str

    @property
    def version(self) -> int:
        """The policy_version of the weights; 0 of what the engines have read themselves."""
        return self.update.version if self.update else 0


@dataclass
class _Slot:
    index: int
    handle: Handle | None = None
    starting: Future[Any] | None = None
    started_at: float = 0.0
    version: int = -1  # the attested one
    in_flight: dict[Future[Any], tuple[Job, float]] = field(default_factory=dict)


class RolloutPool:
    """Engines behind one ``generate``.

    Args:
        launch: starts worker i and returns its handle; called again to replace it.
        config: number of workers, limits, tolerance.
        on_event: receives what happened (a worker started, died, was replaced), for events.jsonl.
    """

    def __init__(
        self,
        launch: Callable[[int], Handle],
        config: EngineConfig,
        workers: int,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._launch, self._config, self._on_event = launch, config, on_event
        self._slots = [_Slot(index) for index in range(workers)]
        self._source: WeightSource | None = None
        self._replaced = 0
        self._finished: SimpleQueue[tuple[_Slot, Future[Any]]] = SimpleQueue()
        self._looked_at = 0.0

    def start(self) -> None:
        """Begins to start every worker; returns at once."""
        for slot in self._slots:
            if slot.handle is None:
                self._start(slot)

    def sync(self, source: WeightSource) -> SyncReport:
        """Gives every worker the published weights and attests them before the first rollout that uses them.

        Raises:
            AttestationError: bytes or meaning differ; the run must stop.
            WorkerFailure: too many workers died.
        """
        self.start()
        self._source = source
        started = time.monotonic()
        gaps = self._bring_up(self._slots)
        gaps = gaps or [0.0]
        return SyncReport(
            version=source.version,
            seconds=time.monotonic() - started,
            bytes=_size(source.update) if source.update else 0,
            mean_abs=sum(gaps) / len(gaps),
            max_abs=max(gaps),
            checksum=source.update.checksum if source.update else "",
        )

    def generate(self, jobs: Iterable[Job]) -> Iterator[RolloutGroup]:
        """Draws every job and yields its group (without scores) as soon as it is finished, in any order.

        Raises:
            ValueError: a prompt does not fit into the context.
            WorkerFailure: too many workers died.
        """
        assert self._source is not None, "sync the weights before the first rollout"
        queue = deque(jobs)
        while queue or any(slot.in_flight for slot in self._slots):
            self._dispatch(queue)
            for slot, future in self._next_finished():
                yield from self._collect(slot, future, queue)
            self._look_for_hung_ones(queue)

    def check_starting(self) -> None:
        """Tells early, while the workers still start, of a model or an option that no worker can run.

        Raises:
            ValueError: what the engine refused.
        """
        for slot in self._slots:
            if slot.starting is not None and slot.starting.done():
                with suppress(EngineDied):  # replaced when it is needed
                    settle(slot.starting)

    def close(self) -> None:
        """Ends every worker."""
        for slot in self._slots:
            if slot.handle is not None:
                slot.handle.kill()
                slot.handle = None

    def _start(self, slot: _Slot) -> None:
        slot.version, slot.in_flight = -1, {}
        slot.handle = self._launch(slot.index)
        slot.starting, slot.started_at = slot.handle.submit("ready"), time.monotonic()
        self._watch(slot, slot.starting)

    def _watch(self, slot: _Slot, future: Future[Any]) -> None:
        """The future comes out of ``_next_finished`` when it is done."""
        future.add_done_callback(lambda done: self._finished.put((slot, done)))

    def _next_finished(self) -> list[tuple[_Slot, Future[Any]]]:
        """What has finished, after the first of it came or a poll's time passed.

        Each finished future is looked at once: to wait for hundreds of them anew, whenever one finishes, was seen to
        take a tenth of a core.
        """
        found: list[tuple[_Slot, Future[Any]]] = []
        with suppress(Empty):
            found.append(self._finished.get(timeout=_POLL_S))
            while True:
                found.append(self._finished.get_nowait())
        return found

    def _dispatch(self, queue: deque[Job]) -> None:
        """Hands jobs to the least loaded workers that hold the current version."""
        assert self._source is not None
        current = [s for s in self._slots if s.starting is None and s.version == self._source.version]
        while queue and current:
            slot = min(current, key=lambda s: len(s.in_flight))
            # One group more than fits keeps the engine full while the next is on its way.
            if len(slot.in_flight) > math.ceil(self._config.max_num_seqs / max(1, len(queue[0].requests))):
                break
            job = queue.popleft()
            assert slot.handle is not None
            future = slot.handle.submit("generate", job.requests, job.params)
            slot.in_flight[future] = (job, time.monotonic())
            self._watch(slot, future)

    def _collect(self, slot: _Slot, future: Future[Any], queue: deque[Job]) -> Iterator[RolloutGroup]:
        """Takes what a worker finished; replaces it when it died."""
        if future is slot.starting:
            self._bring_up([slot])
            return
        if future not in slot.in_flight:
            return  # of a worker that was replaced meanwhile
        try:
            completions = settle(future)
        except EngineDied as error:
            self._replace(slot, str(error), queue)
            return
        job, _ = slot.in_flight.pop(future)
        yield RolloutGroup(problem=job.problem, rollouts=tuple(Rollout(completion=c) for c in completions))

    def _look_for_hung_ones(self, queue: deque[Job]) -> None:
        """Replaces workers that have not answered for too long."""
        now = time.monotonic()
        if now - self._looked_at < _POLL_S:
            return
        self._looked_at = now
        for slot in self._slots:
            if slot.starting is not None:
                if not slot.starting.done() and now - slot.started_at > _START_TIMEOUT_S:
                    self._replace(slot, f"not ready within {_START_TIMEOUT_S:g} s", queue)
                continue
            late = [job for f, (job, since) in slot.in_flight.items()
                    if not f.done() and now - since > self._config.timeout_s]  # fmt: skip
            if late:
                reason = f"no answer for {self._config.timeout_s:g} s (problem {late[0].problem.id})"
                self._replace(slot, reason, queue)

    def _replace(self, slot: _Slot, reason: str, queue: deque[Job]) -> None:
        """Starts another worker in the place of a lost one; its jobs go back to the front of the queue."""
        lost = [job for job, _ in slot.in_flight.values()]
        queue.extendleft(reversed(lost))
        self._replaced += 1
        self._on_event({
            "event": "rollout_worker_lost", "worker": slot.index, "reason": reason, "redrawn": len(lost),
            "replaced": self._replaced,
        })  # fmt: skip
        if slot.handle is not None:
            slot.handle.kill()
        if self._config.weight_backend == "nccl":
            raise WorkerFailure(
                f"rollout worker {slot.index} was lost ({reason}), and a group of nccl cannot be joined again: run the "
                "same command, it goes on from here (engine.weight_backend shm replaces workers in a running run)"
            )
        if self._replaced > self._config.max_replacements:
            raise WorkerFailure(
                f"rollout worker {slot.index} was lost ({reason}); {self._replaced} workers were lost in this run and "
                f"engine.max_replacements is {self._config.max_replacements}: see events.jsonl and the worker's log"
            )
        self._start(slot)

    def _bring_up(self, slots: Sequence[_Slot]) -> list[float]:
        """Starts, updates and attests workers side by side; replaces those that die meanwhile. Returns |Δlogp|s.

        Each step is asked of all of them before any answer is waited for: a collective transfer (nccl) needs every
        receiver at once.
        """
        assert self._source is not None
        source, gaps = self._source, []

        def attested(slot: _Slot, answer: Any) -> None:
            tokens, engine = [list(ids) for ids, _ in answer], [list(values) for _, values in answer]
            gaps.extend(self._attest(slot, tokens, engine, source.score(tokens)))
            slot.version = source.version

        pending = list(slots)
        while pending:
            alive, lost = self._ask_all(pending, lambda slot: slot.starting, self._started, _START_TIMEOUT_S)
            steps: list[tuple[str, tuple[Any, ...], Callable[[_Slot, Any], None]]] = []
            if (update := source.update) is not None:
                steps.append(("update_weights", (update,), partial(_check_bytes, update)))
            if source.canary:
                steps.append(("canary", (source.canary, CANARY_TOKENS), attested))
            for method, arguments, done in steps:
                alive, more = self._ask_all(
                    alive, partial(_submit, method=method, arguments=arguments), done, self._config.timeout_s
                )
                lost += more
            for slot in alive if not source.canary else ():
                slot.version = source.version
            pending = lost
        return gaps

    def _started(self, slot: _Slot, version: int) -> None:
        slot.starting = None
        self._on_event({"event": "rollout_worker_ready", "worker": slot.index})

    def _ask_all(
        self,
        slots: Sequence[_Slot],
        ask: Callable[[_Slot], Future[Any] | None],
        done: Callable[[_Slot, Any], None],
        timeout: float,
    ) -> tuple[list[_Slot], list[_Slot]]:
        """Asks all, then waits for each; returns those that answered and those that were lost and replaced."""
        answers = [(slot, ask(slot)) for slot in slots]
        alive: list[_Slot] = []
        lost: list[_Slot] = []
        for slot, future in answers:
            try:
                if future is not None:
                    done(slot, settle(future, timeout))
                alive.append(slot)
            except EngineDied as error:
                self._replace(slot, str(error), deque())
                lost.append(slot)
            except TimeoutError:
                self._replace(slot, "no answer while it was started or updated", deque())
                lost.append(slot)
        return alive, lost

    def _attest(
        self, slot: _Slot, tokens: list[list[int]], engine: list[list[float]], learner: list[list[float]]
    ) -> list[float]:
        """|Δlogp| of the canary's tokens, once they are accepted; those behind a router's tie left out."""
        source = self._source
        assert source is not None
        names = [source.describe(ids[1:]) for ids in tokens]
        rows = [[*zip(e, lr, n, strict=True)] for e, lr, n in zip(engine, learner, names, strict=True)]
        check = partial(
            attest_meaning, tolerance=self._config.attest_tolerance or None, dtype=source.dtype, worker=slot.index,
            version=source.version,
        )  # fmt: skip
        try:
            check(*_columns(rows))
        except AttestationError:
            settled = before_ties(source.margins(tokens), source.dtype)
            kept = [row[:count] for row, count in zip(rows, settled, strict=True)]
            left_out = sum(map(len, rows)) - sum(map(len, kept))
            if not left_out or left_out > sum(map(len, kept)):
                raise
            check(*_columns(kept))
            self._on_event({
                "event": "router_tie", "worker": slot.index, "version": source.version, "left_out": left_out,
            })  # fmt: skip
            rows = kept
        return [abs(e - lr) for row in rows for e, lr, _ in row]


def canary_prompts(asked: Sequence[Sequence[int]], tokenizer: Any, max_model_len: int, seed: int) -> list[list[int]]:
    """Prompts to attest weights with: those that are asked for real, and two of random tokens.

    The random ones touch embeddings that the task may never use.
    """
    rng = random.Random(seed)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(len(tokenizer)) if i not in special]
    noise = [[rng.choice(plain) for _ in range(_NOISE_LENGTH)] for _ in range(2)]
    room = max_model_len - CANARY_TOKENS - 1
    return [list(prompt)[:room] for prompt in (*asked, *noise)]


def _check_bytes(update: WeightUpdate, slot: _Slot, digest: str) -> None:
    attest_bytes(update, digest)


def _columns(rows: Sequence[Sequence[tuple[float, float, str]]]) -> tuple[list[float], list[float], list[str]]:
    found = [item for row in rows for item in row]
    return [e for e, _, _ in found], [lr for _, lr, _ in found], [name for _, _, name in found]


def _submit(slot: _Slot, *, method: str, arguments: tuple[Any, ...]) -> Future[Any]:
    assert slot.handle is not None
    return slot.handle.submit(method, *arguments)


def _size(update: WeightUpdate) -> int:
    width = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
    return sum(math.prod(s) * width.get(d.removeprefix("torch."), 4)
               for s, d in zip(update.shapes, update.dtypes, strict=True))  # fmt: skip

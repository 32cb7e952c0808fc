"""A pool of processes with a hard deadline for every single call.

One thread (the keeper) hands jobs to workers, collects results, and watches the deadlines: consumes submitted jobs and
workers' messages, waits for whichever comes first (a message, a new job, the nearest deadline), produces futures.
A call that overruns its deadline is the only one that fails: its worker is killed with all its children, a new one is
forked, and the other calls go on there. So it is with a call that takes its process down.

Jobs that take less time than their way to a worker and back travel several at a time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from rewards.base import RewardConfig
from rewards.nursery import Nursery, WorkerProcess
from rewards.processes import resident_bytes
from rewards.worker import Call, Failure, Outcome, Packet, Results, Setup, read_progress
from rollout.types import RolloutGroup

# A worker is replaced after so many jobs, so that what a function caches cannot grow for days.
JOBS_PER_WORKER = 5_000
_MEMORY_EVERY_S = 0.05
# As many jobs are handed out at a time as a worker has done in so many seconds of late, and at most so many.
_PACKET_S, _PACKET_JOBS = 0.01, 32
_GIB = 1 << 30


class PoolBroken(RuntimeError):
    """The reward processes are gone and cannot come back (closed, or killed from outside)."""


@dataclass
class _Job:
    group: RolloutGroup
    calls: tuple[Call, ...] = ()  # known once the functions are loaded
    future: Future[list[Outcome]] = field(default_factory=Future)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)

    def left(self) -> list[tuple[int, Call]]:
        return [(number, call) for number, call in enumerate(self.calls) if number not in self.outcomes]


@dataclass
class _Worker:
    """A process and what it was handed.

    Attributes:
        jobs: those that it works on.
        calls: theirs, by the number under which the process knows them: the job, and the call's number in it.
        handed_at: when, seconds.
        looked_at: when its memory was last looked at.
    """

    process: WorkerProcess
    jobs: list[_Job] = field(default_factory=list)
    calls: list[tuple[_Job, int]] = field(default_factory=list)
    jobs_done: int = 0
    handed_at: float = 0.0
    looked_at: float = 0.0

    @property
    def connection(self) -> Connection:
        return self.process.connection

    def progress(self) -> tuple[int, int]:
        """(call number, start in ns) of the call that it is in; start 0 between calls."""
        return read_progress(self.process.page)

    def take(self, jobs: list[_Job]) -> Packet:
        """Notes what is handed out now, and returns it as it is sent."""
        self.jobs, self.calls = jobs, []
        packet: Packet = []
        for job in jobs:
            numbered = []
            for number, call in job.left():
                numbered.append((len(self.calls), call))
                self.calls.append((job, number))
            packet.append((job.group, numbered))
        self.handed_at = time.monotonic()
        return packet

    def first_left(self) -> int | None:
        """Number of the first call without an outcome."""
        return next((each for each, (job, number) in enumerate(self.calls) if number not in job.outcomes), None)


class RewardPool:
    """Runs the calls of one group per job, on ``processes`` workers; usable from any thread.

    The constructor and ``submit`` return at once: functions are imported in the background. Nothing of it needs the
    main module to be importable or guarded. In a coroutine: ``await asyncio.wrap_future(pool.submit(group))``.

    Args:
        configs: the functions.
        processes: how many workers.
        forced_think: the prompts end in ``<think>``.
        search: folders in which the functions are looked for, after the import path.
        memory_gib: what one worker, with all that it started, may hold beyond the imported functions.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        processes: int,
        forced_think: bool = True,
        search: Sequence[str] = (),
        memory_gib: float = 2.0,
    ) -> None:
        self._configs = tuple(configs)
        self._processes = processes
        self._memory = memory_gib * _GIB
        self._loaded_bytes = 0
        self._waiting: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._loaded: Future[tuple[bool, ...]] = Future()
        self._deadlines: tuple[float, ...] = ()
        self._memory_due = 0.0
        self._job_s = 1.0  # seconds of one job, a running mean
        self._closing = False
        self._broken: Exception | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._nursery = Nursery(Setup(self._configs, tuple(search), forced_think))
        self._keeper = threading.Thread(target=self._keep, name="reward-pool", daemon=True)
        self._keeper.start()

    def ready(self, timeout_s: float | None = None) -> None:
        """Waits until every function is imported and checked.

        Raises:
            ValueError: a function is not there, does not fit its style, or its module raises (traceback as a note).
            PoolBroken: the processes died, or are not ready in time.
        """
        try:
            self._loaded.result(timeout_s)
        except TimeoutError:
            raise PoolBroken(f"the reward functions were not imported within {timeout_s:g} s") from None

    def submit(self, group: RolloutGroup) -> Future[list[tuple[Call, Outcome]]]:
        """Scores one group with every function; the result lists each call with its outcome per rollout.

        Raises:
            PoolBroken: the pool is closed or its processes are gone. What cannot be loaded shows in the result.
        """
        job = _Job(group)
        result: Future[list[tuple[Call, Outcome]]] = Future()

        def finish(done: Future[list[Outcome]]) -> None:
            error = done.exception()
            if result.cancelled() or not result.set_running_or_notify_cancel():
                return
            if error is None:
                result.set_result(list(zip(job.calls, done.result(), strict=True)))
            else:
                result.set_exception(error)

        job.future.add_done_callback(finish)
        with self._lock:
            if self._broken is not None or self._closing:
                raise self._broken or PoolBroken("the reward pool is closed")
            self._waiting.append(job)
            os.write(self._wake_write, b"+")
        return result

    def close(self) -> None:
        """Ends all processes; what is not finished fails with PoolBroken. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.write(self._wake_write, b"x")
        self._keeper.join()
        os.close(self._wake_write)
        os.close(self._wake_read)

    # What follows runs in the keeper thread.

    def _keep(self) -> None:
        error: Exception = PoolBroken("the thread that keeps the reward processes failed")
        try:
            self._load()
            while not self._closing:
                self._hand_out()
                self._collect()
                self._enforce_deadlines()
                self._enforce_memory()
            error = PoolBroken("the reward pool is closed")
        except (EOFError, OSError) as lost:
            status = self._nursery.status()
            error = PoolBroken(f"the process that runs the reward functions died (exit status {status}): {lost!r}")
        except (ValueError, PoolBroken) as refused:
            error = refused
        finally:
            self._shut_down(error)

    def _load(self) -> None:
        while not self._closing:
            if self._nursery.control in wait([self._nursery.control, self._wake_read]):
                verdict, *details = self._nursery.control.recv()
                if verdict == "ready":
                    whole_groups, self._deadlines, self._loaded_bytes = details
                    self._loaded.set_result(whole_groups)
                    return
                if verdict == "refused":
                    raise ValueError(details[0])
                problem = ValueError(f"the reward functions cannot be imported: {details[0]}")
                problem.add_note(details[1])
                raise problem
            os.read(self._wake_read, 4096)

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if not worker.jobs]
        while self._waiting and (idle or len(self._workers) < self._processes):
            worker = idle.pop() if idle else self._fork()
            with self._lock:
                fair = -(-len(self._waiting) // self._processes)  # the others are idle, or soon will be
                count = max(1, min(fair, _PACKET_JOBS, int(_PACKET_S / self._job_s)))
                jobs = [self._waiting.popleft() for _ in range(count)]
            for job in jobs:
                job.calls = job.calls or self._calls_of(job.group)
            try:
                worker.connection.send(worker.take(jobs))
            except OSError:  # it died while it was idle: nobody's call is to blame
                self._end(worker)
                self._settle(jobs)

    def _calls_of(self, group: RolloutGroup) -> tuple[Call, ...]:
        return tuple(
            Call(function, index)
            for function, whole in enumerate(self._loaded.result())
            for index in ([None] if whole else range(len(group.rollouts)))
        )

    def _fork(self) -> _Worker:
        worker = _Worker(self._nursery.fork())
        self._workers.append(worker)
        return worker

    def _collect(self) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.jobs}
        for source in wait([self._wake_read, self._nursery.control, *busy], self._patience()):
            if source == self._wake_read:
                os.read(self._wake_read, 4096)
            elif source is self._nursery.control:
                raise EOFError("the control channel closed")
            else:
                assert isinstance(source, Connection)
                self._receive(busy[source])

    def _receive(self, worker: _Worker) -> None:
        try:
            finished, results = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        self._take(worker, results)
        if finished:
            jobs, worker.jobs, worker.calls = worker.jobs, [], []
            worker.jobs_done += len(jobs)
            self._job_s += ((time.monotonic() - worker.handed_at) / len(jobs) - self._job_s) / 4
            if worker.jobs_done >= JOBS_PER_WORKER or self._hoards(worker):
                self._end(worker)
            self._settle(jobs)

    def _hoards(self, worker: _Worker) -> bool:
        """What is kept from call to call must not grow until an innocent call pays for it."""
        now = time.monotonic()
        if now - worker.looked_at < _MEMORY_EVERY_S:
            return False
        worker.looked_at = now
        return self._held(worker) > self._memory / 2

    def _take(self, worker: _Worker, results: Results) -> None:
        for each, outcome in results:
            job, number = worker.calls[each]
            failed = any(isinstance(result, Failure) for result in outcome)
            job.failures[number] += failed
            retries = self._configs[job.calls[number].function].retries
            if not failed or job.failures[number] > retries:
                job.outcomes[number] = outcome

    def _settle(self, jobs: Sequence[_Job]) -> None:
        """Answers jobs that have every outcome; those with calls to repeat go back to the front, in their order."""
        for job in reversed(jobs):
            if job.left():
                with self._lock:
                    self._waiting.appendleft(job)
        for job in jobs:
            if not job.left():
                job.future.set_result([job.outcomes[number] for number in range(len(job.calls))])

    def _patience(self) -> float | None:
        """Seconds until a deadline may pass; None while nothing runs."""
        busy = [worker for worker in self._workers if worker.jobs]
        if not busy:
            return None
        remaining = [overrun[1] for worker in busy if (overrun := self._overrun(worker)) is not None]
        # A worker may meanwhile have passed on to a call with a shorter deadline.
        return max(0.0, min([*remaining, *self._deadlines, _MEMORY_EVERY_S]))

    def _overrun(self, worker: _Worker) -> tuple[int, float] | None:
        """(call number, seconds left) of the call that a worker is in; None between calls."""
        each, start = worker.progress()
        if not start:
            return None
        return each, self._deadlines[self._function(worker, each)] - (time.monotonic_ns() - start) / 1e9

    def _function(self, worker: _Worker, each: int) -> int:
        job, number = worker.calls[each]
        return job.calls[number].function

    def _enforce_deadlines(self) -> None:
        for worker in [worker for worker in self._workers if worker.jobs]:
            overrun = self._overrun(worker)
            if overrun is None or overrun[1] > 0:
                continue
            stack = worker.process.stack()
            self._end(worker)
            timeout_s = self._configs[self._function(worker, overrun[0])].timeout_s
            failure = Failure(f"timeout: no result after {timeout_s:g} s, process killed", stack)
            self._fail(worker, overrun[0], failure)

    def _enforce_memory(self) -> None:
        """Ends the workers that hold too much. Watched from here: a limit inside would also stop innocent imports."""
        now = time.monotonic()
        if now < self._memory_due:
            return
        self._memory_due = now + _MEMORY_EVERY_S
        for worker in [worker for worker in self._workers if worker.jobs]:
            held = self._held(worker)
            if held <= self._memory:
                continue
            each, start = worker.progress()
            stack = worker.process.stack() if start else ""
            self._end(worker)
            text = (
                f"the process held {held / _GIB:.1f} GiB, more than memory_gib {self._memory / _GIB:g}, and was killed"
            )
            self._fail(worker, each if start else worker.first_left(), Failure(f"memory: {text}", stack))

    def _held(self, worker: _Worker) -> int:
        """Bytes that a worker and what it started hold beyond the imported functions."""
        return resident_bytes(worker.process.pid, apart=self._loaded_bytes)

    def _bury(self, worker: _Worker) -> None:
        """A worker died by itself: the call that it was in has failed, the others go on elsewhere."""
        each, start = worker.progress()
        how = self._end(worker, died=True)
        # Between calls the first one left is to blame, or it would come back for ever.
        blamed = each if start else worker.first_left()
        self._fail(worker, blamed, Failure(f"crash: the process of the reward function {how}"))

    def _fail(self, worker: _Worker, each: int | None, failure: Failure) -> None:
        """One call of an ended worker failed, unless its result arrived after all; the rest goes on elsewhere."""
        if each is not None:
            job, number = worker.calls[each]
            if number not in job.outcomes:
                width = len(job.group.rollouts) if job.calls[number].rollout is None else 1
                self._take(worker, [(each, [failure] * width)])
        self._settle(worker.jobs)

    def _end(self, worker: _Worker, *, died: bool = False) -> str:
        """Kills a worker with all that it started, and keeps what it had sent already; says how it ended if it died."""
        self._workers.remove(worker)
        how = self._nursery.autopsy(worker.process.pid) if died else str(self._nursery.end(worker.process.pid))
        with contextlib.suppress(EOFError, OSError):
            while worker.jobs and worker.connection.poll():
                self._take(worker, worker.connection.recv()[1])
        worker.process.close()
        return how

    def _shut_down(self, error: Exception) -> None:
        with self._lock:
            self._broken = error
            jobs = [*self._waiting, *(job for worker in self._workers for job in worker.jobs)]
            self._waiting.clear()
        for worker in self._workers:
            worker.process.close()
        self._workers.clear()
        self._nursery.close()
        if not self._loaded.done():
            self._loaded.set_exception(error)
        for job in jobs:
            job.future.set_exception(error)

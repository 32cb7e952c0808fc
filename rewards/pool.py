"""A pool of processes with a hard deadline for every single call.

One thread (the keeper) hands jobs to workers, collects results, and watches the deadlines: consumes submitted jobs and
workers' messages, waits for whichever comes first (a message, a new job, the nearest deadline), produces futures.
A call that overruns its deadline is the only one that fails: its worker is killed with all its children, a new one is
forked, and the other calls of the job go on there. So it is with a call that takes its process down.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import BinaryIO

from rewards.base import RewardConfig
from rewards.worker import STACK_OFFSET, Call, Failure, Outcome, Results, Setup, read_progress
from rollout.types import RolloutGroup

_NURSERY = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from rewards.worker import nursery_main
nursery_main(int(sys.argv[1]))
"""
# One thread of arithmetic per worker; and a nursery without threads of its own can be forked safely.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# A worker is replaced after so many jobs, so that what a function caches cannot grow for days.
JOBS_PER_WORKER = 5_000
_STACK_WAIT_S = 0.2


class PoolBroken(RuntimeError):
    """The reward processes are gone and cannot come back (closed, or killed from outside)."""


@dataclass
class _Job:
    group: RolloutGroup
    calls: tuple[Call, ...]
    future: Future[list[Outcome]] = field(default_factory=Future)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)

    def left(self) -> list[tuple[int, Call]]:
        return [(number, call) for number, call in enumerate(self.calls) if number not in self.outcomes]


@dataclass
class _Worker:
    pid: int
    connection: Connection
    file: BinaryIO
    page: mmap.mmap
    job: _Job | None = None
    jobs_done: int = 0

    def close(self) -> None:
        self.connection.close()
        self.page.close()
        self.file.close()


class RewardPool:
    """Runs the calls of one group per job, on ``processes`` workers.

    The constructor returns at once: functions are imported in the background. Nothing of it needs the main module to
    be importable or guarded.
    """

    def __init__(
        self, configs: Sequence[RewardConfig], *, processes: int, forced_think: bool = True, search: Sequence[str] = ()
    ) -> None:
        self._configs = tuple(configs)
        self._processes = processes
        self._waiting: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._loaded: Future[tuple[bool, ...]] = Future()
        self._deadlines: tuple[float, ...] = ()
        self._closing = False
        self._broken: Exception | None = None
        self._wake_read, self._wake_write = os.pipe()
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        path = json.dumps([root, *(entry or os.getcwd() for entry in sys.path)])
        self._nursery = subprocess.Popen(
            # What the compiler says of other people's code would come before every run's first line.
            [sys.executable, "-P", "-W", "ignore::SyntaxWarning", "-c", _NURSERY, str(theirs.fileno()), path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward function prints must not mix with the program's own output
            env={**os.environ, **_ONE_THREAD},
        )
        theirs.close()
        self._control = Connection(ours.detach())
        self._control.send(Setup(self._configs, tuple(search), forced_think))
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
        """Scores one group with every function; the result lists each call with its outcome per rollout."""
        self.ready()
        calls = tuple(
            Call(function, index)
            for function, whole in enumerate(self._loaded.result())
            for index in ([None] if whole else range(len(group.rollouts)))
        )
        job = _Job(group, calls)
        result: Future[list[tuple[Call, Outcome]]] = Future()

        def finish(done: Future[list[Outcome]]) -> None:
            error = done.exception()
            if error is None:
                result.set_result(list(zip(calls, done.result(), strict=True)))
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
            error = PoolBroken("the reward pool is closed")
        except (EOFError, OSError) as lost:
            status = self._nursery.poll()
            error = PoolBroken(f"the process that runs the reward functions died (exit status {status}): {lost!r}")
        except (ValueError, PoolBroken) as refused:
            error = refused
        finally:
            self._shut_down(error)

    def _load(self) -> None:
        while not self._closing:
            if self._control in wait([self._control, self._wake_read]):
                verdict, *details = self._control.recv()
                if verdict == "ready":
                    whole_groups, self._deadlines = details
                    self._loaded.set_result(whole_groups)
                    return
                if verdict == "refused":
                    raise ValueError(details[0])
                problem = ValueError(f"the reward functions cannot be imported: {details[0]}")
                problem.add_note(details[1])
                raise problem
            os.read(self._wake_read, 4096)

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker.job is None]
        while self._waiting and (idle or len(self._workers) < self._processes):
            worker = idle.pop() if idle else self._fork()
            with self._lock:
                worker.job = self._waiting.popleft()
            try:
                worker.connection.send((worker.job.group, worker.job.left()))
            except OSError:  # it died while it was idle: nobody's call is to blame
                job = worker.job
                self._end(worker)
                self._settle(job)

    def _fork(self) -> _Worker:
        file = _memory_file()
        file.truncate(STACK_OFFSET)
        ours, theirs = socket.socketpair()
        self._control.send(("fork",))
        for handle in (theirs.fileno(), file.fileno()):
            send_handle(self._control, handle, self._nursery.pid)
        theirs.close()
        worker = _Worker(
            pid=self._control.recv(),
            connection=Connection(ours.detach()),
            file=file,
            page=mmap.mmap(file.fileno(), STACK_OFFSET),
        )
        self._workers.append(worker)
        return worker

    def _collect(self) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        for source in wait([self._wake_read, self._control, *busy], self._patience()):
            if source == self._wake_read:
                os.read(self._wake_read, 4096)
            elif source is self._control:
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
        job = worker.job
        assert job is not None
        self._take(job, results)
        if finished:
            worker.job = None
            worker.jobs_done += 1
            if worker.jobs_done >= JOBS_PER_WORKER:
                self._end(worker)
            self._settle(job)

    def _take(self, job: _Job, results: Results) -> None:
        for number, outcome in results:
            failed = any(isinstance(each, Failure) for each in outcome)
            job.failures[number] += failed
            retries = self._configs[job.calls[number].function].retries
            if not failed or job.failures[number] > retries:
                job.outcomes[number] = outcome

    def _settle(self, job: _Job) -> None:
        """Answers a job that has every outcome; one with calls to repeat goes back to the front."""
        if job.left():
            with self._lock:
                self._waiting.appendleft(job)
        else:
            job.future.set_result([job.outcomes[number] for number in range(len(job.calls))])

    def _patience(self) -> float | None:
        """Seconds until a deadline may pass; None while nothing runs."""
        busy = [worker for worker in self._workers if worker.job is not None]
        if not busy:
            return None
        remaining = [overrun[1] for worker in busy if (overrun := self._overrun(worker)) is not None]
        # A worker may meanwhile have passed on to a call with a shorter deadline.
        return max(0.0, min([*remaining, *self._deadlines]))

    def _overrun(self, worker: _Worker) -> tuple[int, float] | None:
        """(call number, seconds left) of the call that a worker is in; None between calls."""
        assert worker.job is not None
        number, start = read_progress(worker.page)
        if not start:
            return None
        deadline = self._deadlines[worker.job.calls[number].function]
        return number, deadline - (time.monotonic_ns() - start) / 1e9

    def _enforce_deadlines(self) -> None:
        for worker in [worker for worker in self._workers if worker.job is not None]:
            overrun = self._overrun(worker)
            if overrun is None or overrun[1] > 0:
                continue
            job, number = worker.job, overrun[0]
            assert job is not None
            stack = self._stack_of(worker)
            self._end(worker)
            timeout_s = self._configs[job.calls[number].function].timeout_s
            self._fail(job, number, Failure(f"timeout: no result after {timeout_s:g} s, process killed", stack))

    def _bury(self, worker: _Worker) -> None:
        """A worker died by itself: the call that it was in has failed, the others go on elsewhere."""
        job = worker.job
        assert job is not None
        number, start = read_progress(worker.page)
        status = self._end(worker)
        if os.WIFSIGNALED(status):
            how = f"by signal {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            how = f"with exit status {os.waitstatus_to_exitcode(status)}"
        # Never in a call: blame the first one left, or a job that kills its workers would come back for ever.
        blamed = number if start else next((each for each, _ in job.left()), None)
        self._fail(job, blamed, Failure(f"error: the process of the reward function ended {how}"))

    def _fail(self, job: _Job, number: int | None, failure: Failure) -> None:
        """One call of a job failed, unless its result arrived after all; the rest goes on."""
        if number is not None and number not in job.outcomes:
            width = len(job.group.rollouts) if job.calls[number].rollout is None else 1
            self._take(job, [(number, [failure] * width)])
        self._settle(job)

    def _end(self, worker: _Worker) -> int:
        """Kills a worker with its children, keeps what it had sent already, and returns its exit status."""
        self._workers.remove(worker)
        self._control.send(("end", worker.pid))
        status = self._control.recv()
        with contextlib.suppress(EOFError, OSError):
            while worker.job is not None and worker.connection.poll():
                self._take(worker.job, worker.connection.recv()[1])
        worker.close()
        return status

    def _stack_of(self, worker: _Worker) -> str:
        """Where a hung call stands: its process writes the stack on a signal, even from inside C code."""
        os.kill(worker.pid, signal.SIGUSR1)  # not reaped by anybody but the nursery: the pid is its own
        limit = time.monotonic() + _STACK_WAIT_S
        text = b""
        while time.monotonic() < limit:
            longer = os.pread(worker.file.fileno(), 64_000, STACK_OFFSET)
            if longer and longer == text:
                break
            text = longer
            time.sleep(0.005)
        return text.decode(errors="replace")

    def _shut_down(self, error: Exception) -> None:
        with self._lock:
            self._broken = error
            jobs = [*self._waiting, *(worker.job for worker in self._workers if worker.job is not None)]
            self._waiting.clear()
        self._control.close()  # the nursery sees it and kills the workers
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        try:
            self._nursery.wait(5.0)
        except subprocess.TimeoutExpired:
            self._nursery.kill()  # still inside an import
            self._nursery.wait()
        if not self._loaded.done():
            self._loaded.set_exception(error)
        for job in jobs:
            job.future.set_exception(error)


def _memory_file() -> BinaryIO:
    """A file that lives in memory where the system has such: a full disk must not break a shared page."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("reward-worker"), "r+b")
    return tempfile.TemporaryFile()

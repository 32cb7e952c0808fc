"""Draws completions from an OpenAI-compatible endpoint: many requests at once, in the order in which they finish.

The requests live in one thread with an event loop, which exists only while completions are drawn; jobs are pulled and
completions are handed over in the caller's thread. Faults that may pass are tried again; one that does not ends the
drawing with an :class:`EndpointError`, after everything that had finished.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from rollout.endpoint_http import Acquaintance, Client, key_of
from rollout.endpoint_protocol import Drawn, EndpointConfig, EndpointError, EndpointJob, Fault, one_line

__all__ = ["Drawn", "Endpoint", "EndpointConfig", "EndpointError", "EndpointJob"]

FIRST_PAUSE_S = 1.0  # before the second attempt; doubled each time
LONGEST_PAUSE_S = 60.0  # of ours; the endpoint may ask for more


class Endpoint:
    """An endpoint that draws completions. Close it, or use it in a ``with`` statement.

    Attributes:
        config: as given.
        faults: attempts that brought no completion, by kind: a status, ``timeout``, ``connection`` or ``reply``.

    Example:
        >>> with Endpoint(EndpointConfig(url="http://localhost:8000/v1", model="r1")) as endpoint:
        ...     for job, drawn in endpoint.draw(jobs):
        ...         print(job.problem.id, job.sample_index, drawn.text)
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Reads the key; connects to nothing.

        Raises:
            EndpointError: what the environment holds for a key cannot be one.
        """
        self.config = config
        self.faults: Counter[str] = Counter()
        self._key = key_of(config.api_key_env)
        self._known = Acquaintance()
        self._pace = Pace(config.requests_per_minute)
        self._drawing: _Drawing | None = None
        self._closed = False

    def draw(self, jobs: Iterable[EndpointJob]) -> Generator[tuple[EndpointJob, Drawn], None, None]:
        """Yields every job once with its completion, as they finish; at most ``concurrency`` are in flight.

        Jobs are pulled in the caller's thread, at most ``2 * concurrency`` ahead of what was yielded, so that the
        requests go on while the caller works on a completion. One drawing at a time.

        Raises:
            EndpointError: the endpoint cannot be used, or failed for one completion to the last attempt; everything
                that had finished was yielded before. What was in flight is given up.
        """
        if self._closed or self._drawing is not None:
            raise RuntimeError("this endpoint is closed" if self._closed else "this endpoint draws already")
        client = Client(self.config, self._key, self._known)
        drawing = self._drawing = _Drawing(self.config, client, self._pace, self.faults)
        try:
            yield from drawing.run(iter(jobs))
        finally:
            drawing.stop()
            if self._drawing is drawing:
                self._drawing = None

    def close(self) -> None:
        """Ends a drawing that goes on, its thread and its connections; safe to call twice, and from another thread."""
        self._closed = True
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.stop()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pace:
    """When attempts may start: so many a minute, and none while the endpoint asks to wait. For one event loop."""

    def __init__(self, per_minute: int) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next = self._held_until = 0.0  # on the clock of time.monotonic

    def hold(self, seconds: float) -> None:
        """Lets nothing start for so long."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Returns when one more attempt may start."""
        while (now := time.monotonic()) < self._held_until:  # may be moved meanwhile
            await asyncio.sleep(self._held_until - now)
        start = max(now, self._next)
        self._next = start + self._gap_s
        await asyncio.sleep(start - now)


@dataclass
class _Attempts:
    """The attempts of one job so far.

    Attributes:
        made: all of them.
        counted: failures that count against ``retries``.
        streak: all failures; the pauses grow with them.
        completions: the endpoint's completions at the last failure.
    """

    made: int = 0
    counted: int = 0
    streak: int = 0
    completions: int = 0


class _Drawing:
    """One call of ``Endpoint.draw``: a thread with an event loop, and a task per job."""

    def __init__(self, config: EndpointConfig, client: Client, pace: Pace, faults: Counter[str]) -> None:
        self._config, self._client, self._pace, self._faults = config, client, pace, faults
        self._results: queue.SimpleQueue[tuple[EndpointJob, Drawn] | BaseException] = queue.SimpleQueue()
        self._ending = False  # no further job is begun
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock, self._stopped = threading.Lock(), False
        self._thread = threading.Thread(target=self._live, name="endpoint", daemon=True)

    # --- the caller's thread

    def run(self, jobs: Iterator[EndpointJob]) -> Iterator[tuple[EndpointJob, Drawn]]:
        """Hands jobs over and yields what becomes of them."""
        self._start()
        waiting, more = 0, True
        while True:
            while more and waiting < 2 * self._config.concurrency and not self._ending:
                job = next(jobs, None)
                if job is None:
                    more = False
                    break
                waiting += 1
                with suppress(RuntimeError):  # the loop is closed: the results end in an error that says why
                    self._loop.call_soon_threadsafe(self._begin, job)
            if not waiting and not more:
                return
            found = self._results.get()
            if isinstance(found, BaseException):
                raise found
            waiting -= 1
            yield found

    def _start(self) -> None:
        with self._lock:
            if self._stopped:
                raise EndpointError(f"the endpoint {self._config.url} was closed before anything was drawn")
            self._loop = asyncio.new_event_loop()
            self._main = self._loop.create_task(self._serve())  # its first step comes before the first job's
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread with everything in it; safe to call twice, and from another thread."""
        with self._lock:
            first, self._stopped = not self._stopped, True
        if self._thread.ident is None:
            return
        if first:
            with suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    # --- the other thread

    def _live(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._main]))
        self._ending = True
        self._loop.run_until_complete(self._end_tasks())  # of a drawing that could not even begin
        self._loop.run_until_complete(self._loop.shutdown_default_executor())  # host names were looked up there
        self._loop.close()
        bug = None if self._main.cancelled() else self._main.exception()
        self._results.put(bug or EndpointError(f"the endpoint {self._config.url} was closed during a drawing"))

    async def _serve(self) -> None:
        self._places, self._failure = asyncio.Semaphore(self._config.concurrency), asyncio.Event()
        async with self._client:
            try:
                await self._failure.wait()
                await self._end_tasks()  # first: what finished meanwhile stands before the error
                assert self._error is not None
                self._results.put(self._error)
                await asyncio.Event().wait()  # until stop() cancels this
            finally:
                self._ending = True
                await self._end_tasks()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, job: EndpointJob) -> None:
        if not self._ending:
            task = self._loop.create_task(self._draw_one(job))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._ending:
            self._ending, self._error = True, error
            self._failure.set()

    async def _draw_one(self, job: EndpointJob) -> None:
        """Draws one completion, with as many attempts as it takes."""
        so_far = _Attempts()
        async with self._places:
            while True:
                await self._pace.turn()
                so_far.made += 1
                began = time.monotonic()
                try:
                    drawn = await self._client.complete(job)
                except Fault as found:
                    fault = found
                else:
                    seconds = time.monotonic() - began
                    self._results.put((job, replace(drawn, seed=job.seed, seconds=seconds, attempts=so_far.made)))
                    return
                # Outside of the handler: an error that is raised here must not carry the fault, nor the request, along.
                await asyncio.sleep(self._pause(fault, so_far, job))

    def _pause(self, fault: Fault, so_far: _Attempts, job: EndpointJob) -> float:
        """Seconds until the next attempt.

        Raises:
            EndpointError: there is none.
        """
        config, known = self._config, self._client.known
        self._faults[fault.kind] += 1
        # A rate limit is about all requests: as long as some of them get through, nobody's patience is used up.
        patient = fault.kind == "429" and so_far.streak and known.completions > so_far.completions
        so_far.streak += 1
        so_far.counted = 1 if patient else so_far.counted + 1
        so_far.completions = known.completions
        told = f"the endpoint {config.url} {fault.told}"
        where = f"problem {one_line(job.problem.id)!r}, sample {job.sample_index}"
        never = not (known.heard if fault.kind == "connection" else known.completions)
        if fault.final or (fault.final_at_first and never):
            raise EndpointError(f"{told} ({where})")
        if so_far.counted > config.retries:
            raise EndpointError(f"{told}; given up after {so_far.made} attempts ({where})")
        jitter = random.Random(f"{job.seed}/{so_far.streak}").random()  # [0, 1), the same in every run
        if fault.pause_s is None:
            longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(so_far.streak - 1, 30))
            return longest * (1 + jitter) / 2
        if fault.pause_s > config.timeout_s:
            asked = f"asks to come back in {fault.pause_s:.0f} s, which is more than timeout_s"
            raise EndpointError(f"{told}, and {asked} ({where})")
        if fault.kind == "429":
            self._pace.hold(fault.pause_s)
        return fault.pause_s + FIRST_PAUSE_S * jitter

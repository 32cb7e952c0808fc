"""The processes that run reward functions.

One *nursery* process imports every reward function once, and forks a worker whenever it is asked to: a worker that had
to be killed is replaced in milliseconds, with everything imported. Neither ever imports the program's main module, so
any script may use a rubric, guarded or not, and nothing heavy is loaded that no reward function asked for.

The parent owns the deadlines (rewards/pool.py). A worker notes in shared memory which call it runs and since when;
whatever the call does, the parent reads that note, and the nursery kills the worker with all its children.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from rewards.base import RewardConfig, Score, preload
from rewards.calling import BoundReward, CallTimeout, NotAScore, bind
from rewards.processes import adopt_orphans, children, die_with_parent, end_tree, resident_bytes
from rollout.types import RolloutGroup

# The shared page of a worker: call number and start (ns, monotonic; 0 = between calls), then the stack of a hung call.
PROGRESS = struct.Struct("qq")
STACK_OFFSET = mmap.PAGESIZE
FLUSH_S = 0.05
LOST_CONNECTION = 77  # exit status of a worker whose connection a call has closed


@dataclass(frozen=True, slots=True)
class Setup:
    """What the nursery needs to load the functions: the first message."""

    configs: tuple[RewardConfig, ...]
    search: tuple[str, ...]
    forced_think: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call: function by position in ``Setup.configs``, rollout by position (None: all siblings at once)."""

    function: int
    rollout: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rollout has no score from a function.

    ``error`` is one line that begins with its kind: ``error`` (the function raised), ``invalid`` (it returned no finite
    number), ``timeout`` (it overran its deadline), ``crash`` (its process ended) or ``memory`` (it took too much).
    """

    error: str
    traceback: str = ""

    @property
    def kind(self) -> str:
        return self.error.partition(":")[0]


# Per call: one score or failure per rollout that it covers.
Outcome = list[Score | Failure]
Results = list[tuple[int, Outcome]]
Packet = list[tuple[RolloutGroup, list[tuple[int, Call]]]]
"""What a worker is handed at a time: groups with their calls, numbered through."""


def failure_of(error: BaseException) -> Failure:
    """One line and the traceback, starting below the frames of this package's caller."""
    kind = "timeout" if isinstance(error, CallTimeout) else "invalid" if isinstance(error, NotAScore) else "error"
    text = " ".join(str(error).split())
    line = text if kind != "error" else f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Failure(f"{kind}: {line[:500]}", "".join(traceback.format_exception(error)))


def nursery_main(fd: int) -> None:
    """Loads the functions, reports, then forks and reaps workers on request until the parent is gone.

    Requests: ``("fork",)`` followed by two handles (socket, shared file) -> pid; ``("end", pid)`` kills a worker with
    its children -> the exit status as ``os.waitpid`` gives it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us when it is done
    control = Connection(fd)
    workers: set[int] = set()
    adopt_orphans()
    try:
        setup: Setup = control.recv()
        try:
            functions = [bind(config, setup.search) for config in setup.configs]
            for function in functions:
                preload(function.function)
        except ValueError as error:
            return control.send(("refused", str(error), ""))
        except BaseException as error:  # the module's own import failed: hand its traceback over
            return control.send(("failed", failure_of(error).error, "".join(traceback.format_exception(error))))
        whole_groups = tuple(function.whole_group for function in functions)
        deadlines = tuple(function.deadline_s for function in functions)
        spared = frozenset(children(os.getpid()))  # what the functions' modules started when they were imported
        control.send(("ready", whole_groups, deadlines, resident_bytes(os.getpid())))
        gc.freeze()  # what is loaded stays shared with the workers instead of being copied by their collections
        while True:
            request, *arguments = control.recv()
            if request == "fork":
                handles = recv_handle(control), recv_handle(control)
                pid = os.fork()
                if pid == 0:
                    control.close()
                    workers.clear()
                    _worker_main(*handles, functions=functions, forced_think=setup.forced_think)
                for handle in handles:
                    os.close(handle)
                workers.add(pid)
                control.send(pid)
            else:
                assert request == "end", request
                workers.discard(arguments[0])
                control.send(_end(arguments[0], workers | spared))
    except (EOFError, OSError):  # the parent is gone
        pass
    finally:
        for pid in tuple(workers):
            workers.discard(pid)
            _end(pid, workers)


def _end(pid: int, spared: Set[int]) -> int:
    """Ends a worker with all that it started; returns its exit status as ``os.waitpid`` gives it."""
    end_tree(pid)  # only this process reaps its children, so the pid cannot have passed to anybody else
    status = os.waitpid(pid, 0)[1]
    # A worker that died by itself left its children to this process, whatever group or session they are in.
    for stray in set(children(os.getpid())) - spared:
        end_tree(stray)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(stray, 0)
    return status


def _worker_main(socket_fd: int, file_fd: int, *, functions: Sequence[BoundReward], forced_think: bool) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        adopt_orphans()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        os.lseek(file_fd, STACK_OFFSET, os.SEEK_SET)
        faulthandler.register(signal.SIGUSR1, file=file_fd, all_threads=True)
        progress = mmap.mmap(file_fd, STACK_OFFSET)
        _serve(Connection(socket_fd), progress, functions, forced_think)
        status = 0
    except (EOFError, OSError):  # the parent closed its end
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # never back into the nursery's code


def _serve(connection: Connection, progress: mmap.mmap, functions: Sequence[BoundReward], forced_think: bool) -> None:
    pid, fd = os.getpid(), connection.fileno()
    opened = os.fstat(fd)
    while True:
        packet: Packet = connection.recv()
        results: Results = []
        flushed = time.monotonic()
        for group, calls in packet:
            for number, call in calls:
                _note(progress, number, time.monotonic_ns())
                outcome = _run(functions[call.function], group, call.rollout, forced_think)
                if os.getpid() != pid:
                    os._exit(0)  # a child that the function forked came back here: only the worker itself answers
                if not _is_open(fd, opened):
                    os._exit(LOST_CONNECTION)  # while the note still says whose call it was
                _note(progress, number, 0)
                results.append((number, outcome))
                if time.monotonic() - flushed > FLUSH_S:
                    # What was slow to compute must not be lost, or paid for twice, when a later call is killed.
                    connection.send((False, results))
                    results, flushed = [], time.monotonic()
        connection.send((True, results))


def _note(progress: mmap.mmap, number: int, start_ns: int) -> None:
    """Start is cleared first: a reader that sees the same start twice has read a consistent pair."""
    PROGRESS.pack_into(progress, 0, number, 0)
    PROGRESS.pack_into(progress, 0, number, start_ns)


def _is_open(fd: int, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), opened)
    except OSError:
        return False


def _run(function: BoundReward, group: RolloutGroup, index: int | None, forced_think: bool) -> Outcome:
    try:
        found = function.call(group, index, forced_think)
    except BaseException as error:  # the boundary of a reward call: recorded, never a score
        return [failure_of(error)] * (len(group.rollouts) if index is None else 1)
    return [each if isinstance(each, Score) else failure_of(each) for each in found]


def read_progress(page: Any) -> tuple[int, int]:
    """(call number, start in ns) of a worker's shared page; start 0 between calls."""
    number, start = PROGRESS.unpack_from(page, 0)
    again, start_again = PROGRESS.unpack_from(page, 0)
    return (number, start) if (number, start) == (again, start_again) else (again, 0)

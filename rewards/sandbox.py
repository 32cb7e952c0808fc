"""A candidate program in a process of its own that answers calls; the parent alone reaches the verdict.

The candidate gets arguments and sends back plain values: None, bool, int, float, complex, str, bytes, list, tuple, set,
frozenset and dict by exact type, and numbers and arrays of numpy. Anything else stays inside and is named by a
:class:`Reference`, which can be called and passed on but equals nothing. Nothing is unpickled and nothing that the
candidate says is code here; what it writes to the channel can only be a value, an exception or noise; noise ends it.

Bounded: time (per test), address space of a process, memory of all its processes (sampled), number of processes, size
of files, size of the file system in memory, open files, and the bytes and the parts of every answer.

Not covered: flaws of the kernel (the filter takes the most exposed calls away); side channels of time; kernel memory
that is no process's own, such as the 200,000 inodes that a program can make in five seconds, until it is killed;
between two samples, 50 ms apart, memory may grow beyond its limit by what is written in that time; a candidate may
remember earlier arguments of its own problem. Below the level ``bubblewrap`` see ``rewards.isolation``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from rewards.isolation import Isolation, clean_environment
from rewards.processes import held_bytes, tree, waited_for_a_core
from rewards.seccomp import seccomp_filter

_SAMPLE_S = 0.05
_ENDING_S = 5.0


class Status(StrEnum):
    """How a program fared."""

    PASSED = "passed"
    WRONG_ANSWER = "wrong_answer"
    RUNTIME_ERROR = "runtime_error"
    SYNTAX_ERROR = "syntax_error"
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    KILLED = "killed"  # by a signal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        test_s: seconds of one test (one assert, one check function, one input), and of loading the program, > 0. Time
            in which the program was ready to run and others had the cores does not count, within ``total_s``.
        total_s: seconds of all tests of a program, > 0; by the clock.
        memory: bytes of address space of each process, and bytes of memory of all of them.
        disk: bytes of the file system in memory.
        file: bytes of one file.
        processes: processes and threads at a time, the sandbox's own two included.
        output: bytes of one answer; a quarter of it for what a program writes in one case.
        parts: values in one answer.
    """

    test_s: float = 5.0
    total_s: float = 8.0
    memory: int = 1 << 30
    disk: int = 64 << 20
    file: int = 16 << 20
    processes: int = 16
    output: int = 4 << 20
    parts: int = 500_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")


class SandboxEnded(BaseException):
    """The program can answer no more; ``status`` says why. Not an Exception: tests must not swallow it.

    Attributes:
        status: never ``passed``.
    """

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


class CandidateError(Exception):
    """The candidate raised; ``names`` are the class and those above it, as it says."""

    def __init__(self, names: tuple[str, ...], message: str) -> None:
        super().__init__(f"{names[0] if names else 'Exception'}: {message}")
        self.names = names


@dataclass(frozen=True, eq=False)
class Handle:
    """An object inside that is not plain."""

    index: int
    kind: str


class Sandbox:
    """One candidate. Ends with the ``with`` statement, and with this process.

    Example:
        >>> with Sandbox(isolate("bubblewrap"), Limits()) as sandbox:
        ...     sandbox.ask("load", "def add(a, b): return a + b", "")
        ...     sandbox.ask("call", sandbox.ask("get", "add").index, (1, 2), {})
        3
    """

    def __init__(self, isolation: Isolation, limits: Limits, *, keep_errors: bool = False) -> None:
        self._limits = limits
        self.known: dict[str, Any] = {}  # what the program defines, as far as it was asked for
        self._ended: SandboxEnded | None = None
        self._deadline = self._end = time.monotonic() + limits.total_s
        self.begin_test()
        # What bubblewrap says when it cannot start.
        self._errors = tempfile.TemporaryFile() if keep_errors else None  # noqa: SIM115
        bubblewrap = isolation.level == "bubblewrap"
        code = seccomp_filter(keep_group=not bubblewrap)
        filter_read, filter_write = os.pipe()
        self._answers, answers_write = os.pipe()
        try:
            os.write(filter_write, code)
            os.close(filter_write)
            launch = isolation.launch(limits.disk, filter_read, answers_write)
            self._folder, self._uid = launch.folder, launch.uid
            self.process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors or subprocess.DEVNULL,
                pass_fds=(filter_read, answers_write) if bubblewrap else (answers_write,),
                cwd=launch.folder or "/",
                env=clean_environment(launch.folder),
                start_new_session=launch.new_session,
                bufsize=0,
                **({} if launch.uid is None else {"user": launch.uid, "group": launch.uid, "extra_groups": []}),
            )
        finally:
            os.close(filter_read)
            os.close(answers_write)
        assert self.process.stdin is not None
        self._requests = self.process.stdin.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        setup = {
            "answers": answers_write,
            "path": launch.path,
            "watched": not bubblewrap,
            "limits": self._rlimits(isolation),
            "filter": b"" if bubblewrap else code,
            "longest": limits.output,
        }
        with contextlib.suppress(SandboxEnded):  # said again by the first question
            self._send(_inside())
            self._send(marshal.dumps(setup))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ended(self) -> SandboxEnded | None:
        """Why the program can answer no more; None while it can."""
        return self._ended

    @property
    def spent(self) -> bool:
        """The time of all tests is over."""
        return time.monotonic() >= self._end

    def fail(self, status: Status, detail: str) -> SandboxEnded:
        """Ends the program for a reason that the caller found; returns what to raise."""
        return self._finish(status, detail)

    def begin_test(self) -> None:
        """The time of one test begins."""
        self._deadline = min(self._end, time.monotonic() + self._limits.test_s)
        self._waited: float | None = None  # for a core, before this test; read when a test takes long enough to matter

    def ask(self, operation: str, *details: Any) -> Any:
        """One question, answered with a plain value or a Handle.

        Operations: see ``rewards.candidate._Guest``.

        Raises:
            CandidateError: the candidate raised.
            SandboxEnded: it can answer no more.
        """
        if self._ended is not None:
            raise self._ended
        self._send(marshal.dumps((operation, *details)))
        size = int.from_bytes(self._receive(4), "big")
        if size > self._limits.output + 64:
            raise self._finish(Status.OUTPUT_LIMIT, f"an answer of {size} bytes")
        body = self._receive(size)
        if body.count(b",") + body.count(b"[") + body.count(b"{") > self._limits.parts:
            raise self._finish(Status.OUTPUT_LIMIT, f"an answer of more than {self._limits.parts} parts")
        try:
            answer = json.loads(body)
            if answer == [None]:
                return None
            verb, *rest = answer
            if verb == "v":
                return _decode(rest[0])
            names, message = rest
            error = CandidateError(tuple(map(str, names)), str(message))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError, MemoryError):
            raise self._finish(Status.RUNTIME_ERROR, "it wrote to the channel of the answers") from None
        raise error

    def close(self) -> None:
        """Ends every process of the program and removes its files. Safe to call twice."""
        if self.process.stdin is None or self.process.stdin.closed:
            return
        self._kill()
        self.process.stdin.close()
        os.close(self._answers)
        if self._errors is not None:
            self._errors.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def said(self) -> str:
        """What was written to standard error, if that is kept."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read(4000).decode(errors="replace")

    def _kill(self) -> None:
        if self.process.returncode is None and self._folder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(_ENDING_S)
        if self._folder is not None and self._uid is not None:
            _kill_user(self._uid)

    def _rlimits(self, isolation: Isolation) -> dict[str, int]:
        limits = {
            "RLIMIT_AS": self._limits.memory,
            "RLIMIT_CPU": int(self._limits.total_s) + 2,
            "RLIMIT_FSIZE": self._limits.file,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }
        if self._uid is not None or isolation.level != "rlimits":  # else it would count all that this user runs
            limits["RLIMIT_NPROC"] = self._limits.processes
        return limits

    def _send(self, body: bytes) -> None:
        left = memoryview(len(body).to_bytes(4, "big") + body)
        while left:
            try:
                left = left[os.write(self._requests, left) :]
            except BlockingIOError:
                self._wait(self._requests, select.POLLOUT)
            except OSError:
                raise self._lost() from None

    def _receive(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            try:
                chunk = os.read(self._answers, min(size - len(body), 1 << 20))
            except BlockingIOError:
                self._wait(self._answers, select.POLLIN)
                continue
            if not chunk:
                raise self._lost()
            body += chunk
        return bytes(body)

    def _wait(self, fd: int, event: int) -> None:
        """Until the channel is ready; meanwhile the time and the memory of all processes are watched."""
        poll = select.poll()
        poll.register(fd, event)
        pause = 0.02
        while not poll.poll(1000 * max(0.0, min(pause, self._deadline - time.monotonic()))):
            pids = tree(self.process.pid)
            if time.monotonic() >= self._deadline and not self._extended(pids):
                raise self._finish(Status.TIMEOUT, "no answer in time")
            pause = _SAMPLE_S
            memory = held_bytes(pids, self._limits.memory)
            if memory > self._limits.memory:
                raise self._finish(Status.MEMORY_LIMIT, f"its processes held {memory >> 20} MiB together")
            if len(pids) > 2 * self._limits.processes:
                raise self._finish(Status.RUNTIME_ERROR, f"it had {len(pids)} processes")
            if self._waited is None:
                self._waited = waited_for_a_core(pids)

    def _extended(self, pids: list[int]) -> bool:
        """Moves the deadline by the time in which others had the cores; False when there was none, or no time is left.

        A right program on an overloaded machine would otherwise be a wrong one.
        """
        waited = waited_for_a_core(pids)
        extra = waited - (waited if self._waited is None else self._waited)
        before, self._waited = self._deadline, waited
        self._deadline = min(self._end, self._deadline + extra)
        return self._deadline - before > _SAMPLE_S

    def _lost(self) -> SandboxEnded:
        """The channel closed: the program ended, or ends now."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        status = self.process.returncode
        killed = status is not None and (status < 0 or status > 128)
        how = "closed the channel" if status is None else f"ended with status {status}"
        return self._finish(Status.KILLED if killed else Status.RUNTIME_ERROR, f"the program {how}")

    def _finish(self, status: Status, detail: str) -> SandboxEnded:
        self._ended = SandboxEnded(status, detail)
        self._kill()
        return self._ended


@functools.cache
def _inside() -> bytes:
    source = (Path(__file__).parent / "candidate.py").read_text("utf-8")
    return marshal.dumps(compile(source, "<sandbox>", "exec", optimize=2))


def _decode(value: Any, depth: int = 0) -> Any:
    """A plain value from what JSON made of an answer. Raises one of what :meth:`Sandbox.ask` catches if it is none."""
    if depth > 300:
        raise RecursionError
    if type(value) is list:
        return [_decode(each, depth + 1) for each in value]
    if type(value) is not dict:
        return value
    ((kind, body),) = value.items()
    return _KINDS[kind](body, depth + 1)


def _numpy_array(body: Any, depth: int) -> Any:
    import numpy

    kind, shape, values = body
    if type(kind) is not str or numpy.dtype(kind).kind not in "biufcU" or numpy.dtype(kind).itemsize > 4096:
        raise TypeError
    return numpy.array(_decode(values, depth), dtype=kind).reshape([int(each) for each in shape])


def _integer(body: Any, depth: int) -> int:
    return int(body, 16)


_KINDS: dict[str, Callable[[Any, int], Any]] = {
    "int": _integer,
    "bytes": lambda body, depth: bytes.fromhex(body),
    "complex": lambda body, depth: complex(float(body[0]), float(body[1])),
    "tuple": lambda body, depth: tuple(_decode(list(body), depth)),
    "set": lambda body, depth: set(_decode(list(body), depth)),
    "frozenset": lambda body, depth: frozenset(_decode(list(body), depth)),
    "dict": lambda body, depth: {_decode(key, depth): _decode(each, depth) for key, each in body},
    "reference": lambda body, depth: Handle(int(body[0]), str(body[1])),
    "array": _numpy_array,
}


def _kill_user(uid: int) -> None:
    """Ends whatever still runs under a program's own user id: only a process of that user can name them all."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(pid, 0)

"""The parent's side of the processes that run reward functions: start them, ask for one more, end one.

What they do themselves stands in rewards/worker.py, who gets which job in rewards/pool.py.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import BinaryIO

from rewards.processes import alive
from rewards.worker import LOST_CONNECTION, STACK_OFFSET, Setup

_MAIN = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from rewards.worker import nursery_main
nursery_main(int(sys.argv[1]))
"""
# One thread of arithmetic per worker; and a nursery without threads of its own can be forked safely.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_STACK_WAIT_S = 0.2
_EXIT_WAIT_S = 0.1


@dataclass
class WorkerProcess:
    """One worker: its connection, and the page on which it notes what it does."""

    pid: int
    connection: Connection
    file: BinaryIO
    page: mmap.mmap

    def stack(self) -> str:
        """Where a hung call stands: the process writes the stack on a signal, even from inside C code."""
        os.kill(self.pid, signal.SIGUSR1)  # not reaped by anybody but the nursery: the pid is its own
        limit = time.monotonic() + _STACK_WAIT_S
        text = b""
        while time.monotonic() < limit:
            longer = os.pread(self.file.fileno(), 64_000, STACK_OFFSET)
            if longer and longer == text:
                break
            text = longer
            time.sleep(0.005)
        return text.decode(errors="replace")

    def close(self) -> None:
        """Lets go of everything here; an idle worker ends by itself then."""
        self.connection.close()
        self.page.close()
        self.file.close()


class Nursery:
    """The process that imports the functions and forks the workers.

    Attributes:
        control: readable when the functions are loaded, and when the process is gone.
    """

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        path = json.dumps([root, *(entry or os.getcwd() for entry in sys.path)])
        self._process = subprocess.Popen(
            # What the compiler says of other people's code would come before every run's first line.
            [sys.executable, "-P", "-W", "ignore::SyntaxWarning", "-c", _MAIN, str(theirs.fileno()), path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward function prints must not mix with the program's own output
            env={**os.environ, **_ONE_THREAD},
        )
        theirs.close()
        self.control = Connection(ours.detach())
        self.control.send(setup)

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def fork(self) -> WorkerProcess:
        """One more worker.

        Raises:
            EOFError, OSError: the nursery is gone.
        """
        file = _memory_file()
        file.truncate(STACK_OFFSET)
        ours, theirs = socket.socketpair()
        self.control.send(("fork",))
        for handle in (theirs.fileno(), file.fileno()):
            send_handle(self.control, handle, self.pid)
        theirs.close()
        pid = self.control.recv()
        return WorkerProcess(pid, Connection(ours.detach()), file, mmap.mmap(file.fileno(), STACK_OFFSET))

    def end(self, pid: int) -> int:
        """Kills a worker with all that it started; returns its exit status as ``os.waitpid`` gives it."""
        self.control.send(("end", pid))
        return self.control.recv()

    def autopsy(self, pid: int) -> str:
        """Ends a worker whose connection is closed; returns how that came, in words."""
        limit = time.monotonic() + _EXIT_WAIT_S
        while (living := alive(pid)) and time.monotonic() < limit:
            time.sleep(0.002)
        status = self.end(pid)
        if living or os.waitstatus_to_exitcode(status) == LOST_CONNECTION:
            return "closed descriptors that were not its own"
        if os.WIFSIGNALED(status):
            return f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}"
        return f"ended with exit status {os.waitstatus_to_exitcode(status)}"

    def close(self) -> None:
        """Ends the nursery and its workers."""
        self.control.close()  # the nursery sees it and kills the workers
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # still inside an import
            self._process.wait()


def _memory_file() -> BinaryIO:
    """A file that lives in memory where the system has such: a full disk must not break a shared page."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("reward-worker"), "r+b")
    return tempfile.TemporaryFile()

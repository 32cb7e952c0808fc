"""One child process that answers calls under a deadline; it is killed when it overruns, and forked anew.

For computations that cannot be trusted to end, inside a process that should live on (a reward worker). The child is
forked, so that everything imported is there at once; it is bounded in memory and dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


class Overrun(Exception):
    """The call did not end in time, or took its process down (memory, stack, a crash in C code)."""


class BoundedCalls:
    """Calls functions in a child process.

    Args:
        memory: bytes that a call may take beyond what the process holds when it is forked.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self._memory = memory
        self._pid = 0
        self._owner = 0
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """The function's result.

        Raises:
            Overrun: see there; the next call gets a new child.
            Exception: whatever else the function raised.
        """
        connection = self._child()
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout_s):
                raise Overrun(f"no result within {timeout_s:g} s")
            good, result = connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise Overrun("the process of the call is gone: out of memory, or crashed") from None
        except BaseException:
            self.close()
            raise
        if good:
            return result
        raise result

    def close(self) -> None:
        """Ends the child."""
        if self._pid and self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
        if self._connection is not None:
            self._connection.close()
        self._pid, self._connection = 0, None

    def _child(self) -> Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        self._connection, self._pid = None, 0  # a fork of this process has no child yet
        ours, theirs = Pipe()
        owner = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _serve(theirs, owner, self._memory)
        theirs.close()
        self._pid, self._connection, self._owner = pid, ours, owner
        return ours


def _serve(connection: Connection, parent: int, memory: int) -> None:
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        with contextlib.suppress(ValueError, OSError):
            limit = _address_space() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            function, arguments = connection.recv()
            try:
                answer = (True, function(*arguments))
            except MemoryError:
                return
            except Exception as error:
                answer = (False, error)
            connection.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone, or ends us
        pass
    finally:
        os._exit(0)


def _address_space() -> int:
    """Bytes of address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

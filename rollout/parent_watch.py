"""Ties the life of a process to that of another, which is not able to end it: standard library only."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

PARENT_PID_VARIABLE = "R1_ENGINE_PARENT_PID"
"""Environment variable that names the process whose end ends this one."""

_THREAD = "r1-watch-parent"


def watched_parent() -> int | None:
    """The process that this one is to end with; None when there is none, or when it is this one."""
    pid = int(os.environ.get(PARENT_PID_VARIABLE, "0"))
    return None if pid in (0, os.getpid()) else pid


def watch_parent(on_end: Callable[[], None] | None = None) -> threading.Thread | None:
    """Ends this process as soon as the process that started the engine has ended, however it ended.

    A Ray actor that is killed with SIGKILL cannot stop its engine; without this the engine would keep its memory and
    its cores. Returns the watching thread; None where there is nothing to watch.
    """
    parent = watched_parent()
    if parent is None or any(thread.name == _THREAD for thread in threading.enumerate()):
        return None
    thread = threading.Thread(target=_wait_for_end, args=(parent, on_end or _end_now), name=_THREAD, daemon=True)
    thread.start()
    return thread


def _wait_for_end(pid: int, then: Callable[[], None]) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return then()
    except OSError:  # no pidfd on this kernel: look twice a second
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.5)
        return then()
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
    finally:
        os.close(handle)
    then()


def _end_now() -> None:
    # Not sys.exit: that ends this thread alone, and a busy engine would not look at a polite signal for a while.
    os.kill(os.getpid(), signal.SIGKILL)

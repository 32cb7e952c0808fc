"""A process and all that it started: how much memory they hold, and how they end together. Read from Linux's /proc.

A process that made itself the reaper of its orphans (``adopt_orphans``) keeps every descendant below itself, also those
that left its process group and whose own parents are gone; so none can hide from ``end_tree``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_END_S = 2.0


def die_with_parent() -> None:
    """The system kills this process when the one that forked it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, parents first, zombies left out; empty where the system does not tell."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children(waiting.pop())
        found += [child for child in below if alive(child)]
        waiting += below
    return found


def children(pid: int) -> list[int]:
    """Direct children of a process, zombies included."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it may end at any moment
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def resident_bytes(pid: int, *, apart: int = 0) -> int:
    """Memory that a process and its descendants hold, each counted beyond ``apart`` bytes (what they share)."""
    sizes = (_resident(each) for each in (pid, *descendants(pid)))
    return sum(max(0, size - apart) for size in sizes)


def tree(pid: int) -> list[int]:
    """A process and all below it, zombies included."""
    pids = [pid]
    for each in pids:
        pids += children(each)
    return pids


def held_bytes(pids: Sequence[int], enough: int) -> int:
    """Bytes of memory of some processes; what they share counts once where it would be more than ``enough``."""
    memory = sum(map(_resident, pids))
    return sum(map(_proportional, pids)) if memory > enough else memory


def waited_for_a_core(pids: Sequence[int]) -> float:
    """Seconds that the process which waited most was ready to run and did not; 0 where the kernel does not tell."""
    waited = [0.0]
    for each in pids:
        with contextlib.suppress(OSError, IndexError):
            waited.append(int(Path(f"/proc/{each}/schedstat").read_text().split()[1]) / 1e9)
    return max(waited)


def end_tree(pid: int) -> None:
    """Kills a child of this process with everything that it started; it is still to be reaped.

    The process is stopped first: it forks nothing more, and as long as it is there its orphans stay below it.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    limit = time.monotonic() + _END_S
    while (left := descendants(pid)) and time.monotonic() < limit:
        for each in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """False once a process has ended, reaped or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0

"""A process that is tied to another ends with it, even when the other is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout.parent_watch import PARENT_PID_VARIABLE, watch_parent, watched_parent

WATCHER = """
import sys, time
from rollout.parent_watch import watch_parent
assert watch_parent() is not None and watch_parent() is None
print("watching", flush=True)
time.sleep(60)
"""


def start_watcher(parent: int) -> subprocess.Popen[str]:
    environment = {**os.environ, PARENT_PID_VARIABLE: str(parent), "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen([sys.executable, "-c", WATCHER], env=environment, stdout=subprocess.PIPE, text=True)


def test_it_ends_at_once_when_the_other_is_killed() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    watcher = start_watcher(other.pid)
    assert watcher.stdout is not None and watcher.stdout.readline() == "watching\n"
    time.sleep(0.2)
    assert watcher.poll() is None
    other.kill()
    other.wait()
    assert watcher.wait(timeout=10) == -signal.SIGKILL


def test_it_ends_at_once_when_the_other_is_gone_already() -> None:
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    assert start_watcher(other.pid).wait(timeout=20) == -signal.SIGKILL


def test_the_starting_process_itself_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT_PID_VARIABLE, raising=False)
    assert watched_parent() is None and watch_parent() is None
    monkeypatch.setenv(PARENT_PID_VARIABLE, str(os.getpid()))
    assert watched_parent() is None and watch_parent() is None

"""What the tests of the sandbox share: the level of this machine, and small programs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import Any

from rewards.code_judge import Verdict
from rewards.code_tasks import Task
from rewards.code_tests import run_tests
from rewards.isolation import LEVELS, at_least
from rewards.probe import Probe, probe
from rewards.sandbox import Limits

ADD = Task(kind="asserts", entry_point="add", asserts=("assert add(2, 3) == 5", "assert add(-7, 4) == -3"))
SUMS = Task(kind="stdin", inputs=("2 3\n", "-7 4\n"), outputs=("5\n", "-3\n"))


@functools.cache
def machine() -> Probe:
    """The probe, after bubblewrap was installed where this user may do so; without a network that ends quickly."""
    if shutil.which("bwrap") is None and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "Acquire::Retries=0",
                   "-o", "Acquire::http::Timeout=10", "-o", "DPkg::Lock::Timeout=20", "bubblewrap"]  # fmt: skip
        for words in (command, ["apt-get", "update", "-qq"], command):
            if shutil.which("bwrap") is None and not _quietly(words):
                break
    return probe()


def _quietly(command: list[str]) -> bool:
    """False when it took too long."""
    try:
        subprocess.run(
            command, timeout=45, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return True


def levels() -> list[str]:
    """The levels that work here."""
    found = machine().level
    return [level for level in LEVELS if found and at_least(found, level)]


def verdict(program: str, task: Task = ADD, *, level: str = "", stop_early: bool = True, **limits: float) -> Verdict:
    """The verdict at the strongest level of this machine."""
    settings: dict[str, Any] = {"test_s": 5.0, "total_s": 10.0, **limits}
    return run_tests(task, program, level=level or machine().level, limits=Limits(**settings), stop_early=stop_early)

"""Hostile programs and what they must leave untouched: reads a manifest, and watches the machine while one runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import site
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rewards.code_tasks import Task
from rewards.processes import adopt_orphans, children, descendants, resident_bytes

VICTIM = b"rl_canary_victim"
_MEMORY, _HARNESS, _DISK, _PIDS = 3 << 29, 64 << 20, 256 << 20, 256
_SAMPLE_S, _SETTLE_S = 0.05, 2.0


def read_manifest(path: Path) -> Iterator[tuple[dict[str, Any], Task, str]]:
    """Row, task and text of each program.

    Raises:
        ValueError: a line is not JSON, or names a task or a file that is not there.
    """
    try:
        tasks = json.loads((path.parent / "tasks.json").read_text("utf-8"))
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} and the tasks.json beside it cannot be read: {error}") from None
    for row in rows:
        try:
            text = (path.parent / row["file"]).read_bytes().decode("utf-8", "surrogateescape")
            yield row, _task(tasks[row["task"]]), text
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: program {row.get('id')!r}: {type(error).__name__}: {error}") from None


def _task(found: dict[str, Any]) -> Task:
    if found["type"] == "stdin":
        inputs, outputs = zip(*((case["input"], case["output"]) for case in found["cases"]), strict=True)
        return Task(kind="stdin", inputs=inputs, outputs=outputs)
    return Task(kind="asserts", entry_point=found["entry_point"], asserts=tuple(found["asserts"]))


class Watch:
    """The machine before, during and after one program.

    Args:
        canary: a folder that no program may change; it need not be there.
    """

    def __init__(self, canary: Path) -> None:
        adopt_orphans()  # nothing that is started from here can hide from descendants()
        self._canary = canary
        self._folders = {Path(each) for each in (tempfile.gettempdir(), os.getcwd())}
        self._sites = [Path(each) for each in {*sys.path, site.getusersitepackages()} if each and os.path.isdir(each)]
        self._before = self._look()
        self._pids = self._memory = 0
        self._harness = self._harness_now()
        self._grown = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def violated(self, invariants: Sequence[str]) -> list[str]:
        """Which of the invariants do not hold; ends the watch. What was planted is removed."""
        self._stop.set()
        self._sampler.join()
        left = self._left_over()
        after = self._look()
        for planted in after["sites"] - self._before["sites"]:
            planted.unlink(missing_ok=True)
        same = {name: after[name] == self._before[name] for name in ("canary", "victims")}
        broken = {
            "no_leftover_processes": bool(left),
            "cpu_bounded": bool(left),
            "pids_bounded_256": self._pids > _PIDS,
            "total_memory_bounded": self._memory > _MEMORY,
            "harness_rss_unchanged": self._grown > _HARNESS,
            "disk_unchanged": after["disk"] - self._before["disk"] > _DISK,
            "workdir_removed": bool(after["work"] - self._before["work"]),
            "no_core_file": bool(after["cores"] - self._before["cores"]),
            "canary_unchanged": not same["canary"],
            "victim_alive": not same["victims"],
            "no_sitecustomize_left": bool(after["sites"] - self._before["sites"]),
            "harness_alive": False,
        }
        unknown = [name for name in invariants if name not in broken]
        if unknown:
            raise ValueError(f"there is no invariant {unknown[0]!r}; there are {', '.join(broken)}")
        return [name for name in invariants if broken[name]]

    def _look(self) -> dict[str, Any]:
        entries = {entry for folder in self._folders for entry in folder.glob("*")}
        return {
            "disk": shutil.disk_usage(tempfile.gettempdir()).used,
            "work": {entry for entry in entries if entry.name.startswith("r1-sandbox-")},
            "cores": {entry for entry in entries if entry.name.split(".")[0] == "core"},
            "sites": {folder / f"{name}.py" for folder in self._sites for name in ("sitecustomize", "usercustomize")
                      if (folder / f"{name}.py").exists()},
            "canary": _snapshot(self._canary),
            "victims": _victims(),
        }  # fmt: skip

    def _harness_now(self) -> int:
        judges = children(os.getpid())[:1]
        return sum(resident_bytes(pid) - sum(map(resident_bytes, children(pid))) for pid in (os.getpid(), *judges))

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            below = descendants(os.getpid())
            self._pids = max(self._pids, len(below))
            self._memory = max(self._memory, sum(resident_bytes(pid) for pid in children(os.getpid())))

    def _left_over(self) -> list[int]:
        """Descendants besides the judge, once they had time to go."""
        limit = time.monotonic() + _SETTLE_S
        while left := [pid for child in children(os.getpid()) for pid in descendants(child)]:
            if time.monotonic() > limit:
                break
            time.sleep(0.02)
        self._grown = self._harness_now() - self._harness
        return left


def _snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Path -> (mode, digest) of all that lies in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else []:
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (path.lstat().st_mode, hashlib.blake2b(content).hexdigest())
    return found


def _victims() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if VICTIM in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found

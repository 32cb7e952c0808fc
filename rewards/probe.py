"""What level of isolation this machine gives: each is tried with a program that looks around inside.

Runs in a process of its own (``python -c``), because a level may give its process another view of the file system.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewards.isolation import LEVELS, Isolation, TooWeak, at_least, isolate, why_not
from rewards.sandbox import CandidateError, Limits, Sandbox, SandboxEnded

_PROBE_S = 60.0
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rewards.probe import main; main(sys.argv[2:])"

# Facts that the level must show; read inside by a program of ours, which has no reason to lie.
_LOOK = """
import os
def look():
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    pids = [int(each) for each in os.listdir("/proc") if each.isdigit()]
    interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]]
    return {
        "filter": status["Seccomp"] == "2",
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "no_capabilities": int(status["CapEff"], 16) == 0,
        "processes_hidden": max(pids) < 100 and len(pids) < 10,
        "network_hidden": "eth0" not in interfaces and open("/proc/net/route").read().count("\\n") <= 1,
        "files_hidden": not os.path.exists("/etc/passwd") and not os.path.exists("/home"),
        "work_writable": os.access(os.getcwd(), os.W_OK),
        "uid": os.getuid(),
    }
"""
_SHOWN = {
    "rlimits": ("filter", "no_new_privileges", "no_capabilities", "work_writable"),
    "namespaces": ("processes_hidden", "network_hidden"),
    "bubblewrap": ("files_hidden",),
}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a machine gives.

    Attributes:
        level: the strongest level that works; empty when none does.
        missing: level -> why it does not work, with what usually mends it.
        packages: of those asked for, what programs can import.
        own_uid: each program gets a user id of its own.
    """

    level: str
    missing: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    own_uid: bool = False


def probe(packages: Sequence[str] = ("numpy",)) -> Probe:
    """Tries every level, strongest first, until one works."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", _START, json.dumps([root, *sys.path]), *packages]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    if done.returncode:
        text = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        return Probe(level="", missing=dict.fromkeys(LEVELS, f"the probe failed: {text}"))
    found = json.loads(done.stdout)
    return Probe(**{**found, "packages": tuple(found["packages"])})


def require(level: str, packages: Sequence[str] = ("numpy",)) -> Probe:
    """The probe of a machine that reaches ``level``.

    Raises:
        ValueError: there is no such level.
        TooWeak: the machine does not reach it; the message says how to get there.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    found = probe(packages)
    if not found.level or not at_least(found.level, level):
        gives = f"gives {found.level}" if found.level else "gives none"
        raise TooWeak(
            f"code is to be run at the level {level}, and this machine {gives}: {found.missing[level]}"
            f"{f' (or ask for level: {found.level})' if found.level else ''}"
        )
    return found


def main(packages: Sequence[str]) -> None:
    """Prints the fields of :class:`Probe` as JSON."""
    missing: dict[str, str] = {}
    for level in reversed(LEVELS):
        try:
            isolation = isolate(level, packages)
            own_uid = _try(isolation)
        except TooWeak as error:
            missing[level] = str(error)
            continue
        print(json.dumps({"level": level, "missing": missing, "packages": isolation.packages, "own_uid": own_uid}))
        return
    print(json.dumps({"level": "", "missing": missing, "packages": [], "own_uid": False}))


def _try(isolation: Isolation) -> bool:
    """Runs the probe's program; True when it had a user id of its own."""
    with Sandbox(isolation, Limits(test_s=30, total_s=30), keep_errors=True) as sandbox:
        try:
            sandbox.ask("load", _LOOK, "")
            facts = sandbox.ask("call", sandbox.ask("get", "look").index, (), {})
        except SandboxEnded:
            raise TooWeak(why_not(sandbox.process, sandbox.said())) from None
        except CandidateError as error:
            raise TooWeak(f"the probe's program failed: {error}") from None
    for level in LEVELS[: LEVELS.index(isolation.level) + 1]:
        failed = next((name for name in _SHOWN[level] if not facts[name]), None)
        if failed is not None:
            raise TooWeak(f"inside, {failed.replace('_', ' ')} does not hold")
    return facts["uid"] >= 10_000 and facts["uid"] != 65534

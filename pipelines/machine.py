"""What decides on the last bits of a learner's sums: recorded when a stage starts, compared when a step is replayed."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.resources import own_cores

if TYPE_CHECKING:
    from pipelines.config import Recipe

_CPU_LIST = Path("/proc/cpuinfo")


def machine(recipe: Recipe, *, anywhere: bool = False) -> dict[str, Any]:
    """The machine as far as rounding depends on it: ``{"cores", "ranks", "gpu", "cpu", "torch"}``.

    Args:
        recipe: whose ``run.cpus`` says how many cores are used.
        anywhere: all cores may be used, whatever the recipe says.
    """
    import torch

    return {
        "cores": len(own_cores(0 if anywhere else recipe.run.cpus)),
        "ranks": recipe.parallel.ranks,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu_name(),
        "torch": metadata.version("torch"),
    }


def cpu_name() -> str:
    """The processor's model, which libraries choose their kernels by."""
    if _CPU_LIST.exists():
        for line in _CPU_LIST.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

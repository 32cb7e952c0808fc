"""Peak memory of one training step, each side in a process of its own.

On a CPU: the largest resident size of the process during the steps (the first makes the optimizer's state) over its
size with the libraries imported and no model loaded. So weights, gradients, optimizer state, activations and whatever
the allocator holds on to are in it. On a GPU: the largest sum of live allocations.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learner_sides import Batch
from benchmarks.measure import timed
from benchmarks.peer import Peer, Port


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step took.

    Attributes:
        peak: memory, bytes.
        seconds: of the last step.
    """

    peak: float
    seconds: float


def peak_bytes(name: str, folder: Path, batch: Batch, device: str, **settings: Any) -> float:
    """Peak of the side ``benchmarks.learner_sides.<name>``, bytes.

    Raises:
        PeerFailed: it failed.
    """
    return cost_alone(name, folder, batch, device, 2, **settings).peak


def cost_alone(name: str, folder: Path, batch: Batch, device: str, steps: int, **settings: Any) -> Cost:
    """What that side costs in a process of its own, over ``steps`` steps.

    Raises:
        PeerFailed: it failed.
    """
    with Peer(f"{name}'s memory", _serve, name, folder, batch, device, steps, settings) as peer:
        return peer.ask("begin")


def _serve(
    port: Port, name: str, folder: Path, batch: Batch, device: str, steps: int, settings: Mapping[str, Any]
) -> None:
    import torch

    from benchmarks import learner_sides
    from benchmarks.machine import quiet_environment, usable_cores

    quiet_environment()
    torch.set_num_threads(len(usable_cores()))
    for library in ("policy.learner", "policy.loading", "transformers.models.deepseek_v3", "trl.trainer.grpo_trainer"):
        importlib.import_module(library)
    port.receive()
    before = 0 if device != "cpu" else _status("VmRSS")
    step = getattr(learner_sides, name)(folder, batch, device=device, **settings)
    _forget_peak(device)
    seconds = [timed(step) for _ in range(steps)][-1]
    peak = _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    port.send(Cost(peak=float(peak - before), seconds=seconds))


def _forget_peak(device: str) -> None:
    """The peak counts from now on: loading a checkpoint is not training."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        import torch

        torch.cuda.reset_peak_memory_stats()


def _status(key: str) -> int:
    """A size of this process in bytes, by its name in /proc/self/status (Linux)."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}: peak memory is measured on Linux only")

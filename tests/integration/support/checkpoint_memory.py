"""Prints, as JSON, by how much saving raises this process's memory, in sizes of the model."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from policy.checkpoint import load_checkpoint
from policy.learner import Learner
from policy.saver import Saver
from policy.tokenizer import build_tokenizer
from tests.unit.test_learner import batch, learner, policy


def status(field: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def rise(call: Callable[[], object]) -> int:
    """By how much the resident memory rose above what it was, at most, in a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as there already
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model = policy(hidden_size=256, moe_intermediate_size=256, num_hidden_layers=5, n_routed_experts=16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    one: Learner = learner(model)
    one.step(batch(2))
    saver, tokenizer = Saver(), build_tokenizer()

    def save(step: int, background: bool) -> None:
        where = folder / f"step-{step:06d}"
        saver.save(where, learner=one, tokenizer=tokenizer, extra={}, background=background)
        saver.wait()

    save(0, False)  # what is imported or made once does not count
    found = {
        "foreground": rise(lambda: save(1, False)),
        "model": rise(lambda: saver.export(model, tokenizer, folder / "model")),
        "loading": rise(lambda: load_checkpoint(folder / "step-000001", one)),
        "background": rise(lambda: save(2, True)),
    }
    print(json.dumps({"model_mib": size / 2**20, **{name: bytes_ / size for name, bytes_ in found.items()}}))


if __name__ == "__main__":
    main()

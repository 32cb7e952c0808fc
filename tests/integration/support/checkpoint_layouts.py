"""``python -m tests.integration.support.checkpoint_layouts FOLDER``: 4 + 2 ranks that save and load learners.

A layout is trained for two steps and saved in the background while its third step goes on; rank 0 keeps beside the
checkpoint what was saved (``truth.pt``: whole tensors, and the loss of the third step). Then all layouts' checkpoints
are loaded; ``found.pt`` holds what each gave.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from policy import state as stored
from policy.checkpoint import CheckpointError, load_checkpoint
from policy.config import LearnerConfig, LoraConfig, LossConfig, OptimizerConfig, ParallelConfig
from policy.learner import Learner
from policy.lora import add_adapters
from policy.parallel import Ranks, shard, whole
from policy.saver import Saver
from policy.tokenizer import build_tokenizer
from tests.unit.test_learner import batch, policy

LAYOUTS = {
    "one": ParallelConfig(),
    "fsdp2": ParallelConfig(ranks=2),
    "ep2": ParallelConfig(ranks=2, expert_parallel=2),
    "fsdp4": ParallelConfig(ranks=4),
    "grid": ParallelConfig(ranks=4, expert_parallel=2),
}
SAVING, LOADING = ("one", "fsdp2", "grid"), ("one", "ep2", "fsdp4")
ADAPTED = "lora"  # the folder of adapters that "fsdp2" saves; every layout loads it too


def learner(ranks: Ranks, *, seed: int, dtype: torch.dtype = torch.float64, adapted: bool = False) -> Learner:
    """A learner of a small policy, sharded over the ranks; ``adapted``: only adapters in it are trained."""
    model = policy(dtype, seed=seed)
    if adapted:
        add_adapters(model, LoraConfig(rank=4), seed=seed)
    shard(model, ranks)
    return Learner(
        model,
        optimizer=OptimizerConfig(lr=1e-2, schedule="linear", weight_decay=0.1),
        loss=LossConfig(),
        config=LearnerConfig(threads=1, micro_batch_tokens=40),
        total_steps=10,
        ranks=ranks,
    )


def step(one: Learner, number: int) -> float:
    """One optimizer step on a batch that depends on its number alone; the loss."""
    return one.step(batch(8, seed=number), constant_length=8)["learner/loss"]


def contents(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every leaf of a state, whole and copied; all ranks ask."""
    return {key: whole(tensor).detach().clone() for key, tensor in stored.flatten(tree).items()}


def save(ranks: Ranks, folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """Two steps, a checkpoint in the background, and the third step meanwhile."""
    one = learner(ranks, seed=0, dtype=dtype, adapted=folder.name == ADAPTED)
    for number in range(2):
        step(one, number)
    kept = contents(one.state_dict())
    saver = Saver.of(one.model)
    saver.save(folder / "step-000002", learner=one, tokenizer=build_tokenizer(), extra={"step": 2})
    loss = step(one, 2)
    saver.export(one.model, build_tokenizer(), folder / "model")  # waits for the checkpoint, and is one step further
    if ranks.rank == 0:
        torch.save({"state": kept, "loss": loss, "after": contents_of_one(one, ranks)}, folder / "truth.part")
        os.rename(folder / "truth.part", folder / "truth.pt")
    else:
        contents_of_one(one, ranks)


def contents_of_one(one: Learner, ranks: Ranks) -> dict[str, Tensor]:
    """The model's tensors alone."""
    return contents({"model": one.state_dict()["model"]})


def load(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What a fresh learner of this layout makes of a checkpoint: its state, and the loss of the next step."""
    one = learner(ranks, seed=7, adapted=folder.name == ADAPTED)
    step(one, 9)  # moments of its own, which must not stay
    extra = load_checkpoint(folder / "step-000002", one)
    return {"extra": extra, "state": contents(one.state_dict()), "loss": step(one, 2)}


def fail(ranks: Ranks, folder: Path) -> list[str]:
    """What each rank is told when the disk of one of them is full, and what is left in the folder."""
    one = learner(ranks, seed=0)
    saver = Saver.of(one.model)
    original = stored._Writer.write_data

    def full(*args: Any) -> Any:
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    stored._Writer.write_data = full  # type: ignore[method-assign]
    saver.save(folder / "step-000009", learner=one, tokenizer=build_tokenizer(), extra={})
    try:
        saver.wait()
        told = "nothing"
    except CheckpointError as error:
        told = str(error)
    stored._Writer.write_data = original  # type: ignore[method-assign]
    saver.save(folder / "step-000010", learner=one, tokenizer=build_tokenizer(), extra={})
    saver.wait()
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, told)
    return [*everyone, *sorted(p.name for p in folder.iterdir())]


def wait_for(path: Path) -> None:
    """Until another layout has come that far."""
    while not path.exists():
        time.sleep(0.05)


def run_rank(layout: str, rank: int, folder: Path) -> None:
    """What one rank does: save as one layout, load as another of the same size."""
    world = LAYOUTS[layout].ranks
    store = FileStore(str(folder / f"store-{world}"), world)
    ranks = Ranks.join(LAYOUTS[layout], rank, store)
    loading = {2: "ep2", 4: "fsdp4"}[world]
    save(ranks, folder / layout)
    as_loaded = Ranks(rank, world, LAYOUTS[loading].expert_parallel, ranks.device)
    found: dict[str, Any] = {}
    if world == 2:
        save(ranks, folder / ADAPTED)
        save(ranks, folder / "bf16", torch.bfloat16)
        found["failing"] = fail(ranks, folder / "failing")
    for name in (*SAVING, ADAPTED):
        wait_for(folder / name / "truth.pt")
        found[name] = load(as_loaded, folder / name)
    if rank == 0:
        torch.save(found, folder / f"found-{loading}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Forks all ranks of both sizes: torch and transformers are imported once. Exit status: how many failed."""
    folder = Path(sys.argv[1])
    children = []
    for layout in ("grid", "fsdp2"):
        for rank in range(LAYOUTS[layout].ranks):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    run_rank(layout, rank, folder)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(pid)
    failed = 0
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status and not failed:  # the others wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
        failed += status != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()

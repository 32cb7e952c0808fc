"""Balance loss, moving biases, replay and counts over two ranks, sharded and with experts shared out: as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from policy.batch import Sample
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, ParallelConfig, RouterConfig
from policy.learner import Learner
from policy.parallel import Ranks, shard
from tests.unit.test_learner import batch, policy
from tests.unit.test_routing import biases, own_choice

ROUTER = RouterConfig(bias="update", bias_rate=0.01, balance_coef=0.1, replay=True)


def _samples() -> list[Sample]:
    """An odd number, so that one rank repeats a micro-batch; a third of the experts are not the router's own."""
    found = []
    for sample in own_choice(policy(torch.float64), batch(7)):
        assert sample.routed_experts is not None
        experts = sample.routed_experts.long()
        experts[::3] = (experts[::3] + 1) % 8
        found.append(replace(sample, routed_experts=experts))
    return found


def _train(ranks: Ranks) -> dict[str, Any]:
    model = policy(torch.float64)
    shard(model, ranks)
    learner = Learner(
        model,
        optimizer=OptimizerConfig(lr=1e-3),
        loss=LossConfig(),
        config=LearnerConfig(threads=1, micro_batch_tokens=30),
        total_steps=8,
        router=ROUTER,
        ranks=ranks,
    )
    rows = [learner.step(_samples(), mini_batches=2) for _ in range(2)]
    for row in rows:
        del row["learner/tokens_per_s"], row["learner/pack_fill"]  # not the same by nature
    return {"rows": rows, "biases": biases(model)}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for experts in (1, 2):
        store = dist.FileStore(f"{folder}/store-{experts}", 2)  # pyright: ignore[reportPrivateImportUsage]
        ranks = Ranks.join(ParallelConfig(ranks=2, expert_parallel=experts), rank, store)
        torch.save(_train(ranks), f"{folder}/{experts}-{rank}.pt")
        dist.destroy_process_group()


def test_two_ranks_count_and_balance_as_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    alone = _train(Ranks.alone())
    for path in sorted(tmp_path.glob("*.pt")):
        found = torch.load(path)
        assert torch.equal(found["biases"], alone["biases"]) and found["biases"].any()
        for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
            assert {"learner/balance_loss", "router/replay_agreement", "router/dead_experts/layer_1"} <= ours.keys()
            assert 0.2 < ours["router/replay_agreement"] < 0.95
    assert len(list(tmp_path.glob("*.pt"))) == 4

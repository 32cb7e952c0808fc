"""Checkpoints in the background: what a step waits for, what it does not, and what becomes of failures."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from policy import checkpoint
from policy.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, prune
from policy.learner import Learner
from policy.saver import Saver
from policy.tokenizer import build_tokenizer
from tests.unit.test_learner import assert_same_bits, batch, policy, weights
from tests.unit.test_learner import learner as learner_of

TOKENIZER = build_tokenizer()


class Disk:
    """A disk that lets nothing pass until it is told to, or that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.free = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.writers: list[str] = []
        write = checkpoint.write_state

        def slow(*args: Any) -> None:
            self.writers.append(threading.current_thread().name)
            self.reached.set()
            assert self.free.wait(20)
            if self.error is not None:
                raise self.error
            write(*args)

        monkeypatch.setattr(checkpoint, "write_state", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.free.set()


def trained(steps: int = 1) -> Learner:
    learner = learner_of(policy(), lr=1e-2)
    for number in range(steps):
        learner.step(batch(4, seed=number))
    return learner


def save(saver: Saver, parent: Path, step: int, learner: Learner, **how: Any) -> Path:
    folder = parent / f"step-{step:06d}"
    saver.save(folder, learner=learner, tokenizer=TOKENIZER, extra={"step": step}, **how)
    return folder


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_show_in_it(tmp_path: Path, disk: Disk) -> None:
    learner, saver = trained(), Saver()
    before = weights(learner.model)
    folder = save(saver, tmp_path, 1, learner)
    assert disk.reached.wait(20)
    learner.step(batch(4, seed=1))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(learner.model).items())
    assert latest_checkpoint(tmp_path) is None, "nothing is there before all of it is"
    assert [path.name for path in tmp_path.iterdir()] == [".partial-step-000001"]
    disk.free.set()
    saver.wait()
    assert latest_checkpoint(tmp_path) == folder
    assert disk.writers != [threading.current_thread().name]
    other = learner_of(policy(seed=5), lr=1e-2)
    assert load_checkpoint(folder, other) == {"step": 1}
    assert_same_bits(weights(other.model), before)
    other.step(batch(4, seed=1))
    assert_same_bits(weights(other.model), weights(learner.model))


def test_a_second_save_waits_for_the_first(tmp_path: Path, disk: Disk) -> None:
    learner, saver = trained(), Saver()
    first = save(saver, tmp_path, 1, learner)
    second = threading.Thread(target=save, args=(saver, tmp_path, 2, learner))
    second.start()
    second.join(0.3)
    assert second.is_alive() and len(disk.writers) == 1, "one at a time"
    disk.free.set()
    second.join(20)
    assert not second.is_alive() and (first / "complete.json").is_file(), "it began when the first was whole"
    saver.wait()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_without_the_background_it_is_written_before_the_call_returns(tmp_path: Path, disk: Disk) -> None:
    disk.free.set()
    saver, copies = Saver(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "stage", copies.append)
        folder = save(saver, tmp_path, 1, trained(), background=False)
    assert latest_checkpoint(tmp_path) == folder
    assert disk.writers == [threading.current_thread().name] and copies == []


CALLS = {
    "the next save": lambda saver, path: save(saver, path, 2, trained()),
    "the next save, not in the background": lambda saver, path: save(saver, path, 2, trained(), background=False),
    "the end": lambda saver, path: saver.wait(),
    "the stage's model": lambda saver, path: saver.export(policy(), TOKENIZER, path / "model"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_went_wrong_in_the_background_is_told_once_by(call: str, tmp_path: Path, disk: Disk) -> None:
    disk.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    disk.free.set()
    saver = Saver()
    whole = tmp_path / "step-000000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "error", None)
        save(saver, tmp_path, 0, trained(0), background=False)
    save(saver, tmp_path, 1, trained())
    with pytest.raises(CheckpointError, match=r"^disk full: .*step-000001 needs .* MiB are free; earlier") as caught:
        CALLS[call](saver, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000"], "no other was begun, nothing is left behind"
    assert latest_checkpoint(tmp_path) == whole
    disk.error = None
    saver.wait()
    save(saver, tmp_path, 2, trained(), background=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_pruning_leaves_alone_what_is_being_written(tmp_path: Path, disk: Disk) -> None:
    learner, saver = trained(), Saver()
    disk.free.set()
    for step in (1, 2):
        save(saver, tmp_path, step, learner, background=False)
    disk.free.clear()
    disk.reached.clear()
    save(saver, tmp_path, 3, learner)
    assert disk.reached.wait(20)
    (tmp_path / ".partial-step-000009").mkdir()
    assert sorted(path.name for path in prune(tmp_path, 1, writing="step-000003")) == [
        ".partial-step-000009", "step-000001",
    ]  # fmt: skip
    disk.free.set()
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_one_that_becomes_whole_while_it_is_pruned_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is complete and the look at what is there."""
    learner, saver = trained(), Saver()
    for step in (1, 2):
        save(saver, tmp_path, step, learner, background=False)
    complete = checkpoint._complete
    monkeypatch.setattr(checkpoint, "_complete", lambda parent: [p for p in complete(parent) if p.name[-1] != "2"])
    prune(tmp_path, 1, writing="step-000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]

"""A learner's state on the disk: what is read is what was written, to the bit, and what does not fit is told."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit

from policy.config import LearnerConfig, LossConfig, OptimizerConfig
from policy.learner import Learner
from policy.optimizer_kinds import check_kind
from policy.state import (
    DamagedState,
    SavedTensors,
    StateError,
    flatten,
    read_state,
    stage,
    stored_tensors,
    total_bytes,
    unflatten,
    write_state,
)
from tests.unit.test_learner import batch, policy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
NAMES = st.text(st.sampled_from("ab.0_"), min_size=1, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits at all: NaNs with payloads, infinities, negative zeros, subnormals."""
    shape, dtype = draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(
        0, most, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return raw.view(dtype).reshape(shape)


NUMBERS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats()
TREES = st.dictionaries(
    NAMES, tensors() | NUMBERS | st.dictionaries(NAMES, tensors() | NUMBERS, max_size=3), max_size=5
)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(tree=TREES)
def test_what_is_read_is_what_was_written(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    with tempfile.TemporaryDirectory() as folder:
        write_state(stage(flat), Path(folder) / "state")
        into = {key: torch.zeros_like(tensor) for key, tensor in flat.items()}
        read_state(into, Path(folder) / "state")
        assert {key: bits(tensor) for key, tensor in into.items()} == {key: bits(t) for key, t in flat.items()}
        again = unflatten(tree, into)
    assert repr(again) == repr(tree), "numbers come back as the numbers that they were"


def test_keys_are_the_names_on_the_way() -> None:
    tree = {"a": {"x.weight": torch.ones(2), "n": 3}, "on": True, "lr": 0.1}
    flat = flatten(tree)
    assert list(flat) == ["a.x.weight", "a.n", "on", "lr"]
    assert [flat[key].dtype for key in ("a.n", "on", "lr")] == [torch.int64, torch.bool, torch.float64]
    assert flat["a.x.weight"].data_ptr() == tree["a"]["x.weight"].data_ptr()
    assert total_bytes(flat) == 2 * 4 + 8 + 1 + 8
    with pytest.raises(StateError, match=r"a\.kind is a str: a state is made of tensors and numbers"):
        flatten({"a": {"kind": "adamw"}})


def test_a_copy_does_not_follow_what_it_was_taken_from(tmp_path: Path) -> None:
    live = {"w": torch.arange(4.0), "column": torch.arange(6.0).reshape(2, 3)[:, 1]}
    copies = stage(live)
    for tensor in live.values():
        tensor.add_(100)
    write_state(copies, tmp_path / "state")
    saved = SavedTensors(tmp_path / "state", "")
    assert saved["w"].tolist() == [0, 1, 2, 3] and saved["column"].tolist() == [1, 4]


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    write_state({"model.a": torch.ones(2), "model.b.c": torch.zeros(3, dtype=torch.bfloat16), "rng": torch.ones(1)},
                tmp_path / "state")  # fmt: skip
    saved = SavedTensors(tmp_path / "state", "model.")
    assert sorted(saved) == ["a", "b.c"] and len(saved) == 2
    assert torch.equal(saved["b.c"], torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(KeyError):
        saved["rng"]
    assert stored_tensors(tmp_path / "state")["model.b.c"] == (torch.Size([3]), torch.bfloat16)


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"w": torch.zeros(2, 3), "new": torch.zeros(1)}, "it holds no new: it belongs to another"),
        ({"w": torch.zeros(3, 2)}, r"its w is torch.float32 \[2, 3\], where the learner has torch.float32 \[3, 2\]"),
        ({"w": torch.zeros(2, 3).double()}, r"its w is torch.float32 \[2, 3\], where the learner has torch.float64"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_filled(
    tmp_path: Path, into: dict[str, Tensor], message: str
) -> None:
    write_state({"w": torch.ones(2, 3), "more": torch.ones(1)}, tmp_path / "state")
    with pytest.raises(StateError, match=message) as caught:
        read_state(into, tmp_path / "state")
    assert not isinstance(caught.value, DamagedState)
    assert all(not tensor.any() for tensor in into.values())


def test_damage_is_told(tmp_path: Path) -> None:
    write_state({"w": torch.ones(200)}, tmp_path / "state")
    [data] = (tmp_path / "state").glob("*.distcp")
    whole = data.read_bytes()
    for broken in (whole[:300], b"x" * len(whole)):
        data.write_bytes(broken)
        with pytest.raises(DamagedState, match="it cannot be read"):
            read_state({"w": torch.zeros(200)}, tmp_path / "state")
    listed = tmp_path / "state/.metadata"
    pickled = listed.read_bytes()
    # An unknown instruction, an unhashable key, a call of what cannot be called, a name that is not there.
    for broken in (b"", b"x" * 9, b"}]K\x01s.", b"K\x01)R.", b"cos\nnone\n.", b"\x8d" + b"\x7f" * 8, pickled[:-9]):
        listed.write_bytes(broken)
        with pytest.raises(DamagedState, match="its list of tensors cannot be read"):
            stored_tensors(tmp_path / "state")
    listed.write_bytes(pickled)
    data.unlink()
    with pytest.raises(DamagedState, match="it cannot be read"):
        SavedTensors(tmp_path / "state", "")["w"]
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(DamagedState, match="its list of tensors cannot be read"):
        stored_tensors(tmp_path / "state")


def test_a_tensor_made_of_others_is_stored_as_these(tmp_path: Path) -> None:
    """What 8-bit optimizers keep: codes, scales and the table of what a code means."""
    moment = OptimState8bit.zeros((4, 256), signed=True)
    moment.copy_(torch.randn(4, 256))
    write_state(flatten({"exp_avg": moment}), tmp_path / "state")
    assert set(stored_tensors(tmp_path / "state")) == {"exp_avg.codes", "exp_avg.scale", "exp_avg.qmap"}
    again = OptimState8bit.zeros((4, 256), signed=True)
    into = {"exp_avg": again}
    read_state(flatten(into), tmp_path / "state")
    assert torch.equal(again.codes, moment.codes) and torch.equal(again.scale, moment.scale)
    assert torch.equal(again.dequantize(), moment.dequantize()) and again.codes.any()


def test_eight_bits_are_refused_on_several_ranks_whose_blocks_fit_no_other_number_of_them() -> None:
    with pytest.raises(ValueError, match=r"adamw8bit works with one learner rank, and there are 2: .*set it to adamw"):
        check_kind(OptimizerConfig(kind="adamw8bit"), policy(), 2)


def learner(dtype: torch.dtype, seed: int, kind: str = "adamw") -> Learner:
    return Learner(
        policy(dtype, seed=seed), optimizer=OptimizerConfig(lr=1e-2, schedule="linear", weight_decay=0.1, kind=kind),
        loss=LossConfig(), config=LearnerConfig(threads=1, micro_batch_tokens=40), total_steps=9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, "adamw"),
        (torch.bfloat16, "adamw"),
        (torch.float64, "adamw"),
        (torch.float32, "adamw8bit"),
        (torch.bfloat16, "adamw8bit"),
    ],
)
def test_a_learner_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    one = learner(dtype, 0, kind)
    for number in range(2):
        one.step(batch(8, seed=number), mini_batches=2)
    write_state(stage(flatten(one.state_dict())), tmp_path / "state")
    after = [one.step(batch(8, seed=number), mini_batches=2) for number in (2, 3)]
    torch.manual_seed(99)
    other = learner(dtype, 1, kind)
    other.step(batch(8, seed=5))  # moments of its own, which must not stay
    other.prepare_moments(one.state_dict()["optimizer"]["moments"].keys())
    tree = other.state_dict()
    flat = flatten(tree)
    read_state(flat, tmp_path / "state")
    other.load_state_dict(unflatten(tree, flat))
    again = [other.step(batch(8, seed=number), mini_batches=2) for number in (2, 3)]
    timed = {name for name in after[0] if "per_s" in name or "seconds" in name}
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in after
    ]
    first, second = flatten(one.state_dict()), flatten(other.state_dict())
    assert {key: bits(tensor) for key, tensor in first.items()} == {key: bits(t) for key, t in second.items()}
    assert all(torch.equal(p, second[f"model.{n}"].to(p.dtype)) for n, p in other.model.named_parameters())
    assert any(key.endswith("exp_avg.codes") for key in first) == (kind == "adamw8bit")


def test_a_learner_that_never_stepped_has_no_moments_and_takes_none(tmp_path: Path) -> None:
    fresh = learner(torch.float32, 0)
    write_state(flatten(fresh.state_dict()), tmp_path / "state")
    used = learner(torch.float32, 0)
    used.step(batch(4))
    used.load_state_dict(fresh.state_dict())
    assert used.state_dict()["optimizer"] == {"steps": 0, "position": 0, "moments": {}}
    assert not any(key.startswith("optimizer.moments") for key in stored_tensors(tmp_path / "state"))

"""What makes a checkpoint complete, and that nothing of it is used that is not what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from policy.config import LoraConfig, ModelConfig
from policy.loading import load_policy
from policy.manifest import adapters_of, checksums, incomplete, verify, write_manifest
from policy.tokenizer import build_tokenizer
from policy.whole_folder import Peers
from tests.unit.plain_learner import TINY, Plain

DATA = {"state/a": b"weights", "state/.metadata": b"list", "extra.json": b"{}", "model/config.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000001"
    for name, data in DATA.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, {}, None)
    return folder


def edit(folder: Path, **values: Any) -> None:
    path = folder / "complete.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_it_lists_sizes_and_checksums_and_takes_those_that_are_known(folder: Path) -> None:
    listed = json.loads((folder / "complete.json").read_text())
    assert listed["files"] == {name: len(data) for name, data in DATA.items()}
    assert listed["xxh3_128"] == {name: xxhash.xxh3_128_hexdigest(data) for name, data in DATA.items()}
    assert checksums(folder, ["extra.json"]) == {"extra.json": xxhash.xxh3_128_hexdigest(b"{}")}
    (folder / "complete.json").unlink()
    write_manifest(folder, {"state/a": "told"}, {"rank": 1})
    assert json.loads((folder / "complete.json").read_text())["xxh3_128"]["state/a"] == "told"
    assert adapters_of(folder) == {"rank": 1}


@given(name=st.sampled_from(sorted(DATA)), bit=st.integers(0, 15))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_every_flipped_bit_is_noticed_where_it_is_used(folder: Path, name: str, bit: int) -> None:
    broken = bytearray(DATA[name])
    broken[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(broken)
    part = name.split("/")[0]
    try:
        assert incomplete(folder) == "", "sizes alone do not tell"
        verify(folder, *({"state", "extra.json", "model"} - {part}))
        with pytest.raises(CheckpointError, match=f"{name} is damaged .*: resume from an earlier one") as caught:
            verify(folder, part)
        assert "\n" not in str(caught.value)
    finally:
        (folder / name).write_bytes(DATA[name])


def test_a_checksum_that_is_missing_is_damage_and_none_at_all_an_earlier_version(folder: Path) -> None:
    verify(folder, "state", "extra.json", "model")
    edit(folder, xxh3_128={})
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(folder, "state")
    edit(folder, xxh3_128=None)
    with pytest.raises(CheckpointError, match=r"earlier version .*without checksums.*begin anew from .*000001/model"):
        verify(folder, "state")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '"x"', '{"files": null}', '{"files": []}', '{"files": {}}'])
def test_a_damaged_list_makes_a_checkpoint_incomplete(folder: Path, text: str) -> None:
    assert latest_checkpoint(folder.parent) == folder
    (folder / "complete.json").write_text(text)
    assert latest_checkpoint(folder.parent) is None
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint \(no readable complete\.json\)"):
        load_checkpoint(folder, Plain(torch.nn.Linear(1, 1)))  # type: ignore[arg-type]


def test_bit_flips_in_a_state_never_reach_a_learner(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    model, tokenizer = load_policy(TINY, seed=1)
    save_checkpoint(folder, learner=Plain(model), tokenizer=tokenizer, extra={})
    other = load_policy(TINY, seed=2)[0]
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for file in ("state/__0_0.distcp", "state/.metadata", "extra.json"):
        whole = (folder / file).read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            (folder / file).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=f"{file} is damaged"):
                load_checkpoint(folder, Plain(other))
        (folder / file).write_bytes(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert load_checkpoint(folder, Plain(other)) == {}
    (folder / "extra.json").write_text("null")
    (folder / "complete.json").unlink()
    write_manifest(folder, {}, None)
    with pytest.raises(CheckpointError, match=r"extra\.json holds no names and values\): resume from an earlier one"):
        load_checkpoint(folder, Plain(other))


def test_adapters_of_another_kind_are_refused(tmp_path: Path) -> None:
    def adapted(**fields: Any) -> Plain:
        config = ModelConfig(preset="tiny", overrides=TINY.overrides, lora=LoraConfig(rank=2, **fields))
        return Plain(load_policy(config, seed=1)[0])

    folder = tmp_path / "step-000001"
    save_checkpoint(folder, learner=adapted(alpha=4.0), tokenizer=build_tokenizer(), extra={"step": 1})
    assert load_checkpoint(folder, adapted(alpha=4.0)) == {"step": 1}
    for other, message in (
        (adapted(alpha=8.0), "alpha: 4.0 there, 8.0 here"),
        (adapted(alpha=4.0, targets=("o_proj",)), r"targets: .*gate_proj.* there, \['o_proj'\] here"),
        (adapted(alpha=4.0, experts=True), "experts: False there, True here"),
        (Plain(load_policy(TINY, seed=1)[0]), "adapters: some there, none here"),
    ):
        with pytest.raises(CheckpointError, match=f"set model.lora to what it was written with .{message}") as caught:
            load_checkpoint(folder, other)
        assert "resume from" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_ranks_computed_comes_together_and_a_failure_of_one_is_everyones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = [{"a": "1"}, {"b": "2"}]

    def all_gather(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own, said[1]]

    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    assert Peers().gathered(lambda rank: {"rank": str(rank)}) == {"rank": "0"}
    peers = Peers(group=object())  # type: ignore[arg-type]
    assert peers.gathered(lambda rank: said[rank]) == {"a": "1", "b": "2"}
    with pytest.raises(OSError, match="no such disk"):
        peers.gathered(_fail)
    said[1] = "the disk is gone"
    with pytest.raises(CheckpointError, match="rank 1: the disk is gone"):
        peers.gathered(lambda rank: {})


def _fail(rank: int) -> dict[str, str]:
    raise OSError(f"no such disk on rank {rank}")

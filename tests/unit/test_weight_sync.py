"""Segments of shared memory, checksums, the sender, the attestations; no engine."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.gpu_transfer import GpuTransport, HandOver
from pipelines.weight_sync import (
    AttestationError,
    Onlooker,
    SharedMemoryTransport,
    WeightSender,
    attest_bytes,
    attest_meaning,
    default_tolerance,
    layout,
    sent_tensors,
)
from policy.model import PolicyModel
from policy.presets import preset_config
from rollout.engine import WeightUpdate
from rollout.fingerprint import Fingerprint, fingerprint_of_loads, word_sums
from rollout.shared_memory import Segment, new_hash, remove_stale, segment_name

Tensors = list[tuple[str, torch.Tensor]]


def receive(update: WeightUpdate) -> tuple[str, Tensors]:
    """What an engine does with an update, without the engine."""
    payload = update.payload
    segment = Segment.open(payload["path"], payload["size"])
    found = segment.tensors(update.names, update.dtypes, update.shapes, payload["offsets"])
    return segment.digest(payload["algorithm"]), list(found)


# -- segments ---------------------------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])


@given(shapes=shapes, dtype=dtypes, seed=st.integers(0, 1000))
def test_tensors_of_any_shape_and_dtype_arrive_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = [(f"t{i}", (torch.randn(shape) * 9).to(dtype)) for i, shape in enumerate(shapes)]
    transport = SharedMemoryTransport(lambda: tensors, "any", tmp_path_factory.mktemp("shm"))
    update = transport.publish(3)
    digest, arrived = receive(update)
    attest_bytes(update, digest)
    assert [name for name, _ in arrived] == [name for name, _ in tensors]
    for (_, sent), (_, got) in zip(tensors, arrived, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert torch.equal(got, sent)
    transport.close()


def test_strided_tensors_are_sent_as_they_read(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    transport = SharedMemoryTransport(lambda: [("t", matrix.t()), ("part", matrix[:, 1:3])], "r", tmp_path)
    _, arrived = receive(transport.publish(0))
    assert arrived[0][1].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert arrived[1][1].tolist() == [[1, 2], [5, 6], [9, 10]]


@pytest.mark.parametrize(
    ("sizes", "offsets", "total"),
    [([4, 64, 65, 1], [0, 64, 128, 256], 320), ([], [], 64), ([0, 8], [0, 0], 64)],
)
def test_layout_by_hand(sizes: list[int], offsets: list[int], total: int) -> None:
    assert layout(sizes) == (offsets, total)


def test_a_reader_cannot_change_what_was_published(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(lambda: [("t", torch.ones(8))], "r", tmp_path)
    update = transport.publish(0)
    _, [(_, tensor)] = receive(update)
    tensor.zero_()
    digest, [(_, again)] = receive(update)
    assert digest == update.checksum and again.sum() == 8


def test_a_tensor_outlives_its_segment(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(lambda: [("t", torch.full((1000,), 7.0))], "r", tmp_path)
    _, [(_, tensor)] = receive(transport.publish(0))
    transport.close()
    assert list(tmp_path.iterdir()) == []
    assert tensor.sum() == 7000


def test_a_segment_that_is_gone_or_cut_is_refused_with_the_reason(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(lambda: [("t", torch.ones(8))], "r", tmp_path)
    update = transport.publish(0)
    with pytest.raises(ValueError, match="holds 64 bytes, 128 were announced"):
        Segment.open(update.payload["path"], 128)
    transport.close()
    with pytest.raises(ValueError, match="published two versions since, or runs on another host"):
        receive(update)


def test_no_room_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for one copy of the weights: 5 MB wanted, \d+ MB free; enlarge it"):
        Segment.create("r", 0, 5_000_000, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_segments_of_dead_processes_are_removed(tmp_path: Path) -> None:
    name = "from rollout.shared_memory import segment_name; print(segment_name('dead run', 4))"
    dead = subprocess.run([sys.executable, "-c", name], capture_output=True, text=True, check=True).stdout.strip()
    assert dead.startswith("r1-weights-dead_run-") and dead.endswith("-v4")
    mine = segment_name("alive", 1)
    reused = mine.replace(f"-{os.getpid()}-", f"-{os.getpid()}-9", 1)  # my pid, another process: it started otherwhen
    for file in (dead, mine, reused, "someone-elses-file"):
        (tmp_path / file).write_bytes(b"x")
    assert remove_stale(tmp_path) == sorted([dead, reused])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine, "someone-elses-file"])


@pytest.mark.parametrize("algorithm", ["xxh3_128", "blake2b"])
def test_a_checksum_sees_every_byte(tmp_path: Path, algorithm: str) -> None:
    segment = Segment.create("r", 0, 4096, tmp_path)
    whole = new_hash(algorithm)
    whole.update(bytes(4096))
    seen = {segment.digest(algorithm)}
    assert seen == {whole.hexdigest()}
    for position in (0, 1, 2048, 4095):
        segment.buffer[position] = 1
        seen.add(segment.digest(algorithm))
    assert len(seen) == 5


def test_an_unknown_checksum_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown checksum algorithm 'crc'"):
        new_hash("crc")


# -- the sender -------------------------------------------------------------------------------------------------------


def test_the_current_and_the_last_version_can_be_read_older_ones_are_gone(tmp_path: Path) -> None:
    value = torch.zeros(4)
    transport = SharedMemoryTransport(lambda: [("t", value)], "r", tmp_path)
    updates = []
    for version in range(4):
        value.fill_(version)
        updates.append(transport.publish(version))
        assert len(list(tmp_path.iterdir())) == min(version + 1, 2)
    assert receive(updates[3])[1][0][1].tolist() == [3.0] * 4
    assert receive(updates[2])[1][0][1].tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="published two versions since"):
        receive(updates[1])
    transport.close()
    transport.close()
    assert list(tmp_path.iterdir()) == []


def tiny_policy() -> PolicyModel:
    torch.manual_seed(0)
    return PolicyModel(preset_config("tiny", num_hidden_layers=2, first_k_dense_replace=1))


def test_parameters_and_buffers_travel_under_their_checkpoint_names() -> None:
    model = tiny_policy()
    sender = WeightSender(model, run_id="names")
    update = sender.publish(0)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in update.names  # a buffer
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in update.names  # stacked in memory, single on the way
    parameters = sum(p.numel() for p in model.parameters())
    buffers = 8  # the correction bias of the one MoE layer
    assert sum(math.prod(shape) for shape in update.shapes) == parameters + buffers
    sender.close()


def test_the_wire_dtype_leaves_what_the_model_keeps_in_fp32() -> None:
    sent = dict(sent_tensors(tiny_policy(), "bfloat16"))
    assert sent["lm_head.weight"].dtype == torch.bfloat16
    assert sent["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize(("backend", "words"), [("nccl", "needs GPUs; use shm"), ("carrier-pigeon", "must be one of")])
def test_a_backend_that_cannot_work_is_refused(backend: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        WeightSender(tiny_policy(), backend=backend)


# -- attestations -----------------------------------------------------------------------------------------------------


def update_of(checksum: str) -> WeightUpdate:
    return WeightUpdate(
        version=7, backend="shm", names=("a",), dtypes=("float32",), shapes=((2,),), checksum=checksum, payload={}
    )


@pytest.mark.parametrize(("received", "named"), [("beef", "received beef"), ("", "received nothing")])
def test_other_bytes_stop_the_run(received: str, named: str) -> None:
    attest_bytes(update_of("cafe"), "cafe")
    with pytest.raises(AttestationError, match=f"version 7 arrived with other bytes: published cafe, {named}"):
        attest_bytes(update_of("cafe"), received)


def test_one_flipped_byte_in_the_segment_stops_the_run(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(lambda: [("t", torch.ones(1000))], "r", tmp_path)
    update = transport.publish(0)
    with Path(update.payload["path"]).open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[1234] ^= 1
    digest, _ = receive(update)
    with pytest.raises(AttestationError, match="other bytes"):
        attest_bytes(update, digest)


def test_meaning_by_hand() -> None:
    engine, learner = [-1.0, -2.0, -3.0], [-1.00004, -2.0, -3.00002]
    mean, largest = attest_meaning(engine, learner, ["a", "b", "c"], tolerance=1e-4)
    assert mean == pytest.approx(2e-5, rel=1e-6) and largest == pytest.approx(4e-5, rel=1e-6)


def test_the_worst_tokens_are_named_with_both_sides() -> None:
    engine = [-1.0, -2.0, -3.0, -4.0]
    learner = [-1.0, -2.5, -3.0, -4.1]
    with pytest.raises(AttestationError) as failure:
        attest_meaning(engine, learner, ["a", "<think>", "c", "7"], worker=1, version=12)
    text = str(failure.value)
    assert text.startswith("version 12 of the weights in rollout worker 1 mean something else")
    assert "max 5.00e-01, mean 1.50e-01 over 4 tokens" in text
    assert text.index("'<think>' at 1 (engine -2.0000, learner -2.5000)") < text.index("'7' at 3")


def test_a_small_error_everywhere_is_seen_by_the_mean() -> None:
    most, most_mean = default_tolerance("float32")
    shift = (most + most_mean) / 2
    with pytest.raises(AttestationError, match="mean"):
        attest_meaning([0.0] * 50, [shift] * 50, ["x"] * 50)
    attest_meaning([0.0] * 50, [shift] + [0.0] * 49, ["x"] * 50)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    with pytest.raises(AttestationError, match="max inf"):
        attest_meaning([bad, -1.0], [bad, -1.0], ["a", "b"], dtype="bfloat16")


@pytest.mark.parametrize(("engine", "learner", "tokens"), [([], [], []), ([-1.0], [-1.0, -2.0], ["a"])])
def test_nothing_to_compare_is_a_failure(engine: list[float], learner: list[float], tokens: list[str]) -> None:
    with pytest.raises(AttestationError, match="cannot be attested"):
        attest_meaning(engine, learner, tokens)


def test_bf16_is_given_more_room() -> None:
    attest_meaning([-1.0], [-1.04], ["a"], dtype="bfloat16")
    with pytest.raises(AttestationError):
        attest_meaning([-1.0], [-1.04], ["a"], dtype="float32")


# -- fingerprints of what travels between GPUs ------------------------------------------------------------------------


def test_word_sums_by_hand() -> None:
    assert word_sums(torch.tensor([5, -2, 7], dtype=torch.int32)) == (10, 5 - 4 + 21)
    assert word_sums(torch.tensor([1, 2, 3], dtype=torch.uint8)) == (6, 14)
    assert word_sums(torch.zeros(0)) == (0, 0)


def test_word_sums_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1001)
    whole = word_sums(tensor)
    monkeypatch.setattr("rollout.fingerprint._CHUNK", 64)
    assert word_sums(tensor) == whole


def digest_of(tensors: Tensors) -> str:
    found = Fingerprint()
    for name, tensor in tensors:
        found.add(name, tensor)
    return found.hexdigest()


def test_a_fingerprint_sees_values_places_names_shapes_and_order() -> None:
    base = [("a", torch.tensor([1.0, 2.0, 3.0, 4.0])), ("b", torch.ones(2))]
    others = [
        [("a", torch.tensor([1.0, 2.0, 3.0, 4.0000005])), base[1]],
        [("a", torch.tensor([2.0, 1.0, 3.0, 4.0])), base[1]],
        [("a", torch.tensor([[1.0, 2.0], [3.0, 4.0]])), base[1]],
        [("c", base[0][1]), base[1]],
        [base[1], base[0]],
        [base[0]],
    ]
    assert digest_of(base) == digest_of([(name, tensor.clone()) for name, tensor in base])
    assert digest_of(base) not in {digest_of(other) for other in others}


def test_loads_are_fingerprinted_on_their_way_in() -> None:
    class Model:
        def __init__(self) -> None:
            self.loaded: Tensors = []

        def load_weights(self, weights: Any) -> None:
            self.loaded += list(weights)

    model, found, tensors = Model(), Fingerprint(), [("a", torch.ones(3)), ("b", torch.zeros(2, 2))]
    with fingerprint_of_loads(model, found):
        model.load_weights(tensors[:1])
        model.load_weights(iter(tensors[1:]))
    assert [name for name, _ in model.loaded] == ["a", "b"]
    assert found.hexdigest() == digest_of(tensors)
    model.load_weights([("after", torch.ones(1))])
    assert found.hexdigest() == digest_of(tensors)


# -- nccl and ipc: vLLM's trainer engines behind publish --------------------------------------------------------------


class FakeTrainer:
    """Behaves as vLLM's trainer engines do towards their client."""

    def __init__(self, client: HandOver, tensors: Any, fail: str = "") -> None:
        self.client, self.tensors, self.fail = client, tensors, fail
        self.sent: list[Tensors] = []
        self.finished = 0
        self.closed = False

    def send_weights(self) -> None:
        if self.fail:
            raise OSError(self.fail)
        self.client.start_weight_update()
        now = [(name, tensor.clone()) for name, tensor in self.tensors()]
        self.sent.append(now)
        names, kinds = [n for n, _ in now], ["float32" for _ in now]
        shapes = [list(t.shape) for _, t in now]
        handles = [{"uuid": (n, b"handle")} for n in names]
        self.client.update_weights({"names": names, "dtype_names": kinds, "shapes": shapes, "ipc_handles": handles})
        self.client.finish_weight_update()
        self.finished += 1

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def weights() -> Tensors:
    return [("a", torch.zeros(3)), ("b", torch.ones(2, 2))]


def transport_over(backend: str, weights: Tensors, fail: str = "") -> tuple[GpuTransport, list[FakeTrainer]]:
    trainers: list[FakeTrainer] = []

    def connect(backend: str, client: HandOver, tensors: Any, init: dict[str, Any]) -> FakeTrainer:
        trainers.append(FakeTrainer(client, tensors, fail))
        return trainers[0]

    return GpuTransport(backend, lambda: iter(weights), 4, connect), trainers


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ipc_hands_over_the_handles_and_holds_the_tensors_until_the_next_version(weights: Tensors) -> None:
    transport, trainers = transport_over("ipc", weights)
    first = transport.publish(1)
    handles = pickle.loads(b64decode(first.payload["ipc_handles_pickled"]))
    assert handles == [{"uuid": ("a", b"handle")}, {"uuid": ("b", b"handle")}]
    assert first.checksum == digest_of(weights) and first.payload["names"] == ["a", "b"]
    assert trainers[0].finished == 0  # the engines may still be reading
    weights[0][1].fill_(5)
    second = transport.publish(2)
    assert trainers[0].finished == 1 and second.checksum != first.checksum
    transport.close()
    until(lambda: trainers[0].finished == 2)
    assert trainers[0].closed and len(trainers) == 1


def test_nccl_returns_before_the_receivers_have_joined(weights: Tensors) -> None:
    joined = threading.Event()
    trainers: list[FakeTrainer] = []

    def connect(backend: str, client: HandOver, tensors: Any, init: dict[str, Any]) -> FakeTrainer:
        assert joined.wait(10)
        trainers.append(FakeTrainer(client, tensors))
        return trainers[0]

    transport = GpuTransport("nccl", lambda: iter(weights), 4, connect)
    update = transport.publish(1)
    init = update.payload["init"]
    assert init["world_size"] == 5 and init["rank_offset"] == 1 and init["master_port"] > 0
    assert update.payload["names"] == ["a", "b"] and update.payload["shapes"] == [[3], [2, 2]]
    assert trainers == []
    joined.set()
    transport.publish(2)
    until(lambda: len(trainers[0].sent) == 2)
    transport.close()


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_a_transfer_that_fails_is_told_by_publish(backend: str, weights: Tensors) -> None:
    transport, _ = transport_over(backend, weights, fail="link down")

    def both() -> Iterator[WeightUpdate]:
        yield transport.publish(1)
        yield transport.publish(2)

    with pytest.raises(RuntimeError, match=f"could not be sent over {backend}: link down"):
        list(both())
    transport.close()


@pytest.mark.parametrize("passes", [1, 2])
def test_the_other_ranks_gather_as_often_as_the_first_one(passes: int) -> None:
    gathered: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b"):
            gathered.append(name)
            yield name, torch.ones(2)

    onlooker = Onlooker(tensors, passes)
    for version in (1, 2):
        assert onlooker.publish(version) is None
    onlooker.close()
    onlooker.close()
    assert gathered == ["a", "b"] * passes * 2


def test_outlines_spare_a_first_pass(tmp_path: Path) -> None:
    """Names and shapes are asked for without the tensors, which may have to be gathered."""
    passes: list[int] = []

    class Tensors:
        def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
            passes.append(1)
            yield "t", torch.full((3,), 7.0)

        def outlines(self) -> list[tuple[str, torch.Tensor]]:
            return [("t", torch.empty(3, device="meta"))]

    transport = SharedMemoryTransport(Tensors(), "r", tmp_path)
    update = transport.publish(1)
    assert passes == [1] and (update.names, update.shapes) == (("t",), ((3,),))
    transport.close()

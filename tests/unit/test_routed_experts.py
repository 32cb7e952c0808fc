"""Experts on their way from the sampler to the learner: captured, written as text, kept in a journal, packed."""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.batch import Sample, pack, samples_from_groups
from policy.inputs import check_routed_experts
from policy.presets import preset_config
from rollout.engine import EngineConfig, GenerateRequest
from rollout.scripted_engine import Scripted, ScriptedEngine
from rollout.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    SamplingParams,
    group_from_json,
    group_to_json,
    pack_experts,
    unpack_experts,
)
from rollout.vllm_routing import ASKED, RoutingCapture, pack_rows, returned_experts
from rollout.vllm_start import MENDS, StartOptions, engine_arguments

# -- text -------------------------------------------------------------------------------------------------------------


def test_the_text_by_hand() -> None:
    text = pack_experts(bytes(range(12)), (2, 3, 2), 1)
    assert text.startswith("2x3x2x1:") and text.isascii()
    assert unpack_experts(text) == (bytes(range(12)), (2, 3, 2), 1)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 5), layers=st.integers(1, 3), top_k=st.integers(1, 3), wide=st.booleans())
def test_rows_come_back_as_they_were(tokens: int, layers: int, top_k: int, wide: bool) -> None:
    kind = np.uint16 if wide else np.uint8
    rows = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (tokens, layers, top_k)).astype(kind)
    ids, shape, width = unpack_experts(pack_rows(rows[::1]))
    assert np.array_equal(np.frombuffer(ids, dtype=f"<u{width}").reshape(shape), rows)


@pytest.mark.parametrize("damage", ["", "2x3x2x1", "2x3x2x1:###", "2x3x9x1:", "axb:", "2x3x2x4:"])
def test_a_damaged_text_is_told(damage: str) -> None:
    whole = pack_experts(bytes(range(12)), (2, 3, 2), 1)
    text = damage + whole.partition(":")[2] if damage.endswith(":") else damage
    with pytest.raises(ValueError, match=r"routed_experts .* is damaged: draw the rollout again"):
        unpack_experts(text)
    with pytest.raises(ValueError, match="11 bytes are not 2 x 3 x 2 ids of 1 bytes"):
        pack_experts(bytes(11), (2, 3, 2), 1)


@pytest.mark.parametrize("head", ["-2x-3x2x1", "2x-3x-2x1", " 2x3x2x1", "2x3x2x1x1", "1_2x1x1x1", "2x3x2x3"])
def test_shapes_that_are_none(head: str) -> None:
    packed = pack_experts(bytes(range(12)), (2, 3, 2), 1).partition(":")[2]
    with pytest.raises(ValueError, match="is damaged"):
        unpack_experts(f"{head}:{packed}")


def test_what_follows_the_ids_or_is_no_text_is_damage() -> None:
    ids = bytes(range(12))
    for stream in (zlib.compress(ids) + b"x", zlib.compress(ids + b"x"), zlib.compress(ids)[:-1]):
        with pytest.raises(ValueError, match="is damaged"):
            unpack_experts(f"2x3x2x1:{base64.b64encode(stream).decode()}")
    for other in (None, 5, b"2x3x2x1:"):
        with pytest.raises(ValueError, match="is damaged"):
            unpack_experts(other)  # pyright: ignore[reportArgumentType]


# -- what a model takes -----------------------------------------------------------------------------------------------


def test_experts_that_no_router_chooses_are_refused() -> None:
    shape = preset_config("tiny")  # two layers, two of eight experts a token
    good = torch.tensor([[3, 1], [0, 7], [6, 5]])
    taken = check_routed_experts([good.to(torch.uint8), good], shape, 3)
    assert taken is not None and all(torch.equal(choice, good) for choice in taken)
    twice = good.clone()
    twice[1] = 4
    for bad, message in (
        (twice, r"routed_experts\[1\] sends token 1 to an expert twice \(\[4, 4\]\)"),
        (torch.zeros_like(good), "sends token 0 to an expert twice"),
        (good + 0.7, "holds torch.float32: experts are numbered by integers"),
        (good.bool(), "holds torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            check_routed_experts([good, bad], shape, 3)


def test_samples_of_different_models_are_refused() -> None:
    samples = [
        Sample(token_ids=(5, 6, 7), prompt_length=1, routed_experts=torch.zeros(2, 2, k, dtype=torch.int32))
        for k in (2, 1)
    ]
    with pytest.raises(ValueError, match=r"routed_experts of sample 1 have \[2, 1\] .* those of sample 0 \[2, 2\]"):
        pack(samples, 10)
    with pytest.raises(ValueError, match=r"routed_experts hold torch.float32: experts are numbered by integers"):
        Sample(token_ids=(5, 6, 7), prompt_length=1, routed_experts=torch.zeros(2, 2, 2))


# -- journal and batch ------------------------------------------------------------------------------------------------


def _completion(experts: str | None) -> Completion:
    return Completion(
        prompt_token_ids=(5, 6), token_ids=(7, 8, 9), text="", rollout_logprobs=(-1.0, -1.0, -1.0),
        finish_reason=FinishReason.STOP, policy_version=0, routed_experts=experts,
    )  # fmt: skip


def _group(*experts: str | None) -> RolloutGroup:
    rollouts = tuple(Rollout(completion=_completion(text), advantage=1.0) for text in experts)
    return RolloutGroup(problem=Problem(id="p", prompt="?"), rollouts=rollouts)


ROWS = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)  # four tokens are fed: 5 6 7 8; 9 never is


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_journal_keeps_them_and_the_batch_holds_a_row_for_each_token_that_is_fed(kind: Any) -> None:
    group = _group(pack_rows(ROWS.astype(kind)), pack_rows(ROWS[::-1].astype(kind) + kind(1)))
    again = group_from_json(json.loads(json.dumps(group_to_json(group))))
    assert again == group
    samples = samples_from_groups([again], mask_truncated=False)
    [micro] = pack(samples, 100)
    assert micro.routed_experts is not None and micro.routed_experts.dtype == torch.int64
    assert micro.routed_experts.shape == (2, micro.tokens, 2)
    both = np.concatenate([ROWS, ROWS[::-1] + 1])
    assert torch.equal(micro.routed_experts, torch.from_numpy(both.astype(np.int64)).transpose(0, 1))
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 5, 6, 7, 8]]


def test_a_journal_from_before_has_none() -> None:
    row = json.loads(json.dumps(group_to_json(_group(None))))
    for rollout in row["rollouts"]:
        del rollout["completion"]["routed_experts"]
    [sample] = samples_from_groups([group_from_json(row)], mask_truncated=False)
    assert sample.routed_experts is None and pack([sample], 10)[0].routed_experts is None


def test_a_row_too_many_and_samples_with_and_without_are_refused() -> None:
    for rows in (3, 5):
        with pytest.raises(ValueError, match=rf"routed_experts of {rows} tokens for 5: one row for each token but the"):
            Sample(token_ids=(5, 6, 7, 8, 9), prompt_length=2, routed_experts=torch.zeros(rows, 2, 2).int())
    mixed = samples_from_groups([_group(pack_rows(ROWS), None)], mask_truncated=False)
    with pytest.raises(ValueError, match="1 of 2 samples have no routed_experts: give them to all samples or to none"):
        pack(mixed, 10)


def test_the_scripted_engine_gives_them_to_who_asks() -> None:
    script = Scripted(
        token_ids=(7, 8, 9), text="abc", routed_experts=tuple(map(lambda t: tuple(map(tuple, t)), ROWS.tolist()))
    )
    engine = ScriptedEngine(lambda *_: script)
    asked = [GenerateRequest(prompt_token_ids=(5, 6), sample_index=i, seed=i, routed_experts=i == 0) for i in range(2)]
    for limit, rows in ((8, 4), (2, 3)):
        given_, plain = asyncio.run(engine.generate(asked, SamplingParams(max_tokens=limit)))
        assert given_.routed_experts == pack_rows(ROWS[:rows]) and plain.routed_experts is None


# -- capture on a CPU -------------------------------------------------------------------------------------------------


class FakeRunner:
    """What the capture looks at in vLLM's model runner."""

    def __init__(self, layers: int = 2, experts: int = 8) -> None:
        self.routers = [
            SimpleNamespace(set_capture_fn=lambda see, i=i: self.see.__setitem__(i, see)) for i in range(layers)
        ]
        self.see: dict[int, Any] = {}
        self.input_batch = SimpleNamespace(num_reqs=0, req_ids=[], num_computed_tokens_cpu=np.zeros(8, dtype=np.int32))
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, dtype=np.int32))
        self.capture = RoutingCapture(self, self.routers, experts)

    def _model_forward(self, ids: np.ndarray) -> str:
        for layer, see in self.see.items():
            see(torch.from_numpy(ids[:, layer].astype(np.int32)))
        return "hidden"

    def run(self, *parts: tuple[str, int, np.ndarray]) -> None:
        """One forward pass over (request, tokens computed before, experts of its tokens [T, L, K])."""
        batch = self.input_batch
        batch.num_reqs, batch.req_ids = len(parts), [name for name, _, _ in parts]
        batch.num_computed_tokens_cpu[: len(parts)] = [first for _, first, _ in parts]
        self.query_start_loc.np[1 : len(parts) + 1] = np.cumsum([len(rows) for _, _, rows in parts])
        padding = np.zeros((1, 2, 2), dtype=np.int64)  # vLLM may pad the pass
        assert self._model_forward(np.concatenate([*(rows for _, _, rows in parts), padding])) == "hidden"


def _rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8, (count, 2, 2))


def _text(rows: np.ndarray) -> str:
    return pack_rows(rows.astype(np.uint8))


A, B, PLAIN = f"{ASKED}1-0a1b2c3d", f"{ASKED}12-aaaaaaaa", "7-ffffffff"


def test_rows_are_put_together_by_request_and_position() -> None:
    runner, a, b = FakeRunner(), _rows(5, 1), _rows(3, 2)
    runner.run((A, 0, a[:3]), (PLAIN, 0, _rows(4)), (B, 0, b[:1]))
    runner.run((B, 1, b[1:2]), (A, 3, a[3:4]))
    runner.run((PLAIN, 4, _rows(1)), (A, 4, a[4:]), (B, 2, b[2:]))
    assert runner.capture.take([(f"{ASKED}12", 3), (f"{ASKED}1", 4)]) == [_text(b), _text(a[:4])]
    assert runner.capture.drop([]) == 0
    assert runner.capture.take([(f"{ASKED}1", 4)]) == [None]


def test_a_token_computed_again_replaces_its_row_and_takes_back_what_came_after() -> None:
    runner, first, again = FakeRunner(), _rows(6, 1), _rows(4, 2)
    runner.run((A, 0, first))
    runner.run((A, 0, again))  # preempted, and computed again from the start
    assert runner.capture.take([(f"{ASKED}1", 4)]) == [_text(again)]
    runner.run((A, 0, first))
    runner.run((A, 0, again))
    assert runner.capture.take([(f"{ASKED}1", 5)]) == [None]  # not the stale rows of the first time


def test_long_requests_and_many_experts() -> None:
    runner, rows = FakeRunner(experts=300), _rows(400) + 280
    runner.run((A, 0, rows[:1]))
    for at in range(1, 400):
        runner.run((A, at, rows[at : at + 1]))
    assert runner.capture.take([(f"{ASKED}1", 400)]) == [pack_rows(rows.astype(np.uint16))]


def test_tokens_that_were_never_computed_give_the_request_up(caplog: pytest.LogCaptureFixture) -> None:
    runner, rows = FakeRunner(), _rows(6)
    runner.run((A, 2, rows[2:5]))  # the first two were in a cache
    runner.run((A, 5, rows[5:]))
    assert [record.getMessage() for record in caplog.records] == [
        f"the experts of request {ASKED}1 are given up: its tokens 0 to 1 were not computed here (is the prefix cache "
        "on?)"
    ], "once"
    assert runner.capture.take([(f"{ASKED}1", 6)]) == [None]
    runner.run((A, 0, rows[:2]))
    runner.run((A, 4, rows[4:]))
    assert runner.capture.take([(f"{ASKED}1", 6)]) == [None]
    runner.run((A, 0, rows))
    assert runner.capture.take([(f"{ASKED}1", 6)]) == [_text(rows)]


def test_dropped_requests_leave_nothing() -> None:
    runner = FakeRunner()
    runner.run((A, 0, _rows(3)), (B, 0, _rows(3)))
    assert runner.capture.drop([f"{ASKED}1", "never heard of"]) == 1
    assert runner.capture.drop([f"{ASKED}12"]) == 0


# -- GPUs -------------------------------------------------------------------------------------------------------------


def test_what_vllm_returns_on_a_gpu_holds_dense_layers_that_are_left_out() -> None:
    """vLLM's rows [T, all layers, K]: three layers here, of which the first is dense."""
    every = np.concatenate([np.zeros((4, 1, 2), dtype=np.uint8), ROWS], axis=1)
    model = SimpleNamespace(hf_text_config=SimpleNamespace(first_k_dense_replace=1, num_hidden_layers=3))
    assert returned_experts(SimpleNamespace(routed_experts=every), model, 4) == pack_rows(ROWS)
    assert returned_experts(SimpleNamespace(routed_experts=every), model, 3) == pack_rows(ROWS[:3])
    assert returned_experts(SimpleNamespace(routed_experts=every), model, 5) is None
    assert returned_experts(SimpleNamespace(routed_experts=None), model, 4) is None


def _arguments(config: EngineConfig, tmp_path: Path, *, cpu: bool) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    options = StartOptions(dtype="float32", seed=0, cores=None, load_format="auto", worker=0, mends=MENDS)
    return engine_arguments(tmp_path, config, options, cpu=cpu)


def test_vllm_is_asked_for_them_on_gpus_only(tmp_path: Path) -> None:
    wanted = EngineConfig(return_routed_experts=True)
    on_gpu = _arguments(wanted, tmp_path, cpu=False)
    assert on_gpu["enable_return_routed_experts"] and on_gpu["enable_prefix_caching"]
    assert "enable_return_routed_experts" not in _arguments(EngineConfig(), tmp_path, cpu=False)
    on_cpu = _arguments(wanted, tmp_path, cpu=True)
    assert "enable_return_routed_experts" not in on_cpu and not on_cpu["enable_prefix_caching"]


def test_capturing_from_compiled_code_is_refused(tmp_path: Path) -> None:
    config = EngineConfig(return_routed_experts=True, enforce_eager=False)
    with pytest.raises(ValueError, match=r"captured from eager code on a CPU: leave engine.enforce_eager at null"):
        _arguments(config, tmp_path, cpu=True)

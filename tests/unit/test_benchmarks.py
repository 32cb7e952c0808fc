"""The pure parts of the benchmarks: medians, ratios, operations counted by hand, tables. Nothing here measures time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import command_of, main
from benchmarks.apart import run_apart
from benchmarks.flops import active_parameters, attention_parameters, forward_flops, training_flops
from benchmarks.grpo import workloads
from benchmarks.machine import core_groups
from benchmarks.measure import Comparison, Series, comparison_from_json, comparison_to_json, take_turns
from benchmarks.options import Options
from benchmarks.peer import Peer, PeerFailed, Port
from benchmarks.report import Measurement, markdown, number, read, rows_of, span, table, write
from benchmarks.reward import spread
from benchmarks.transformers_peer import padded
from benchmarks.vllm_peer import split
from benchmarks.workload import (
    balance_experts,
    mark_tokens,
    mean_length,
    prompts,
    ragged_lengths,
    set_end_probability,
    write_prompts,
)


def comparison(**changes: Any) -> Comparison:
    fields: dict[str, Any] = dict(
        key="grpo-short",
        title="GRPO step",
        unit="samples/s",
        ours=Series(name="r1", values=(20.0, 30.0, 24.0)),
        peers=(Series(name="TRL", values=(10.0, 10.0, 16.0)),),
        goal=2.0,
        notes={"workload": "128 samples"},
    )
    return Comparison(**{**fields, **changes})


def measurement(**changes: Any) -> Measurement:
    fields: dict[str, Any] = dict(
        name="grpo",
        comparisons=(comparison(),),
        command="python -m benchmarks grpo",
        date="2026-11-24",
        machine={"cores": "2 CPU cores, AVX512", "memory": "16 GiB", "system": "Linux", "packages": "torch 2.13.0"},
        busy=0.02,
        seconds=61.2,
    )
    return Measurement(**{**fields, **changes})


# -- medians and ratios ----------------------------------------------------------------------------------------------


def test_ratio_is_of_the_medians_and_span_of_the_rounds() -> None:
    found = comparison()
    assert (found.ours.median, found.ours.low, found.ours.high) == (24.0, 20.0, 30.0)
    assert found.ratio() == 2.4  # 24 / 10
    assert found.span() == (1.5, 3.0)  # 20/10, 30/10, 24/16
    assert found.reached is True
    assert replace(found, goal=2.5).reached is False
    assert replace(found, goal=None).reached is None


def test_median_of_an_even_number_of_rounds_is_the_mean_of_the_middle_two() -> None:
    assert Series(name="a", values=(1.0, 4.0, 2.0, 100.0)).median == 3.0


def test_the_goal_looks_at_the_first_peer() -> None:
    peers = (Series(name="a", values=(100.0,) * 3), Series(name="b", values=(1.0,) * 3))
    assert comparison(peers=peers).reached is False
    assert comparison(peers=peers[::-1]).reached is True


@pytest.mark.parametrize("values", [(), (0.0,), (1.0, -1.0), (math.nan,), (math.inf,)])
def test_a_series_refuses_what_was_not_measured(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="TRL"):
        Series(name="TRL", values=values)


def test_sides_must_have_as_many_rounds() -> None:
    with pytest.raises(ValueError, match="r1 has 3 rounds, TRL 1"):
        comparison(peers=(Series(name="TRL", values=(1.0,)),))
    with pytest.raises(ValueError, match="needs a peer"):
        comparison(peers=())


def test_sides_take_turns_and_warm_up_is_not_kept() -> None:
    calls: list[str] = []

    def side(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    found = take_turns({"a": side("a"), "b": side("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert found == {"a": (3.0, 5.0), "b": (4.0, 6.0)}
    with pytest.raises(ValueError, match="rounds"):
        take_turns({}, rounds=0)


def test_a_comparison_survives_json() -> None:
    row = json.loads(json.dumps(comparison_to_json(comparison())))
    assert row["ours"]["median"] == 24.0
    assert row["ratios"] == [{"to": "TRL", "ratio": 2.4, "span": [1.5, 3.0]}]
    assert comparison_from_json(row) == comparison()


# -- operations ------------------------------------------------------------------------------------------------------


def small(**changes: Any) -> SimpleNamespace:
    fields = dict(
        hidden_size=8, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=16, moe_intermediate_size=4,
        num_experts_per_tok=2, n_shared_experts=1, n_routed_experts=5, num_attention_heads=2, qk_nope_head_dim=3,
        qk_rope_head_dim=2, v_head_dim=4, kv_lora_rank=6, q_lora_rank=None, vocab_size=10,
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def test_attention_weights_by_hand() -> None:
    # q 8 x 10, kv_a 8 x (6 + 2), kv_b 6 x 2 (3 + 4), o 8 x 8
    assert attention_parameters(small()) == 80 + 64 + 84 + 64
    # the low-rank query: 8 x 7 and 7 x 10 in the place of 8 x 10
    assert attention_parameters(small(q_lora_rank=7)) == 56 + 70 + 64 + 84 + 64


def test_active_weights_by_hand() -> None:
    # 3 attentions, one dense layer 3 x 8 x 16, two layers with (2 + 1) experts of 3 x 8 x 4 and a router 8 x 5
    assert active_parameters(small()) == 3 * 292 + 384 + 2 * (3 * 96 + 40)
    # idle experts cost only their column in the router
    assert active_parameters(small(n_routed_experts=50)) - active_parameters(small()) == 2 * 8 * 45
    # more dense layers than layers
    assert active_parameters(small(first_k_dense_replace=9)) == 3 * (292 + 384)


def test_forward_operations_by_hand() -> None:
    config = small()
    per_token = 2 * active_parameters(config)
    # sequences of 1 and 3 tokens: 1 + (1 + 2 + 3) pairs; per pair, layer, head 2 x (5 + 4); LM head 2 x 8 x 10 each
    assert forward_flops(config, [1, 3], head_tokens=2) == 4 * per_token + 3 * 2 * 18 * 7 + 2 * 160
    assert training_flops(config, [1, 3], 2) == 3 * forward_flops(config, [1, 3], 2)


def test_counted_weights_are_those_of_the_model() -> None:
    from policy.model import PolicyModel
    from policy.presets import preset_config

    config = preset_config("tiny")
    model = PolicyModel(config)
    matrices = {name: p.numel() for name, p in model.model.layers.named_parameters() if p.dim() > 1}
    assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
    idle = config.n_routed_experts - config.num_experts_per_tok
    unused = sum(n // config.n_routed_experts * idle for name, n in matrices.items() if ".experts." in name)
    assert active_parameters(config) == sum(matrices.values()) - unused


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 20))
def test_one_long_sequence_costs_more_than_its_parts(lengths: list[int], head: int) -> None:
    parts, whole = forward_flops(small(), lengths, head), forward_flops(small(), [sum(lengths)], head)
    assert whole >= parts
    assert (whole == parts) == (len(lengths) == 1)


# -- workload --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    from policy.model import PolicyModel
    from policy.presets import preset_config
    from policy.tokenizer import EOS_ID

    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = PolicyModel(preset_config("tiny")).eval()
    mark_tokens(found)
    balance_experts(found, seed=0)
    set_end_probability(found, EOS_ID, 1 / 50, seed=0)
    return found


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(9))


def test_every_token_is_the_last_one_with_the_same_probability(model: Any) -> None:
    from policy.tokenizer import EOS_ID

    with torch.no_grad():
        ends = model(random_tokens(8, 64)).logits.softmax(-1)[..., EOS_ID] * 50
    assert ends.mean().item() == pytest.approx(1, abs=0.05)
    assert ends.min().item() > 0.5 and ends.max().item() < 2


def test_no_expert_gets_much_more_than_its_share(model: Any) -> None:
    with torch.no_grad():
        load = model.hidden_states(random_tokens(1, 1024), segment_lengths=[512, 512]).router_load.double()
    assert (load.amax(1) / load.mean(1)).max().item() < 2


def test_mean_of_a_cut_geometric_length_by_hand() -> None:
    # half of them end at 1, a quarter at 2, the rest is cut at 3
    assert mean_length(2, 3) == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 3)
    assert mean_length(128, 10**6) == pytest.approx(128)


def test_ragged_lengths_follow_that_mean_and_their_seed() -> None:
    lengths = ragged_lengths(20_000, limit=512, mean_tokens=128)
    assert min(lengths) == 1 and max(lengths) == 512
    assert sum(lengths) / len(lengths) == pytest.approx(mean_length(128, 512), rel=0.03)
    assert ragged_lengths(9, limit=512, seed=1) == ragged_lengths(9, limit=512, seed=1)
    assert ragged_lengths(9, limit=512, seed=1) != ragged_lengths(9, limit=512, seed=2)


def test_prompts_differ_and_are_written_as_rows(tmp_path: Path) -> None:
    texts = prompts(50, seed=3)
    assert len(set(texts)) == 50 and texts == prompts(50, seed=3)
    write_prompts(tmp_path / "p.jsonl", texts)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == texts


def test_the_reward_tells_all_completions_apart() -> None:
    ids = [[1], [1, 1], [2], [1, 2, 3]]
    values = spread(completion_ids=ids, prompts=["?"] * 4)
    assert len(set(values)) == 4 and all(0 <= v < 1 for v in values)
    assert spread(completion_ids=ids[::-1]) == values[::-1]


def test_the_reward_is_one_that_the_rubric_takes() -> None:
    from benchmarks.house import grpo_stage
    from rewards.calling import bind

    stage = grpo_stage("s", Path("p.jsonl"), steps=1, problems=4, max_tokens=8)
    assert bind(stage.rewards.functions[0]).function is spread


def test_padding_leaves_prompt_and_padding_out_of_the_loss() -> None:
    batch = padded([[5, 6, 7, 8], [9, 3]], [2, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]


@pytest.mark.parametrize("quick", [False, True])
def test_grpo_workloads_can_be_cut_into_micro_batches(quick: bool, tmp_path: Path) -> None:
    short, ragged = workloads(Options(scratch=tmp_path, quick=quick))
    assert short.max_tokens == 64 and short.warmup >= 1 and ragged.max_tokens > short.max_tokens
    assert all(w.samples % w.micro_batch == 0 and w.rounds >= 1 for w in (short, ragged))
    if not quick:
        assert (short.samples, ragged.samples, ragged.max_tokens) == (128, 256, 512)


def test_cores_and_requests_are_dealt_out_evenly() -> None:
    assert core_groups([0, 1], 2) == [[0], [1]]
    assert core_groups([2, 3, 5, 7, 8], 2) == [[2, 3], [5, 7, 8]]
    assert core_groups([4], 2) == [[4], [4]]
    assert split(range(5), 2) == [(0, 2, 4), (1, 3)]


# -- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,300"), (123.4, "123"), (99.94, "99.9"), (2.0, "2.00"), (0.0951, "0.0951"), (0.00456, "0.00456"),
     (0.00002, "2.00e-05"), (999.6, "1,000")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_span_of_one_value_is_left_out() -> None:
    assert span(2.0, 3.0) == "2.00 – 3.00"
    assert span(2.0, 2.0001) == ""


def test_rows_of_a_comparison() -> None:
    assert rows_of(comparison()) == [
        ("r1", "24.0", "20.0 – 30.0", "", "", ""),
        ("TRL", "10.0", "10.0 – 16.0", "2.40", "1.50 – 3.00", "≥ 2: reached"),
    ]
    assert rows_of(comparison(goal=3.0))[1][-1] == "≥ 3: missed"


def test_the_table_shows_every_side() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([measurement()]))
    text = console.export_text()
    for part in ("GRPO step (samples/s)", "TRL", "2.40", "1.50 – 3.00", "reached"):
        assert part in text


def test_the_page_says_how_figures_were_measured() -> None:
    page = markdown([measurement()])
    assert "| TRL | 10.0 | 10.0 – 16.0 | 2.40 | 1.50 – 3.00 | ≥ 2: reached |" in page
    assert "- workload: 128 samples" in page
    for part in ("`python -m benchmarks grpo`", "2026-11-24", "2 CPU cores, AVX512", "16 GiB", "2%", "torch 2.13.0"):
        assert part in page
    assert "Quick" not in page
    assert "Quick" in markdown([measurement(quick=True)])


def test_one_benchmark_can_be_measured_again_alone(tmp_path: Path) -> None:
    old_sync, old_grpo = measurement(name="sync", date="2026-01-01"), measurement(date="2026-01-01")
    write([old_sync, old_grpo], tmp_path / "docs")
    data, page = write([measurement()], tmp_path / "docs")
    assert read(data) == [old_sync, measurement()]
    assert page.read_text() == markdown([old_sync, measurement()])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text('{"benchmarks": [{"name": "grpo"}]}')
    with pytest.raises(ValueError, match="delete it"):
        write([measurement()], tmp_path)
    assert read(tmp_path / "none.json") == []


def test_the_command_is_what_a_reader_types() -> None:
    assert command_of([], quick=False) == "python -m benchmarks"
    assert command_of(["sync", "grpo"], quick=True) == "python -m benchmarks grpo sync --quick"


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["grop"])
    assert stopped.value.code == 2
    assert "there is no benchmark 'grop'" in capsys.readouterr().err


# -- peers -----------------------------------------------------------------------------------------------------------


def _doubles(port: Port, factor: int) -> None:
    while True:
        port.send(port.receive() * factor)


def _raises(port: Port) -> None:
    port.receive()
    raise ValueError("no such model")


def _vanishes(port: Port) -> None:
    import os

    port.receive()
    os._exit(7)


def _leaves_a_child(port: Port) -> None:
    import subprocess
    import sys

    while True:
        port.receive()
        port.send(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]).pid)


def _hosts_a_peer(port: Port) -> None:
    with Peer("inner", _leaves_a_child) as peer:
        while True:
            port.receive()
            port.send(peer.ask("go"))


def test_what_a_peer_started_ends_with_it() -> None:
    with Peer("vLLM", _leaves_a_child) as peer:
        child = psutil.Process(peer.ask("go"))
    assert gone(child)
    with Peer("benchmark", _hosts_a_peer) as peer:
        child = psutil.Process(peer.ask("go"))
        psutil.Process(peer._process.pid).kill()
    assert gone(child), "also when whoever started the peer is killed"


def gone(process: psutil.Process) -> bool:
    try:
        process.wait(10)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_peer_answers_in_turns_and_ends() -> None:
    with Peer("doubler", _doubles, 2) as peer:
        assert [peer.ask(3), peer.ask(4)] == [6, 8]
    peer.close()


def test_a_benchmark_runs_in_a_process_that_does_not_know_who_started_it() -> None:
    with pytest.raises(PeerFailed, match="has no attribute 'run'"):  # it came as far as to look into the module
        run_apart("options", quick=True, seed=0)
    # A spawned process imports the module by name, and never the `__main__` of a package.
    assert run_apart.__module__ == "benchmarks.apart"


def test_a_peer_that_fails_says_why() -> None:
    with Peer("TRL", _raises) as peer, pytest.raises(PeerFailed, match=r"(?s)TRL failed.*no such model"):
        peer.ask("go")
    with Peer("vLLM", _vanishes) as peer, pytest.raises(PeerFailed, match="exit code 7"):
        peer.ask("go")

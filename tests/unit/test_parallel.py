"""What needs no second process: who takes which micro-batch, which layouts are refused, what a model will look like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BioGptConfig, MambaConfig, MambaForCausalLM

from policy.batch import Sample, pack
from policy.config import LoraConfig, ModelConfig, ParallelConfig
from policy.layout import check_layout
from policy.model import checkpoint_tensors
from policy.parallel import Outlines, Ranks, _layers, pack_for, shard, sharded, within
from tests.integration.support.ranks import MODELS, adapted, dense, policy

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def samples(lengths: list[int]) -> list[Sample]:
    return [Sample(token_ids=tuple(range(1, n + 1)), prompt_length=1) for n in lengths]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(8, 200))
def test_every_micro_batch_counts_once_and_ranks_stay_in_step(lengths: list[int], size: int, limit: int) -> None:
    micros = pack(samples(lengths), limit)
    shares = [Ranks(rank, size).share(micros) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    taken = Counter(id(micro) for share in shares for micro, weight in share if weight == 1)
    assert taken == Counter(id(micro) for micro in micros)
    assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}
    for a_round in zip(*shares, strict=True):  # a rank without work repeats something small
        idle = [micro.tokens for micro, weight in a_round if weight == 0]
        assert not idle or max(idle) <= min(micro.tokens for micro in micros)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 5), st.integers(8, 200), st.booleans())
def test_samples_are_cut_so_that_all_ranks_have_work(lengths: list[int], size: int, limit: int, padded: bool) -> None:
    given_samples = samples(lengths)
    alone = pack_for(Ranks.alone(), given_samples, limit, padded=padded)
    micros = pack_for(Ranks(0, size), given_samples, limit, padded=padded)
    assert sorted(i for micro in micros for i in micro.sample_index) == list(range(len(lengths)))
    rounds = -(-len(alone) // size)
    assert -(-len(micros) // size) == rounds, "no further round for the sake of balance"
    assert all(micro.tokens <= limit or len(micro.segment_lengths) == 1 for micro in micros)


def test_ranks_get_equal_work_of_a_batch_that_would_fit_in_one_micro_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randint(20, 400, (64,), generator=draw)).tolist()
    micros = pack_for(Ranks(0, 4), samples(lengths), 100_000)
    assert len(micros) == 4
    loads = [sum(micro.tokens for micro, _ in Ranks(rank, 4).share(micros)) for rank in range(4)]
    assert max(loads) < 1.05 * sum(loads) / 4


def test_a_rank_alone_is_given_everything_and_costs_nothing() -> None:
    ranks, values = Ranks.alone(), torch.tensor([1.0, float("nan")], dtype=torch.float64)
    micros = pack(samples([5, 9]), 8)
    assert [micro for micro, _ in ranks.share(micros)] == micros
    assert ranks.total(values) is values and ranks.largest(values) is values
    model = policy()
    shard(model, ranks)
    assert sharded(model) is None and within(model, lambda x: x + 1, 2) == 3


@pytest.mark.parametrize("kind", MODELS)
def test_outlines_are_what_is_sent(kind: str) -> None:
    model = MODELS[kind]()
    outlines = list(checkpoint_tensors(model, Outlines(model)))
    assert all(tensor.is_meta for _, tensor in outlines)
    expected = [(name, tensor.dtype, tensor.shape) for name, tensor in checkpoint_tensors(model)]
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in outlines] == expected


@pytest.mark.parametrize(
    ("build", "width", "told"),
    [
        (dense, 2, "expert_parallel is 2, but Qwen2ForCausalLM has no routed experts of DeepSeek-V3's kind"),
        (policy, 3, "expert_parallel is 3, which does not divide the 8 routed experts of PolicyModel"),
        (lambda: adapted(experts=True), 2, "expert_parallel is 2, but the routed experts have adapters"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(build: Any, width: int, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        shard(build(), Ranks(0, 2 * width, width))
    assert "\n" not in str(caught.value)


def test_a_layout_is_refused_before_anything_is_loaded() -> None:
    model = ModelConfig(preset="tiny")
    check_layout(model, ParallelConfig(ranks=4))
    check_layout(model, ParallelConfig(ranks=4, expert_parallel=2))
    with pytest.raises(ValueError, match="does not divide the 8 routed experts of tiny: set it to a divisor"):
        check_layout(model, ParallelConfig(ranks=3, expert_parallel=3))
    with pytest.raises(ValueError, match=r"set it to 1, or model\.lora\.experts to false"):
        lora = ModelConfig(preset="tiny", lora=LoraConfig(experts=True))
        check_layout(lora, ParallelConfig(ranks=2, expert_parallel=2))


def test_a_model_without_routed_experts_is_refused_early(tmp_path: Any) -> None:
    dense().config.save_pretrained(tmp_path)
    model, two = ModelConfig(path=str(tmp_path)), ParallelConfig(ranks=2, expert_parallel=2)
    check_layout(model, ParallelConfig(ranks=2))
    with pytest.raises(ValueError, match="has no routed experts of DeepSeek-V3's kind to share out: set it to 1"):
        check_layout(model, two)


def test_of_layers_within_layers_the_outer_ones_are_cut() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    with torch.device("meta"):
        model = MambaForCausalLM(config)
    assert len(model._no_split_modules or ()) > 1
    assert [type(layer).__name__ for layer in _layers(model)] == ["MambaBlock"] * 2


def test_a_model_without_known_layers_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    BioGptConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    check_layout(model, ParallelConfig())
    with pytest.raises(ValueError, match=r"parallel\.ranks is 2, but BioGptForCausalLM names no decoder layers"):
        check_layout(model, ParallelConfig(ranks=2))

"""The learner's benchmarks, their pure parts: TRL's tensors, memory on paper against counted bytes, lines, the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from benchmarks import learner_cost
from benchmarks.flops import active_parameters
from benchmarks.learner_cost import Curve, Line, draw, even_batch
from benchmarks.learner_gpu import SHAPE
from benchmarks.learner_sides import Batch, ragged_batch, samples_of, trl_micro_batches
from benchmarks.paper_memory import layer_bytes, parameters, training_memory
from policy import causal, experts, varlen
from policy.model import PolicyModel
from policy.presets import preset_config

BATCH = Batch(sequences=((1, 2, 3, 4, 5), (6, 7, 8), (9, 10, 11, 12)), prompt=2, advantages=(0.5, -1.0, 2.0))


def test_counts_of_a_batch_by_hand() -> None:
    assert BATCH.fed == [4, 2, 3] and BATCH.under_loss == 3 + 1 + 2
    samples = samples_of(BATCH, 320)
    assert [s.token_ids for s in samples] == list(BATCH.sequences) and [s.advantage for s in samples] == [
        0.5,
        -1.0,
        2.0,
    ]


def test_a_ragged_batch_follows_its_seed() -> None:
    one, same, other = (ragged_batch(50, 20, limit=30, seed=seed, mean_tokens=9) for seed in (1, 1, 2))
    assert one == same != other
    assert all(25 <= len(s) <= 54 for s in one.sequences)


def test_trl_pads_to_the_longest_of_the_step() -> None:
    first, second = trl_micro_batches(BATCH, 2)
    assert first["prompt_ids"].tolist() == [[1, 2], [6, 7]] and second["prompt_ids"].tolist() == [[9, 10]]
    assert first["completion_ids"].tolist() == [[3, 4, 5], [8, 0, 0]]
    assert second["completion_ids"].tolist() == [[11, 12, 0]], "its own longest has two"
    assert second["completion_mask"].tolist() == [[1, 1, 0]] and first["prompt_mask"].tolist() == [[1, 1], [1, 1]]
    assert int(first["num_items_in_batch"]) == int(second["num_items_in_batch"]) == BATCH.under_loss
    assert first["advantages"].tolist() == [0.5, -1.0]


# -- memory on paper -------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=40, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    n_shared_experts=1, n_group=1, topk_group=1,
)  # fmt: skip


class FlashLike(torch.autograd.Function):
    """What PyTorch's variable-length kernel keeps: its inputs, its result, and a log-sum-exp per token and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any) -> Tensor:
        parts = zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)), strict=True)
        rows = (tuple(x.transpose(0, 1) for x in part) for part in parts)
        out = torch.cat([F.scaled_dot_product_attention(*r, is_causal=True).transpose(0, 1) for r in rows])
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], len(q)))
        return out


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the ways that a GPU takes, with a kernel that keeps what the real one keeps."""
    monkeypatch.setattr(experts, "runs_grouped", lambda *_: True)
    monkeypatch.setattr(causal, "runs_varlen", lambda *_: True)

    def kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any, **_: Any) -> Tensor:
        out = FlashLike.apply(q, k, v, starts)
        assert isinstance(out, Tensor)
        return out

    monkeypatch.setattr(causal, "varlen_attention", lambda *given: varlen.varlen_attention(*given, kernel=kernel))


def test_a_layer_keeps_what_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    config, tokens = preset_config("deepseek-v3", **SMALL), 600
    model = PolicyModel(config).bfloat16()  # pyright: ignore[reportCallIssue]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(320, (1, tokens), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(ids, segment_lengths=[300, 200, 100])
    counted = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    paper = sum(layer_bytes(config, tokens, dense=i < 1) for i in range(3)) + 6 * tokens * config.hidden_size
    assert paper == pytest.approx(counted, rel=0.03)


def test_weights_on_paper_are_those_of_the_model() -> None:
    for changes in ({}, {"q_lora_rank": None, "first_k_dense_replace": 0}, {"tie_word_embeddings": True}):
        config = preset_config("deepseek-v3", **{**SMALL, **changes})
        assert parameters(config) == sum(p.numel() for p in PolicyModel(config).parameters())


def test_memory_of_a_step_by_hand() -> None:
    config = preset_config("deepseek-v3", **SMALL)
    count = parameters(config)
    found = training_memory(config, 100, 80, checkpointing="none", chunk=50)
    assert (found.weights, found.gradients, found.masters, found.moments) == (
        2 * count,
        4 * count,
        4 * count,
        8 * count,
    )
    assert found.logits == 50 * 320 * 6 + 320 * 64 * 4
    assert found.total == 18 * count + found.activations + found.logits
    recomputed = training_memory(config, 100, 80, checkpointing="layer", chunk=50)
    biggest = max(layer_bytes(config, 100, dense=dense) for dense in (True, False))
    assert recomputed.activations == 3 * 100 * 64 * 2 + biggest + 6 * 100 * 64 + 80 * (2 * 64 + 4)
    assert training_memory(config, 100, 80, checkpointing="none", chunk=50, kind="adamw8bit").moments < 2.1 * count


def test_the_model_for_gpus_has_the_size_that_it_says() -> None:
    config = preset_config("deepseek-v3", **SHAPE)
    assert parameters(config) == pytest.approx(3.1e9, rel=0.02)
    assert active_parameters(config) + 2 * config.vocab_size * config.hidden_size == pytest.approx(0.6e9, rel=0.03)


# -- cost against work -----------------------------------------------------------------------------------------------


def test_a_line_by_hand() -> None:
    line = Line.through((1.0, 2.0, 3.0), (3.0, 5.0, 7.0))
    assert (line.slope, line.offset, line.deviation) == pytest.approx((2.0, 1.0, 0.0))
    bent = Line.through((0.0, 1.0, 2.0), (0.0, 3.0, 0.0))
    assert (bent.slope, bent.offset, bent.deviation) == pytest.approx((0.0, 1.0, 2 / 3))
    with pytest.raises(ValueError, match="three or more points"):
        Line.through((1.0, 2.0), (1.0, 2.0))


def test_an_even_batch_holds_the_tokens_that_it_says() -> None:
    batch = even_batch(320, 4 * learner_cost.LENGTH, seed=0)
    assert sum(batch.fed) == 4 * learner_cost.LENGTH and len(set(batch.fed)) == 1


def test_the_plot_is_written_and_says_how_straight_it_is(tmp_path: Path) -> None:
    curve = Curve(title="tokens", xs=(1.0, 2.0, 4.0), seconds=(1.0, 2.0, 4.0), peaks=(1e8, 1e8, 1e8))
    draw([curve, curve], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<?xml") and "line fits to 0.0%" in text

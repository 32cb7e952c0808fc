"""Presets: shapes and sizes, what vLLM must read, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from policy.model import PolicyModel
from policy.presets import PRESETS, check_supported, preset_config, with_vllm_fields
from policy.tokenizer import build_tokenizer


def _size(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PolicyModel(preset_config(name)).parameters())


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.45e6, 0.6e6), ("tiny-5m", 5.3e6, 5.5e6)])
def test_small_presets(name: str, low: float, high: float) -> None:
    assert low < _size(name) < high
    config, tokenizer = preset_config(name), build_tokenizer()
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    # What vLLM's CPU kernels take: the latent of DeepSeek-V3, sizes divisible by 32.
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    for field in ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        assert getattr(config, field) % 32 == 0, field


def test_real_presets_have_their_published_sizes() -> None:
    """671B (arXiv 2412.19437, abstract); 15.29B without embeddings (arXiv 2502.16982)."""
    assert _size("deepseek-v3") == pytest.approx(671.0e9, rel=1e-3)
    assert _size("moonlight-16b") - 2 * 163840 * 2048 == pytest.approx(15.29e9, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_vllm_reads(name: str) -> None:
    written = preset_config(name).to_dict()
    assert written["topk_method"] == "noaux_tc"
    assert written["scoring_func"] == "sigmoid"
    assert written["moe_router_dtype"] == "float32"
    assert written["num_nextn_predict_layers"] == 0
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert DeepseekV3Config.from_dict(written).to_dict() == written


def test_overrides_replace_fields() -> None:
    config = preset_config("tiny", num_hidden_layers=3, num_experts_per_tok=1)
    assert (config.num_hidden_layers, config.num_experts_per_tok, config.hidden_size) == (3, 1, 96)
    assert preset_config("tiny").num_hidden_layers == 2


def test_fields_of_a_foreign_config_are_mended() -> None:
    config = DeepseekV3Config.from_dict({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1})
    assert config.to_dict()["num_nextn_predict_layers"] == 1
    assert with_vllm_fields(config).to_dict()["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tny", {}, "unknown preset 'tny' .did you mean 'tiny'"),
        ("tiny", dict(hiden_size=3), "no field 'hiden_size' .did you mean 'hidden_size'"),
        ("tiny", dict(n_group=3), r"n_routed_experts \(8\) must be divisible by n_group \(3\)"),
        ("tiny", dict(n_group=8), "two experts or more"),
        ("tiny", dict(n_group=2, topk_group=3), "topk_group must be in 1..n_group"),
        ("tiny", dict(n_group=4, topk_group=1, num_experts_per_tok=3), r"num_experts_per_tok must be in 1\.\.2"),
        ("tiny", dict(num_key_value_heads=1), "must equal num_attention_heads"),
        ("tiny", dict(hidden_act="gelu"), "hidden_act must be silu"),
        ("tiny", dict(attention_dropout=0.1), "set it to 0"),
        ("tiny", dict(rope_interleave=False), "rope_interleave must be true"),
        ("tiny", dict(n_shared_experts=0), "n_shared_experts must be >= 1"),
        ("tiny", dict(qk_rope_head_dim=63), "must be even"),
        ("tiny", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "rope_type must be"),
    ],
)
def test_impossible_shapes_are_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset_config(name, **overrides)


def test_a_model_refuses_them_too() -> None:
    config = preset_config("tiny")
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="silu"):
        PolicyModel(config)
    check_supported(preset_config("tiny"))

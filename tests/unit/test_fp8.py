"""FP8 blocks: values by the format's definition, by transformers' own kernel, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from policy.fp8 import FP8, block_of, dequantise, dequantise_into, scale_of, scale_shape
from policy.shards import Shards
from tests.unit.released import BLOCK, by_hand, quantise

RELEASED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0], [8.0, -16.0, 0.5]]).to(FP8)
    scale = torch.tensor([[10.0, 100.0]])
    expected = torch.tensor([[10.0, 20.0, 400.0], [80.0, -160.0, 50.0]])
    assert torch.equal(dequantise(weight, scale, (2, 2)), expected)
    assert torch.equal(dequantise(weight, torch.tensor([[1.0], [2.0]]), (1, 3))[1], 2 * weight[1].float())


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_shape_is_the_definition(rows: int, columns: int, seed: int) -> None:
    """576 rows of DeepSeek's kv_a_proj_with_mqa are four and a half blocks: edges are the rule, not the exception."""
    torch.manual_seed(seed)
    values, scale = quantise(torch.randn(rows, columns))
    assert tuple(scale.shape) == scale_shape((rows, columns), BLOCK)
    assert torch.equal(dequantise(values, scale, BLOCK), by_hand(values, scale))


def test_agrees_with_transformers_where_that_can_read_it() -> None:
    """It takes whole blocks only."""
    values, scale = quantise(torch.randn(256, 384))
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale, output_dtype=torch.float32)  # type: ignore[arg-type]
    assert torch.equal(dequantise(values, scale), theirs)


def test_is_computed_in_fp32_and_rounded_once() -> None:
    values, scale = quantise(torch.randn(130, 140))
    narrow = dequantise(values, scale, BLOCK, torch.bfloat16)
    assert torch.equal(narrow, by_hand(values, scale).bfloat16())
    place = torch.zeros(2, 130, 140, dtype=torch.bfloat16)
    dequantise_into(place[1], values, scale, BLOCK)
    assert torch.equal(place[1], narrow) and not place[0].any()


def test_comes_back_within_the_format_s_resolution() -> None:
    weight = torch.randn(200, 300)
    again = dequantise(*quantise(weight))
    coarse = weight.abs().amax() / 448 / 2**7  # half the smallest step below the block's largest
    assert bool(((again - weight).abs() <= weight.abs() / 16 + coarse).all())  # 3 bits after the point


@pytest.mark.parametrize(
    "given_config",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {**RELEASED, "fmt": "e5m2"},
        {"quant_method": "compressed-tensors", "weight_block_size": [128, 128]},
    ],
)
def test_other_quantisations_are_refused(given_config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"quantised .*only fp8 e4m3 in blocks") as caught:
        block_of(given_config)
    assert "\n" not in str(caught.value)


def test_block_sizes() -> None:
    assert block_of(RELEASED) == (128, 128)
    assert block_of(None) is None and block_of({}) is None


@pytest.mark.parametrize(
    ("change", "block", "message"),
    [
        (dict(w_scale_inv=None), BLOCK, r"its scales \(w_scale_inv\) are missing"),
        (dict(w_scale_inv=torch.ones(5, 1)), BLOCK, r"\[5, 1\] in torch.float32: blocks of 128 x 128 need \[5, 2\]"),
        (dict(w_scale_inv=torch.ones(5, 2, dtype=torch.int32)), BLOCK, r"in torch.int32: blocks"),
        (dict(w=torch.zeros(576, 160)), BLOCK, r"stored in torch.float32 and has FP8 scales"),
        (dict(w=torch.zeros(576, 160, dtype=torch.int8), w_scale_inv=None), BLOCK, "holds torch.int8, which is no w"),
        (dict(w=torch.zeros(576).to(FP8)), BLOCK, "is no matrix"),
        ({}, None, "no quantization_config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, change: dict[str, Tensor | None], block: tuple[int, int] | None, message: str
) -> None:
    values, scale = quantise(torch.randn(576, 160))
    tensors = {"w": values, "w_scale_inv": scale} | change
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    with Shards(tmp_path) as shards, pytest.raises(ValueError, match=message) as caught:
        scale_of("w", shards, block)
    assert "\n" not in str(caught.value)


def test_a_whole_pair_fits(tmp_path: Path) -> None:
    values, scale = quantise(torch.randn(576, 160))
    tensors = {"w": values, "w_scale_inv": scale, "v": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Shards(tmp_path) as shards:
        assert scale_of("w", shards, BLOCK) == "w_scale_inv"
        assert scale_of("v", shards, BLOCK) is None

"""Rotary embeddings: angles by hand, YaRN against transformers, relative positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from policy.rope import RotaryTable, inverse_frequencies, rotate, rotation_scale, softmax_scale
from tests.unit.model_zoo import YARN, config_of, make_policy, relative_gap, twin_of

DEEPSEEK_V3 = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)


def test_plain_frequencies_by_hand() -> None:
    config = config_of(qk_rope_head_dim=4, rope_parameters=dict(rope_type="default", rope_theta=100.0))
    assert inverse_frequencies(config).tolist() == pytest.approx([1.0, 0.1])
    assert rotation_scale(config) == 1.0
    assert softmax_scale(config) == pytest.approx(1 / math.sqrt(14))


@pytest.mark.parametrize(
    "parameters",
    [
        DEEPSEEK_V3,
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "attention_factor": 1.25},
        {k: v for k, v in YARN.items() if k not in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")},
    ],
)
def test_yarn_agrees_with_transformers(parameters: dict[str, Any]) -> None:
    config = config_of(qk_rope_head_dim=64, rope_parameters=parameters, max_position_embeddings=163840)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert torch.equal(inverse_frequencies(config), frequencies), "a last bit shows at position 131,071"
    assert rotation_scale(config) == pytest.approx(scale)


LONG = 131_072


def test_turns_of_128k_positions_agree_with_transformers_and_with_the_truth() -> None:
    """Angles are fp32 on all sides, learner, transformers and engine: at 131,071 the fastest pair is off by a rounding
    of its angle, 0.004, and by that of its frequency times the position, 0.008."""
    config = DeepseekV3Config(rope_parameters=DEEPSEEK_V3, max_position_embeddings=163840)
    positions = torch.arange(LONG)
    turns = RotaryTable(config)(positions)
    twin = DeepseekV3RotaryEmbedding(config)
    cos, sin = twin(torch.zeros(1), positions[None])
    assert cos.shape == (1, LONG, 64), "each half holds every pair once"
    assert torch.equal(turns.real, cos[0, :, :32]) and torch.equal(turns.imag, sin[0, :, :32])
    truth = positions[:, None].double() * inverse_frequencies_in_fp64(DEEPSEEK_V3, 64)
    error = (turns - torch.polar(torch.ones_like(truth), truth)).abs().amax(dim=0)
    assert error.max() < 0.012 and error[-9:].max() < 1e-4


def inverse_frequencies_in_fp64(parameters: dict[str, Any], dim: int) -> torch.Tensor:
    """YaRN's frequencies by the formula of its paper, section 3.2."""
    fast = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def pair(turns: float) -> float:
        context = parameters["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = math.floor(pair(parameters["beta_fast"])), math.ceil(pair(parameters["beta_slow"]))
    slow_share = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return fast / parameters["factor"] * slow_share + fast * (1 - slow_share)


@pytest.mark.parametrize("start", [0, 4_000, LONG - 24])
def test_logits_at_far_positions_agree_with_transformers(start: int) -> None:
    """A tiny policy with DeepSeek-V3's own YaRN, its tokens at positions up to 131,071."""
    model = make_policy(
        "yarn", rope_parameters=DEEPSEEK_V3, qk_rope_head_dim=64, max_position_embeddings=163840, num_hidden_layers=2
    )
    ids = torch.randint(1, 53, (1, 24), generator=torch.Generator().manual_seed(start))
    positions = torch.arange(start, start + 24)[None]
    with torch.no_grad():
        ours = model(ids, position_ids=positions).logits
        theirs = twin_of(model).eval()(ids, position_ids=positions, use_cache=False).logits
    assert relative_gap(ours, theirs) < 3e-5


def test_yarn_of_deepseek_v3_by_hand() -> None:
    """Pair 0 turns once per 2 pi positions and is kept, the last is 40 times slower, the logits grow by mscale^2."""
    config = DeepseekV3Config(rope_parameters=DEEPSEEK_V3)
    frequencies = inverse_frequencies(config)
    assert frequencies[0].item() == 1.0
    assert frequencies[31].item() == pytest.approx(10000 ** (-62 / 64) / 40)
    # Pairs 10 and 23 bound the blend: 64 ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 10.5, and 22.5 with one turn.
    plain = inverse_frequencies(DeepseekV3Config())
    assert torch.equal(frequencies[:11], plain[:11])
    assert torch.allclose(frequencies[23:], plain[23:] / 40)
    assert bool((frequencies[11:23] < plain[11:23]).all() and (frequencies[11:23] > plain[11:23] / 40).all())
    assert rotation_scale(config) == 1.0
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_a_quarter_turn_by_hand() -> None:
    quarter = torch.tensor([[1j, 1.0 + 0j]])  # pair 0 turns by 90 degrees, pair 1 stays
    assert rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), quarter).tolist() == [[-2.0, 1.0, 3.0, 4.0]]


@settings(max_examples=25, deadline=None)
@given(a=st.integers(0, 60), b=st.integers(0, 60), shift=st.integers(0, 60), seed=st.integers(0, 99))
def test_products_depend_on_the_distance_alone(a: int, b: int, shift: int, seed: int) -> None:
    table = RotaryTable(config_of("yarn"))
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        turns = table(torch.tensor([i, j]))
        return float(rotate(q, turns[0]) @ rotate(k, turns[1]))

    assert product(a, b) == pytest.approx(product(a + shift, b + shift), abs=2e-4)


def test_dtype_is_kept_and_the_rotation_is_wide() -> None:
    turns = RotaryTable(config_of())(torch.arange(60))
    x = torch.randn(60, 8)
    assert rotate(x.bfloat16(), turns).dtype == torch.bfloat16
    assert torch.equal(rotate(x.bfloat16(), turns), rotate(x.bfloat16().float(), turns).bfloat16())
    assert rotate(x.double(), turns).dtype == torch.float64


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(rope_type="linear", factor=2.0), "rope_type must be one of default, yarn"),
        (dict(rope_type="yarn", factor=None, original_max_position_embeddings=16), "rope_parameters.factor is missing"),
    ],
)
def test_unsupported_settings_are_refused(parameters: dict[str, Any], message: str) -> None:
    config = config_of()
    config.rope_parameters = {"rope_theta": 10000.0, **parameters}
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(config)

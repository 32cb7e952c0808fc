"""Rotary position embeddings of DeepSeek-V3: interleaved pairs, with or without YaRN.

Pair i of a rotated head, (x[2i], x[2i + 1]), turns by the angle p * f_i at position p, with f_i = theta ** (-2i / d)
(Su et al., arXiv 2104.09864). YaRN (Peng et al., arXiv 2309.00071) divides the frequencies of slow pairs by ``factor``,
keeps those of fast pairs, blends in between, and makes up for the longer context by scaling the attention logits.

Shapes: N tokens, A heads, R = qk_rope_head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from policy.layers import at_least_fp32

SUPPORTED_ROPE_TYPES = ("default", "yarn")


def rope_parameters(config: DeepseekV3Config) -> dict[str, Any]:
    """The RoPE settings of a config, checked.

    Raises:
        ValueError: a ``rope_type`` other than ``default`` and ``yarn``, or a YaRN setting that is missing.
    """
    parameters = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"rope_parameters.rope_type must be one of {', '.join(SUPPORTED_ROPE_TYPES)}, got {kind!r}")
    if kind == "yarn":
        for name in ("factor", "original_max_position_embeddings"):
            if not parameters.get(name):
                raise ValueError(f"rope_parameters.{name} is missing: YaRN needs it, as a number > 0")
    return parameters


def inverse_frequencies(config: DeepseekV3Config) -> Tensor:
    """Angle per position of every pair, radians, fp32 on the CPU. [R / 2]

    Raises:
        ValueError: see :func:`rope_parameters`.
    """
    parameters = rope_parameters(config)
    dim = config.qk_rope_head_dim
    # The device is named because models are built under ``torch.device("meta")`` while they are loaded.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    periods = parameters["rope_theta"] ** exponents
    fast = 1.0 / periods
    if parameters.get("rope_type", "default") == "default":
        return fast
    low, high = _yarn_range(parameters, dim)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    # In the order of operations of transformers and vLLM: at position 131,071 the last bit of a frequency is seen.
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (parameters["factor"] * periods) * (1 - kept) + fast * kept


def _yarn_range(parameters: dict[str, Any], dim: int) -> tuple[float, float]:
    """Pairs below the first bound keep their frequency, pairs above the second are divided by ``factor``."""
    theta, context = parameters["rope_theta"], parameters["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns that often over the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with(parameters.get("beta_fast") or 32)
    high = pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation_scale(config: DeepseekV3Config) -> float:
    """Factor on the cosines and sines (YaRN's attention factor); 1 without YaRN and for DeepSeek-V3's own settings."""
    parameters = rope_parameters(config)
    if parameters.get("rope_type", "default") == "default":
        return 1.0
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return _yarn_magnitude(parameters["factor"], mscale) / _yarn_magnitude(parameters["factor"], all_dim)
    return _yarn_magnitude(parameters["factor"], 1.0)


def softmax_scale(config: DeepseekV3Config) -> float:
    """Factor on the attention logits: 1 / sqrt(qk_head_dim), times YaRN's mscale_all_dim magnitude squared."""
    parameters = rope_parameters(config)
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if parameters.get("rope_type", "default") == "default" or not parameters.get("mscale_all_dim"):
        return scale
    return scale * _yarn_magnitude(parameters["factor"], parameters["mscale_all_dim"]) ** 2


class RotaryTable:
    """Turns by position. Holds no parameter and no buffer, so nothing of it is ever saved or loaded."""

    def __init__(self, config: DeepseekV3Config) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = rotation_scale(config)

    def __call__(self, positions: Tensor) -> Tensor:
        """The turn of every pair as a complex number, angles in fp32. positions [N] -> complex64 [N, R / 2]"""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        return torch.complex(angles.cos().mul_(self._scale), angles.sin().mul_(self._scale))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turns each pair (x[2i], x[2i + 1]) by its angle: a complex product. [..., R], complex [..., R / 2] -> [..., R]

    ``turns`` must broadcast against the pairs of x. Computed in fp32 (fp64 for fp64), returned in the dtype of x.
    """
    wide = x.to(at_least_fp32(x.dtype)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(wide) * turns).flatten(-2).to(x.dtype)

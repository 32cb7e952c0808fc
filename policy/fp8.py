"""DeepSeek's FP8 weights: e4m3 values with one fp32 scale for each block of 128 x 128 (arXiv 2412.19437, section 3.3).

A weight [R, C] comes with ``<name>_scale_inv`` [ceil(R / 128), ceil(C / 128)]; the blocks at the lower and the right
edge are smaller where R or C is not a multiple of 128. value[i, j] = weight[i, j] * scale_inv[i // 128, j // 128].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from policy.shards import Shards, Stored

SCALE_SUFFIX = "_scale_inv"
FP8 = torch.float8_e4m3fn
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # the last holds powers of two

Block = tuple[int, int]


def block_of(quantization: Mapping[str, Any] | None) -> Block | None:
    """Rows and columns of a block from a config's ``quantization_config``; None for a config without one.

    Raises:
        ValueError: weights quantised in another way.
    """
    if not quantization:
        return None
    method, kind = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    block = quantization.get("weight_block_size")
    if method != "fp8" or kind != "e4m3" or not isinstance(block, (list, tuple)) or len(block) != 2:
        raise ValueError(
            f"its weights are quantised (quant_method {method!r}, fmt {kind!r}, weight_block_size {block}): only fp8 "
            "e4m3 in blocks (weight_scale_inv) can be read; take the checkpoint in bfloat16"
        )
    if any(type(size) is not int or size < 1 for size in block):
        raise ValueError(f"quantization_config.weight_block_size must be two whole numbers >= 1, got {list(block)}")
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Shape of the scales of a weight of this shape."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def scale_of(name: str, shards: Shards, block: Block | None) -> str | None:
    """Name of the scales of a stored weight, checked to fit; None for one that is stored plainly.

    Raises:
        ValueError: no scales for an FP8 weight, scales of another shape or without a weight in FP8, or no weight at all
            (integers, other 8-bit formats).
    """
    stored, scale = shards[name], name + SCALE_SUFFIX
    if stored.dtype != FP8:
        if not stored.dtype.is_floating_point or stored.dtype.itemsize == 1:
            raise ValueError(f"{name} holds {stored.dtype}, which is no weight: take the checkpoint in bfloat16")
        if scale in shards:
            raise ValueError(f"{name} is stored in {stored.dtype} and has FP8 scales ({scale}): is the folder whole?")
        return None
    if block is None:
        raise ValueError(f"{name} is stored in FP8, but config.json has no quantization_config with its block size")
    if scale not in shards:
        raise ValueError(f"{name} is stored in FP8 and its scales ({scale}) are missing: is the folder whole?")
    _check_scale(name, stored, shards[scale], block)
    return scale


def _check_scale(name: str, weight: Stored, scale: Stored, block: Block) -> None:
    if len(weight.shape) != 2:
        raise ValueError(f"{name} is stored in FP8 and is no matrix: its shape is {list(weight.shape)}")
    expected = scale_shape(weight.shape, block)
    if scale.shape != expected or scale.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{name} {list(weight.shape)} has scales of shape {list(scale.shape)} in {scale.dtype}: blocks of "
            f"{block[0]} x {block[1]} need {list(expected)} in float32 or bfloat16"
        )


def check_scales(name: str, scale: Tensor, weight: Tensor, block: Block) -> None:
    """Looks at the values of scales: a block's scale is positive, or zero over a block of zeros.

    Args:
        name: of the scales.
        scale: [ceil(R / block rows), ceil(C / block columns)]
        weight: e4m3. [R, C]
        block: rows and columns of a block.

    Raises:
        ValueError: a scale that is negative, not finite, or zero over weights that are not.
    """
    wide = scale.float()
    bad = ~(wide.isfinite() & (wide >= 0))
    for row, column in (wide == 0).nonzero().tolist():
        rows = slice(row * block[0], (row + 1) * block[0])
        bad[row, column] = bool(weight[rows, column * block[1] : (column + 1) * block[1]].float().any())
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] is {float(wide[row, column])}: a scale must be a positive, finite number; is the "
            "folder whole?"
        )


def dequantise_into(place: Tensor, weight: Tensor, scale: Tensor, block: Block) -> None:
    """Writes weight * scale, computed in fp32, into ``place``; in between only one row of blocks exists in fp32.

    Args:
        place: any dtype. [R, C]
        weight: e4m3. [R, C]
        scale: [ceil(R / block rows), ceil(C / block columns)]
        block: rows and columns of a block.
    """
    rows, columns = block
    for index, band in enumerate(weight.split(rows)):
        wide = scale[index].float().repeat_interleave(columns)[: weight.shape[1]]
        start = index * rows
        place.detach()[start : start + len(band)].copy_(band.float() * wide)


def dequantise(weight: Tensor, scale: Tensor, block: Block = (128, 128), dtype: torch.dtype = torch.float32) -> Tensor:
    """weight * scale in a tensor of its own. See :func:`dequantise_into`."""
    out = torch.empty(weight.shape, dtype=dtype)
    dequantise_into(out, weight, scale, block)
    return out

"""Causal attention over packed sequences on a GPU: PyTorch's variable-length flash attention, without any padding.

The kernel wants one width for queries, keys and values, a multiple of 8 and at most 256. Latent attention has wider
keys than values (192 and 128 in DeepSeek-V3): the values get columns of zeros, which are cut off again. A zero column
changes no product.

Shapes: N tokens, A heads, D = query/key width, V = value width, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from policy.segments import Segments

_WIDTH_STEP, _WIDEST = 8, 256
_OLDEST = (8, 0)  # compute capability that flash attention needs


def runs_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether attention takes this way: half precision on a GPU that has the kernel, and widths that it knows."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    widest = max(query.shape[-1], value.shape[-1])
    return widest <= _WIDEST and torch.cuda.get_device_capability(query.device) >= _OLDEST


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Segments, *, kernel: Any = None
) -> Tensor:
    """Attention of every token to its own sequence up to itself. query, key [N, A, D], value [N, A, V] -> [N, A, V]

    Args:
        query, key, value: in the order of ``segments``, half precision.
        scale: factor on the products of queries and keys.
        segments: where the sequences lie.
        kernel: in the place of ``torch.nn.attention.varlen.varlen_attn``.
    """
    if kernel is None:
        from torch.nn.attention.varlen import varlen_attn as kernel  # slow to import, and for GPUs only
    width = -(-max(query.shape[-1], value.shape[-1]) // _WIDTH_STEP) * _WIDTH_STEP
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    longest = segments.longest
    # One split: a sequence gets the same bits whoever shares its batch.
    out = kernel(
        q, k, v, segments.bounds, segments.bounds, longest, longest, scale=scale, window_size=(-1, 0), num_splits=1
    )
    return out[..., : value.shape[-1]]

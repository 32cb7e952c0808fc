"""What is mended in vLLM 0.31 on a CPU, one mend per name; each has a test that leaves it out and sees what follows.

``rotary``
    vLLM's CPU kernel for rotary embeddings is wrong for a query of several heads, which is what MLA passes. The native
    implementation is chosen by a compilation option (``rollout.vllm_start``); nothing to do here.
``repack``
    After a weight update vLLM does not bring unquantised experts back into the packed layout of its kernel: they would
    be read as garbage. :func:`repack_experts` does.
``batch``
    A token's log-probability depends in its last bits on what else is in the batch, so a rollout that is drawn again
    after a kill would differ. Two causes, found by running each kernel on slices of a batch: MKL's fp32 matrix products
    take another path for three rows or fewer, and the vectorised sigmoid treats the last elements of a tensor
    apart when their number is no multiple of 16. :func:`make_batch_invariant` pads both.

Everything else on the path (oneDNN linear layers, the fused experts, MLA decode, norms, log-softmax) was seen to be
independent of the batch, bit for bit. Imported by vLLM's engine processes alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout.vllm_start import MENDS, MENDS_VARIABLE

_LEAST_ROWS = 4  # MKL's sgemm gives a row the same bits from here on
_VECTOR = 16  # elements that one step of a vectorised fp32 loop takes (two AVX2 registers, one AVX-512 register)

# Holds the overridden operators for the life of the process.
_overrides: list[torch.library.Library] = []


def active_mends() -> frozenset[str]:
    """The mends of this process, all of them unless the environment says otherwise."""
    return frozenset(os.environ.get(MENDS_VARIABLE, ",".join(sorted(MENDS))).split(","))


def repack_experts(model: torch.nn.Module) -> int:
    """Packs the experts of every MoE layer as at load time; returns how many layers were packed.

    Call after ``finalize_layerwise_reload``. Only kernels that keep experts in a layout of their own have the hook's
    body; for the others it does nothing.
    """
    packed = 0
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
            packed += 1
    return packed


def make_batch_invariant() -> None:
    """Makes fp32 results on this CPU independent of the batch. Once per process, before the model is loaded."""
    if _overrides:
        return
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.out", _bmm_out, "CPU")
    library.impl("mm", _mm, "CPU")
    _overrides.append(library)
    cpu_router._grouped_topk = pad_rows(cpu_router._grouped_topk)


def _bmm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """[B, M, K] x [B, K, N] -> out [B, M, N], each row the same whatever M"""
    rows = a.shape[1]
    if rows >= _LEAST_ROWS or rows == 0:
        return torch.baddbmm(out, a, b, beta=0, out=out)  # the same kernel behind an operator that is not overridden
    padded = F.pad(a, (0, 0, 0, _LEAST_ROWS - rows))
    return out.copy_(torch.bmm(padded, b)[:, :rows])


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] x [K, N] -> [M, N], each row the same whatever M"""
    rows = a.shape[0]
    if rows >= _LEAST_ROWS or rows == 0:
        return torch.mm(a, b, out=a.new_empty(rows, b.shape[1]))
    padded = F.pad(a, (0, 0, 0, _LEAST_ROWS - rows))
    return torch.mm(padded, b, out=a.new_empty(_LEAST_ROWS, b.shape[1]))[:rows]


def pad_rows(route: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wraps a router function so that the tensors it works on have a multiple of 16 rows."""

    def padded(gating_output: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = gating_output.shape[0]
        weights, ids = route(F.pad(gating_output, (0, 0, 0, -rows % _VECTOR)), *args, **kwargs)
        return weights[:rows], ids[:rows]

    return padded

"""The products of all routed experts in one call each, for GPUs: ``torch.nn.functional.grouped_mm``.

The rows of an expert begin at a multiple of :data:`ALIGNMENT`: the kernel that computes the gradient of the weights
reads groups along its inner dimension, in vectors of 16 bytes. The rows between are zero. How many rows there are is
known beforehand, up to that padding, so the host never waits for the router's choice.

Shapes: N tokens, H = hidden_size, E experts, K = num_experts_per_tok, I = moe_intermediate_size, M = N * K assignments
sorted by expert, P = M + E * (ALIGNMENT - 1) + 1 rows at most with padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 8  # rows: 16 bytes of bf16


@dataclass(frozen=True)
class Groups:
    """Where the rows of every expert lie.

    Attributes:
        ends: row behind the last of each expert, padding included. [E], int32
        slot: the row of assignment k of token n. [N * K]
        token: the token of each row; 0 for padding. [P]
        real: 1 for a row of a token, 0 for padding. [P, 1], bool
    """

    ends: Tensor
    slot: Tensor
    token: Tensor
    real: Tensor

    @classmethod
    def of(cls, place: Tensor, load: Tensor, top_k: int) -> Groups:
        """Args: as in ``policy.experts.Dispatch``: place [N * K] among the sorted assignments, load [E]."""
        padded = (load + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = padded.cumsum(0)
        shift = (ends - padded) - (load.cumsum(0) - load)  # of the rows of each expert
        expert = torch.searchsorted(load.cumsum(0), place, right=True)
        slot = place + shift[expert]
        # grouped_mm wants its operand longer than the last end.
        rows = len(place) + len(load) * (ALIGNMENT - 1) + 1
        token = slot.new_zeros(rows).index_copy_(0, slot, torch.arange(len(slot), device=slot.device) // top_k)
        real = torch.zeros(rows, 1, dtype=torch.bool, device=slot.device).index_fill_(0, slot, True)
        return cls(ends.to(torch.int32), slot, token, real)


def runs_grouped(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the experts' products take this way: bf16 on a GPU, sizes that fill the kernel's vectors."""
    widths = (gate_up.shape[1], gate_up.shape[2], down.shape[2])
    return x.device.type == "cuda" and down.dtype == torch.bfloat16 and all(w % ALIGNMENT == 0 for w in widths)


def grouped_mlp(x: Tensor, gates: Tensor, weights: tuple[Tensor, Tensor], groups: Groups) -> Tensor:
    """Sum over k of gates[n, k] * down_e(silu(gate_e(x)) * up_e(x)) with e the expert of (n, k). [N, H] -> [N, H]

    Args:
        x: the tokens. [N, H]
        gates: of each assignment. [N, K]
        weights: gate and up of all experts [E, 2I, H], down [E, H, I].
        groups: where the rows lie.
    """
    gate_up, down = weights
    rows = torch.where(groups.real, x.index_select(0, groups.token), 0)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=groups.ends).chunk(2, dim=-1)
    weight = gates.new_zeros(len(rows)).index_copy(0, groups.slot, gates.flatten())
    # Rows behind the last group are not written by the kernel: whatever lies there must not meet a gradient of 0.
    inner = torch.where(groups.real, F.silu(gate) * up * weight[:, None], 0)
    out = F.grouped_mm(inner, down.transpose(1, 2), offs=groups.ends)
    return out.index_select(0, groups.slot).view(*gates.shape, -1).sum(dim=1)

"""From what callers pass (rows with a mask, packed rows, position ids) to a flat stream of tokens cut into segments.

Shapes: B rows, T columns, N tokens that are kept, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config

IGNORED_LABEL = -100

# Bounds of packed rows that padding-free collators repeat beside position_ids, which say the same.
_REDUNDANT_KWARGS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


@dataclass(frozen=True)
class Stream:
    """The tokens that are computed, and where they came from.

    Attributes:
        positions: position of each token. [N]
        kept: place of each token in the flattened rows; None when every token is kept. [N]
        lengths: tokens of each sequence, in the order of the rows.
    """

    positions: Tensor
    kept: Tensor | None
    lengths: Sequence[int]


def plan_stream(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_lengths: Sequence[int] | None = None,
) -> Stream:
    """Plans the computation of ``input_ids`` [B, T].

    With ``segment_lengths`` the rows are one packed stream. With ``attention_mask`` [B, T] each row is one sequence,
    padded on either side. With neither, a sequence ends where ``position_ids`` [B, T] do not go on by one, or with its
    row. Positions count from 0 within a segment, or are the columns of a padded row, unless they are given.

    Raises:
        ValueError: shapes or lengths that do not fit; a mask and segment_lengths at once; a row that is all padding.
    """
    rows, columns = input_ids.shape
    if position_ids is not None:
        if position_ids.shape not in ((rows, columns), (1, columns), (columns,)):
            raise ValueError(
                f"position_ids {tuple(position_ids.shape)} must have the shape of input_ids {(rows, columns)}"
            )
        position_ids = position_ids.expand(rows, columns)
    if segment_lengths is not None:
        return _packed(input_ids, attention_mask, position_ids, segment_lengths)
    if attention_mask is not None:
        return _padded(input_ids, attention_mask, position_ids)
    if position_ids is None:
        positions = torch.arange(columns, device=input_ids.device).repeat(rows)
        return _stream([columns] * rows, positions)
    return _stream(_lengths_by_position(position_ids), position_ids.flatten())


def _stream(lengths: Sequence[int], positions: Tensor, kept: Tensor | None = None) -> Stream:
    return Stream(positions, kept, lengths)


def _packed(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, segment_lengths: Sequence[int]
) -> Stream:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "a packed batch has no padding: pass segment_lengths or an attention_mask with zeros, not both"
        )
    if sum(segment_lengths) != input_ids.numel():
        raise ValueError(
            f"segment_lengths sum to {sum(segment_lengths)}, but input_ids hold {input_ids.numel()} tokens"
        )
    if position_ids is None:
        position_ids = torch.cat([torch.arange(n) for n in segment_lengths]).to(input_ids.device)
    return _stream(segment_lengths, position_ids.flatten())


def _padded(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> Stream:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}; "
            "other masks (4-D, sliding) are not supported"
        )
    real = attention_mask != 0
    lengths = real.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} of attention_mask keeps no token: leave the row out")
    kept = None if sum(lengths) == real.numel() else real.flatten().nonzero().flatten()
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    positions = position_ids.flatten()
    return _stream(lengths, positions if kept is None else positions[kept], kept)


def _lengths_by_position(position_ids: Tensor) -> list[int]:
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    bounds = [*starts.flatten().nonzero().flatten().tolist(), position_ids.numel()]
    return [b - a for a, b in pairwise(bounds)]


def check_routed_experts(
    given: Sequence[Tensor] | None, config: DeepseekV3Config, tokens: int, kept: Tensor | None = None
) -> list[Tensor] | None:
    """The given choice of experts as one int64 [tokens, K] per MoE layer; of ``kept`` tokens only, where given (padding
    may hold anything).

    Raises:
        ValueError: a wrong number of layers, a wrong shape, ids that are no integers, an expert that does not exist, or
            one that a token is sent to twice.
    """
    if given is None:
        return None
    assert config.first_k_dense_replace is not None and config.num_experts_per_tok is not None
    layers = max(config.num_hidden_layers - config.first_k_dense_replace, 0)
    if len(given) != layers:
        raise ValueError(f"routed_experts has {len(given)} entries, the model has {layers} MoE layers")
    shape = (tokens, config.num_experts_per_tok)
    out = []
    for i, choice in enumerate(given):
        if choice.numel() != shape[0] * shape[1] or choice.shape[-1] != shape[1]:
            raise ValueError(f"routed_experts[{i}] has shape {tuple(choice.shape)}, expected {shape}")
        if choice.dtype == torch.bool or choice.is_floating_point() or choice.is_complex():
            raise ValueError(f"routed_experts[{i}] holds {choice.dtype}: experts are numbered by integers")
        choice = choice.reshape(shape).to(torch.int64)
        choice = choice if kept is None else choice[kept]
        if int(choice.min()) < 0 or int(choice.max()) >= config.n_routed_experts:
            raise ValueError(f"routed_experts[{i}] names experts outside 0..{config.n_routed_experts - 1}")
        ordered = choice.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            token = int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[0])
            raise ValueError(
                f"routed_experts[{i}] sends token {token} to an expert twice ({choice[token].tolist()}): no router "
                "does; draw the rollout again"
            )
        out.append(choice)
    return out


def refuse_unsupported(kwargs: Mapping[str, Any]) -> None:
    """Arguments of transformers' causal models that this one does not have must be off.

    Raises:
        TypeError: one is not; it would otherwise change nothing, silently.
    """
    for name, value in kwargs.items():
        if name not in _REDUNDANT_KWARGS and value is not None and value is not False:
            mend = "pass use_cache=False" if name in ("use_cache", "past_key_values") else "leave it out"
            raise TypeError(f"PolicyModel does not support {name}={value!r:.80}: {mend}")


def trainable_labels(labels: Tensor, attention_mask: Tensor | None, stream: Stream) -> Tensor:
    """Labels [B, T] without the first one of every sequence, which no token of its own sequence predicts.

    Raises:
        ValueError: a label on padding, which would train on nothing.
    """
    if attention_mask is not None and bool(((labels != IGNORED_LABEL) & (attention_mask == 0)).any()):
        raise ValueError(f"labels are set where attention_mask is 0: set them to {IGNORED_LABEL} on padding")
    lengths = torch.tensor(stream.lengths, device=labels.device)
    first = lengths.cumsum(0) - lengths
    places = first if stream.kept is None else stream.kept[first]
    return labels.flatten().index_fill(0, places, IGNORED_LABEL).view(labels.shape)

"""Rollouts and demonstrations -> packed micro-batches.

The shift, once and for all. A sequence of T tokens, prompt first, is fed as tokens 0 .. T-2; input position n
predicts token n+1. So the log-probability of token t is computed from the hidden state of position t-1, the last token
is never fed (nothing is predicted from it), and the first token is never predicted.
Worked example, prompt (5, 6), completion (7, 8, 9)::

    input_ids     5      6      7      8
    position_ids  0      1      2      3
    predicts      6      7      8      9
    loss_mask     False  True   True   True      # True where the predicted token was sampled
    targets              7      8      9         # only these rows go through the LM head

Shapes: N packed input tokens of a micro-batch, M of them under the loss (``loss_mask.sum()``), S sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Integral

import torch
from torch import Tensor

from rollout.types import Completion, FinishReason, Rollout, RolloutGroup, unpack_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        token_ids: prompt and completion. [T]
        prompt_length: tokens of the prompt, >= 1 (the first token cannot be predicted), < T.
        rollout_logprobs: the sampler's log-probability (nats) of each completion token; None for a
            demonstration. [T - prompt_length]
        advantage: of the whole completion; unused by supervised fine-tuning.
        routed_experts: the experts of every token that is fed, to be replayed (every token but the last); None when
            they are not known. [T - 1, MoE layers, K], any integer dtype
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    rollout_logprobs: tuple[float, ...] | None = None
    advantage: float = 0.0
    routed_experts: Tensor | None = None

    def __post_init__(self) -> None:
        experts = self.routed_experts
        if experts is not None and (experts.dtype == torch.bool or experts.is_floating_point()):
            raise ValueError(f"routed_experts hold {experts.dtype}: experts are numbered by integers")
        if self.prompt_length < 1:
            raise ValueError("a sample needs a prompt of at least one token: nothing predicts its first token")
        if self.prompt_length >= len(self.token_ids):
            raise ValueError(
                f"a sample needs at least one token after its prompt, got {len(self.token_ids)} tokens with a "
                f"prompt of {self.prompt_length}"
            )
        completion = len(self.token_ids) - self.prompt_length
        if self.rollout_logprobs is not None and len(self.rollout_logprobs) != completion:
            raise ValueError(f"{len(self.rollout_logprobs)} rollout_logprobs for a completion of {completion} tokens")
        if self.routed_experts is not None and len(self.routed_experts) != len(self.token_ids) - 1:
            raise ValueError(
                f"routed_experts of {len(self.routed_experts)} tokens for {len(self.token_ids)}: one row for each "
                "token but the last, which is never fed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences packed one after the other; attention must not cross ``segment_lengths``.

    Attributes:
        input_ids, position_ids: [1, N], int64; positions start at 0 in every segment.
        segment_lengths: input tokens of each sequence, summing to N. S entries
        loss_mask: True where the predicted token is under the loss. [N], bool
        loss_index: the positions where ``loss_mask`` is True. [M], int64
        targets: the predicted tokens under the loss. [M], int64
        advantages: of the sequence of each target. [M], float64 (exact; the loss casts)
        rollout_logprobs: the sampler's, of each target; None when the samples have none. [M], float64
        sequence_index: which sample each target belongs to, as an index into what was packed. [M], int64
        sequence_lengths: tokens under the loss in the sequence of each target. [M], int64
        sample_index: index of each packed sequence into what was packed. S entries
        routed_experts: experts to replay for each input token; None when the samples have none.
            [MoE layers, N, K], int64
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: list[int]
    loss_mask: Tensor
    loss_index: Tensor
    targets: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None
    sequence_index: Tensor
    sequence_lengths: Tensor
    sample_index: list[int]
    routed_experts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Input tokens, N."""
        return self.input_ids.shape[1]

    @property
    def loss_tokens(self) -> int:
        """Tokens under the loss, M."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


def samples_from_groups(groups: Iterable[RolloutGroup], *, mask_truncated: bool) -> list[Sample]:
    """The rollouts that train, in order: those with an advantage.

    Args:
        groups: with advantages filled in (``group_advantages``).
        mask_truncated: leave out completions cut off by the token limit (DAPO's overlong filtering). They
            then do not count in the denominators of the loss either.
    """
    samples = []
    for _, rollout in training_rollouts(groups, mask_truncated=mask_truncated):
        completion = rollout.completion
        assert rollout.advantage is not None
        samples.append(
            Sample(
                token_ids=(*completion.prompt_token_ids, *completion.token_ids),
                prompt_length=len(completion.prompt_token_ids),
                rollout_logprobs=completion.rollout_logprobs,
                advantage=rollout.advantage,
                routed_experts=_routed_experts(completion),
            )
        )
    return samples


def training_rollouts(
    groups: Iterable[RolloutGroup], *, mask_truncated: bool
) -> Iterator[tuple[RolloutGroup, Rollout]]:
    """The rollouts that become samples, in their order, each with its group; see :func:`samples_from_groups`."""
    for group in groups:
        for rollout in group.rollouts:
            cut_off = rollout.completion.finish_reason is FinishReason.LENGTH
            if rollout.advantage is not None and not (mask_truncated and cut_off):
                yield group, rollout


def _routed_experts(completion: Completion) -> Tensor | None:
    """[T_prompt + T - 1, MoE layers, K], uint8 or uint16"""
    if completion.routed_experts is None:
        return None
    ids, shape, width = unpack_experts(completion.routed_experts)
    flat = torch.frombuffer(bytearray(ids), dtype=torch.uint8 if width == 1 else torch.uint16)
    return flat.view(shape)


def pack(samples: Sequence[Sample], micro_batch_tokens: int, *, padded: bool = False) -> list[MicroBatch]:
    """Cuts samples into few, full micro-batches. Deterministic; every sample lands in exactly one.

    Best fit, longest first (Johnson, 1973): each sequence goes where it leaves the least room, or opens a micro-batch
    when it fits nowhere; ties go to the earlier one. The longest sequences come in the first micro-batches, so a batch
    that does not fit in memory fails early.

    Args:
        samples: what to pack; either all or none carry rollout_logprobs, and the same of routed_experts.
        micro_batch_tokens: most tokens of a micro-batch, >= 1; a longer sequence gets one of its own.
        padded: the model pads a micro-batch to its longest sequence. Then sequences x longest is what stays within the
            limit, and similar lengths go together.

    Raises:
        ValueError: ``micro_batch_tokens`` < 1, or only some samples carry rollout_logprobs or routed_experts, or
            these have different shapes.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be >= 1, got {micro_batch_tokens}")
    for name in ("rollout_logprobs", "routed_experts"):
        having = sum(getattr(sample, name) is not None for sample in samples)
        if having not in (0, len(samples)):
            raise ValueError(
                f"{len(samples) - having} of {len(samples)} samples have no {name}: give them to all samples or to none"
            )
    shapes = [None if s.routed_experts is None else tuple(s.routed_experts.shape[1:]) for s in samples]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"routed_experts of sample {index} have {list(shape or ())} layers and experts a token, those of "
                f"sample 0 {list(shapes[0] or ())}: they come from different models; draw the rollouts again"
            )
    sizes = [len(sample.token_ids) - 1 for sample in samples]
    return [_micro_batch(samples, rows) for rows in cut(sizes, micro_batch_tokens, padded=padded)]


def check_token_ids(samples: Sequence[Sample], vocabulary: int) -> None:
    """Refuses tokens that a model of ``vocabulary`` tokens does not have.

    Raises:
        ValueError: names the first sample that has one.
    """
    for index, sample in enumerate(samples):
        ids = sample.token_ids
        whole = all(issubclass(kind, Integral) for kind in set(map(type, ids)))
        if not whole or min(ids) < 0 or max(ids) >= vocabulary:
            place = next(i for i, t in enumerate(ids) if not isinstance(t, Integral) or not 0 <= t < vocabulary)
            raise ValueError(
                f"token {place} of sample {index} is {ids[place]!r}, the model has 0..{vocabulary - 1}: was the sample "
                "made with another tokenizer?"
            )


def cut(sizes: Sequence[int], limit: int, *, padded: bool = False) -> list[list[int]]:
    """What :func:`pack` puts together: indices of ``sizes`` (input tokens of each sequence) by micro-batch."""
    return _similar(sizes, limit) if padded else _best_fit(sizes, limit)


def _best_fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of ``sizes`` by micro-batch, as few and as full as best fit finds them."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect_left(room, (sizes[index], 0))
        left, chosen = room.pop(place) if place < len(room) else (limit, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        insort(room, (left - sizes[index], chosen))
    return bins


def _similar(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of ``sizes`` by micro-batch, similar ones together: rows x longest stays within the limit."""
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not bins or (len(bins[-1]) + 1) * sizes[bins[-1][0]] > limit:
            bins.append([])
        bins[-1].append(index)
    return bins


def pack_fill(micros: Sequence[MicroBatch], micro_batch_tokens: int) -> float:
    """Share of the micro-batches' places that hold tokens, 0 .. 1; a sequence too long for one fills its own."""
    tokens = [micro.tokens for micro in micros]
    return sum(tokens) / sum(max(micro_batch_tokens, n) for n in tokens)


def _micro_batch(samples: Sequence[Sample], rows: list[int]) -> MicroBatch:
    chosen = [samples[i] for i in rows]
    lengths = [len(s.token_ids) - 1 for s in chosen]
    completions = torch.tensor([len(s.token_ids) - s.prompt_length for s in chosen])
    starts = [0, *accumulate(lengths)]
    loss_mask = torch.zeros(starts[-1], dtype=torch.bool)
    for start, end, sample in zip(starts, starts[1:], chosen, strict=False):
        loss_mask[start + sample.prompt_length - 1 : end] = True
    rollout_logprobs = None
    if chosen[0].rollout_logprobs is not None:
        rollout_logprobs = torch.tensor([p for s in chosen for p in s.rollout_logprobs or ()], dtype=torch.float64)
    experts = [sample.routed_experts.long() for sample in chosen if sample.routed_experts is not None]
    return MicroBatch(
        input_ids=torch.tensor([[t for s in chosen for t in s.token_ids[:-1]]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        segment_lengths=lengths,
        loss_mask=loss_mask,
        loss_index=loss_mask.nonzero().squeeze(1),
        targets=torch.tensor([t for s in chosen for t in s.token_ids[s.prompt_length :]]),
        advantages=torch.tensor([s.advantage for s in chosen], dtype=torch.float64).repeat_interleave(completions),
        rollout_logprobs=rollout_logprobs,
        sequence_index=torch.tensor(rows).repeat_interleave(completions),
        sequence_lengths=completions.repeat_interleave(completions),
        sample_index=list(rows),
        routed_experts=torch.cat(experts).transpose(0, 1).contiguous() if experts else None,
    )

"""Numbers that go wrong: what is looked at in every update of the weights, and what is told when one is not finite.

An update is one optimizer step over the micro-batches of a mini-batch. Looked at are, in this order, the advantages and
the sampler's log-probabilities that came in, the reference's and the learner's own log-probabilities, the loss, the
gradient, and the weights that the update made. Whatever is NaN or infinite before the weights are touched skips the
update: weights and moments stay as they are to the bit, the schedule moves on. Weights that an update left not finite
cannot be taken back, so there the learner stops.

With several ranks nothing is decided in the middle of a mini-batch, where the others wait in collectives: each rank
looks at its share, the findings are reduced, and all of them decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from policy.batch import MicroBatch
from policy.errors import NonFiniteError
from policy.loss import LossInputs

KINDS = ("advantages", "rollout_logprobs", "ref_logprobs", "old_logprobs", "logprobs", "loss")
"""What is looked at token by token or micro-batch by micro-batch, causes before what follows from them."""

Largest = Callable[[Tensor], Tensor]
_NAMED = 3  # names in a message


def _alone(values: Tensor) -> Tensor:
    """The maximum over the only rank."""
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class BadUpdate:
    """One update that was skipped, or (``weights``) that ruined the weights.

    Attributes:
        what, micro_batches, parameters: as in :class:`NonFiniteError`.
        text: the same as a sentence.
        samples: indices into the batch that the learner was given.
        losses: each micro-batch's share of the loss, as far as this process computed it.
        mini_batch: place of the update in its batch, 0-based.
        optimizer_step: number of the optimizer step that did not happen (weights: that did), from 1.
        position: of the schedule, 0-based.
        in_a_row: bad updates up to this one without a good one between them.
        stops: the learner takes no further step.
    """

    what: str
    text: str
    mini_batch: int
    micro_batches: tuple[int, ...]
    samples: tuple[int, ...]
    parameters: tuple[str, ...]
    losses: tuple[float, ...]
    optimizer_step: int
    position: int
    in_a_row: int
    stops: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values; losses that are not finite as texts, which JSON can hold."""
        losses = [value if math.isfinite(value) else str(value) for value in self.losses]
        return {**asdict(self), "losses": losses}


class Watch:
    """Looks at the numbers of one mini-batch.

    Args:
        samples: sequences in the mini-batch.
        micro_batches: micro-batches that it is cut into.
    """

    def __init__(self, samples: int, micro_batches: int) -> None:
        self.losses: list[float] = []
        self._seen = torch.zeros(len(KINDS), samples, dtype=torch.float64)  # 1: not finite
        self._where = torch.zeros(len(KINDS), micro_batches, dtype=torch.float64)

    def look(self, index: int, micro: MicroBatch, logprobs: Tensor, loss: float, inputs: LossInputs | None) -> None:
        """Looks at micro-batch ``index``: its log-probabilities [M], its share of the loss, what went into that."""
        self.losses.append(loss)
        values: dict[str, Tensor | None] = {"logprobs": logprobs.detach()}
        if inputs is not None:
            values["advantages"] = inputs.advantages
            values["rollout_logprobs"] = inputs.rollout_logprobs
            values["ref_logprobs"] = inputs.ref_logprobs
            values["old_logprobs"] = inputs.old_logprobs
        given = {kind: value for kind, value in values.items() if value is not None}
        fine = torch.stack([value.isfinite().all() for value in given.values()]).tolist()  # one transfer
        for (kind, value), good in zip(given.items(), fine, strict=True):
            if not good:
                self._mark(kind, index, micro.sequence_index[~value.isfinite()].unique().tolist())
        if not math.isfinite(loss):
            self._mark("loss", index, micro.sample_index)

    def check(self, largest: Largest = _alone) -> None:
        """Asked once all micro-batches are computed.

        Args:
            largest: element-wise maximum over all ranks.

        Raises:
            NonFiniteError: something was not finite, in whichever rank.
        """
        found = largest(torch.cat([self._seen, self._where], dim=1))
        kind = next((i for i, row in enumerate(found) if row.any()), None)
        if kind is None:
            return
        samples = found[kind, : self._seen.shape[1]].nonzero().flatten().tolist()
        where = found[kind, self._seen.shape[1] :].nonzero().flatten().tolist()
        subject = "the loss is" if KINDS[kind] == "loss" else f"{KINDS[kind]} are"
        raise NonFiniteError(
            f"{subject} not finite in micro-batch {', '.join(str(i + 1) for i in where)} of {self._where.shape[1]} "
            f"({len(samples)} of its mini-batch's {self._seen.shape[1]} sequences)",
            KINDS[kind],
            micro_batches=where,
            samples=samples,
        )

    def _mark(self, kind: str, micro_batch: int, samples: Iterable[int]) -> None:
        row = KINDS.index(kind)
        self._where[row, micro_batch] = 1
        self._seen[row, list(samples)] = 1


class Guard:
    """Counts a learner's bad updates and stops it after too many in a row.

    Args:
        limit: bad updates in a row that are let pass, ``LearnerConfig.max_bad_steps``.

    Attributes:
        bad: those of the last call of the learner.
        in_a_row: without a good one since; part of the learner's state, so that a resumed run counts on.
        updates: good and bad ones of the last call so far.
        recalled: places of updates that the next call skips whatever it finds, because the run that it repeats did.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.bad: list[BadUpdate] = []
        self.in_a_row = self.updates = 0
        self.recalled: frozenset[int] = frozenset()

    @property
    def stopped(self) -> bool:
        """Whether the last update was one bad update too many, or ruined the weights."""
        return bool(self.bad) and self.bad[-1].stops

    def begin(self) -> None:
        """Before a batch.

        Raises:
            NonFiniteError: an earlier batch stopped this learner.
        """
        self.check()
        self.bad, self.updates = [], 0

    def check(self) -> None:
        """Refuses to go on, or to save, after the learner stopped.

        Raises:
            NonFiniteError: it did.
        """
        if self.stopped:
            raise NonFiniteError(f"this learner has stopped: {self.bad[-1].text}", self.bad[-1].what)

    def check_recalled(self) -> None:
        """Before an update that nothing speaks against.

        Raises:
            NonFiniteError: it was skipped when the batch was first computed.
        """
        if self.updates in self.recalled:
            raise NonFiniteError("skipped, as it was when the batch was first computed", "recalled")

    def good(self) -> None:
        """An update was made."""
        self.in_a_row = 0
        self.updates += 1

    def add(self, error: NonFiniteError, samples: Sequence[int], **where: Any) -> None:
        """An update was bad.

        Args:
            error: what was found.
            samples: the batch's index of each sample of the mini-batch.
            where: ``losses``, ``optimizer_step`` and ``position`` of :class:`BadUpdate`.
        """
        self.in_a_row += 1
        self.bad.append(
            BadUpdate(
                what=error.what,
                text=str(error),
                mini_batch=self.updates,
                micro_batches=error.micro_batches,
                samples=tuple(sorted(samples[i] for i in error.samples)),
                parameters=error.parameters,
                in_a_row=self.in_a_row,
                stops=error.what == "weights" or self.in_a_row > self._limit,
                **where,
            )
        )
        self.updates += 1


def all_finite(tensors: Sequence[Tensor], largest: Largest = _alone) -> bool:
    """Whether no tensor holds a NaN or an infinity; one pass over them, one transfer from the device.

    Args:
        tensors: of a sharded one this rank's shard is looked at.
        largest: element-wise maximum over all ranks.
    """
    shards = [shard for tensor in tensors if (shard := _local(tensor)).numel()]
    # The sum of squares is ten times as fast as the largest absolute value, but it may overflow.
    return any(bool(largest(torch.nn.utils.get_total_norm(shards, order)).isfinite()) for order in (2.0, math.inf))


def not_finite(tensors: Mapping[str, Tensor], largest: Largest = _alone) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; the arguments are those of :func:`all_finite`."""
    broken = [0.0 if bool(_local(tensor).isfinite().all()) else 1.0 for tensor in tensors.values()]
    found = largest(torch.tensor(broken, dtype=torch.float64)).tolist()
    return [name for name, flag in zip(tensors, found, strict=True) if flag]


def named(names: Sequence[str]) -> str:
    """``a, b, c and 5 more``"""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def check_loaded(model: nn.Module, source: str) -> None:
    """Refuses a model whose weights are broken before anything is computed with it.

    Args:
        source: where the model came from, for the message.

    Raises:
        ValueError: a parameter or buffer holds a NaN or an infinity.
    """
    state = {
        name: tensor.detach()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_floating_point() and tensor.numel()
    }
    if broken := not_finite(state):
        raise ValueError(
            f"the model of {source} has weights that are NaN or infinite ({named(broken)}): the folder is damaged or "
            "its training went wrong; take another one"
        )


def _local(tensor: Tensor) -> Tensor:
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()

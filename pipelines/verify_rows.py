"""The rows of ``r1 verify``: what was measured, how far it may be off, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PROPERTIES: Mapping[str, str] = MappingProxyType(
    {
        "micro_batch": "micro-batch size",
        "packing": "packed, or each alone",
        "neighbours": "neighbours in a pack",
        "order": "order of the samples",
        "logprob_chunk": "chunk of the log-probabilities",
        "checkpointing": "activation checkpointing",
        "step": "a whole step, cut in two ways",
        "ranks": "data-parallel ranks",
        "expert_parallel": "expert-parallel degree",
        "engine_decode": "engine and learner: sampled tokens",
        "engine_prefill": "engine and learner: read tokens",
        "routing": "engine and learner: experts",
        "weight_sync": "weights sent to the engine",
        "save_load": "saved and loaded state",
    }
)
"""What can be measured, by the name that ``--only`` takes; in the order of the table."""

OF_THE_ENGINE = ("engine_decode", "engine_prefill", "routing", "weight_sync")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One property.

    Attributes:
        property: its name in :data:`PROPERTIES`.
        worst: the largest deviation that was seen; None when nothing was measured.
        tolerance: what is accepted.
        ok: whether ``worst`` is within it; None when nothing was measured, which proves nothing.
        reason: why the tolerance is what it is, or why nothing was measured.
        unit: of ``worst`` and ``tolerance``: ``relative``, ``nats``, ``share`` or ``tensors``.
        where: where the worst was seen.
        detail: further figures.
        seconds: that the measurement took.
    """

    property: str
    worst: float | None = None
    tolerance: float | None = None
    ok: bool | None = None
    reason: str
    unit: str = "relative"
    where: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For ``--json``, which has no word for infinite: what is not a number is null, and not ok."""
        worst = self.worst if self.worst is not None and math.isfinite(self.worst) else None
        return {
            "property": self.property, "title": PROPERTIES[self.property], "worst": worst,
            "tolerance": self.tolerance, "ok": self.ok, "unit": self.unit, "reason": self.reason,
            "where": self.where, "seconds": round(self.seconds, 2), **self.detail,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a measurement found: the worst deviation, where, what is accepted and why.

    Attributes:
        worst, where, tolerance, reason, unit, detail: as of :class:`Row`.
        ok: decides when more than ``worst`` counts; None compares with the tolerance.
    """

    worst: float
    where: str = ""
    tolerance: float
    reason: str
    unit: str = "relative"
    ok: bool | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


def measured(name: str, measure: Callable[[], Finding]) -> Row:
    """The row of one measurement. A deviation that is not a number is not ok."""
    started = time.monotonic()
    found = measure()
    within = found.worst <= found.tolerance
    return Row(
        property=name, worst=found.worst, tolerance=found.tolerance, ok=within if found.ok is None else found.ok,
        reason=found.reason, unit=found.unit, where=found.where, detail=found.detail,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def unmeasured(name: str, why: str) -> Row:
    """A row that proves nothing, and says why."""
    return Row(property=name, reason=why)

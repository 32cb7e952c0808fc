"""Timing two or more sides against each other. Standard library only.

A shared machine drifts: its clock, its neighbours, its caches. The sides of a comparison therefore take turns (ABAB),
every round gives one ratio, and what is reported is the ratio of the medians with the span of the rounds' own ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Series:
    """What one side measured, one value per round.

    Attributes:
        name: who was measured, e.g. ``TRL GRPOTrainer``.
        values: one per round, in the unit of the comparison; at least one, all > 0.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.name}: nothing was measured")
        bad = [value for value in self.values if not (math.isfinite(value) and value > 0)]
        if bad:
            raise ValueError(f"{self.name}: a measured value must be finite and > 0, got {bad[0]}")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One side of ours against one or more peers, measured in turns.

    Attributes:
        key: short name, unique, e.g. ``grpo-ragged``.
        title: what is compared.
        unit: of every value, e.g. ``samples/s``.
        ours: our side.
        peers: the others; each has as many rounds as ours.
        goal: what the ratio to the first peer should reach at least; None where there is no goal.
        reading: how a ratio is read, e.g. ``times as fast``.
        notes: what one has to know to read the figures: workload, settings, what was left out.
    """

    key: str
    title: str
    unit: str
    ours: Series
    peers: tuple[Series, ...]
    goal: float | None = None
    reading: str = "times as fast"
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.peers:
            raise ValueError(f"{self.key}: a comparison needs a peer")
        for peer in self.peers:
            if len(peer.values) != len(self.ours.values):
                raise ValueError(
                    f"{self.key}: {self.ours.name} has {len(self.ours.values)} rounds, {peer.name} {len(peer.values)}: "
                    "sides that take turns have as many"
                )

    def ratio(self, peer: int = 0) -> float:
        """Our median over the peer's."""
        return self.ours.median / self.peers[peer].median

    def span(self, peer: int = 0) -> tuple[float, float]:
        """Smallest and largest ratio of a single round."""
        pairs = [a / b for a, b in zip(self.ours.values, self.peers[peer].values, strict=True)]
        return min(pairs), max(pairs)

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        return None if self.goal is None else self.ratio() >= self.goal


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """A JSON-serialisable form, with medians and ratios spelled out for other readers."""
    row = asdict(comparison)
    for side, series in zip([row["ours"], *row["peers"]], [comparison.ours, *comparison.peers], strict=True):
        side["median"] = series.median
    row["ratios"] = [
        {"to": peer.name, "ratio": comparison.ratio(i), "span": list(comparison.span(i))}
        for i, peer in enumerate(comparison.peers)
    ]
    return row


def comparison_from_json(row: Mapping[str, Any]) -> Comparison:
    """Inverse of :func:`comparison_to_json`; what is derived there is derived again.

    Raises:
        KeyError, TypeError: the row is none of ours.
    """

    def series(side: Mapping[str, Any]) -> Series:
        return Series(name=side["name"], values=tuple(side["values"]))

    keep = {key: row[key] for key in ("key", "title", "unit", "goal", "reading", "notes")}
    return Comparison(**keep, ours=series(row["ours"]), peers=tuple(series(peer) for peer in row["peers"]))


def take_turns(
    sides: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 0, pause_s: float = 0.0
) -> dict[str, tuple[float, ...]]:
    """Calls every side once per round, in the given order, and keeps what each returns.

    Args:
        sides: name -> a function that does its work once and returns the measured value.
        rounds: measured rounds, >= 1.
        warmup: rounds before them that are not kept.
        pause_s: seconds of rest before each call, so that threads of the other side that still spin come to rest.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, work in sides.items():
            time.sleep(pause_s)
            value = work()
            if turn >= warmup:
                values[name].append(value)
    return {name: tuple(found) for name, found in values.items()}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return statistics.fmean(values) if values else 0.0

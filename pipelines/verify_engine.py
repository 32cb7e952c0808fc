"""One engine of a recipe, asked for what the learner can compute too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.actors import settle
from pipelines.launch import Launcher
from pipelines.resources import own_cores, start_ray
from pipelines.verify_samples import Questions
from pipelines.weight_sync import before_ties, default_tolerance
from rollout.engine import WeightUpdate
from rollout.types import Completion

if TYPE_CHECKING:
    from pipelines.config import Recipe

_START_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """|Δlogp| between engine and learner, nats.

    Attributes:
        rows: by sequence and token.
        left_out: tokens that were not compared because a router's choice before them was as good as a tie.
    """

    rows: tuple[tuple[float, ...], ...]
    left_out: int = 0

    @property
    def worst(self) -> float:
        """The largest; what is not a number counts as infinite."""
        return max((_or_infinite(gap) for row in self.rows for gap in row), default=0.0)

    @property
    def mean(self) -> float:
        """Over all tokens."""
        found = [_or_infinite(gap) for row in self.rows for gap in row]
        return sum(found) / len(found) if found else 0.0

    def by_position(self) -> list[dict[str, float]]:
        """Mean and largest by position in the sequence: 1, 2-3, 4-7, 8-15, …"""
        longest = max(map(len, self.rows), default=0)
        found, first = [], 1
        while first <= longest:
            last = min(2 * first - 1, longest)
            gaps = [_or_infinite(gap) for row in self.rows for gap in row[first - 1 : last]]
            found.append({"from": first, "to": last, "tokens": len(gaps), "mean": sum(gaps) / len(gaps),
                          "max": max(gaps)})  # fmt: skip
            first = last + 1
        return found

    @property
    def tokens(self) -> int:
        """How many were compared."""
        return sum(map(len, self.rows))


class EngineProbe:
    """A vLLM engine in a Ray actor, started as a run starts it.

    Args:
        recipe: whose engine; one worker of it.
        folder: the Hugging Face folder that it loads.
        experts: the engine returns the experts of each token.

    Raises:
        ValueError: a model that vLLM cannot run here.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, experts: bool = False) -> None:
        cores = own_cores(recipe.run.cpus)
        start_ray(recipe.run.ray_address, len(cores))
        config = replace(recipe.engine, workers=1, return_routed_experts=experts)
        self._config = config
        launch = Launcher(folder=folder, engine=config, dtype=recipe.model.dtype, seed=recipe.seed, cores=cores)
        self._handle = launch(0)
        self._ready = self._handle.submit("ready")

    def draw(self, asked: Questions) -> list[Completion]:
        """One completion per request.

        Raises:
            ValueError: the engine cannot run the model, or a prompt leaves no room in the context.
            EngineDied: its process is gone.
        """
        settle(self._ready, _START_S)
        return settle(self._handle.submit("generate", asked.requests, asked.sampling), self._config.timeout_s)

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of tokens 1..T-1 of each sequence, read as a prompt."""
        settle(self._ready, _START_S)
        answers = settle(self._handle.submit("canary", sequences, 1), self._config.timeout_s)
        return [list(values)[: len(ids) - 1] for ids, (_, values) in zip(sequences, answers, strict=True)]

    def take_over(self, update: WeightUpdate) -> str:
        """Gives the engine other weights; the digest of the bytes that it received."""
        settle(self._ready, _START_S)
        return settle(self._handle.submit("update_weights", update), self._config.timeout_s)

    def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Greedy continuations with the engine's log-probabilities of every token after the first."""
        settle(self._ready, _START_S)
        return settle(self._handle.submit("canary", prompts, new_tokens), self._config.timeout_s)

    def close(self) -> None:
        """Ends the engine's processes."""
        self._handle.kill()


def gaps_of(
    engine: Sequence[Sequence[float]], learner: Sequence[Sequence[float]], skip: Sequence[int] | None = None
) -> Gaps:
    """|Δlogp| token by token; the first ``skip`` entries of each of the learner's rows belong to the prompt."""
    starts = skip or [0] * len(engine)
    rows = [
        tuple(abs(a - b) for a, b in zip(mine, theirs[start : start + len(mine)], strict=True))
        for mine, theirs, start in zip(engine, learner, starts, strict=True)
    ]
    return Gaps(rows=tuple(rows))


def without_ties(gaps: Gaps, margins: Sequence[Sequence[float]], dtype: str, skip: Sequence[int] | None = None) -> Gaps:
    """The gaps of tokens before the first choice of a router that is as good as a tie, if enough are left.

    Args:
        margins: of the choice for each token but the last of each sequence (``LearnerService.router_margins``).
        skip: as for :func:`gaps_of`.
    """
    settled = before_ties(margins, dtype)
    starts = skip or [0] * len(gaps.rows)
    kept = [row[: max(0, count - start)] for row, count, start in zip(gaps.rows, settled, starts, strict=True)]
    left_out = gaps.tokens - sum(map(len, kept))
    if not left_out or left_out > gaps.tokens / 2:
        return gaps  # ties everywhere prove nothing
    return Gaps(rows=tuple(kept), left_out=left_out)


def accepted(gaps: Gaps, dtype: str, tolerance: float) -> tuple[bool, float, str]:
    """Whether engine and learner agree, the largest |Δlogp| that is accepted, and why.

    Args:
        dtype: of the engine.
        tolerance: ``engine.attest_tolerance``; 0 takes the dtype's default.
    """
    most, most_mean = (tolerance, math.inf) if tolerance else default_tolerance(dtype)
    if tolerance:
        reason = "engine.attest_tolerance of the recipe"
    elif dtype == "float32":
        reason = f"float32: a right engine shows up to 5e-5 on unlikely tokens; the mean must stay below {most_mean:g}"
    else:
        reason = f"bfloat16: a right engine shows 0.2 on single tokens; the mean must stay below {most_mean:g}"
    return gaps.worst <= most and gaps.mean <= most_mean, most, reason


def _or_infinite(gap: float) -> float:
    return gap if math.isfinite(gap) else math.inf

"""From scored rollouts of a held-out set to its result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evals.metrics import Estimate, pass_at_1
from rollout.types import FinishReason, Rollout, RolloutGroup

PASSING = 1.0
"""A rollout passes when the score that decides reaches this."""
_ERRORS_KEPT = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SetResult:
    """How a policy did on one held-out set.

    Attributes:
        name: of the set.
        judge: the reward function whose score decides.
        pass_at_1: mean over problems of the share of their samples that pass.
        ci95: its 95 % interval over problems.
        n: problems that were judged.
        k: samples per problem.
        sampling_se: standard error of pass_at_1 from sampling alone; None for k = 1.
        greedy, greedy_ci95: the same at temperature 0, one sample a problem; None when it was not drawn.
        truncated: share of the samples that were cut at their token limit.
        mean_tokens: mean length of a sample, tokens.
        errors: samples that the judge failed on or timed out on; they are neither right nor wrong and left out.
        unjudged: samples that the judge did not apply to; left out too.
        problems_left_out: problems without a single judged sample; not among the n.
        error_examples: ``problem id -> what went wrong`` of the first few.
        by_problem: share of the judged samples that pass, by problem id.
        greedy_by_problem: the same at temperature 0.
    """

    name: str
    judge: str
    pass_at_1: float
    ci95: tuple[float, float]
    n: int
    k: int
    sampling_se: float | None = None
    greedy: float | None = None
    greedy_ci95: tuple[float, float] | None = None
    truncated: float = 0.0
    mean_tokens: float = 0.0
    errors: int = 0
    unjudged: int = 0
    problems_left_out: int = 0
    error_examples: Mapping[str, str] = field(default_factory=dict)
    by_problem: Mapping[str, float] = field(default_factory=dict)
    greedy_by_problem: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the shares by problem are left out when there are none."""
        row = asdict(self)
        row["ci95"] = list(self.ci95)
        row["greedy_ci95"] = list(self.greedy_ci95) if self.greedy_ci95 else None
        return row

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> SetResult:
        """Inverse of :meth:`to_json`.

        Raises:
            TypeError: the row was not written by it.
        """
        pairs = {key: tuple(row[key]) for key in ("ci95", "greedy_ci95") if row.get(key)}
        return SetResult(**{**row, **pairs})


def evaluate_set(
    name: str, groups: Iterable[RolloutGroup], *, greedy: Iterable[RolloutGroup] | None = None, judge: str | None = None
) -> SetResult:
    """Judges a held-out set.

    Args:
        name: of the set.
        groups: scored groups, one per problem, k samples each.
        greedy: scored groups of one sample at temperature 0; None when they were not drawn.
        judge: the reward function whose score decides; None takes the first that the rollouts name.

    Raises:
        ValueError: no groups, a problem twice, or no sample that the judge scored.
    """
    sampled = list(groups)
    judge = judge or _first_function(name, sampled)
    flags, problems = _flags(name, sampled, judge)
    estimate = _estimate(name, judge, flags, sampled)
    lengths = [len(r.completion.token_ids) for r in problems]
    greedy_flags: dict[str, list[bool]] = {}
    greedy_estimate: Estimate | None = None
    if greedy is not None:
        drawn = list(greedy)
        greedy_flags, _ = _flags(name, drawn, judge)
        greedy_estimate = _estimate(name, judge, greedy_flags, drawn)
    failed = [(g.problem.id, r.errors[judge]) for g in sampled for r in g.rollouts if judge in r.errors]
    return SetResult(
        name=name, judge=judge, pass_at_1=estimate.value, ci95=estimate.ci95, n=estimate.n, k=estimate.k,
        sampling_se=estimate.sampling_se,
        greedy=greedy_estimate.value if greedy_estimate else None,
        greedy_ci95=greedy_estimate.ci95 if greedy_estimate else None,
        truncated=sum(r.completion.finish_reason is FinishReason.LENGTH for r in problems) / len(problems),
        mean_tokens=sum(lengths) / len(lengths),
        errors=len(failed),
        unjudged=sum(judge not in r.scores and judge not in r.errors for r in problems),
        problems_left_out=len(sampled) - estimate.n,
        error_examples=dict(list(dict(reversed(failed)).items())[::-1][:_ERRORS_KEPT]),
        by_problem=_shares(flags), greedy_by_problem=_shares(greedy_flags),
    )  # fmt: skip


def _first_function(name: str, groups: Sequence[RolloutGroup]) -> str:
    for group in groups:
        for rollout in group.rollouts:
            for function in (*rollout.scores, *rollout.errors):
                return function
    raise ValueError(f"held-out set {name!r}: no rollout was scored; name a reward function in its rewards")


def _flags(name: str, groups: Sequence[RolloutGroup], judge: str) -> tuple[dict[str, list[bool]], list[Rollout]]:
    """Judged samples by problem (only problems that have one), and all samples."""
    flags: dict[str, list[bool]] = {}
    seen: set[str] = set()
    for group in groups:
        if group.problem.id in seen:
            raise ValueError(f"held-out set {name!r}: problem {group.problem.id!r} occurs twice")
        seen.add(group.problem.id)
        judged = [r.scores[judge] >= PASSING for r in group.rollouts if judge in r.scores]
        if judged:
            flags[group.problem.id] = judged
    return flags, [r for g in groups for r in g.rollouts]


def _estimate(name: str, judge: str, flags: Mapping[str, list[bool]], groups: Sequence[RolloutGroup]) -> Estimate:
    if not flags:
        errors = [r.errors[judge] for g in groups for r in g.rollouts if judge in r.errors]
        reason = f"; the first error: {errors[0]}" if errors else ""
        raise ValueError(f"held-out set {name!r}: {judge} scored none of {len(groups)} problems{reason}")
    return pass_at_1(list(flags.values()))


def _shares(flags: Mapping[str, list[bool]]) -> dict[str, float]:
    return {problem: sum(values) / len(values) for problem, values in flags.items()}

"""Accuracy with its error: pass@1, pass@k, maj@k, and paired differences. Values in, values out.

Legend: n problems; k samples of one problem; c of them right. The interval is over problems: the question is how far
the figure would move on other problems of the same kind. ``sampling_se`` is the part that more samples would remove.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: the mean, in [0, 1] for a share and [-1, 1] for a difference of shares.
        ci95: its 95 % interval, see :func:`mean_interval`.
        n: problems.
        k: samples per problem (the most, when they differ).
        sampling_se: standard error from sampling alone, sqrt(sum of p(1-p)/(k-1)) / n; None when no problem has two
            samples, or where it is not defined.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    k: int
    sampling_se: float | None = None


def pass_at_1(correct: Sequence[Sequence[bool]]) -> Estimate:
    """Mean over problems of the share of their samples that are right.

    Args:
        correct: one sequence of k flags per problem; every problem has at least one sample.

    Raises:
        ValueError: no problems, or a problem without samples.
    """
    means = [fmean(map(float, flags)) for flags in _checked(correct)]
    variances = [p * (1 - p) / (len(f) - 1) for p, f in zip(means, correct, strict=True) if len(f) > 1]
    return Estimate(
        value=fmean(means), ci95=mean_interval(means), n=len(means), k=max(map(len, correct)),
        sampling_se=math.sqrt(sum(variances)) / len(means) if variances else None,
    )  # fmt: skip


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Mean over problems of the unbiased chance that at least one of k samples is right.

    Raises:
        ValueError: no problems, k < 1, or a problem with fewer than k samples.
    """
    values = [pass_at_k_of(len(flags), sum(flags), k) for flags in _checked(correct)]
    return Estimate(value=fmean(values), ci95=mean_interval(values), n=len(values), k=k)


def pass_at_k_of(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (Chen et al., 2021).

    Raises:
        ValueError: k is not in [1, n], or c not in [0, n].
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, got {n} samples")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right ones of {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]) -> Estimate:
    """Share of problems whose most frequent answer is right (cons@k).

    Args:
        answers: per problem and sample the normalised answer; None (not parsed) does not vote. The first seen of
            equally frequent answers wins; a problem without votes is wrong.
        correct: whether each of them is right, same shape.

    Raises:
        ValueError: no problems, or shapes that differ.
    """
    if [len(a) for a in answers] != [len(c) for c in correct]:
        raise ValueError("answers and correct must have the same shape: one entry per problem and sample")
    values = [float(_majority(a, c)) for a, c in zip(answers, _checked(correct), strict=True)]
    return Estimate(value=fmean(values), ci95=mean_interval(values), n=len(values), k=max(map(len, correct)))


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate:
    """Mean of after - before over the problems that both have; pairing removes how hard each problem is.

    Args:
        before, after: share of right samples by problem id.

    Raises:
        ValueError: no problem in common.
    """
    shared = [problem for problem in before if problem in after]
    if not shared:
        raise ValueError("the two evaluations have no problem in common, so there is no paired difference")
    changes = [after[problem] - before[problem] for problem in shared]
    return Estimate(value=fmean(changes), ci95=mean_interval(changes, low=-1.0), n=len(shared), k=1)


def mean_interval(values: Sequence[float], *, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """95 % interval of the mean of values in [low, high].

    It is mean ± t(n-1) x sample standard deviation / sqrt(n), cut at the range.
    Where all values are equal to one end the spread says nothing; the bound is then the exact binomial (Clopper and
    Pearson) one for n equal outcomes: other problems may still differ. One value alone gives the whole range.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no problems: there is nothing to take a mean of")
    n, mean = len(values), fmean(values)
    if n == 1:
        return low, high
    if all(value == values[0] for value in values) and values[0] in (low, high):
        reach = (high - low) * (1 - ((1 - _LEVEL) / 2) ** (1 / n))
        return (low, low + reach) if values[0] == low else (high - reach, high)
    half = t_quantile((1 + _LEVEL) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return max(low, mean - half), min(high, mean + half)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: sample standard deviation / sqrt(n); None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: int) -> float:
    """Quantile p in [0.5, 1) of Student's t distribution with ``df`` >= 1 degrees of freedom, by bisection to 1e-10."""
    assert df >= 1 and 0.5 <= p < 1
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        high *= 2
    while high - low > 1e-10 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    """P(T <= t) for t >= 0 by the finite series for whole df (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    total, term = 0.0, cosine if df % 2 else 1.0
    for i in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cosine * cosine * (i - 1) / i
    inner = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return 0.5 + inner / 2


def _majority(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    votes: dict[str, int] = {}
    first: dict[str, bool] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
            first.setdefault(answer, right)
    return first[max(votes, key=lambda answer: votes[answer])] if votes else False  # max keeps the first of equals


def _checked(correct: Sequence[Sequence[bool]]) -> Sequence[Sequence[bool]]:
    if not correct:
        raise ValueError("no problems: there is nothing to evaluate")
    for index, flags in enumerate(correct):
        if not len(flags):
            raise ValueError(f"problem {index} has no samples")
    return correct

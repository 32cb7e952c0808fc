"""pass@1 and its interval, pass@k, maj@k and paired differences, against numbers worked by hand or published."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.metrics import (
    maj_at_k,
    mean_interval,
    paired_difference,
    pass_at_1,
    pass_at_k,
    pass_at_k_of,
    t_quantile,
)

flags = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [  # printed tables of Student's t
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 5, 2.57058), (0.975, 9, 2.26216),
        (0.975, 29, 2.04523), (0.975, 30, 2.04227), (0.975, 255, 1.96931), (0.95, 10, 1.81246), (0.995, 7, 3.49948),
        (0.5, 4, 0.0),
    ],
)  # fmt: skip
def test_quantiles_of_students_t(p: float, df: int, value: float) -> None:
    assert t_quantile(p, df) == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_many_degrees_of_freedom_approach_the_normal_distribution() -> None:
    assert t_quantile(0.975, 20_000) == pytest.approx(1.95996 + 1.2e-4, abs=2e-5)


def test_pass_at_1_by_hand() -> None:
    result = pass_at_1([[True, True, False, False], [True] * 4, [False] * 4])
    # means .5, 1, 0; sample standard deviation .5; t(2) = 4.30265; interval wider than the range
    assert result.value == 0.5 and (result.n, result.k) == (3, 4)
    assert result.ci95 == (0.0, 1.0)
    assert result.sampling_se == pytest.approx(math.sqrt(0.25 / 3) / 3)


def test_the_interval_by_hand() -> None:
    means = [0.25, 0.5, 0.5, 0.75]
    half = 3.182446 * stdev(means) / 2  # t(3), sqrt(4)
    assert mean_interval(means) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)
    assert stdev(means) == pytest.approx(0.2041241)


def test_thirty_problems_have_an_error_of_seven_to_nine_points() -> None:
    rng = random.Random(0)
    correct = [[rng.random() < p for _ in range(64)] for p in [0.02] * 12 + [0.9] * 8 + [0.5] * 10]
    result = pass_at_1(correct)
    se = (result.ci95[1] - result.value) / t_quantile(0.975, 29)
    assert 0.06 < se < 0.09
    assert result.sampling_se is not None and result.sampling_se < se / 4, "more samples would not help"


def test_equal_outcomes_are_no_certainty() -> None:
    low, high = mean_interval([1.0] * 256)
    assert high == 1.0 and low == pytest.approx(0.025 ** (1 / 256))  # Clopper and Pearson
    assert mean_interval([0.0] * 30) == pytest.approx((0.0, 1 - 0.025 ** (1 / 30)))
    assert mean_interval([0.5] * 9) == (0.5, 0.5)
    assert mean_interval([0.3]) == (0.0, 1.0), "one problem says nothing about others"


def test_one_sample_has_no_sampling_error_to_tell() -> None:
    assert pass_at_1([[True], [False]]).sampling_se is None
    ragged = pass_at_1([[True], [True, False]])
    assert ragged.value == 0.75 and ragged.k == 2 and ragged.sampling_se == pytest.approx(0.25)


@given(flags)
def test_pass_at_1_is_within_its_interval_and_does_not_depend_on_order(correct: list[list[bool]]) -> None:
    result = pass_at_1(correct)
    assert 0 <= result.ci95[0] <= result.value + 1e-12 and result.value - 1e-12 <= result.ci95[1] <= 1
    again = pass_at_1([row[::-1] for row in correct[::-1]])
    assert again.value == pytest.approx(result.value) and again.ci95 == pytest.approx(result.ci95)


def test_the_interval_covers_the_truth_about_19_times_in_20() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        hardness = [rng.betavariate(1.2, 0.8) for _ in range(60)]
        low, high = pass_at_1([[rng.random() < p for _ in range(4)] for p in hardness]).ci95
        hits += low <= 1.2 / 2.0 <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (10, 3, 5, 0.916667), (64, 20, 8, 0.959958), (200, 7, 100, 0.992991), (5, 0, 3, 0.0), (5, 5, 3, 1.0),
        (4, 1, 1, 0.25), (4, 1, 4, 1.0),
    ],
)  # fmt: skip
def test_pass_at_k_of_known_values(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k_of(n, c, k) == pytest.approx(value, abs=5e-7)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_the_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([i < c for i in range(n)], k))
    assert pass_at_k_of(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(flags)
def test_pass_at_k_with_k_1_is_pass_at_1(correct: list[list[bool]]) -> None:
    assert pass_at_k(correct, 1).value == pytest.approx(pass_at_1(correct).value)


def test_maj_at_k() -> None:
    def wins(answers: list[str | None], correct: list[bool]) -> float:
        return maj_at_k([answers], [correct]).value

    assert wins(["7", "8", "7"], [False, True, False]) == 0.0
    assert wins(["7", "8", "8"], [False, True, True]) == 1.0
    assert wins(["8", "7"], [True, False]) == 1.0, "the first seen wins a tie"
    assert wins(["7", "8", "8", "7"], [False, True, True, False]) == 0.0
    assert wins([None, None, "8"], [False, False, True]) == 1.0, "what was not parsed does not vote"
    assert wins([None, None], [False, False]) == 0.0
    both = maj_at_k([["a"], ["a", "b"]], [[True], [False, True]])
    assert both.value == 0.5 and (both.n, both.k) == (2, 2)


def test_a_paired_difference_removes_how_hard_the_problems_are() -> None:
    before = {"a": 0.0, "b": 0.5, "c": 0.875, "only before": 1.0}
    after = {"c": 1.0, "b": 0.75, "a": 0.25, "only after": 0.0}
    result = paired_difference(before, after)
    changes = [0.25, 0.25, 0.125]
    half = 4.302653 * stdev(changes) / math.sqrt(3)
    assert result.value == pytest.approx(fmean(changes)) and result.n == 3
    assert result.ci95 == pytest.approx((fmean(changes) - half, fmean(changes) + half), rel=1e-6)
    assert result.ci95[0] > 0, "clear, although the two intervals alone overlap widely"


def test_a_difference_may_be_negative_and_total() -> None:
    assert paired_difference({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}).ci95[0] == -1.0
    assert paired_difference({"a": 0.5}, {"a": 1.0}).ci95 == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_1([]), "no problems"),
        (lambda: pass_at_1([[True], []]), "problem 1 has no samples"),
        (lambda: pass_at_k([[True]], 2), "pass@2 needs 1 <= k <= samples, got 1"),
        (lambda: pass_at_k([[True]], 0), "pass@0"),
        (lambda: pass_at_k_of(3, 4, 1), "4 right ones of 3"),
        (lambda: maj_at_k([["a"]], [[True, False]]), "same shape"),
        (lambda: maj_at_k([], []), "no problems"),
        (lambda: paired_difference({"a": 1.0}, {"b": 1.0}), "no problem in common"),
        (lambda: mean_interval([]), "no problems"),
    ],
)
def test_what_has_no_answer_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()

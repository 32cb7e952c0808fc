"""Figures of a benchmark: against numbers worked by hand, published values, and lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.metrics import mean_interval, pass_at_k, pass_at_k_of, standard_error, t_quantile
from evals.samples import Sample
from evals.summary import summarise, vote
from rewards.base import RewardConfig
from tests.unit.eval_samples import benchmark, sample, samples

BY_LEVEL = benchmark(group_by=("level",), version="3")


def of(*problems: str) -> list[Sample]:
    """Samples of one problem per text, a letter of status each."""
    return [each for number, statuses in enumerate(problems) for each in samples(statuses, number)]


def test_a_summary_by_hand() -> None:
    found = summarise(BY_LEVEL, of("rrww", "rrrr", "wuwp"), problems=4)
    # means .5, 1, 0: mean .5, s .5, se .5/sqrt(3); t(2) = 4.30265: the interval is wider than the range
    assert found["pass_at_1"] == 0.5 and found["ci95"] == [0.0, 1.0] and (found["n"], found["k"]) == (3, 4)
    assert found["se"] == pytest.approx(0.5 / math.sqrt(3))
    assert found["sampling_se"] == pytest.approx(math.sqrt(0.25 / 3) / 3)
    # pass@2: 1 - C(2,2)/C(4,2) = 5/6, 1, 0; pass@4: 1, 1, 0
    assert {k: figure["value"] for k, figure in found["pass_at"].items()} == pytest.approx({"2": 11 / 18, "4": 2 / 3})
    assert all(set(figure) == {"value", "ci95", "n"} and figure["n"] == 3 for figure in found["pass_at"].values())
    assert (found["samples"], found["missing"], found["left_out"], found["version"]) == (12, 4, 0, "3")
    assert found["shares"] == pytest.approx(
        {"truncated": 0, "unanswered": 1 / 12, "unparsed": 1 / 12, "refused": 0, "timeout": 0, "error": 0}
    )
    assert found["tokens"] == {"mean": 3.0, "mean_ci95": [3.0, 3.0], "max": 3, "total": 36, "uncounted": 0}
    assert found["by"] == {
        "level": {
            "0": {"pass_at_1": 0.25, "ci95": [0.0, 1.0], "n": 2}, "1": {"pass_at_1": 1.0, "ci95": [0.0, 1.0], "n": 1},
        }
    }  # fmt: skip
    assert found["by_problem"] == {"p0": 0.5, "p1": 1.0, "p2": 0.0} and found["errors"] == {}
    assert json.loads(json.dumps(found)) == found, "plain JSON, no NaN, no infinity"


def test_the_interval_is_over_problems() -> None:
    found = summarise(benchmark(), of("rwww", "rrww", "rrww", "rrrw"), problems=4)
    half = 3.182446 * stdev([0.25, 0.5, 0.5, 0.75]) / 2
    assert found["ci95"] == pytest.approx([0.5 - half, 0.5 + half], rel=1e-6) and found["pass_at_1"] == 0.5


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(10, 3, 5, 0.916667), (64, 20, 8, 0.959958), (200, 7, 100, 0.992991), (5, 0, 3, 0), (5, 5, 3, 1)],
)  # fmt: skip
def test_pass_at_k_is_the_published_unbiased_estimator(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k_of(n, c, k) == pytest.approx(value, abs=5e-7)
    found = summarise(benchmark(), of("r" * c + "w" * (n - c)), problems=1)["pass_at"]
    assert str(k) not in found or found[str(k)]["value"] == pytest.approx(value, abs=5e-7)
    assert set(found) == {str(2**i) for i in range(1, 9) if 2**i <= n} | {str(n)}


def test_a_failed_grader_is_in_no_figure_and_counted() -> None:
    with_errors = of("rwe", "eer", "eee")
    with_errors[0] = sample(0, 0, finish_reason="length")
    found = summarise(benchmark(), with_errors, problems=3, k=3)
    assert found["pass_at_1"] == 0.75 and found["by_problem"] == {"p0": 0.5, "p1": 1.0}
    assert (found["n"], found["left_out"], found["samples"], found["missing"]) == (2, 1, 9, 0)
    assert found["shares"]["error"] == pytest.approx(6 / 9) and found["shares"]["truncated"] == pytest.approx(1 / 9)
    assert found["pass_at"] == {"2": {"value": 1.0, "ci95": [0.0, 1.0], "n": 1}}, "only p0 has two judged samples"
    assert "maj" not in found, "no problem has three"
    told = [sample(0, 0, "error", detail="error: KeyError"), *(sample(n, 0, "error", detail="?") for n in range(1, 9))]
    errors = summarise(benchmark(), told, problems=9)["errors"]
    assert len(errors) == 5 and errors["p0, sample 0"] == "error: KeyError"


def test_nothing_judged_is_no_zero() -> None:
    for given_samples in ([], of("e", "ee")):
        found = summarise(benchmark(), given_samples, problems=2, k=2)
        assert found["pass_at_1"] is found["ci95"] is found["se"] is found["sampling_se"] is None
        assert found["n"] == 0 and found["pass_at"] == {} and "maj" not in found and found["by_problem"] == {}
        assert found["missing"] == 4 - len(given_samples)


def test_an_evaluation_that_was_killed_says_what_is_missing_and_mixes_nothing() -> None:
    killed = of("rrww", "rw", "w")
    found = summarise(benchmark(), killed, problems=5, k=4)
    assert found["missing"] == 20 - 7 and found["n"] == 3 and found["k"] == 4
    assert found["pass_at_1"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["pass_at"]["2"]["n"] == 2 and found["pass_at"]["4"]["n"] == 1 and found["maj"]["n"] == 1
    assert found["pass_at"]["2"]["value"] == pytest.approx((5 / 6 + 1) / 2)


def test_more_samples_than_were_asked_for_do_not_change_what_k_votes_say() -> None:
    votes = samples("wwrrr", answers=["2", "2", "1", "1", "1"])
    assert summarise(benchmark(), votes, problems=1, k=3)["maj"]["value"] == 0.0
    assert summarise(benchmark(), votes, problems=1)["maj"]["value"] == 1.0


# --- votes


@pytest.mark.parametrize(
    ("statuses", "answers", "right"),
    [
        ("wwr", ["2", "2", "1"], False),
        ("wrr", ["2", "1/2", "0.5"], True),  # two spellings, one answer
        ("wwrr", ["2", "2.0", r"\frac{1}{2}", "\\dfrac12"], False),  # a tie: the first seen wins
        ("rrww", [r"\frac12", "0.50", "2", "2"], True),
        ("uuur", [None, None, None, "1"], True),  # what is missing does not vote
        ("pppr", ["?", "?", "?", "1"], True),  # nor what cannot be read
        ("xxxr", ["9^9", "9^9", "9^9", "1"], True),
        ("uuuu", [None] * 4, False),
        ("wwwrr", ["x+1", "1+x", "7", "\\text{ yes }", "yes"], True),
        ("twrr", ["9", "9", "1", "1"], False),  # an answer that could not be compared in time is an answer
    ],
)
def test_majority(statuses: str, answers: list[str | None], right: bool) -> None:
    found = summarise(benchmark(), samples(statuses, answers=answers), problems=1)
    assert found["maj"] == {"value": float(right), "ci95": [0.0, 1.0], "n": 1}
    backwards = summarise(benchmark(), samples(statuses, answers=answers)[::-1], problems=1)
    assert backwards == found, "samples have an order of their own, whatever the order in which they were finished"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "0.5", True), ("1/2", r"\frac{1}{2}", True), ("1,000", "1000", True), ("$3$", "3.", True),
        ("-0", "0", True), ("1/3", "0.333", False), ("2516_8", "2516", False), ("yes", "no", False),
        ("x = 1", "1", False), ("A", "B", False),
    ],
)  # fmt: skip
def test_spellings_of_one_answer_are_one_vote(one: str, other: str, same: bool) -> None:
    votes = [vote(sample(answer=text)) for text in (one, other)]
    assert None not in votes and (votes[0] == votes[1]) is same


def test_long_answers_and_empty_ones_vote_as_they_are_or_not_at_all() -> None:
    assert vote(sample(answer=" " + "a b" * 2000)) == "a b" * 2000
    assert vote(sample(answer="")) is None and vote(sample(answer="\u202e1")) is None


def test_no_vote_where_a_vote_means_nothing() -> None:
    assert "maj" not in summarise(benchmark(), of("r", "w"), problems=2), "one sample each"
    programs = benchmark(RewardConfig(path="code_tests"), doc_to_target="")
    assert "maj" not in summarise(programs, of("rrw"), problems=1), "no two programs are alike"
    hidden = samples("rr", answers=[None, "1"])
    assert "maj" not in summarise(benchmark(), hidden, problems=1), "right without an answer that could be shown"


# --- invariances

letters = st.text("rrwupte", min_size=1, max_size=5)


@given(st.lists(letters, min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_of_samples_does_not_matter(problems: list[str], rng: random.Random) -> None:
    ordered = of(*problems)
    shuffled = rng.sample(ordered, len(ordered))
    first, second = (summarise(BY_LEVEL, each, problems=9) for each in (ordered, shuffled))
    assert first | {"errors": {}} == second | {"errors": {}}


@given(st.lists(letters, min_size=1, max_size=8))
@settings(max_examples=60)
def test_figures_hang_together(problems: list[str]) -> None:
    found = summarise(BY_LEVEL, of(*problems), problems=len(problems))
    judged = [text.replace("e", "") for text in problems]
    shares = [text.count("r") / len(text) for text in judged if text]
    assert found["n"] == len(shares)
    if shares:
        assert found["pass_at_1"] == pytest.approx(fmean(shares)) and list(found["by_problem"].values()) == shares
        assert found["ci95"][0] <= found["pass_at_1"] <= found["ci95"][1]
        by = found["by"]["level"].values()
        assert sum(row["n"] * row["pass_at_1"] for row in by) == pytest.approx(len(shares) * found["pass_at_1"])
    if not any("e" in text for text in problems) and len({len(text) for text in problems}) == 1:
        rising = [found["pass_at_1"], *(figure["value"] for figure in found["pass_at"].values())]
        assert rising == sorted(rising)
    size = sum(map(len, problems))
    lost = len(problems) * max(map(len, problems)) - size
    assert (found["samples"], found["missing"]) == (size, lost)


def test_the_interval_agrees_with_resampling_the_problems_where_there_are_many() -> None:
    rng = random.Random(3)
    shares = [fmean(rng.random() < p for _ in range(4)) for p in [0.1] * 60 + [0.5] * 60 + [0.9] * 80]
    means = sorted(fmean(rng.choices(shares, k=len(shares))) for _ in range(2000))
    low, high = mean_interval(shares)
    assert low == pytest.approx(means[49], abs=0.006) and high == pytest.approx(means[1949], abs=0.006)


def test_the_interval_covers_what_it_should_where_there_are_few() -> None:
    """There a bootstrap's percentiles are too narrow."""
    rng = random.Random(5)
    hits = {"t": 0, "bootstrap": 0}
    rounds = 150
    for _ in range(rounds):
        shares = [rng.random() for _ in range(8)]  # the truth is 1/2
        low, high = mean_interval(shares)
        hits["t"] += low <= 0.5 <= high
        means = sorted(fmean(rng.choices(shares, k=len(shares))) for _ in range(200))
        hits["bootstrap"] += means[4] <= 0.5 <= means[194]
    assert hits["t"] / rounds > 0.92 > hits["bootstrap"] / rounds


def test_standard_error() -> None:
    assert standard_error([0.25, 0.75]) == pytest.approx(0.25) and standard_error([1.0]) is None
    assert t_quantile(0.975, 2) * 0.25 > 1  # two problems say next to nothing


def test_pass_at_k_refuses_problems_with_fewer_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 needs"):
        pass_at_k([[True, False]], 3)

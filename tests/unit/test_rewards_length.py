"""Length: numbers worked by hand, and TRL's own function."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.length import cosine, length, soft_overlong
from rollout.template import split_reasoning
from rollout.types import Problem
from tests.unit.reward_groups import completion


def judge(tokens: int, answer: str = "6", **options):
    text = f"t</think>\\boxed{{{answer}}}"
    problem = Problem(id="p", prompt="2*3", answer="6")
    return length(completion(text, tokens=tokens), problem, split_reasoning(text), **options)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0)]
)
def test_the_soft_penalty(tokens, expected):
    assert judge(tokens, max_tokens=100, cache_tokens=20).value == pytest.approx(expected)


def test_without_a_margin_it_is_a_step():
    assert [judge(t, max_tokens=100).value for t in (100, 101)] == [0.0, -1.0]
    assert [judge(t, max_tokens=100).metrics["over"] for t in (100, 101)] == [0.0, 1.0]


@pytest.mark.parametrize(("limit", "cache"), [(100, 20), (100, 100), (64, 1), (50, 0)])
def test_it_is_what_trl_computes(limit, cache):
    rewards = pytest.importorskip("trl.rewards")
    tokens = range(0, limit + 5)
    theirs = rewards.get_soft_overlong_punishment(limit, cache)([[1] * t for t in tokens])
    assert [soft_overlong(t, limit, cache) for t in tokens] == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("tokens", "answer", "expected"),
    [
        (0, "6", 2.0),
        (50, "6", 1.5),
        (25, "6", 1 + 0.5 * (1 + math.sqrt(0.5))),
        (0, "5", -10.0),
        (50, "5", -5.0),
        (75, "5", -5 * (1 - math.sqrt(0.5))),
        (100, "6", -10.0),
        (100, "5", -10.0),
    ],
)
def test_the_cosine(tokens, answer, expected):
    score = judge(tokens, answer, max_tokens=100, form="cosine")
    assert score.value == pytest.approx(expected)
    assert score.metrics["over"] == float(tokens == 100)


def test_what_the_cosine_pays_can_be_set():
    pays = {"right": [1.0, 0.5], "exceed": -1.0}
    assert judge(0, max_tokens=10, form="cosine", pays=pays).value == 1.0
    assert judge(0, "5", max_tokens=10, form="cosine", pays=pays).value == -10.0
    assert judge(10, max_tokens=10, form="cosine", pays=pays).value == -1.0


@given(st.integers(1, 10_000), st.data())
def test_longer_is_never_better_when_right_and_never_worse_when_wrong(limit, data):
    short, long = sorted(data.draw(st.tuples(st.integers(0, limit), st.integers(0, limit))))
    assert cosine(short, limit, 2, 1) >= cosine(long, limit, 2, 1)
    assert cosine(short, limit, -10, 0) <= cosine(long, limit, -10, 0)
    cache = data.draw(st.integers(0, limit))
    assert 0 >= soft_overlong(short, limit, cache) >= soft_overlong(long, limit, cache) >= -1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1"),
        ({"max_tokens": 10, "cache_tokens": 11}, "cache_tokens must be in"),
        ({"max_tokens": 10, "form": "sine"}, "form must be one of"),
        ({"max_tokens": 10, "pays": {"right": [1.0]}}, "right must be two numbers"),
        ({"max_tokens": 10, "pays": {"rihgt": [1.0, 0.0]}}, "no 'rihgt'"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        judge(1, **options)

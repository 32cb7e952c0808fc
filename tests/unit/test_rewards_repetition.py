"""Repetition: hand-worked shares, loops, languages without spaces, and hostile text in linear time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.repetition import loop_share, repeated_share, repetition
from tests.unit.reasoning_texts import TEXTS
from tests.unit.reward_groups import completion


def judge(text: str, **options):
    return repetition(completion(text), **options)


def value(text: str, **options) -> float:
    found = judge(text, **options).value
    assert found is not None
    return found


def test_the_share_of_repeated_ngrams():
    assert repeated_share(["a", "b", "c", "a", "b", "c"], 3) == 0.25  # abc bca cab abc: one of four
    assert repeated_share(["a", "b", "c", "d"], 3) == 0.0
    assert repeated_share(["a"] * 5, 2) == 0.75
    assert repeated_share(["a"], 2) == 0.0
    assert value("one two three one two three", n=3, max_penalty=2) == -0.5


def test_the_share_in_loops():
    assert loop_share(["a", *["b"] * 4, "c"], 0) == pytest.approx(4 / 6)
    assert loop_share(["a", "b"] * 4 + ["c"] * 2, 0) == 0.8
    assert loop_share(["a"] * 3, 0) == 0.0
    assert loop_share(["a"] * 11, 12) == 0.0 and loop_share(["a"] * 12, 12) == 1.0


@pytest.mark.parametrize("language", sorted(TEXTS))
def test_reasoning_is_left_alone_and_its_loops_are_not(language):
    text = "\n".join(TEXTS[language])
    assert value(text) == 0.0
    assert value(f"{text}\n" * 3) < -0.6
    line = TEXTS[language][1]
    assert value(f"{text}\n" + f"{line}\n" * 40) < -0.7


@pytest.mark.parametrize(
    "text", ["hahaha " * 50, "a " * 200, "!" * 300, "我" * 300, "等一下" * 80, "wait, " * 90, "x\n" * 60, "ก" * 200]
)
def test_loops(text):
    assert value(text) < -0.8


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 8))
def test_the_rolling_hash_counts_as_tuples_do(units, n):
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert repeated_share(units, n) == pytest.approx(expected)


@given(st.text())
def test_the_range(text):
    assert -1.0 <= value(text) <= 0.0


@pytest.mark.parametrize("piece", ["a", "a ", "a\n", "\n", "中", "a!b?", "é\u0301"])
def test_hostile_text_is_read_in_linear_time(piece):
    start = time.process_time()
    judge(piece * (300_000 // len(piece)), n=1000)
    assert time.process_time() - start < 4


def test_what_is_refused():
    with pytest.raises(ValueError, match="n must be >= 1"):
        judge("a", n=0)
    with pytest.raises(ValueError, match="max_penalty"):
        judge("a", max_penalty=-1)

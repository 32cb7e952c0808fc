"""Answers of many kinds against the verdict that mathematics gives, and cases from files."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import accuracy, bare_answer, check_gold, quick_equal
from rewards.answers import boxed, last_parts
from rewards.bounded import BoundedCalls, Overrun
from rewards.grading_cases import confusion
from rewards.normalise import normalised, rational
from rollout.template import split_reasoning
from rollout.types import Problem
from tests.unit.math_pairs import RIGHT, WRONG

VERDICTS = {
    f"{kind}-{number}": (gold, answer, verdict)
    for verdict, table in ((1.0, RIGHT), (0.0, WRONG))
    for kind, pairs in table.items()
    for number, (gold, answer) in enumerate(pairs)
}


def judge(gold: object, text: str, **options):
    return accuracy(Problem(id="g", prompt="?", answer=gold), split_reasoning(text, forced_think=False), **options)


def test_the_table_is_large_and_covers_every_kind() -> None:
    assert sum(map(len, RIGHT.values())) > 130 and sum(map(len, WRONG.values())) > 90
    assert RIGHT.keys() == WRONG.keys()


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers_are_accepted_and_wrong_ones_are_not(kind: str) -> None:
    for verdict, table in ((1.0, RIGHT), (0.0, WRONG)):
        found = {pair: judge(pair[0], f"so \\boxed{{{pair[1]}}}").value for pair in table[kind]}
        assert {pair: value for pair, value in found.items() if value != verdict} == {}


@pytest.mark.parametrize("kind", ["integer", "fraction", "structure", "symbolic", "unit"])
def test_equality_is_symmetric(kind: str) -> None:
    for verdict, table in ((1.0, RIGHT), (0.0, WRONG)):
        for gold, answer in table[kind]:
            if not answer.strip("?\\ldots"):
                continue
            assert judge(answer, f"\\boxed{{{gold}}}").value == verdict, (gold, answer)


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_fraction_equals_itself_however_it_is_written(top: int, bottom: int) -> None:
    sign, size = "-" if top < 0 else "", abs(top)
    assert quick_equal(f"{top}/{bottom}", f"{sign}\\frac{{{size}}}{{{bottom}}}") is True
    assert quick_equal(f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}") is True
    assert quick_equal(f"{top}/{bottom}", f"{top + 1}/{bottom}") is False


@given(st.integers(0, 10**15))
def test_thousands_separators_change_nothing(number: int) -> None:
    for separator in (",", "\\,", "{,}", ",\\!"):
        assert quick_equal(str(number), f"{number:,}".replace(",", separator)) is True


@given(st.text(max_size=200))
def test_no_text_breaks_the_readers(text: str) -> None:
    for reader in (boxed, last_parts, normalised, rational):
        reader(text)
    bare_answer(split_reasoning(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\\boxed{42}</think>", 0.0),
        ("<think>\\boxed{42}", 0.0),
        ("<think>a</think>\\boxed{41} \\boxed{42}", 0.0),  # two candidates side by side are one answer of two parts
        ("<think>a</think>\\boxed{41}? No: \\boxed{42}", 1.0),
        ("<think>a</think>" + "".join(f"\\boxed{{{n}}} " for n in range(100)), 0.0),
        ("\\boxed{\u202e24}", 0.0),  # shown as 42
        ("\\boxed{}", 0.0),
        ("\\boxed{42", 0.0),
    ],
)
def test_what_pays_nothing_by_trick(text: str, value: float) -> None:
    assert judge("42", text).value == value


def test_parts_in_boxes_of_their_own_are_one_answer() -> None:
    assert judge("3, -1", "\\boxed{3} and \\boxed{-1}").value == 1.0
    assert last_parts("\\boxed{1} or rather \\boxed{2}, \\boxed{3}") == ["2", "3"]


def test_bare_texts_count_only_where_they_are_asked_for() -> None:
    assert judge("42", "so the answer is 42").value == 0.0
    assert judge("42", "so the answer is 42", bare=True).value == 1.0
    assert judge("\\frac12", "we get $x=3$, then $\\frac{1}{2}$.", bare=True).value == 1.0
    assert judge("7", "<think>7", bare=True).value == 0.0


def test_no_text_is_ever_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for code in (f'__import__("os").system("touch {canary}")', f'\\pi+__import__("pathlib").Path("{canary}").touch()'):
        assert judge("\\pi", f"\\boxed{{{code}}}").value == 0.0
    assert not canary.exists()


def test_a_bomb_costs_its_limit_and_the_next_answer_is_right() -> None:
    bomb = "\\boxed{(a+b+c+d+e)^{60}-(a+b+c+d)^{60}}"
    for _ in range(2):
        started = time.monotonic()
        score = judge("(a+b+c)^{7}", bomb, limit_s=0.3)
        assert score.value == 0.0 and score.metrics["gave_up"] + score.metrics["refused"] <= 1
        assert time.monotonic() - started < 5
        assert judge("x^2-1", "\\boxed{(x-1)(x+1)}").value == 1.0


def _spin() -> None:
    while True:
        pass


def _hoard() -> int:
    return len(bytearray(1 << 33))


def test_a_bounded_call_is_killed_and_the_next_one_is_answered() -> None:
    calls = BoundedCalls(memory=1 << 30)
    assert calls.call(divmod, 7, 2, timeout_s=10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        calls.call(divmod, 7, 0, timeout_s=10)
    for bomb, arguments in ((_spin, ()), (_hoard, ()), (os._exit, (3,))):
        with pytest.raises(Overrun):
            calls.call(bomb, *arguments, timeout_s=0.5)
        assert calls.call(divmod, 7, 2, timeout_s=10) == (3, 1)
    calls.close()


@pytest.mark.parametrize("gold", [None, "", "  ", "\\frac{1}{2", "$$", "{}", "?!"])
def test_a_gold_answer_that_nobody_can_read_is_refused(gold: object) -> None:
    with pytest.raises(ValueError, match=r"no gold answer|a gold answer that cannot be parsed"):
        check_gold(Problem(id="g", prompt="", answer=gold))


@pytest.mark.parametrize("gold", [0, 3.5, "x", "\\emptyset", "\\infty", "\\text{Evelyn}", "12:30", "北京", "1011_2"])
def test_a_gold_answer_that_can_be_read_is_not(gold: object) -> None:
    check_gold(Problem(id="g", prompt="", answer=gold))


def test_cases_are_counted_by_file_and_contested_ones_apart(tmp_path: Path) -> None:
    rows = [
        {"gold": "1/2", "prediction": "0.5", "expected": True},
        {"gold": "x+1", "prediction": "1+x", "expected": True, "kind": "answer", "contested": False},
        {"gold": "2", "prediction": "3", "expected": False},
        {"gold": "2", "prediction": "2", "expected": False},
        {"gold": "2", "prediction": "3", "expected": True},
        {"gold": "2", "prediction": "it is 2", "expected": True, "kind": "raw"},
        {"gold": "2", "prediction": "<think>2</think>\\boxed{2}", "expected": True, "kind": "completion"},
        {"gold": "a", "prediction": "b", "expected": True, "contested": True},
    ]
    path = tmp_path / "cases.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    [found] = confusion([path], processes=1).values()
    assert found.pop("seconds") > 0
    assert found == {
        "n": 7, "true_accept": 4, "true_reject": 1, "false_accept": 1, "false_reject": 1, "contested": 1, "timeouts": 0,
        "errors": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 1: no JSON"), ('{"gold": "1"}', "prediction is missing"), ("[]", "gold is missing"),
     ('{"gold": 1, "prediction": 1, "expected": true, "kind": "odd"}', "kind must be one of")],
)  # fmt: skip
def test_a_broken_case_file_names_the_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=words):
        confusion([path])
    with pytest.raises(ValueError, match="there is no case file"):
        confusion([tmp_path / "none.jsonl"])


def cases(name: str) -> Path:
    folder = Path(os.environ.get("R1_DATA", "")) / "cases" / "math_answers"
    if "R1_DATA" not in os.environ or not (folder / name).is_file():
        pytest.skip(f"R1_DATA names no folder with cases/math_answers/{name}")
    return folder / name


def test_published_labels_of_gsm8k_are_met_without_exception() -> None:
    [found] = confusion([cases("real_gsm8k_openai.jsonl.gz")]).values()
    assert found["true_accept"] + found["true_reject"] == found["n"] == 1500


def test_real_answers_to_math_500() -> None:
    [found] = confusion([cases("real_math500_answers.jsonl")]).values()
    assert found["false_accept"] == 0 and found["true_accept"] + found["true_reject"] >= 0.995 * found["n"]


def test_hard_pairs() -> None:
    both = confusion([cases("own_nasty.jsonl"), cases("upstream_math_verify_lighteval.jsonl")]).values()
    n = sum(found["n"] for found in both)
    assert sum(found["true_accept"] + found["true_reject"] for found in both) >= 0.96 * n
    assert sum(found["false_accept"] for found in both) <= 0.01 * n


def test_every_bomb_is_answered() -> None:
    [found] = confusion([cases("own_bombs.jsonl.gz")]).values()
    assert found["n"] == 30 and found["errors"] == 0 and found["false_accept"] == 0

"""Right or wrong: what counts as the answer, and when two answers are equal."""

import time

import pytest

from rewards.accuracy import accuracy, boxed, compared, final_answer, normalised, quick_equal
from rollout.template import split_reasoning
from rollout.types import Problem


def judge(gold: object, text: str):
    return accuracy(Problem(id="g", prompt="?", answer=gold), split_reasoning(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t</think>so \\boxed{42}", "42"),
        ("t</think>\\boxed{41}? No. \\boxed{42}", "42"),
        ("t</think>\\boxed {42}", "42"),
        ("t</think>\\fbox{1} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("t</think>\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("t</think>\\boxed{42} or \\boxed{43", "42"),
        ("t</think><answer>42</answer>", "42"),
        ("t</think><answer>it is \\boxed{42}</answer>", "42"),
        ("t</think>42", None),
        ("\\boxed{42}</think>hm", None),
        ("\\boxed{42}", None),
    ],
)
def test_what_counts_as_the_final_answer(text, expected):
    assert final_answer(split_reasoning(text)) == expected


def test_boxes_are_the_outermost_balanced_ones():
    assert boxed(r"\boxed{\boxed{1}} \boxed{\text{a \} b}}") == [r"\boxed{1}", r"\text{a \} b}"]
    assert boxed("no box") == []


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("42", " $42$. ", True),
        ("1,000", "1000", True),
        ("0.5", "1/2", True),
        ("\\frac{1}{2}", "\\dfrac{2}{4}", True),
        ("-3", "3", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("7", "7.0000001", False),
        ("7", "7.0000000000001", True),
        ("0.1", "0.10000001", False),
        ("3.141593", "3.1415926535", True),
        ("\\left( 3, 4 \\right)", "(3,4)", True),
        ("1/0", "1", None),
        ("x+1", "1+x", None),
        ("(1,000+x)", "(1000)", None),
    ],
)
def test_equality_without_a_parser(gold, answer, expected):
    assert quick_equal(gold, answer) is expected


def test_normalised_takes_off_the_wrapping():
    assert normalised("\\( x \\, y \\)") == "x y"
    assert normalised("$$ 12,345,678. $$") == "12345678"
    assert normalised("1,2,3") == "1,2,3"


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("x+1", "1+x", 1.0),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", 1.0),
        ("2\\pi", "\\pi", 0.0),
        ("[0, 1)", "[0, 1]", 0.0),
        (42, "42", 1.0),
        (0.5, "\\frac12", 1.0),
        ("42", "not a number {", 0.0),
    ],
)
def test_the_rest_is_left_to_math_verify(gold, answer, expected):
    assert judge(gold, f"t</think>\\boxed{{{answer}}}").value == expected


def test_the_metrics_tell_what_happened():
    assert judge("1", "t").metrics == {
        "answered": 0.0,
        "boxes": 0.0,
        "refused": 0.0,
        "gave_up": 0.0,
        "unparsed": 0.0,
        "raised": 0.0,
    }
    assert judge("1", "t</think>\\boxed{2}\\boxed{1}").metrics["boxes"] == 2.0
    assert judge("1", "\\boxed{1}\\boxed{1}</think>\\boxed{2}").metrics["boxes"] == 1.0


@pytest.mark.parametrize(
    "bomb", ["9^{9^{9^9}}", "9^99999999", "(" * 50 + "x" + ")" * 50, "7" * 300, "x+" * 1500 + "1", "10000!!"]
)
def test_bombs_are_refused_before_anybody_parses_them(bomb):
    start = time.monotonic()
    score = judge("3", f"t</think>\\boxed{{{bomb}}}")
    assert score.value == 0.0 and score.metrics["refused"] == 1.0
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("answer", "unparsed"),
    [("x+2", 0.0), ("\\frac{1}{", 1.0), ("x @ @ y", 1.0), ("(1, 2]", 0.0), ("hyperbola", 0.0), ("y = 3x", 0.0)],
)
def test_what_cannot_be_read_is_counted_apart_from_what_is_wrong(answer, unparsed):
    score = judge("x+1", f"t</think><answer>{answer}</answer>")
    assert score.value == 0.0 and score.metrics["unparsed"] == unparsed


def test_whatever_a_parser_raises_the_model_gets_its_zero(monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("a bug of a parser")

    monkeypatch.setattr("rewards.accuracy.equal", broken)
    assert compared("x+1", "1+x") == (False, False, True)


def test_a_comparison_that_cannot_be_started_is_an_error_and_no_zero(monkeypatch):
    def no_process(*arguments, **options):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("rewards.accuracy._calls.call", no_process)
    with pytest.raises(BlockingIOError):
        judge("x+1", "t</think>\\boxed{1+x}")


def test_a_gold_answer_that_is_missing_or_unreadable_is_an_error():
    with pytest.raises(ValueError, match="'g' has no gold answer"):
        judge(None, "t</think>\\boxed{1}")
    with pytest.raises(ValueError, match="'g' has no gold answer"):
        judge(" ", "t</think>\\boxed{1}")

"""Multiple choice: which letter a completion names, and when it names none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import Score
from rewards.base import check_problems
from rewards.choice import choice, claim, final_letter, letter_of
from rollout.template import split_reasoning
from rollout.types import Problem

DRESSES = (
    "\\boxed{{{}}}", "\\boxed{{({})}}", "\\boxed{{\\text{{{}}}}}", "$\\boxed{{\\textbf{{({})}}}}$",
    "\\boxed{{{}. a metal}}", "\\boxed{{\\text{{{}) 42 J}}}}", "\\boxed{{\\text{{Option {}}}}}",
    "<answer>{}</answer>", "<answer> ({}) vitamin C </answer>", "The answer is ({}).", "the correct answer is **{}**.",
    "**Answer: {}**", "ANSWER: {}", "Answer: {}) an acid", "**Final Answer**\n\n{}", "The right option is **({}) x**",
    "The answer is therefore {}, because the others are too heavy", "Thus option {} is correct.", "7 J.\n({})", "{}.",
)  # fmt: skip


def reasoned(text: str, *, thinking: str = "Is it A? Or B?"):
    return split_reasoning(f"{thinking}</think>\n{text}")


def problem(answer: object = "C", **columns) -> Problem:
    return Problem(id="q1", prompt="Which?", answer=answer, metadata=columns)


@given(st.sampled_from(DRESSES), st.sampled_from("ABCD"), st.sampled_from("ABCD"))
def test_a_letter_counts_in_every_dress_and_only_the_right_one_is_paid(dress, gold, said):
    text = reasoned(dress.format(said))
    assert final_letter(text) == said
    expected = Score(value=float(said == gold), metrics={"answered": 1.0, "unparsed": 0.0})
    assert choice(problem(gold), text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{A, C}", "\\boxed{A} and \\boxed{C}", "\\boxed{A metal}", "\\boxed{42}", "\\boxed{}C",
        "<answer></answer>",
        "The answer is A or C", "The answer is (C) and (D)", "The answer is not A but C", "Answer: C. D",
        "So the answer is a bit unclear", "I think that C is heavy", "A metal", "C is the first of them, I think.",
        "\\boxed{\u202eC}", "the answer is: Carbon", "\\boxed{CC}", "",
    ],
)  # fmt: skip
def test_what_is_not_exactly_one_letter_earns_nothing(text):
    assert final_letter(reasoned(text)) is None
    assert choice(problem(), reasoned(text)).value == 0.0


def test_the_last_claim_counts_and_a_box_goes_before_a_sentence():
    assert final_letter(reasoned("The answer is (A). Wait. The answer is (B).")) == "B"
    assert final_letter(reasoned("\\boxed{A}. On second thought it is \\boxed{D}, since 3 > 2.")) == "D"
    assert final_letter(reasoned("\\boxed{C}\nThe answer is (A).")) == "C"
    assert final_letter(reasoned("\\boxed{C} <answer>A</answer>")) == "C"
    assert final_letter(reasoned("Answer: A\nAnswer: B")) == "B"


def test_letters_of_the_option_itself_do_not_count():
    assert letter_of("C) (S)-2-butanol") == "C"
    assert letter_of("(D) A metal, B vitamins and C") == "D"
    assert letter_of("c") == letter_of("(c)") == letter_of("Ｃ") == "C"
    assert letter_of("c or d") is None and letter_of("an acid") is None


def test_nothing_inside_the_thinking_counts():
    for text in ("\\boxed{C}</think>I cannot tell.", "\\boxed{C}", "The answer is C</think>"):
        found = choice(problem(), split_reasoning(text))
        assert (found.value, found.metrics["answered"]) == (0.0, 0.0)


def test_an_answer_that_is_no_option_is_counted_apart():
    four = {"choices": ["w", "x", "y", "z"]}
    assert choice(problem(**four), reasoned("\\boxed{E}")).metrics == {"answered": 1.0, "unparsed": 1.0}
    assert choice(problem("E"), reasoned("\\boxed{E}")).value == 1.0
    assert choice(problem(), reasoned("\\boxed{42 J}")).metrics == {"answered": 1.0, "unparsed": 1.0}
    assert claim(reasoned("I do not know.")) is None


@pytest.mark.parametrize("gold", [None, "", "c", "AB", 3, "1"])
def test_a_gold_answer_must_be_a_letter(gold):
    with pytest.raises(
        ValueError, match="problem 'q1': the gold answer of a multiple choice must be one letter A to Z"
    ):
        check_problems(choice, [problem(gold)])
    with pytest.raises(ValueError, match="problem 'q1'"):
        choice(problem(gold), reasoned("\\boxed{C}"))


def test_a_gold_answer_must_be_an_option():
    with pytest.raises(ValueError, match="the gold answer is D, and the options are A to C"):
        check_problems(choice, [problem("D", choices=["x", "y", "z"])])


def test_a_long_text_is_read_from_its_end():
    assert final_letter(reasoned("\n* " * 50_000 + "\nThe answer is B.")) == "B"

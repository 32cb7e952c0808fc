"""The demo task: its wording, its demonstrations, and the scorer that judges them."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.recipes.chain_sum import backwards, compact, no_thinking, parse, running_sums
from rewards.reasoning_gym import reasoning_gym
from rollout.prompts import DataConfig, load_problems
from rollout.template import extract_answer, split_reasoning
from rollout.types import Problem


def problem(expression: str) -> Problem:
    return Problem(id="x", prompt=expression)


def generated(size: int = 400, rewrite=compact, **params) -> list[Problem]:
    path = f"pipelines.recipes.chain_sum:{rewrite.__name__}"
    return load_problems(DataConfig(source="reasoning_gym:chain_sum", params=params, size=size, seed=3, rewrite=path))


def score(problem: Problem, text: str) -> float | None:
    return reasoning_gym(problem, split_reasoning(text)).value


def test_compact_keeps_everything_but_the_wording():
    first = generated(1, min_terms=3, max_terms=3, min_digits=1, max_digits=1)[0]
    entry = first.metadata["entry"]
    assert first.prompt == entry["metadata"]["expression"].replace(" ", "")
    assert entry["question"].startswith("State the final answer")
    assert first.answer == entry["answer"]
    assert re.fullmatch(r"\d[+-]\d[+-]\d", first.prompt)


def test_backwards_is_the_same_sum_in_reverse_order():
    forth, back = generated(50, max_terms=6), generated(50, rewrite=backwards, max_terms=6)
    for one, other in zip(forth, back, strict=True):
        assert other.prompt == "".join(reversed(re.findall(r"[+-]\d+", f"+{one.prompt}")))
        assert running_sums(one) == running_sums(other) and no_thinking(one) == no_thinking(other)
        assert other.answer == one.answer


def test_compact_refuses_another_task():
    with pytest.raises(ValueError, match="not one of reasoning_gym:chain_sum"):
        compact(problem("3 + 5"))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("3+5-2", "3+5=8;8-2=6</think><answer>6</answer>"),
        ("3-5+1", "3-5=-2;-2+1=-1</think><answer>-1</answer>"),
        ("3-0+0", "3-0=3;3+0=3</think><answer>3</answer>"),
        ("12-7", "12-7=5</think><answer>5</answer>"),
        ("4", "</think><answer>4</answer>"),
        ("-2+5+3", "3+5=8;8-2=6</think><answer>6</answer>"),  # with its first sign: backwards
        ("+4", "</think><answer>4</answer>"),
        ("-4+-5--6", "-4-5=-9;-9+6=-3</think><answer>-3</answer>"),
    ],
)
def test_running_sums_by_hand(expression, text):
    assert running_sums(problem(expression)) == text


def test_no_thinking_by_hand():
    assert no_thinking(problem("3-5+1")) == "</think><answer>-1</answer>"


@pytest.mark.parametrize("expression", ["", "3+", "3 + 5", "3*5", "3+x", "3++5"])
def test_what_is_no_chain_of_sums_is_refused(expression):
    with pytest.raises(ValueError, match="not a sum of whole numbers"):
        running_sums(problem(expression))


@given(st.lists(st.integers(-99, 99), min_size=1, max_size=8), st.data())
def test_every_step_is_right_arithmetic(numbers, data):
    operators = [data.draw(st.sampled_from("+-")) for _ in numbers[1:]]
    expression = str(numbers[0]) + "".join(f"{op}{n}" for op, n in zip(operators, numbers[1:], strict=True))
    total = eval(" ".join([str(numbers[0]), *(f"{op} ({n})" for op, n in zip(operators, numbers[1:], strict=True))]))
    thinking = split_reasoning(running_sums(problem(expression))).thinking or ""
    steps = [step for step in thinking.split(";") if step]
    assert len(steps) == len(operators)
    for step in steps:
        left, right = step.split("=")
        assert eval(left) == int(right)
    assert extract_answer(running_sums(problem(expression))) == str(total)
    assert extract_answer(no_thinking(problem(expression))) == str(total)


@pytest.mark.parametrize(
    "params",
    [
        {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
        {"min_terms": 6, "max_terms": 12, "min_digits": 1, "max_digits": 1},
        {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 4, "allow_negation": True},
    ],
)
def test_the_scorer_gives_every_demonstration_full_marks(params):
    for each in generated(**params):
        assert score(each, running_sums(each)) == 1.0
        assert score(each, no_thinking(each)) == 1.0


def test_corruption_stays_consistent_and_costs_the_answer():
    wrong = 0
    for each in generated(min_terms=4, max_terms=4, min_digits=1, max_digits=1):
        text = running_sums(each, Random(each.id), corrupt=0.15)
        steps = (split_reasoning(text).thinking or "").split(";")
        carried = [step.split("=")[1] for step in steps]
        assert all(after.startswith(before) for before, after in zip(carried, steps[1:], strict=False))
        assert extract_answer(text) == carried[-1]
        slips = sum(eval(step.split("=")[0]) != int(step.split("=")[1]) for step in steps)
        wrong += slips > 0
        if slips == 1:
            assert score(each, text) != 1.0
    # Of 400 demonstrations of three steps 1 - .85^3 = .386 have a slip: 154, standard deviation 10.
    assert 114 < wrong < 194


def test_corruption_is_drawn_again_from_its_seed():
    each = problem("1+2+3+4+5")
    drawn = {running_sums(each, Random(seed), corrupt=0.5) for seed in range(20)}
    assert len(drawn) > 10
    assert running_sums(each, Random(5), corrupt=0.5) == running_sums(each, Random(5), corrupt=0.5)
    assert no_thinking(each, Random(1), corrupt=1.0) != no_thinking(each)


@pytest.mark.parametrize("demonstrate", [running_sums, no_thinking])
def test_corruption_needs_a_seeded_source_and_a_chance(demonstrate):
    with pytest.raises(ValueError, match="needs an rng"):
        demonstrate(problem("1+2"), corrupt=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        demonstrate(problem("1+2"), Random(0), corrupt=1.5)


def test_parse_folds_signs():
    assert parse("3+5--2") == (3, [("+", 5), ("+", 2)])
    assert parse("-3-0") == (-3, [("-", 0)])

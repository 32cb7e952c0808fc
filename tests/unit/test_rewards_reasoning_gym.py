"""reasoning-gym judges its own problems."""

import json
from dataclasses import replace

import pytest

from rewards import Rubric, RubricConfig, Score
from rewards.base import RewardConfig, check_problems
from rewards.reasoning_gym import reasoning_gym
from rollout.prompts import DataConfig, load_problems
from rollout.template import split_reasoning
from rollout.types import Problem
from tests.unit.reward_groups import group


@pytest.fixture(scope="module")
def problem() -> Problem:
    config = DataConfig(source="reasoning_gym:chain_sum", size=1, params={"min_digits": 2, "max_digits": 2})
    return replace(load_problems(config)[0], answer=None)  # the entry alone is what counts


def judge(problem: Problem, text: str, **options) -> Score:
    return reasoning_gym(problem, split_reasoning(text), **options)


def gold(problem: Problem) -> str:
    return problem.metadata["entry"]["answer"]


def test_the_right_answer_in_several_dresses(problem):
    for text in ("t</think><answer>{}</answer>", "t</think>{}", "t</think><answer> {}.0 </answer>"):
        assert judge(problem, text.format(gold(problem))) == Score(
            value=1.0, metrics={"answered": 1.0, "unreadable": 0.0}
        )


def test_partial_credit_is_the_scorers_and_strict_takes_it_away(problem):
    text = f"t</think><answer>It is {gold(problem)}</answer>"
    expected = len(gold(problem)) / len(f"It is {gold(problem)}")
    assert judge(problem, text).value == pytest.approx(expected)
    assert judge(problem, text, strict=True).value == 0.0
    assert judge(problem, f"t</think><answer>{gold(problem)}</answer>", strict=True).value == 1.0


def test_an_answer_inside_the_thinking_or_none_at_all_earns_nothing(problem):
    nothing = Score(value=0.0, metrics={"answered": 0.0, "unreadable": 0.0})
    assert judge(problem, f"<answer>{gold(problem)}</answer>") == nothing
    assert judge(problem, f"<answer>{gold(problem)}</answer></think>") == nothing


def test_a_problem_from_elsewhere_is_an_error():
    with pytest.raises(ValueError, match=r"'x' .*carries no entry of reasoning-gym"):
        judge(Problem(id="x", prompt="1+1", answer="2", source="jsonl:a"), "t</think>2")


def test_a_text_that_the_scorer_chokes_on_is_a_wrong_answer():
    (each,) = load_problems(DataConfig(source="reasoning_gym:prime_factorization", size=1))
    score = judge(each, "t</think><answer>two times three</answer>")
    assert score == Score(value=0.0, metrics={"answered": 1.0, "unreadable": 1.0})


def test_a_scorer_that_chokes_on_its_own_reference_is_an_error(problem):
    metadata = dict(problem.metadata)
    metadata["entry"] = {"question": "?", "metadata": {}}
    with pytest.raises(KeyError, match="answer"):
        judge(replace(problem, metadata=metadata), "t</think><answer>3</answer>")


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "word_sorting", "number_sequence", "spell_backward", "ab"])
def test_reference_answers_pass_also_after_a_trip_through_json(name):
    """A journal of rollouts is JSON; what is read back must be judged as before."""
    for each in load_problems(DataConfig(source=f"reasoning_gym:{name}", size=3)):
        again = replace(each, metadata=json.loads(json.dumps(dict(each.metadata))))
        assert judge(again, f"t</think><answer>{each.answer}</answer>").value == 1.0


def test_through_the_rubric(problem):
    config = RubricConfig(functions=(RewardConfig(path="reasoning_gym", params={"strict": True}),), processes=1)
    right = group(2, problem=problem, text=f"t</think><answer>{gold(problem)}</answer>")
    wrong = group(2, problem=problem, text="t</think><answer>no</answer>")
    with Rubric(config) as rubric:
        assert [[r.reward for r in each.rollouts] for each in rubric.score([right, wrong])] == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("answer", ["nan", "NaN", "nan + nani", "-nanj"])
def test_not_a_number_earns_nothing(answer):
    (each,) = load_problems(DataConfig(source="reasoning_gym:complex_arithmetic", size=1))
    score = judge(each, f"t</think><answer>{answer}</answer>")
    assert score == Score(value=0.0, metrics={"answered": 1.0, "unreadable": 1.0})


@pytest.mark.parametrize("name", ["countdown", "arc_agi", "advanced_geometry"])
def test_no_answer_earns_nothing_where_the_scorer_pays_for_it(name):
    (each,) = load_problems(DataConfig(source=f"reasoning_gym:{name}", size=1))
    for text in ("t</think>", "t</think><answer> </answer>"):
        assert judge(each, text) == Score(value=0.0, metrics={"answered": 0.0, "unreadable": 0.0})


def test_a_reply_of_another_shape_is_unreadable():
    (each,) = load_problems(DataConfig(source="reasoning_gym:boxnet", size=1))
    assert judge(each, "t</think><answer>[[[1]]]</answer>").metrics["unreadable"] == 1.0


def test_a_scorer_that_pays_in_full_for_nonsense_is_refused_before_the_run(problem):
    halting = load_problems(DataConfig(source="reasoning_gym:game_of_life_halting", size=8))
    with pytest.raises(ValueError, match="scorer of game_of_life_halting gives full credit to 'no answer at all'"):
        check_problems(reasoning_gym, halting)
    check_problems(reasoning_gym, [problem])

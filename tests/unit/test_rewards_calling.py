"""Calling conventions: argument injection, TRL and verl styles, and what counts as a score."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rewards import Score
from rewards.base import RewardConfig
from rewards.calling import CallTimeout, NotAScore, as_score, bind
from rollout.types import Problem
from tests.unit.reward_groups import group, reward

ROW = Problem(id="r", prompt="1+0", answer="1", metadata={"solution": "1", "level": 5})


def values(config: RewardConfig, of=None, forced_think: bool = True) -> list[float | None]:
    bound, of = bind(config), of or group(2)
    calls = [None] if bound.whole_group else range(len(of.rollouts))
    found = [each for index in calls for each in bound.call(of, index, forced_think)]
    assert all(isinstance(each, Score) for each in found), found
    return [each.value for each in found if isinstance(each, Score)]


def test_a_function_gets_what_it_names():
    assert values(reward("length")) == [1.0, 2.0]
    assert values(reward("sees_everything")) == [1.0, 1.0]
    assert values(reward("sees_everything"), forced_think=False) == [0.0, 0.0]


def test_params_are_arguments():
    assert values(reward("with_metrics", params={"scale": 0.5}), group(3)) == [0.0, 0.5, 1.0]
    assert bind(reward("with_metrics")).call(group(2), 1, True) == [Score(value=1.0, metrics={"index": 1.0})]


def test_none_does_not_apply():
    assert values(reward("only_even")) == [1.0, None]


def test_callable_objects_and_methods():
    assert values(reward("judge")) == [3.0, 3.0]
    assert values(reward("judge.later")) == [4.0, 4.0]


def test_trl_functions_get_lists_and_columns():
    assert values(reward("trl_lengths", style="trl")) == [10.0, 10.0]
    assert values(reward("trl_columns", style="trl"), group(2, problem=ROW)) == [5.0, 5.0]
    assert values(reward("trl_columns", style="trl"), group(2, problem=ROW, text="x")) == [None, None]
    assert values(reward("trl_chat", style="trl_chat")) == [10.0, 10.0]
    assert values(reward("trl_async", style="trl")) == [2.0, 2.0]


def test_a_trl_function_must_answer_for_every_completion():
    with pytest.raises(TypeError, match="a list of 3 numbers, got 1 values"):
        bind(reward("trl_short", style="trl")).call(group(3), None, True)


def test_any_iterable_of_a_batch_function_will_do_and_its_metrics_are_kept():
    assert values(reward("trl_array", style="trl")) == [0.0, 1.0]
    found = bind(reward("trl_logs", style="trl")).call(group(2), None, True)
    assert found == [Score(value=1.0, metrics={"seen": 1.5}), Score(value=None, metrics={"seen": 1.5})]


def test_a_trl_function_that_looks_for_solution_gets_the_gold_answer():
    assert values(reward("trl_solution", style="trl")) == [1.0, 1.0]
    problem = Problem(id="s", prompt="1+0", answer="1", metadata={"solution": "long text 2"})
    assert values(reward("trl_solution", style="trl"), group(2, problem=problem)) == [0.0, 0.0]


@pytest.mark.parametrize("what", ["text", "number", "dict", "nothing"])
def test_a_batch_function_that_returns_no_list_is_told_so(what):
    with pytest.raises(NotAScore, match="a trl reward must return a list of 2 numbers, got"):
        bind(reward("trl_odd", style="trl", params={"what": what})).call(group(2), None, True)


def test_a_function_that_hands_an_awaitable_back_is_waited_for():
    assert values(reward("hands_back_a_coroutine")) == [2.0, 2.0]


def test_factories_and_classes_make_functions():
    assert values(reward("make_scaled", factory={"factor": 3.0})) == [3.0, 6.0]
    assert values(reward("Judge", factory={})) == [3.0, 3.0]
    assert values(reward("make_scaled", factory={"factor": 3.0}, params={"plus": 1.0})) == [4.0, 7.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (reward("make_scaled", factory={"fctor": 3.0}), "cannot be made from factory {'fctor': 3.0}.*factor"),
        (reward("make_nothing", factory={}), "the factory made a int, not a function"),
        (reward("Judge"), "is a type, not a function: give its arguments under factory, {} for none"),
        (reward("make_scaled", style="trl"), "takes none of prompts, completions, completion_ids; if it is a factory"),
    ],
)
def test_what_no_factory_makes_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        bind(config)


def test_a_column_that_is_not_there_is_the_functions_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'level'"):
        bind(reward("trl_columns", style="trl")).call(group(2), None, True)


def test_verl_functions():
    problem = Problem(id="v", prompt="1+0", answer="1", metadata={"data_source": "math", "extra_info": {"index": 4}})
    assert values(reward("compute_score", style="verl"), group(2, problem=problem)) == [1.0, 1.0]
    found = bind(reward("compute_score_dict", style="verl")).call(group(1), 0, True)
    assert found == [Score(value=0.5, metrics={"acc": 1.0})]


def test_verl_functions_of_lists():
    problem = Problem(id="v", prompt="1+0", metadata={"data_source": "math", "reward_model": {"ground_truth": "1"}})
    found = bind(reward("compute_scores", style="verl_batch", params={"bonus": 0.5})).call(
        group(2, problem=problem), None, True
    )
    assert found == [Score(value=1.5, metrics={"acc": 1.0})] * 2


def test_async_calls_of_a_group_overlap_and_fail_one_by_one():
    assert values(reward("waits"), group(3)) == [0.0, 1.0, 2.0]
    fine, failed, late, own = bind(reward("some_fail", timeout_s=0.2)).call(group(4), None, True)
    assert fine == Score(value=1.0)
    assert isinstance(failed, OSError)
    assert isinstance(late, CallTimeout) and str(late) == "no result after 0.2 s"
    assert type(own) is TimeoutError  # the function's own is an error like any other


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (reward("asks_too_much"), "asks for 'trainer_state': name one of completion, problem, rollout, group"),
        (reward("length", params={"scale": 2}), "takes no parameter 'scale'; it has completion"),
        (reward("asks_too_much", style="verl"), "asks for 'completion': name one of data_source"),
        (reward("trl_columns"), "asks for 'prompts'.*or is it style: trl?"),
        (reward("compute_score"), "asks for 'data_source'.*or is it style: verl?"),
        (reward("compute_scores", style="verl"), "asks for 'data_sources'.*or is it style: verl_batch?"),
    ],
)
def test_arguments_that_nobody_gives_are_refused_before_the_first_call(config, message):
    with pytest.raises(ValueError, match=message):
        bind(config)


def test_a_missing_argument_may_come_from_params():
    assert values(reward("asks_too_much", params={"trainer_state": None})) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(0.5), 0.5),
        (np.bool_(True), 1.0),
        (None, None),
        (Score(value=None), None),
        ({"score": 0.5}, 0.5),
    ],
)
def test_what_counts_as_a_score(value, expected):
    score = as_score(value)
    assert score.value == expected and (score.value is None or type(score.value) is float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "score must be finite, got nan"),
        (float("-inf"), "score must be finite, got -inf"),
        (np.float32("nan"), "score must be finite, got nan"),
        ("1.0", "score must be a number, got str"),
        (b"1", "score must be a number, got bytes"),
        ([1.0], "score must be a number, got list"),
        (np.array([1.0]), "score must be a number, got ndarray"),
        (Decimal("1"), "score must be a number, got Decimal"),
        (1j, "score must be a number, got complex"),
        ({"reward": 1.0}, "must hold 'score', got the keys reward"),
        (Score(value=float("nan")), "score must be finite"),
        (Score(value=1.0, metrics={"m": float("inf")}), "m must be finite, got inf"),
        ({"score": 1.0, "m": float("nan")}, "m must be finite, got nan"),
    ],
)
def test_what_does_not_is_an_error_and_never_zero(value, message):
    with pytest.raises(NotAScore, match=message):
        as_score(value)

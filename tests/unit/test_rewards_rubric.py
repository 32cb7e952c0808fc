"""The rubric: weights, what failed, order and overlap."""

import time

import pytest

from rewards import RewardConfig, RewardFailure, Rubric, RubricConfig, passed, reward_metrics
from rewards.rubric import REWARD_METRICS
from rollout.types import Rollout, RolloutGroup
from tests.unit.reward_groups import completion, group, reward


def score(*functions: RewardConfig, groups=None, events: list | None = None, **options) -> list[RolloutGroup]:
    config = RubricConfig(functions=functions, **{"processes": 1, **options})
    with Rubric(config, on_event=None if events is None else events.append) as rubric:
        return list(rubric.score([group(4)] if groups is None else groups))


def rewards_of(groups: list[RolloutGroup]) -> list[float | None]:
    return [rollout.reward for each in groups for rollout in each.rollouts]


def test_the_reward_is_the_weighted_sum_of_what_applies():
    (scored,) = score(reward("length", weight=0.5), reward("only_even", weight=10.0), reward("judge", weight=0.0))
    assert [rollout.scores for rollout in scored.rollouts] == [
        {"length": 1.0, "only_even": 1.0, "judge": 3.0},
        {"length": 2.0, "judge": 3.0},
        {"length": 3.0, "only_even": 1.0, "judge": 3.0},
        {"length": 4.0, "judge": 3.0},
    ]
    assert rewards_of([scored]) == [10.5, 1.0, 11.5, 2.0]
    assert all(not rollout.errors for rollout in scored.rollouts)


def test_where_nothing_applies_there_is_no_reward():
    (scored,) = score(reward("never"))
    assert rewards_of([scored]) == [None] * 4
    assert all(not rollout.scores and not rollout.errors for rollout in scored.rollouts)


def test_everything_else_of_a_group_is_kept():
    original = group(2)
    (scored,) = score(reward("length"), groups=[original])
    assert scored.problem == original.problem
    assert [r.completion for r in scored.rollouts] == [r.completion for r in original.rollouts]


@pytest.mark.parametrize("what", ["nan", "inf", "text", "list"])
def test_a_failure_is_never_a_score(what):
    (scored,) = score(reward("returns", params={"what": what}), reward("length"), max_error_rate=1.0)
    for rollout in scored.rollouts:
        assert rollout.reward is None
        assert "returns" not in rollout.scores and "length" in rollout.scores
        assert rollout.errors["returns"].startswith("invalid: score must be ")


def test_one_failed_sibling_leaves_the_others_their_rewards():
    (scored,) = score(reward("raises_on_odd"), max_error_rate=0.5)
    assert rewards_of([scored]) == [1.0, None, 1.0, None]


def test_failures_are_told_with_their_traceback():
    events: list[dict] = []
    score(reward("raises_on_odd"), reward("trl_raises", style="trl"), max_error_rate=1.0, events=events)
    single = [event for event in events if event["function"] == "raises_on_odd"]
    assert [event["sample_index"] for event in single] == [1, 3]
    assert single[0]["event"] == "reward_error" and single[0]["problem"] == "p0"
    assert "KeyError" in single[0]["traceback"] and "reward_functions.py" in single[0]["traceback"]
    (whole,) = [event for event in events if event["function"] == "trl_raises"]
    assert whole["sample_index"] is None and "the whole list" in whole["error"]


def test_timeouts_are_told_apart_from_errors():
    events: list[dict] = []
    functions = (reward("sleeps_on_first", timeout_s=0.3), reward("some_fail", timeout_s=0.2))
    groups = score(*functions, max_error_rate=1.0, events=events)
    assert [(event["event"], event["function"], event["sample_index"]) for event in events] == [
        ("reward_timeout", "sleeps_on_first", 0),
        ("reward_error", "some_fail", 1),
        ("reward_timeout", "some_fail", 2),
        ("reward_error", "some_fail", 3),
    ]
    metrics = reward_metrics(groups, RubricConfig(functions=functions))
    assert metrics["reward/sleeps_on_first/timeouts"] == 1 and metrics["reward/sleeps_on_first/errors"] == 0
    assert metrics["reward/some_fail/timeouts"] == 1 and metrics["reward/some_fail/errors"] == 2


def test_too_many_failures_stop_the_run_with_the_traceback():
    config = RubricConfig(functions=(reward("raises_on_odd"),), max_error_rate=0.4, processes=1)
    with Rubric(config) as rubric:
        scored = rubric.score([group(4), group(4, number=1)])
        assert len([next(scored), next(scored)]) == 2  # what could be scored is not lost
        with pytest.raises(RewardFailure, match=r"'raises_on_odd' failed on 4 of 8 completions \(50%") as caught:
            next(scored)
        assert "KeyError" in caught.value.traceback and caught.value.traceback in caught.value.__notes__
        assert "\n" not in str(caught.value)
        assert list(rubric.score([group(1)]))  # one good call later: each call of score has its own account


def test_the_limit_itself_is_allowed():
    assert score(reward("raises_on_odd"), max_error_rate=0.5)
    with pytest.raises(RewardFailure):
        score(reward("raises_on_odd"), max_error_rate=0.0)


def test_a_function_that_always_fails_does_not_wait_for_the_whole_step():
    pulled = []

    def upstream():
        for number in range(100):
            pulled.append(number)
            yield group(16, number=number)
            time.sleep(0.02)

    with pytest.raises(RewardFailure, match="'always_raises' failed on 32 of 32"):
        score(reward("always_raises"), groups=upstream())
    assert len(pulled) < 60


def test_order_is_kept_whatever_takes_longer():
    config = RubricConfig(functions=(reward("sleeps_on_first", params={"seconds": 0.1}),), processes=2)
    groups = [group(1 + number % 3, number=number) for number in range(8)]
    with Rubric(config) as rubric:
        assert [each.problem.id for each in rubric.score(groups)] == [each.problem.id for each in groups]


def test_scoring_overlaps_with_what_generates():
    """Eight groups of 0.2 s each, generated in 0.2 s each: 3.2 s one after the other, 1.8 s overlapped."""

    def upstream():
        for number in range(8):
            time.sleep(0.2)
            yield group(1, number=number)

    with Rubric(RubricConfig(functions=(reward("sleeps_on_first", params={"seconds": 0.2}),), processes=1)) as rubric:
        rubric.ready()
        start = time.monotonic()
        seen = [time.monotonic() - start for _ in rubric.score(upstream())]
    assert seen[-1] < 3.1
    assert seen[0] < 1.0  # handed on long before the last one was generated


def test_an_error_upstream_passes_through():
    def upstream():
        yield group(1)
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError, match="the engine is gone"):
        score(reward("length"), groups=upstream())


def test_no_groups_are_no_trouble():
    assert score(reward("length"), groups=[]) == []
    assert score(reward("length"), groups=[group(0)])[0].rollouts == ()


def test_cheap_functions_cost_microseconds():
    """Processor time of this process (25 to 40 us a call were measured): wall-clock time depends on the neighbours."""
    with Rubric(RubricConfig(functions=(reward("length"), reward("judge")), processes=2)) as rubric:
        groups = [group(8, number=number) for number in range(50)]
        best = float("inf")
        for _ in range(4):
            start = time.process_time()
            list(rubric.score(groups))
            best = min(best, time.process_time() - start)
    assert best / 800 < 120e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": ()}, "at least one"),
        ({"functions": (reward("length"), reward("length"))}, "two reward functions are called 'length'"),
        ({"judge": "accuracy"}, "judge must be one of length, got 'accuracy'"),
        ({"max_error_rate": 1.5}, "max_error_rate"),
        ({"processes": 0}, "processes"),
        ({"memory_gib": 0}, "memory_gib must be > 0, got 0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RubricConfig(**{"functions": (reward("length"),), **options})


def test_the_first_function_judges_unless_another_is_named():
    functions = (reward("length"), reward("judge"))
    assert RubricConfig(functions=functions).judge == "length"
    assert RubricConfig(functions=functions, judge="judge").judge == "judge"


def rollout(reward_: float | None, errors: dict | None = None, metrics: dict | None = None, **scores) -> Rollout:
    return Rollout(completion=completion(), scores=scores, errors=errors or {}, metrics=metrics or {}, reward=reward_)


def test_passing_needs_full_marks_from_the_judge():
    assert passed(rollout(1.0, length=1.0), "length") and passed(rollout(1.0, length=1.5), "length")
    assert not passed(rollout(1.0, length=0.99), "length")
    assert not passed(rollout(None), "length")


def test_metrics_by_hand():
    config = RubricConfig(functions=(reward("length"), reward("only_even")))
    rollouts = (
        rollout(1.0, length=1.0, only_even=1.0, metrics={"length/tokens": 4.0}),
        rollout(3.0, length=0.5, metrics={"length/tokens": 8.0}),
        rollout(None, errors={"length": "timeout: 1 s"}, only_even=0.0),
        rollout(None, errors={"length": "error: x"}),
        rollout(None, errors={"length": "invalid: x"}),
        rollout(None, errors={"length": "crash: x"}),
        rollout(None, errors={"length": "memory: x"}),
        rollout(None),
    )
    found = reward_metrics([RolloutGroup(problem=group(0).problem, rollouts=rollouts)], config)
    assert found == {
        "reward/mean": 2.0,
        "reward/std": 1.0,
        "reward/pass_rate": 0.125,
        "reward/unscored": 6.0,
        "reward/length/mean": 0.75,
        "reward/length/applied": 0.25,
        "reward/length/errors": 4.0,
        "reward/length/invalid": 1.0,
        "reward/length/crashes": 1.0,
        "reward/length/out_of_memory": 1.0,
        "reward/length/timeouts": 1.0,
        "reward/length/tokens": 6.0,
        "reward/only_even/mean": 0.5,
        "reward/only_even/applied": 0.25,
        "reward/only_even/errors": 0.0,
        "reward/only_even/invalid": 0.0,
        "reward/only_even/crashes": 0.0,
        "reward/only_even/out_of_memory": 0.0,
        "reward/only_even/timeouts": 0.0,
    }
    declared = {
        name.replace("{function}", f).replace("{metric}", "tokens")
        for name in REWARD_METRICS
        for f in ("length", "only_even")
    }
    assert set(found) <= declared
    assert reward_metrics([], config) == {}

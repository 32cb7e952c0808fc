import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.advantages import group_advantages, sample_std
from policy.config import AdvantageConfig
from policy.glossary import ADVANTAGE_METRICS
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup


def group(*rewards: float | None, name: str = "p") -> RolloutGroup:
    completion = Completion(
        prompt_token_ids=(1,),
        token_ids=(2,),
        text="x",
        rollout_logprobs=(-0.5,),
        finish_reason=FinishReason.STOP,
        policy_version=0,
    )
    rollouts = tuple(
        Rollout(
            completion=replace(completion, sample_index=i), reward=r, errors={} if r is not None else {"f": "error"}
        )
        for i, r in enumerate(rewards)
    )
    return RolloutGroup(problem=Problem(id=name, prompt="?"), rollouts=rollouts)


def advantages(group: RolloutGroup) -> list[float | None]:
    return [r.advantage for r in group.rollouts]


def test_group_scale_by_hand() -> None:
    # rewards 1, 0, 0, 0: mean 1/4; squared deviations 9/16 + 3/16 = 12/16, over n - 1 = 3: 1/4; std 1/2
    (filled,), stats = group_advantages([group(1.0, 0.0, 0.0, 0.0)], AdvantageConfig(scale="group", epsilon=0.0))
    assert advantages(filled) == [1.5, -0.5, -0.5, -0.5]
    assert (stats.mean, stats.min, stats.max) == (0.0, -0.5, 1.5)
    assert stats.std == pytest.approx(1.0)


def test_epsilon_is_added_to_the_std() -> None:
    (filled,), _ = group_advantages([group(1.0, 0.0, 0.0, 0.0)], AdvantageConfig(scale="group", epsilon=0.5))
    assert advantages(filled) == [0.75, -0.25, -0.25, -0.25]


def test_batch_and_no_scale_by_hand() -> None:
    groups = [group(1.0, 0.0), group(3.0, 0.0)]
    # all rewards 1, 0, 3, 0: mean 1, squared deviations 0 + 1 + 4 + 1 = 6, over 3: 2
    filled, _ = group_advantages(groups, AdvantageConfig(scale="batch", epsilon=0.0))
    root = math.sqrt(2.0)
    assert advantages(filled[0]) == pytest.approx([0.5 / root, -0.5 / root])
    assert advantages(filled[1]) == pytest.approx([1.5 / root, -1.5 / root])
    filled, _ = group_advantages(groups, AdvantageConfig(scale="none"))
    assert [advantages(g) for g in filled] == [[0.5, -0.5], [1.5, -1.5]]


def test_zero_variance_groups_are_dropped_and_counted() -> None:
    # 0.1 + 0.2 differs from 0.3 in the last bit: still no difference between siblings
    groups = [group(1.0, 1.0), group(0.1 + 0.2, 0.3), group(1.0, 0.0)]
    filled, stats = group_advantages(groups, AdvantageConfig())
    assert advantages(filled[0]) == advantages(filled[1]) == [None, None]
    assert (stats.groups, stats.trained_groups, stats.dropped_zero_variance) == (3, 1, 2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_kept_zero_variance_groups_have_exactly_zero_advantage(scale: str) -> None:
    config = AdvantageConfig(scale=scale, drop_zero_variance=False, epsilon=0.0)
    (filled,), stats = group_advantages([group(0.1 + 0.2, 0.3)], config)
    assert advantages(filled) == [0.0, 0.0]
    assert (stats.trained_groups, stats.dropped_zero_variance) == (1, 0)


def test_failed_rewards_are_left_out_of_mean_and_std() -> None:
    (filled,), stats = group_advantages([group(2.0, None, 0.0)], AdvantageConfig(scale="none"))
    assert advantages(filled) == [1.0, None, -1.0]  # a failure counted as 0 would give a mean of 2/3
    assert (stats.unscored_rollouts, stats.rollouts) == (1, 3)


@pytest.mark.parametrize("drop", [True, False])
def test_groups_with_fewer_than_two_scores_never_train(drop: bool) -> None:
    groups = [group(1.0, None), group(None, None), group(1.0)]
    filled, stats = group_advantages(groups, AdvantageConfig(drop_zero_variance=drop))
    assert [a for g in filled for a in advantages(g)] == [None] * 5
    assert (stats.dropped_unscored, stats.dropped_zero_variance, stats.trained_groups) == (3, 0, 0)
    assert (stats.mean, stats.std, stats.min, stats.max) == (0.0, 0.0, 0.0, 0.0)


def test_counts_of_solved_groups() -> None:
    groups = [group(1.0, 0.5), group(1.0, 0.0), group(0.0, -1.0), group(0.0, None), group(None, None)]
    _, stats = group_advantages(groups, AdvantageConfig())
    assert (stats.all_positive, stats.none_positive, stats.positive_rollouts) == (1, 2, 3)
    assert stats.metrics()["rollouts/positive_share"] == 3 / 7


def test_metrics_are_the_declared_ones() -> None:
    for groups in ([], [group(1.0, 0.0)]):
        assert group_advantages(groups, AdvantageConfig())[1].metrics().keys() == ADVANTAGE_METRICS.keys()


def test_an_infinite_reward_names_its_problem() -> None:
    with pytest.raises(ValueError, match="problem 'p7' is nan"):
        group_advantages([group(1.0, math.nan, name="p7")], AdvantageConfig())


def test_input_is_unchanged_and_order_kept() -> None:
    groups = [group(1.0, 0.0, name="a"), group(1.0, 1.0, name="b")]
    filled, _ = group_advantages(groups, AdvantageConfig())
    assert [g.problem.id for g in filled] == ["a", "b"]
    assert advantages(groups[0]) == [None, None]


def test_std_is_torch_std() -> None:
    values = [0.3, 1.7, -2.0, 0.0, 5.5]
    assert sample_std(values) == pytest.approx(torch.tensor(values, dtype=torch.float64).std().item(), abs=1e-15)
    assert sample_std(values) == pytest.approx(statistics.stdev(values))
    assert sample_std([1.0]) == 0.0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=6), min_size=1, max_size=5), st.floats(-3, 3))
def test_advantages_sum_to_zero_and_ignore_a_constant(rewards: list[list[float]], shift: float) -> None:
    config = AdvantageConfig(scale="none")
    filled, _ = group_advantages([group(*r) for r in rewards], config)
    shifted, _ = group_advantages([group(*(x + shift for x in r)) for r in rewards], config)
    for one, other in zip(filled, shifted, strict=True):
        for a, b in zip(advantages(one), advantages(other), strict=True):
            assert (a or 0.0) == pytest.approx(b or 0.0, abs=1e-7)
        assert sum(a or 0.0 for a in advantages(one)) == pytest.approx(0.0, abs=1e-9)

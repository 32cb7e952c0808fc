"""The grpo stage's leaves: the gate, the order of groups, a step's metrics, and what a stage refuses."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.evaluate import HeldoutSet
from pipelines.grpo import Gate, GrpoStage, check_gate, in_order, step_metrics
from pipelines.rollout_pool import SyncReport
from pipelines.tracking import describe_metric
from policy.advantages import group_advantages
from policy.config import AdvantageConfig
from rewards.base import RewardConfig
from rewards.rubric import RubricConfig
from rollout.prompts import DataConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, SamplingParams

RUBRIC = RubricConfig(functions=(RewardConfig(path="reasoning_gym"),))
HELDOUT = HeldoutSet(name="h", data=DataConfig(source="jsonl:h.jsonl"), rewards=RUBRIC)


def stage(**changes: Any) -> GrpoStage:
    given: dict[str, Any] = {"data": DataConfig(source="jsonl:x.jsonl"), "rewards": RUBRIC, "steps": 3, **changes}
    return GrpoStage(**given)


def group(name: str, lengths: list[int], scores: list[float | None], version: int = 4) -> RolloutGroup:
    rollouts = []
    for index, (length, score) in enumerate(zip(lengths, scores, strict=True)):
        completion = Completion(
            prompt_token_ids=(1,), token_ids=tuple(range(length)), text="t", rollout_logprobs=(-1.0,) * length,
            finish_reason=FinishReason.LENGTH if length >= 8 else FinishReason.STOP, policy_version=version,
            sample_index=index,
        )  # fmt: skip
        scored = {} if score is None else {"reasoning_gym": score}
        errors = {"reasoning_gym": "error: boom"} if score is None else {}
        rollouts.append(Rollout(completion=completion, scores=scored, errors=errors, reward=score))
    return RolloutGroup(problem=Problem(id=name, prompt="p"), rollouts=tuple(rollouts))


def test_step_metrics_by_hand() -> None:
    groups = [group("a", [2, 4], [1.0, 0.0]), group("b", [8, 6], [1.0, None], version=3)]
    filled, signal = group_advantages(groups, AdvantageConfig())
    sync = SyncReport(version=5, seconds=0.5, bytes=100, mean_abs=1e-7, max_abs=1e-6, checksum="c")
    metrics = step_metrics(stage(), filled, signal, sync, drawn_tokens=12, seconds=4.0)
    assert metrics["rollout/samples"] == 4
    assert metrics["rollout/length_mean"] == 5.0
    assert metrics["rollout/length_p50"] == 5.0  # of 2, 4, 6, 8
    assert metrics["rollout/length_max"] == 8
    assert metrics["sync/seconds"] == 0.5 and metrics["sync/bytes"] == 100 and metrics["sync/version"] == 5
    assert metrics["sync/canary_mean_abs"] == 1e-7 and metrics["sync/canary_max_abs"] == 1e-6
    assert metrics["rollout/truncated"] == 0.25
    assert metrics["rollout/tokens_per_s"] == 3.0  # 8 of the 20 tokens were in the run folder already
    assert metrics["reward/mean"] == pytest.approx(2 / 3)  # the failed one is no zero
    assert metrics["reward/reasoning_gym/errors"] == 1
    # Version 5 is what the sync has just made; the rollouts were drawn for the step before it, at 4 and (stale) at 3.
    assert metrics["staleness/max"] == 1
    assert metrics["groups/dropped_unscored"] == 1
    assert [name for name in metrics if describe_metric(name) is None] == []


def test_groups_come_back_in_the_order_of_their_problems() -> None:
    groups = [group(name, [1, 1], [1.0, 0.0]) for name in "cab"]
    problems = [Problem(id=name, prompt="p") for name in "abc"]
    assert [g.problem.id for g in in_order(groups, problems)] == ["a", "b", "c"]
    with pytest.raises(KeyError):
        in_order(groups[:2], problems)


def test_the_gate_looks_at_the_lower_end_of_the_interval() -> None:
    results = {"short": {"pass_at_1": 0.22, "ci95": [0.18, 0.26]}}
    check_gate(None, {})
    check_gate(Gate(set="short", min_pass_at_1=0.15), results)
    with pytest.raises(ValueError, match=r"RL does not start.*0\.220.*0\.180.*0\.2\b"):
        check_gate(Gate(set="short", min_pass_at_1=0.2), results)
    with pytest.raises(ValueError, match=r"'other' was not evaluated.*short"):
        check_gate(Gate(set="other", min_pass_at_1=0.2), results)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 1}, "group_size must be >= 2"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"truncated": "drop"}, "truncated must be mask or keep"),
        ({"sampling": SamplingParams(top_p=0.9)}, "top_p 1"),
        ({"sampling": SamplingParams(temperature=0)}, "temperature > 0"),
        ({"eval_every": 5}, "eval_every is 5 and eval_sets has 0 sets"),
        ({"eval_sets": (HELDOUT,)}, "eval_every is 0 and eval_sets has 1 sets"),
        ({"stop_without_signal": 1.0}, r"stop_without_signal must be in \(0, 1\) or null"),
        ({"stop_without_signal": 0.0}, r"stop_without_signal must be in \(0, 1\) or null"),
        (
            {"stop_without_signal": 0.9, "advantages": AdvantageConfig(drop_zero_variance=False)},
            "needs advantages.drop_zero_variance",
        ),
    ],
)
def test_a_stage_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**changes)

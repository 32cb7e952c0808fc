"""From scored groups to the result of a held-out set."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from evals.run import SetResult, evaluate_set
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup


def rollout(score: float | str | None, *, cut: bool = False) -> Rollout:
    """One sample of 4 tokens; a text as its score is the error of the judge, None means that it did not apply."""
    completion = Completion(
        prompt_token_ids=(1,), token_ids=(1, 2, 3, 4), text="", rollout_logprobs=(0.0,) * 4,
        finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP, policy_version=0,
    )  # fmt: skip
    scores = {"acc": score} if isinstance(score, float) else {}
    return Rollout(completion=completion, scores=scores, errors={"acc": score} if isinstance(score, str) else {})


def group(problem: str, scores: Sequence[float | str | None], *, cut: bool = False) -> RolloutGroup:
    return RolloutGroup(problem=Problem(id=problem, prompt=""), rollouts=tuple(rollout(s, cut=cut) for s in scores))


def test_a_plain_set() -> None:
    result = evaluate_set(
        "hard", [group("a", [1.0, 0.0]), group("b", [1.0, 1.5]), group("c", [0.99, 0.0], cut=True)],
        greedy=[group("a", [1.0]), group("b", [1.0]), group("c", [0.0])],
    )  # fmt: skip
    assert result.pass_at_1 == 0.5 and (result.n, result.k) == (3, 2) and result.judge == "acc"
    assert result.by_problem == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert result.greedy == pytest.approx(2 / 3) and result.greedy_by_problem == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert result.truncated == pytest.approx(1 / 3) and result.mean_tokens == 4.0
    assert result.sampling_se == pytest.approx(0.5 / 3) and result.errors == result.unjudged == 0
    assert result.ci95[0] <= 0.5 <= result.ci95[1]


def test_failures_of_the_judge_are_counted_and_named_never_wrong_answers() -> None:
    result = evaluate_set(
        "hard",
        [
            group("a", [1.0, "error: ZeroDivisionError"]),
            group("b", ["timeout: 5 s", "error: late"]),
            group("c", [None, 0.0, 0.0]),
        ],
    )
    assert result.pass_at_1 == 0.5 and result.n == 2, "a: 1 of 1; c: 0 of 2; b is not judged"
    assert (result.errors, result.unjudged, result.problems_left_out) == (3, 1, 1)
    assert result.error_examples == {"a": "error: ZeroDivisionError", "b": "timeout: 5 s"}
    assert result.by_problem == {"a": 1.0, "c": 0.0} and result.k == 2


def test_only_the_first_few_errors_are_kept() -> None:
    groups = [group(f"p{i}", [1.0, f"error: {i}"]) for i in range(9)]
    result = evaluate_set("hard", groups)
    assert list(result.error_examples) == [f"p{i}" for i in range(5)] and result.errors == 9


def test_the_named_judge_decides() -> None:
    mixed = Rollout(completion=rollout(1.0).completion, scores={"format": 1.0, "acc": 0.0})
    groups = [RolloutGroup(problem=Problem(id="a", prompt=""), rollouts=(mixed,))]
    assert evaluate_set("s", groups).judge == "format"
    assert evaluate_set("s", groups, judge="acc").pass_at_1 == 0.0
    assert evaluate_set("s", groups, judge="format").pass_at_1 == 1.0


def test_a_result_survives_json() -> None:
    groups = iter([group("a", [1.0, 0.0]), group("b", ["error: x", 0.0])])
    result = evaluate_set("hard", groups, greedy=iter([group("a", [1.0])]))
    row = json.loads(json.dumps(result.to_json()))
    assert SetResult.from_json(row) == result
    assert row["ci95"] == list(result.ci95) and {"pass_at_1", "greedy", "n", "k"} <= set(row)
    alone = evaluate_set("hard", [group("a", [1.0])])
    assert SetResult.from_json(json.loads(json.dumps(alone.to_json()))) == alone and alone.greedy is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "'hard': no rollout was scored; name a reward function"),
        ([group("a", [None])], "no rollout was scored"),
        ([group("a", ["error: bad gold"])], "acc scored none of 1 problems; the first error: error: bad gold"),
        ([group("a", [1.0]), group("a", [0.0])], "problem 'a' occurs twice"),
    ],
)
def test_what_cannot_be_judged_is_refused(groups: list[RolloutGroup], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_set("hard", groups)

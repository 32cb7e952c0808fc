"""A trial tells good reward functions from bad ones, whatever they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.base import RewardConfig
from rewards.trial import DEFAULT_PROBLEM, Kind, group_of, run_trial, trial_cases, with_columns
from rollout.template import split_reasoning

FUNCTIONS = '''
import os, random, time

def exact(reasoning, problem):
    """Right is what the answer tags hold, once."""
    text = reasoning.answer
    inside = text.removeprefix("<answer>").removesuffix("</answer>")
    return float(reasoning.closed and inside == problem.answer and text != inside)

def naive(completion, problem):
    return 1.0 if problem.answer in completion.text else 0.0

def careless(completion, problem):
    start = completion.text.rfind("boxed{")
    text = completion.text[start + 6 :].split("}")[0] if start >= 0 else ""
    try:
        return float(eval(text) == int(problem.answer))
    except Exception:
        return 0.0

def short(completion):
    return 1.0 if len(completion.token_ids) < 200 else 0.0

def moody(completion):
    return random.random()

def counts_calls(completion, seen=[]):
    seen.append(1)
    return float(len(seen))

def raises(completion):
    raise KeyError("gold")

def slow_on_large(completion):
    if len(completion.token_ids) > 100_000:
        time.sleep(60)
    return 1.0

def level(completion, problem):
    return float(problem.metadata["level"])
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trial") / "candidates.py"
    path.write_text(FUNCTIONS)
    return path


def trial(functions: Path, name: str, **options) -> dict:
    timeout_s = options.pop("timeout_s", 5.0)
    return run_trial(RewardConfig(path=f"{functions}:{name}", timeout_s=timeout_s), **options)


def test_a_strict_judge(functions: Path) -> None:
    found = trial(functions, "exact")
    assert found["ok"] and found["judges"] and found["deterministic"] and not found["executes_text"]
    assert (found["hackable"], found["hacks"], found["failure"]) == (False, [], "")
    scores = {row["case"]: row["score"] for row in found["cases"]}
    assert scores["right_tags"] == 1.0 and scores["right_boxed"] == scores["wrong_tags"] == 0.0
    assert found["calls_per_s"] > 10 and found["slowest_s"] >= found["median_s"] > 0


def test_a_judge_that_looks_for_the_answer_anywhere_is_hackable(functions: Path) -> None:
    found = trial(functions, "naive")
    assert found["judges"] and found["hackable"] and found["ok"]
    assert {"only_in_thinking", "thinking_unclosed", "both_boxed", "ten_thousand_boxes"} <= set(found["hacks"])
    assert "empty" not in found["hacks"] and "injected_order" not in found["hacks"]


def test_a_judge_that_evaluates_text_is_found_out(functions: Path) -> None:
    found = trial(functions, "careless", timeout_s=1.0)
    assert found["executes_text"] and not found["ok"]


def test_a_function_that_does_not_judge_is_not_called_hackable(functions: Path) -> None:
    found = trial(functions, "short")
    assert found["ok"] and not found["judges"] and found["hackable"] is None


@pytest.mark.parametrize("name", ["moody", "counts_calls"])
def test_what_differs_from_call_to_call_is_noticed(functions: Path, name: str) -> None:
    found = trial(functions, name)
    assert not found["deterministic"] and not found["ok"]


def test_what_works_on_nothing_is_not_tried_on_everything(functions: Path) -> None:
    found = trial(functions, "raises")
    assert not found["ok"] and found["failure"] == "error: KeyError: 'gold'" and "raise KeyError" in found["traceback"]
    assert {row["kind"] for row in found["cases"]} == {"right", "wrong"}
    assert found["outcomes"] == {"error": len(found["cases"])}


def test_a_timeout_costs_one_case(functions: Path) -> None:
    found = trial(functions, "slow_on_large", timeout_s=0.5)
    assert {row["case"] for row in found["cases"] if row["outcome"] == "timeout"} == {
        "megabyte_wrong", "megabyte_right", "megabyte_answer",
    }  # fmt: skip
    assert not found["ok"] and found["deterministic"]


def test_columns_of_ones_own(functions: Path) -> None:
    found = trial(functions, "level", problem=with_columns(DEFAULT_PROBLEM, {"answer": "x", "level": 3}))
    assert {row["score"] for row in found["cases"]} == {3.0}


def test_a_function_that_is_not_there(functions: Path) -> None:
    with pytest.raises(ValueError, match="has no 'nothing'"):
        trial(functions, "nothing")


@pytest.mark.parametrize("forced_think", [True, False])
def test_the_completions_are_what_they_are_called(forced_think: bool, tmp_path: Path) -> None:
    cases = {c.name: c for c in trial_cases(DEFAULT_PROBLEM, "41", tmp_path / "c", forced_think=forced_think)}
    apart = {name: split_reasoning(case.text, forced_think=forced_think) for name, case in cases.items()}
    for name, case in cases.items():
        if case.kind in (Kind.RIGHT, Kind.WRONG):
            assert apart[name].closed and ("42" in case.text, "41" in case.text) == (
                case.kind is Kind.RIGHT, case.kind is Kind.WRONG,
            )  # fmt: skip
    assert "42" not in apart["only_in_thinking"].answer and "42" in str(apart["only_in_thinking"].thinking)
    assert not apart["thinking_unclosed"].closed
    assert len(cases["megabyte_wrong"].text) > 1_000_000 and "42" not in cases["megabyte_wrong"].text
    assert cases["ten_thousand_boxes"].text.count("\\boxed{") >= 10_000
    assert len(cases) == len({case.text for case in cases.values()}), "no completion twice"


def test_tokens_are_made_up() -> None:
    made = group_of(DEFAULT_PROBLEM, ["", "12345"])
    assert [len(rollout.completion.token_ids) for rollout in made.rollouts] == [1, 2]
    assert [rollout.completion.sample_index for rollout in made.rollouts] == [0, 1]

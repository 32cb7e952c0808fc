"""The sft stage's leaves: what is imitated, and what a stage refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pipelines.sft import SftStage, resolve_target
from rollout.prompts import DataConfig
from rollout.types import Problem


def stage(**changes: Any) -> SftStage:
    return SftStage(**{"data": DataConfig(source="jsonl:x.jsonl"), "steps": 2, **changes})


def test_a_column_is_imitated() -> None:
    problem = Problem(id="p", prompt="1+1", answer="2", metadata={"solution": "1+1=2"})
    rng = random.Random(0)
    assert resolve_target(stage())(problem, rng) == "2"
    assert resolve_target(stage(target="solution"))(problem, rng) == "1+1=2"
    with pytest.raises(ValueError, match=r"problem p: no text in column 'proof'.*answer, solution"):
        resolve_target(stage(target="proof"))(problem, rng)


def test_a_function_is_given_the_rng_and_its_parameters() -> None:
    demonstrate = resolve_target(stage(target="pipelines.recipes.chain_sum:running_sums", target_params={"corrupt": 1}))
    problem = Problem(id="p", prompt="3+5-2")
    clean = resolve_target(stage(target="pipelines.recipes.chain_sum:running_sums"))
    assert clean(problem, random.Random(0)) == "3+5=8;8-2=6</think><answer>6</answer>"
    assert (
        demonstrate(problem, random.Random(0))
        == demonstrate(problem, random.Random(0))
        != clean(problem, random.Random(0))
    )


@pytest.mark.parametrize("target", ["no_such_module:f", "pipelines.recipes.chain_sum:nothing"])
def test_a_function_that_is_not_there_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=f"stages.sft.target '{target}' cannot be imported"):
        resolve_target(stage(target=target))


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every"])
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        stage(**{name: 0})

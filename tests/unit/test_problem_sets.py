"""Training and held-out problems of a recipe share nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import load_recipe
from pipelines.problem_sets import ProblemSets
from pipelines.run import check_recipe
from rollout.prompts import fingerprint

MINI = Path(__file__).parents[1] / "integration" / "support" / "mini.yaml"


def test_no_training_problem_is_held_out() -> None:
    problems = ProblemSets(load_recipe(MINI).recipe)
    held = {fingerprint(p.prompt) for item in problems.heldout_sets() for p in problems.heldout(item)}
    assert len(held) == 6
    for stage in load_recipe(MINI).recipe.stages:
        if stage.kind in ("sft", "grpo"):
            train = {fingerprint(p.prompt) for p in problems.training(stage.data)}  # type: ignore[attr-defined]
            assert not train & held


def test_held_out_problems_would_be_trained_on_if_they_were_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = ProblemSets(
        load_recipe(MINI, ["stages.before.sets.0.data.size=60", "stages.after.sets.0.data.size=60"]).recipe
    )
    monkeypatch.setattr("pipelines.problem_sets.fingerprints", lambda problem: {problem.id})  # nothing is recognised
    with pytest.raises(ValueError, match="is also short problem"):
        problems.training(problems._recipe.stages[0].data)  # type: ignore[attr-defined]


def test_a_recipe_is_checked_without_starting_anything() -> None:
    recipe = load_recipe(MINI).recipe
    report = check_recipe(recipe, ProblemSets(recipe))
    assert [entry["kind"] for entry in report["stages"]] == ["sft", "eval", "grpo", "eval"]
    assert report["stages"][0]["problems"] == 200
    assert report["stages"][1]["heldout"] == {"short": 6}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.preset=tinny", "tiny"),
        ("model={path: /nowhere/at/all}", "/nowhere/at/all"),
        ("stages.grpo.data.source=reasoning_gym:chain_some", "chain_some"),
        ("stages.grpo.data={source: 'jsonl:/nowhere/x.jsonl'}", "/nowhere/x.jsonl"),
        ("stages.grpo.rewards={functions: [{path: 'nowhere:f'}]}", "stages.grpo.rewards"),
        ("stages.sft.target=nowhere:f", "stages.sft.target"),
    ],
)
def test_what_is_not_there_is_named_before_anything_starts(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        recipe = load_recipe(MINI, [override]).recipe
        check_recipe(recipe, ProblemSets(recipe))
    assert "\n" not in str(caught.value)


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    recipe = load_recipe(MINI, [f"stages.grpo.data={{source: 'jsonl:{empty}'}}"]).recipe
    with pytest.raises(ValueError, match="empty"):
        check_recipe(recipe, ProblemSets(recipe))

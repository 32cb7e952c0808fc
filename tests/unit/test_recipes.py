"""Every shipped recipe as a user gets it: it can be run, and what it is judged on is not what it is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.config import Recipe, load_recipe, shipped_recipes
from pipelines.evaluate import EvalStage
from pipelines.grpo import GrpoStage
from pipelines.problem_sets import ProblemSets
from pipelines.run import check_recipe
from pipelines.sft import SftStage
from rollout.prompts import fingerprint, fingerprints

Loaded = tuple[Recipe, ProblemSets]


@pytest.fixture(scope="module", params=shipped_recipes())
def loaded(request: pytest.FixtureRequest) -> Loaded:
    recipe = load_recipe(request.param).recipe
    return recipe, ProblemSets(recipe)  # 40 000 problems: generated once


def evaluations(recipe: Recipe) -> list[EvalStage]:
    return [stage for stage in recipe.stages if isinstance(stage, EvalStage)]


def test_there_are_recipes() -> None:
    assert {"r1-tiny", "r1-tiny-long"} <= set(shipped_recipes())


def test_a_shipped_recipe_passes_every_check_of_a_run(loaded: Loaded) -> None:
    recipe, problems = loaded
    report = check_recipe(recipe, problems)
    assert [entry["kind"] for entry in report["stages"]] == ["sft", "eval", "grpo", "eval"]
    for stage, entry in zip(recipe.stages, report["stages"], strict=True):
        if isinstance(stage, SftStage | GrpoStage):
            assert entry["problems"] == stage.data.size == 20_000, "nothing is short of what was asked for"
        if isinstance(stage, EvalStage):
            assert entry["heldout"] == {"short": 256, "hard": 256, "longer": 256}


def test_before_and_after_are_judged_on_the_same_problems_in_the_same_way(loaded: Loaded) -> None:
    recipe, _ = loaded
    before, after = evaluations(recipe)
    assert (before.name, after.name) == ("before", "after")
    assert before.sets == after.sets
    for item in before.sets:
        assert item.data is not None
        assert (item.data.size, item.samples, item.greedy, item.data.distinct) == (256, 8, True, True), item.name
        assert item.sampling.temperature == 1.0, "as they are drawn in training"
    for stage in recipe.stages:
        if isinstance(stage, GrpoStage):
            assert stage.eval_sets in ((), before.sets), "evaluations during training are points of the same curve"
            assert stage.sampling == before.sets[0].sampling
            assert all(stage.rewards == item.rewards for item in before.sets)


def test_no_held_out_problem_is_trained_on(loaded: Loaded) -> None:
    """Counted here from the prompts themselves, beside the proof that the loading of the data makes."""
    recipe, problems = loaded
    prompts = {fingerprint(p.prompt) for item in problems.heldout_sets() for p in problems.heldout(item)}
    assert len(prompts) == 3 * 256, "no problem stands in two held-out sets, or twice in one"
    held = {print_ for item in problems.heldout_sets() for p in problems.heldout(item) for print_ in fingerprints(p)}
    assert len(held) == 2 * len(prompts), "each in its own words and in those of its source"
    checked = 0
    for stage in recipe.stages:
        if isinstance(stage, SftStage | GrpoStage):
            training = problems.training(stage.data)
            assert not held & {print_ for p in training for print_ in fingerprints(p)}, stage.name
            checked += len(training)
    assert checked == 40_000


def test_the_training_stages_ask_for_the_kinds_of_problems_that_are_judged(loaded: Loaded) -> None:
    """Of the longest of them in no stage: that set shows what carries over. RL of r1-tiny leaves out the hard ones."""
    recipe, problems = loaded
    before = evaluations(recipe)[0]
    lengths = {item.name: {_terms(p.prompt) for p in problems.heldout(item)} for item in before.sets}
    assert lengths == {"short": {3, 4}, "hard": {5}, "longer": {6}}
    for stage in recipe.stages:
        if isinstance(stage, SftStage | GrpoStage):
            trained = {_terms(p.prompt) for p in problems.training(stage.data)}
            wanted = {3, 4} if recipe.name == "r1-tiny" and isinstance(stage, GrpoStage) else {3, 4, 5}
            assert wanted <= trained and max(trained) == max(wanted), stage.name


def test_a_held_out_problem_would_be_missed_if_it_were_there(loaded: Loaded) -> None:
    """The count above is not empty: the data without the exclusion does hold held-out problems."""
    recipe, problems = loaded
    held = {fingerprint(p.prompt) for item in problems.heldout_sets() for p in problems.heldout(item)}
    alone = ProblemSets(replace(recipe, stages=tuple(s for s in recipe.stages if isinstance(s, SftStage))))
    [stage] = alone._recipe.stages
    assert isinstance(stage, SftStage)
    assert len(held & {fingerprint(p.prompt) for p in alone.training(stage.data)}) > 50


def _terms(prompt: str) -> int:
    """Numbers in a chain of sums of one-digit numbers, whichever way it is written."""
    return sum(character.isdigit() for character in prompt)

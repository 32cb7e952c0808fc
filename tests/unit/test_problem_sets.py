"""Training and held-out problems of a recipe share nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.config import Recipe, load_recipe
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


OWN = """
task: sums
data_file: sums.jsonl
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
instruction: Put the answer into a box.
metadata: {version: 1}
"""


def with_benchmark(folder: Path, *train: str, mode: str = "refuse") -> Recipe:
    """The mini recipe, evaluated on a benchmark of the folder, trained on these questions."""
    questions = [f"How many apples do {n} baskets hold when each of them holds {n + 1} red ones and no other fruit?"
                 for n in range(2, 7)]  # fmt: skip
    rows = [{"question": question, "answer": "6"} for question in questions]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(OWN)
    asked = [{"prompt": text.format(*questions), "original": "so", "answer": "1"} for text in train]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    sampled = "samples: 2, sampling: {max_tokens: 12}"
    sets = f"[{{benchmark: {folder / 'sums.yaml'}, data_dir: {folder}, limit: 4, {sampled}}}]"
    data = f"{{source: 'jsonl:{folder / 'train.jsonl'}'}}"
    return load_recipe(MINI, [
        f"stages.before.sets={sets}", f"stages.after.sets={sets}", f"stages.grpo.data={data}",
        f"stages.sft.data={data}", "stages.sft.target=original", "stages.sft.batch_size=1",
        "stages.grpo.problems_per_step=1", "stages.sft.target_params={}", f"contamination={mode}",
    ]).recipe  # fmt: skip


def test_a_benchmark_is_a_held_out_set_with_its_own_problems_and_grader(tmp_path: Path) -> None:
    recipe = with_benchmark(tmp_path, "What is the capital of France?")
    problems = ProblemSets(recipe)
    [item, _] = problems.heldout_sets()
    assert (item.name, item.rubric.judge) == ("sums", "accuracy")
    held = problems.heldout(item)
    assert len(held) == 4 and held[0].prompt.endswith("?\nPut the answer into a box.")
    assert check_recipe(recipe, problems)["stages"][1]["heldout"] == {"sums": 4}


def test_a_question_of_a_benchmark_is_taken_out_of_the_training_data(tmp_path: Path) -> None:
    recipe = with_benchmark(tmp_path, "{0}", "{3}", "{4}", "What is the capital of France?")
    asked = [p.prompt for p in ProblemSets(recipe).training(recipe.stages[0].data)]  # type: ignore[attr-defined]
    assert len(asked) == 2 and asked[0].startswith("How many apples do 6 baskets"), "the fifth is not asked: limit 4"


@pytest.mark.parametrize("mode", ["refuse", "warn", "off"])
def test_a_question_inside_a_training_text_is_refused_or_told(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_benchmark(tmp_path, "Listen well, and answer as you like: {2} Thank you.", mode=mode)
    if mode == "refuse":
        with pytest.raises(ValueError, match=r"stages\.sft\.data") as caught:
            check_recipe(recipe, ProblemSets(recipe))
        assert "\n" not in str(caught.value) and "sums" in str(caught.value)
    else:
        check_recipe(recipe, ProblemSets(recipe))
        assert ("sums" in capsys.readouterr().err) == (mode == "warn")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("{benchmark: gsm9k}", "gsm8k"),
        ("{benchmark: gsm8k, data: {source: 'jsonl:x'}}", "a benchmark brings its own"),
        ("{name: x}", "data and rewards, or a benchmark"),
        ("{benchmark: gsm8k, template: raw}", "chat or r1-zero"),
        ("{benchmark: gsm8k, limit: -1}", "limit must be >= 0"),
    ],
)
def test_a_set_that_cannot_be_is_named(item: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_recipe(MINI, [f"stages.before.sets=[{item}]"])

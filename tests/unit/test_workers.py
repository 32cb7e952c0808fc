"""What Workers asks of the learner and of the engines, without either; and the canary's problems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipelines.config import Recipe, load_recipe
from pipelines.evaluate import HeldoutSet
from pipelines.grpo import GrpoStage
from pipelines.problem_sets import ProblemSets
from pipelines.resources import own_cores
from pipelines.rollout_pool import Job
from pipelines.run_dir import RunConfig, RunDirError, StageDir, step_name
from pipelines.workers import Workers, engine_config
from policy.config import LossConfig
from policy.tokenizer import build_tokenizer
from rewards.base import RewardConfig
from rewards.rubric import RubricConfig
from rollout.engine import EngineConfig
from rollout.prompts import DataConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, SamplingParams, sampling_seed

MINI = Path(__file__).parents[1] / "integration" / "support" / "mini.yaml"
RUBRIC = RubricConfig(functions=(RewardConfig(path="random"),))
PROBLEMS = [Problem(id=name, prompt=f"{name}?") for name in "abc"]


class Handle:
    """A service that answers at once and writes down what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls.append((method, args, kwargs))
        done: Future[Any] = Future()
        done.set_result({"learner/loss": 0.5})
        return done

    def kill(self) -> None:
        raise AssertionError("nobody kills it here")


def bare(**attributes: Any) -> Workers:
    """Workers without processes: they hold what the method under test reads, and nothing else."""
    workers = Workers.__new__(Workers)
    for name, value in attributes.items():
        setattr(workers, name, value)
    return workers


def stage(**changes: Any) -> GrpoStage:
    return GrpoStage(data=DataConfig(source="jsonl:x.jsonl"), rewards=RUBRIC, steps=1, **changes)


def group(problem: Problem, lengths: Sequence[int], step: int = 0) -> RolloutGroup:
    completions = [
        Completion(
            prompt_token_ids=(1,), token_ids=(2,) * length, text="t", rollout_logprobs=(-1.0,) * length,
            finish_reason=FinishReason.STOP, policy_version=0, sample_index=index,
            seed=sampling_seed(3, step, problem.id, index),
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip
    return RolloutGroup(problem=problem, rollouts=tuple(Rollout(completion=c) for c in completions))


@pytest.fixture
def folder(tmp_path: Path) -> StageDir:
    return StageDir(tmp_path / "02-grpo", "rl", "grpo", lambda row: None)


# -- the learner's step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"truncated": "mask"}, {"mask_truncated": True}),
        ({"mini_batches": 3}, {"mini_batches": 3}),
        ({"sampling": SamplingParams(temperature=0.7, max_tokens=40)}, {"temperature": 0.7}),
        ({"loss": LossConfig(constant_length=64)}, {"constant_length": 64}),
        ({"sampling": SamplingParams(max_tokens=33)}, {"constant_length": 33}),
    ],
    ids=["defaults", "mask", "mini-batches", "temperature", "constant length", "max_tokens"],
)
def test_the_learner_is_told_how_the_rollouts_were_drawn(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    handle = Handle()
    groups = (group(PROBLEMS[0], [1, 2]),)
    given = {"sampling": SamplingParams(max_tokens=40), **changes}
    metrics = bare(_learner=handle).learner_step(stage(**given), groups)
    usual = {"mask_truncated": False, "mini_batches": 1, "temperature": 1.0, "constant_length": 40}
    assert handle.calls == [("grpo_step", (list(groups),), {**usual, **expected})]
    assert metrics == {"learner/loss": 0.5}


# -- rollouts --------------------------------------------------------------------------------------------------------


class Pool:
    """Draws groups of two completions, 5 and 7 tokens long, last problem first."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def generate(self, jobs: Sequence[Job]) -> Iterator[RolloutGroup]:
        self.jobs += jobs
        for job in reversed(jobs):
            drawn = group(job.problem, [5, 7])
            seeds = [request.seed for request in job.requests]
            again = [
                replace(r, completion=replace(r.completion, seed=s)) for r, s in zip(drawn.rollouts, seeds, strict=True)
            ]
            yield replace(drawn, rollouts=tuple(again))


def scored(groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
    for each in groups:
        rollouts = tuple(replace(r, scores={"random": 1.0}, reward=1.0) for r in each.rollouts)
        yield replace(each, rollouts=rollouts)


def drawing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Workers over a pool, with a judge that gives every completion a 1."""
    monkeypatch.setattr(Workers, "_rubric", lambda *_: SimpleNamespace(score=scored))
    engine = EngineConfig(max_model_len=128, return_routed_experts=True)
    return bare(_pool=pool, _engine=engine, tokenizer=build_tokenizer(), seed=3)


def test_only_tokens_that_were_drawn_now_are_counted(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    workers = drawing(pool, monkeypatch)
    folder.journal(step_name(4)).append(group(PROBLEMS[1], [30, 20], 4))  # drawn before a kill, and not yet scored
    groups, drawn = workers.rollouts(stage(group_size=2), 4, PROBLEMS, folder)
    assert [g.problem.id for g in groups] == ["a", "b", "c"]
    assert [job.problem.id for job in pool.jobs] == ["a", "c"]
    assert drawn == 2 * (5 + 7)
    assert all(r.reward == 1.0 for g in groups for r in g.rollouts)

    folder.complete_step(4, groups)  # killed again, before the checkpoint
    again, drawn = workers.rollouts(stage(group_size=2), 4, PROBLEMS, folder)
    assert (drawn, len(pool.jobs)) == (0, 2)
    assert again == groups


def test_a_problem_that_reads_otherwise_now_is_drawn_again(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    workers = drawing(pool, monkeypatch)
    folder.journal(step_name(0)).append(group(replace(PROBLEMS[1], answer="mended since"), [30, 20]))
    groups, drawn = workers.rollouts(stage(group_size=2), 0, PROBLEMS, folder)
    assert [g.problem for g in groups] == PROBLEMS
    assert [job.problem.id for job in pool.jobs] == ["a", "b", "c"]
    assert drawn == 3 * (5 + 7), "what was thrown away is not taken off"


def changed(whole: RolloutGroup, **completion: Any) -> RolloutGroup:
    """The group with something else in its first completion."""
    first, *others = whole.rollouts
    return replace(whole, rollouts=(replace(first, completion=replace(first.completion, **completion)), *others))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: replace(g, rollouts=g.rollouts[:1]), "it holds the samples [0] of 2"),
        (lambda g: replace(g, rollouts=()), "it holds the samples [] of 2"),
        (lambda g: replace(g, rollouts=g.rollouts[:1] * 2), "it holds the samples [0, 0] of 2"),
        (lambda g: replace(g, rollouts=g.rollouts * 2), "it holds the samples [0, 1, 0, 1] of 2"),
        (lambda g: changed(g, sample_index=7), "it holds the samples [7, 1] of 2"),
        (lambda g: replace(g, rollouts=g.rollouts[::-1]), "its samples have other seeds or another order than"),
        (lambda g: changed(g, seed=5), "its samples have other seeds or another order than"),
    ],
    ids=["one", "none", "one twice", "all twice", "an index", "order", "a seed"],
)
def test_a_group_with_other_samples_than_were_asked_for_is_drawn_again(
    change: Any, reason: str, folder: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, events = Pool(), []
    workers = drawing(pool, monkeypatch)
    workers.run = cast(Any, SimpleNamespace(note=events.append))
    journal = folder.journal(step_name(0))
    for whole in (group(PROBLEMS[0], [30, 20]), change(group(PROBLEMS[1], [30, 20])), group(PROBLEMS[2], [30, 20])):
        journal.append(next(scored([whole])))
    groups, drawn = workers.rollouts(stage(group_size=2), 0, PROBLEMS, folder)
    assert [job.problem.id for job in pool.jobs] == ["b"] and drawn == 5 + 7
    assert [r.completion.sample_index for g in groups for r in g.rollouts] == [0, 1] * 3
    [event] = events
    assert (event["event"], event["problem"], event["file"]) == ("drawn_again", "b", str(journal.path))
    assert event["reason"].startswith(reason)
    assert len(journal.finished()["b"].rollouts) == 2, "the next continuation finds the new one"
    workers.rollouts(stage(group_size=2), 0, PROBLEMS, folder)
    assert len(pool.jobs) == len(events) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout_logprobs": (0.5, -1.0)}, "the log-probability 0.5 is that of a probability above 1"),
        ({"rollout_logprobs": (float("inf"), -1.0)}, "the log-probability inf is that of a probability above 1"),
        ({"rollout_logprobs": (None, -1.0)}, "the log-probability None is no number"),
        ({"token_ids": ("x", 2)}, "a token id is no whole number"),
        ({"routed_experts": 5}, "routed_experts 5 is no text"),
    ],
)
def test_a_stored_group_that_no_engine_gives_is_refused(
    change: dict[str, Any], words: str, folder: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool()
    journal = folder.journal(step_name(0))
    journal.append(changed(group(PROBLEMS[1], [2, 2]), **change))
    with pytest.raises(RunDirError) as error:
        drawing(pool, monkeypatch).rollouts(stage(group_size=2), 0, PROBLEMS, folder)
    assert str(error.value).startswith(f"{journal.path}: problem b, sample 0: {words}") and pool.jobs == []


def test_what_an_engine_may_say_is_left_to_the_learner(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding above 0, and what is not finite: an update that the learner skips must be skipped again on a resume."""
    for index, odd in enumerate((1e-6, float("nan"), -float("inf"))):
        pool = Pool()
        folder.journal(step_name(index)).append(
            changed(group(PROBLEMS[1], [2, 2], index), rollout_logprobs=(odd, -1.0))
        )
        drawing(pool, monkeypatch).rollouts(stage(group_size=2), index, PROBLEMS[1:2], folder)
        assert pool.jobs == []


def test_a_group_is_in_the_run_folder_before_it_is_scored(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        for _ in groups:
            raise RuntimeError("killed")
        yield from ()

    workers = drawing(Pool(), monkeypatch)
    monkeypatch.setattr(Workers, "_rubric", lambda *_: SimpleNamespace(score=lost))
    with pytest.raises(RuntimeError, match="killed"):
        workers.rollouts(stage(group_size=2), 0, PROBLEMS, folder)
    assert [g.problem.id for g in folder.journal(step_name(0)).groups()] == ["c"]


def test_siblings_and_steps_have_seeds_of_their_own(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    workers = drawing(pool, monkeypatch)
    for step in (0, 1):
        workers.rollouts(stage(group_size=2), step, PROBLEMS, folder)
    assert [len(job.requests) for job in pool.jobs] == [2] * 6
    assert len({request.seed for job in pool.jobs for request in job.requests}) == 12


def test_experts_are_asked_for_where_a_stage_replays_them(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone: an evaluation's would fill the run folder for nothing."""
    pool = Pool()
    workers = drawing(pool, monkeypatch)
    workers.rollouts(stage(group_size=2), 0, PROBLEMS[:1], folder)
    workers._problems = cast(Any, SimpleNamespace(heldout=lambda wanted: PROBLEMS[1:2]))
    item = HeldoutSet(name="h", data=DataConfig(source="jsonl:h.jsonl"), rewards=RUBRIC, samples=2)
    workers.heldout_rollouts(item, folder, tag="eval", greedy=False)
    assert [request.routed_experts for job in pool.jobs for request in job.requests] == [True, True, False, False]

    recipe = load_recipe(str(MINI)).recipe
    assert not engine_config(recipe).return_routed_experts
    replaying = load_recipe(str(MINI), ["stages.grpo.router.replay=true"]).recipe
    assert engine_config(replaying) == replace(recipe.engine, return_routed_experts=True)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saving(**run: Any) -> tuple[Workers, Handle]:
    """Workers that save every second step, and what they ask the learner."""
    handle = Handle()
    settings = RunConfig(checkpoint_every=2, keep_checkpoints=2, **run)
    return bare(_learner=handle, _recipe=SimpleNamespace(run=settings)), handle


def complete(folder: StageDir, *steps: int) -> None:
    for step in steps:
        path = folder.checkpoints / step_name(step)
        path.mkdir()
        (path / "extra.json").write_text("{}")
        (path / "complete.json").write_text('{"files": {"extra.json": 2}}')


def kept(folder: StageDir) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_checkpoints_are_written_in_the_background_but_for_the_last(folder: StageDir) -> None:
    workers, handle = saving()
    prompts: Any = SimpleNamespace(state=lambda: {"position": 9})
    for step in (1, 2, 3):
        workers.checkpoint(folder, step, prompts, last=step == 3)
    assert handle.calls == [
        ("save", (str(folder.checkpoints / step_name(step)), {"step": step, "prompts": {"position": 9}}),
         {"background": step == 2})
        for step in (2, 3)
    ]  # fmt: skip


def test_the_background_can_be_switched_off(folder: StageDir) -> None:
    workers, handle = saving(checkpoint_background=False)
    workers.checkpoint(folder, 2, SimpleNamespace(state=dict), last=False)  # type: ignore[arg-type]
    assert [how for _, _, how in handle.calls] == [{"background": False}]


@pytest.mark.parametrize(("background", "left"), [(True, [".partial-step-000008"]), (False, [])])
def test_old_checkpoints_go_and_the_one_in_flight_stays(folder: StageDir, background: bool, left: list[str]) -> None:
    workers, _ = saving(checkpoint_background=background)
    complete(folder, 2, 4, 6)
    for name in (".partial-step-000008", ".partial-step-000003"):
        (folder.checkpoints / name).mkdir()
    workers.checkpoint(folder, 8, SimpleNamespace(state=dict), last=False)  # type: ignore[arg-type]
    assert kept(folder) == [*left, "step-000004", "step-000006"]


# -- held-out sets ---------------------------------------------------------------------------------------------------


def test_greedy_changes_how_a_token_is_chosen_and_nothing_else(
    folder: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def draw(self: Workers, problems: Any, journal: Any, step: int, samples: int, *rest: Any) -> Any:
        sampling, template, rewards, _ = rest
        asked.append((journal.path.name, step, samples, sampling, template, rewards))
        return [group(problem, [1] * samples) for problem in problems], 0

    monkeypatch.setattr(Workers, "_draw", draw)
    sampling = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=77, stop=("</answer>", "\n"))
    item = HeldoutSet(
        name="h", data=DataConfig(source="jsonl:h.jsonl"), rewards=RUBRIC, samples=4, sampling=sampling, template="raw"
    )
    workers = bare(_problems=SimpleNamespace(heldout=lambda wanted: PROBLEMS if wanted is item else []))
    found = {greedy: workers.heldout_rollouts(item, folder, tag="eval", greedy=greedy) for greedy in (False, True)}
    greedily = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=77, stop=("</answer>", "\n"))
    assert asked == [
        ("eval-h-sampled.jsonl", -1, 4, sampling, "raw", RUBRIC),
        ("eval-h-greedy.jsonl", -1, 1, greedily, "raw", RUBRIC),
    ]
    assert folder.journal("eval-h-sampled").groups() == found[False]
    assert folder.journal("eval-h-greedy").groups() == found[True]


# -- cores -----------------------------------------------------------------------------------------------------------


def test_cores_are_the_first_of_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_cores(0) == sorted(os.sched_getaffinity(0))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7, 2, 5})
    assert own_cores(0) == own_cores(3) == [2, 5, 7]
    assert own_cores(1) == [2]
    with pytest.raises(ValueError, match=r"run\.cpus is 4, but only 3 cores"):
        own_cores(4)


# -- canary ----------------------------------------------------------------------------------------------------------


def only(recipe: Recipe, *kinds: str) -> Recipe:
    return replace(recipe, stages=tuple(stage for stage in recipe.stages if stage.kind in kinds))


def test_canary_problems_come_with_the_template_of_their_held_out_set() -> None:
    recipe = load_recipe(MINI, ["stages.before.sets.0.template=r1-zero", "stages.sft.template=raw"]).recipe
    sets = ProblemSets(recipe)
    problems, template = sets.canary()
    first = next(sets.heldout_sets())
    assert (first.name, template) == ("short", "r1-zero")
    assert problems == sets.heldout(first)[:2] and len(problems) == 2


@pytest.mark.parametrize(("kinds", "template"), [(("sft", "grpo"), "raw"), (("grpo",), "r1-zero")])
def test_without_a_held_out_set_they_come_from_the_first_training_stage(kinds: tuple[str, ...], template: str) -> None:
    recipe = only(load_recipe(MINI, ["stages.sft.template=raw", "stages.grpo.template=r1-zero"]).recipe, *kinds)
    sets = ProblemSets(recipe)
    problems, found = sets.canary()
    assert found == template
    assert problems == sets.training(recipe.stages[0].data)[:2]  # type: ignore[attr-defined]


def test_a_set_that_is_evaluated_during_training_counts_too() -> None:
    recipe = only(load_recipe(MINI).recipe, "grpo")
    item = replace(load_recipe(MINI).recipe.stages[1].sets[0], template="raw")  # type: ignore[attr-defined]
    with_sets = replace(recipe.stages[0], eval_every=1, eval_sets=(item,))  # type: ignore[type-var]
    sets = ProblemSets(replace(recipe, stages=(with_sets,)))
    assert sets.canary() == (sets.heldout(item)[:2], "raw")

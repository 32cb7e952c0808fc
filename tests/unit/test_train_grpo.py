"""The loop of the grpo stage, over workers that only write down what they are asked: no model, no process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import HeldoutSet
from pipelines.grpo import GrpoStage, train_grpo
from pipelines.rollout_pool import SyncReport
from pipelines.run_dir import StageDir, step_name
from pipelines.tracking import Tracker, TrackingConfig, describe_metric, read_metrics
from rewards.base import RewardConfig
from rewards.rubric import RubricConfig
from rollout.prompts import DataConfig, PromptStream
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

RUBRIC = RubricConfig(functions=(RewardConfig(path="reasoning_gym"),))
HELDOUT = HeldoutSet(name="h", data=DataConfig(source="jsonl:h.jsonl"), rewards=RUBRIC)
LEARNED = {"learner/loss": 0.25, "learner/skipped": 0.0, "mismatch/max_abs": 1e-6}
EVALUATED = {"h": {"pass_at_1": 0.75, "ci95": [0.5, 0.875], "greedy": None}}
MIXED, EQUAL = (1.0, 0.0), (1.0, 1.0)  # rewards of two siblings, with and without a gradient

Rewards = Callable[[int], Sequence[Sequence[float]]]  # of a step: one row per group


class Clock:
    """Stands in for time.monotonic; only the workers below let time pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedWorkers:
    """Gives the rewards that a test wants and writes down every call."""

    def __init__(self, rewards: Rewards = lambda step: (MIXED, MIXED), *, start: int = 0, lag: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.clock = Clock()
        self._rewards, self._start, self._lag = rewards, start, lag
        self._version = -1

    def begin_stage(self, optimizer: Any, loss: Any, learner: Any, router: Any, total_steps: int) -> None:
        self.calls.append(("begin", total_steps))

    def resume(self, folder: StageDir, prompts: PromptStream) -> int:
        self.calls.append(("resume",))
        return self._start

    def sync_weights(self, step: int) -> SyncReport:
        self.calls.append(("sync", step))
        self.clock.now += 2
        self._version = step
        return SyncReport(version=step, seconds=1.5, bytes=64, mean_abs=1e-7, max_abs=1e-6, checksum="c")

    def rollouts(
        self, stage: GrpoStage, step: int, problems: Sequence[Problem], folder: StageDir
    ) -> tuple[list[RolloutGroup], int]:
        self.calls.append(("rollouts", step, self._version))
        self.clock.now += 8
        groups = [
            group(problem, rewards, self._version - self._lag)
            for problem, rewards in zip(problems, self._rewards(step), strict=True)
        ]
        return groups, 24

    def learner_step(self, stage: GrpoStage, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        self.calls.append(("learner", [[r.advantage for r in g.rollouts] for g in groups]))
        self.clock.now += 4
        return dict(LEARNED)

    def checkpoint(self, folder: StageDir, step: int, prompts: PromptStream, *, last: bool) -> None:
        logged = max(read_metrics(folder.metrics))
        self.calls.append(("checkpoint", step, last, {"logged": logged, "drawn": prompts.state()["position"]}))
        self.clock.now += 16 + step

    def export(self, folder: StageDir) -> None:
        self.calls.append(("export",))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The calls of one kind, without their name."""
        return [call[1:] for call in self.calls if call[0] == name]


def group(problem: Problem, rewards: Sequence[float], version: int) -> RolloutGroup:
    rollouts = [
        Rollout(
            completion=Completion(
                prompt_token_ids=(1,), token_ids=(2, 3), text="t", rollout_logprobs=(-1.0, -1.0),
                finish_reason=FinishReason.STOP, policy_version=version, sample_index=index,
            ),
            scores={"reasoning_gym": reward}, reward=reward,
        )
        for index, reward in enumerate(rewards)
    ]  # fmt: skip
    return RolloutGroup(problem=problem, rollouts=tuple(rollouts))


@pytest.fixture
def events() -> list[Mapping[str, Any]]:
    return []


@pytest.fixture
def folder(tmp_path: Path, events: list[Mapping[str, Any]]) -> StageDir:
    return StageDir(tmp_path / "02-grpo", "rl", "grpo", events.append)


def train(workers: ScriptedWorkers, folder: StageDir, **changes: Any) -> dict[str, Any]:
    """One process's share of a stage of four steps of two groups each."""
    given: dict[str, Any] = {"steps": 4, "problems_per_step": 2, "group_size": 2, **changes}
    stage = GrpoStage(data=DataConfig(source="jsonl:x.jsonl"), rewards=RUBRIC, **given)
    prompts = PromptStream([Problem(id=f"p{i}", prompt=f"{i}+1") for i in range(20)], seed=0)
    with Tracker(folder, TrackingConfig(), "run", total=stage.steps) as tracker:
        return train_grpo(stage, workers, prompts, folder, tracker)  # pyright: ignore[reportArgumentType]


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_step_is_drawn_learned_published_logged_and_only_then_saved(folder: StageDir) -> None:
    workers = ScriptedWorkers()
    figures = train(workers, folder, steps=3, mini_batches=2)
    assert workers.calls[:3] == [("begin", 6), ("resume",), ("sync", 0)]
    names = [call[0] for call in workers.calls[3:-1]]
    assert names == ["rollouts", "learner", "sync", "checkpoint"] * 3
    assert workers.calls[-1] == ("export",)
    assert workers.named("rollouts") == [(0, 0), (1, 1), (2, 2)], "each step draws from what the step before made"
    assert workers.named("sync") == [(0,), (1,), (2,), (3,)]
    saved = [(step + 1, step == 2, {"logged": step, "drawn": 2 * step + 2}) for step in range(3)]
    assert workers.named("checkpoint") == saved
    assert figures["policy_version"] == 3
    assert figures["steps"] == 3
    assert figures["reward/pass_rate"] == {"first": 0.5, "last": 0.5, "max": 0.5}


def test_the_learner_and_the_run_folder_get_the_same_advantages(folder: StageDir) -> None:
    workers = ScriptedWorkers(lambda step: (MIXED, EQUAL))
    train(workers, folder, steps=2)
    for step, (advantages,) in enumerate(workers.named("learner")):
        assert advantages[0][0] > 0 > advantages[0][1]
        assert advantages[1] == [None, None]
        kept = folder.journal(step_name(step)).groups()
        assert [[r.advantage for r in g.rollouts] for g in kept] == advantages


def test_a_resumed_stage_publishes_its_checkpoint_and_goes_on_with_its_step(folder: StageDir) -> None:
    workers = ScriptedWorkers(start=2)
    assert train(workers, folder)["policy_version"] == 4
    assert workers.calls[:4] == [("begin", 4), ("resume",), ("sync", 2), ("rollouts", 2, 2)]
    assert sorted(read_metrics(folder.metrics)) == [2, 3]


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_every_row_tells_of_every_part_of_the_step(folder: StageDir) -> None:
    train(ScriptedWorkers(lambda step: (MIXED, EQUAL)), folder)
    rows = read_metrics(folder.metrics)
    assert sorted(rows) == [0, 1, 2, 3]
    always = {f"seconds/{phase}" for phase in ("rollout", "journal", "learner", "sync", "step")}
    always |= {f"sync/{name}" for name in ("seconds", "bytes", "version", "canary_mean_abs", "canary_max_abs")}
    always |= {f"rollout/{name}" for name in ("samples", "length_mean", "length_p50", "length_max", "truncated")}
    always |= {f"advantage/{name}" for name in ("mean", "std", "min", "max")}
    always |= {"groups/total", "groups/trained", "groups/dropped_zero_variance", "rollouts/positive_share"}
    always |= {"rollout/tokens_per_s", "staleness/max", "reward/mean", "reward/pass_rate"}
    for step, row in rows.items():
        assert always - row.keys() == set()
        assert row.items() >= LEARNED.items()
        assert ("seconds/checkpoint" in row) == (step > 0)
        assert [name for name in row if describe_metric(name) is None] == ["step"]
        assert (row["reward/mean"], row["groups/trained"], row["groups/total"]) == (0.75, 1, 2)
        assert (row["sync/version"], row["staleness/max"]) == (step + 1, 0)


def test_rollouts_of_older_weights_show_as_staleness(folder: StageDir) -> None:
    train(ScriptedWorkers(lag=2), folder)
    assert [row["staleness/max"] for row in read_metrics(folder.metrics).values()] == [2, 2, 2, 2]


def test_seconds_are_those_of_each_phase(folder: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's checkpoint is written after its line: its seconds stand in the next one."""
    workers = ScriptedWorkers()
    monkeypatch.setattr("time.monotonic", workers.clock)
    train(workers, folder)
    for step, row in read_metrics(folder.metrics).items():
        found = [row[f"seconds/{phase}"] for phase in ("rollout", "journal", "learner", "sync", "step")]
        assert found == [8, 0, 4, 2, 14]
        assert row["rollout/tokens_per_s"] == 3
        assert row.get("seconds/checkpoint") == (16 + step if step else None)


# -- early stop ------------------------------------------------------------------------------------------------------


def solved_at_step_1(step: int) -> Sequence[Sequence[float]]:
    return (EQUAL, EQUAL) if step == 1 else (MIXED, EQUAL)


def test_a_stage_without_signal_stops_saves_and_exports(folder: StageDir, events: list[Mapping[str, Any]]) -> None:
    workers = ScriptedWorkers(solved_at_step_1)
    figures = train(workers, folder, stop_without_signal=0.9)
    assert [step for step, _ in workers.named("rollouts")] == [0, 1], "half of step 0 has a signal, none of step 1"
    assert [(step, last) for step, last, _ in workers.named("checkpoint")] == [(1, False), (2, True)]
    stopped = [event for event in events if event["event"] == "stopped_early"]
    assert [(event["stage"], event["step"]) for event in stopped] == [("rl", 1)]
    assert workers.calls[-1] == ("export",)
    assert (figures["policy_version"], figures["steps"]) == (2, 2)


def test_a_stage_killed_after_its_early_stop_draws_nothing_more(
    folder: StageDir, events: list[Mapping[str, Any]]
) -> None:
    train(ScriptedWorkers(solved_at_step_1), folder, stop_without_signal=0.9)
    events.clear()
    again = ScriptedWorkers(solved_at_step_1, start=2)
    figures = train(again, folder, stop_without_signal=0.9)
    assert again.calls == [("begin", 4), ("resume",), ("sync", 2), ("export",)]
    assert [event["event"] for event in events] == ["stopped_early"]
    assert (figures["policy_version"], figures["steps"]) == (2, 2)


def test_a_stage_killed_before_the_checkpoint_of_its_early_stop_saves_it(folder: StageDir) -> None:
    train(ScriptedWorkers(solved_at_step_1), folder, stop_without_signal=0.9)
    again = ScriptedWorkers(solved_at_step_1, start=1)
    train(again, folder, stop_without_signal=0.9)
    assert [step for step, _ in again.named("rollouts")] == [1]
    assert [(step, last) for step, last, _ in again.named("checkpoint")] == [(2, True)]


@pytest.mark.parametrize("limit", [None, 0.9, 0.5])
def test_it_stops_at_its_share_of_groups_and_never_without_one(folder: StageDir, limit: float | None) -> None:
    rewards = (lambda step: (EQUAL, EQUAL)) if limit is None else (lambda step: (MIXED, EQUAL))
    workers = ScriptedWorkers(rewards)
    train(workers, folder, stop_without_signal=limit)
    steps = 1 if limit == 0.5 else 4  # half of the groups have no signal
    assert len(workers.named("rollouts")) == steps
    assert [last for _, last, _ in workers.named("checkpoint")] == [False] * (steps - 1) + [True]


# -- evaluations -----------------------------------------------------------------------------------------------------


def test_evaluations_during_training_stand_in_the_line_of_their_step(
    folder: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = ScriptedWorkers()

    def evaluate(sets: Sequence[HeldoutSet], asked: ScriptedWorkers, into: StageDir, *, tag: str) -> dict[str, Any]:
        assert (asked, into) == (workers, folder)
        workers.calls.append(("eval", [item.name for item in sets], tag))
        return EVALUATED

    monkeypatch.setattr("pipelines.grpo.evaluate_sets", evaluate)
    train(workers, folder, eval_every=2, eval_sets=(HELDOUT,))
    assert workers.named("eval") == [(["h"], "step-000002"), (["h"], "step-000004")]
    names = [call[0] for call in workers.calls]
    assert names[names.index("eval") - 1 :][:3] == ["sync", "eval", "checkpoint"], "the new weights are evaluated"
    for step, row in read_metrics(folder.metrics).items():
        found = {name: value for name, value in row.items() if name.startswith("eval/")}
        expected = {"eval/h/pass_at_1": 0.75, "eval/h/ci_low": 0.5, "eval/h/ci_high": 0.875}
        assert found == (expected if step in (1, 3) else {})
        assert ("seconds/eval" in row) == bool(found)

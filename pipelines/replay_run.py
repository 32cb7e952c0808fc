"""A stored run: which of its steps can be computed again, from which state, and how."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipelines.bad_steps import names_of, read_bad_step, with_names
from pipelines.config import Recipe, load_recipe
from pipelines.files import read_lines
from pipelines.first_model import check_same_model
from pipelines.grpo import GrpoStage, step_metrics
from pipelines.problem_sets import ProblemSets
from pipelines.rollout_pool import SyncReport
from pipelines.run_dir import Journal, read_json, stage_path, step_name
from pipelines.sft import SftStage, demonstrations, resolve_target
from pipelines.stored_groups import check_stored
from pipelines.tracking import read_metrics, read_rows
from pipelines.workers import Workers
from policy.advantages import group_advantages
from policy.config import LossConfig
from rewards.rubric import weighted_reward
from rollout.types import RolloutGroup

if TYPE_CHECKING:
    from pipelines.learner_service import LearnerService
    from rollout.prompts import PromptStream

Advance = Callable[[int, int], None]  # steps done, steps in all
# A step -> its metrics, and the names of the sequences that the learner was given
_Take = Callable[[int], tuple[dict[str, float], list[dict[str, Any]]]]
_STORED = re.compile(r"step-(\d{6,})\.jsonl")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A state that a step can be reached from.

    Attributes:
        step: the first step that it has not seen.
        checkpoint: where it is stored; None: it is the model that the stage began with.
    """

    step: int
    checkpoint: Path | None


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """One step, computed again.

    Attributes:
        figures: its metrics, as far as they do not need engines or a clock.
        bad: the updates that were not finite, as they are kept in the run folder.
        trace: where that arose first (``policy.trace.Trace.to_json``), with a ``sentence``; None for a step that went
            well in the run.
    """

    figures: dict[str, float]
    bad: list[dict[str, Any]]
    trace: dict[str, Any] | None


class StoredStage:
    """One training stage of a run folder, which is only read.

    Args:
        run: the run folder.
        name: of the stage; None takes the last one that has begun to train.

    Raises:
        ValueError: this is no run folder, or it has no such stage.
    """

    def __init__(self, run: Path, name: str | None) -> None:
        resolved = run / "recipe.resolved.yaml"
        if not resolved.is_file():
            raise ValueError(f"{run} is no run folder (it has no {resolved.name}): name one, e.g. runs/r1-tiny")
        self.run = run
        self.recipe: Recipe = load_recipe(str(resolved.absolute())).recipe
        self.trained = [(i, s) for i, s in enumerate(self.recipe.stages) if isinstance(s, SftStage | GrpoStage)]
        begun = [(i, s) for i, s in self.trained if self._path(i).is_dir()]
        chosen = [(i, s) for i, s in begun if name in (None, s.name)]
        if not chosen:
            known = ", ".join(s.name for _, s in begun) or "none"
            what = "has begun to train nothing" if name is None else f"has no training stage {name!r} that has begun"
            raise ValueError(f"{run} {what} (there are: {known})")
        self.index, self.stage = chosen[-1]
        self.path = self._path(self.index)
        metrics = self.path / "metrics.jsonl"
        try:
            self.rows = read_metrics(metrics)
        except (TypeError, ValueError) as error:  # a damaged line is an OSError
            raise ValueError(f"{metrics}: a figure is no number ({error}): put the line back") from None
        self._times_logged = Counter(row["step"] for row in read_rows(metrics))
        self.events = [_event(run / "events.jsonl", *line) for line in read_lines(run / "events.jsonl")]

    @property
    def recipe_folders(self) -> list[str]:
        """Where the run's recipe lay, beside which a user's own modules are found."""
        sources = {event["recipe"] for event in self.events if "recipe" in event}
        return sorted(str(Path(source).absolute().parent) for source in sources)

    @property
    def first_model(self) -> Path | None:
        """The folder that the stage's first model was loaded from; None: it is the recipe's own model."""
        earlier = [i for i, _ in self.trained if i < self.index]
        return self._path(earlier[-1]) / "model" if earlier else None

    @property
    def base_version(self) -> int:
        """policy_version of the stage's first model."""
        done = [read_json(self._path(i) / "done") for i, s in self.trained if i < self.index and s.kind == "grpo"]
        return int(done[-1]["policy_version"]) if done else 0

    def start(self, step: int) -> Start:
        """The nearest state at or before a step.

        Raises:
            ValueError: the step cannot be computed again; says why, and which can be.
        """
        self._check_known(step)
        starts = self._starts()
        stored = self._stored()
        for start in sorted(starts, key=lambda each: -each.step):
            if self._reaches(start, step, stored):
                return start
        possible = [i for i in sorted(stored) if any(self._reaches(each, i, stored) for each in starts)]
        gone = [str(i) for i in range(step + 1) if i not in stored]
        reason = f"no checkpoint before it is kept, and the stage's first model ({self.first_model}) is gone"
        if gone:
            reason = f"no rollouts of step {gone[-1]} are stored"
        raise ValueError(
            f"step {step} of stage {self.stage.name!r} cannot be computed again: {reason}; steps that can be: "
            f"{_ranges(possible) or 'none'}"
        )

    def groups(self, step: int) -> list[RolloutGroup]:
        """The scored groups of a step, with rewards that follow from their scores, and without advantages.

        Raises:
            RunDirError: the file is damaged.
        """
        assert isinstance(self.stage, GrpoStage)
        rubric, found = self.stage.rewards, []
        for group in self._kept_groups(step):
            scored = (replace(r, reward=weighted_reward(r, rubric), advantage=None) for r in group.rollouts)
            found.append(replace(group, rollouts=tuple(scored)))
        return found

    def contradictions(self, step: int) -> dict[str, tuple[float | None, float | None]]:
        """Rewards and advantages of a step of RL, stored and recomputed from its scores, by their place.

        Raises:
            RunDirError: the file is damaged.
        """
        if not isinstance(self.stage, GrpoStage):
            return {}
        found: dict[str, tuple[float | None, float | None]] = {}
        again, _ = group_advantages(self.groups(step), self.stage.advantages)
        for kept, group in zip(self._kept_groups(step), again, strict=True):
            for one, other in zip(kept.rollouts, group.rollouts, strict=True):
                place = f"{group.problem.id}/{one.completion.sample_index}"
                found[f"stored reward of {place}"] = one.reward, other.reward
                found[f"stored advantage of {place}"] = one.advantage, other.advantage
        return found

    def _kept_groups(self, step: int) -> list[RolloutGroup]:
        assert isinstance(self.stage, GrpoStage)
        path = self.path / "rollouts" / f"{step_name(step)}.jsonl"
        groups = Journal(path).groups()
        if not any(group.rollouts for group in groups):
            raise ValueError(f"{path} holds no rollout: the step cannot be computed again; put the file back")
        for group in groups:
            check_stored(path, group, self.stage.rewards)
        return groups

    def machines(self, step: int) -> list[dict[str, Any]]:
        """What the stage ran on up to a step, as recorded whenever it was started."""
        found: list[dict[str, Any]] = []
        since: list[int] = []
        for event in self.events:
            if event.get("stage") != self.stage.name:
                continue
            if event.get("event") == "stage_started" and "machine" in event:
                found.append(event["machine"])
                since.append(0)
            elif event.get("event") == "resumed" and found:
                since[-1] = event["step"]
        return [machine for machine, first in zip(found, since, strict=True) if first <= step]

    def _path(self, index: int) -> Path:
        return stage_path(self.run, index, self.recipe.stages[index].kind)

    def _check_known(self, step: int) -> None:
        if self._times_logged[step] > 1:  # a resumed run does not log again what is logged
            raise ValueError(
                f"{self.path / 'metrics.jsonl'} has {self._times_logged[step]} lines of step {step}, where a run "
                "writes one: delete those that are not the run's"
            )
        if step in self.rows or read_bad_step(self.path, step) is not None:
            return
        logged = sorted(self.rows)
        every = getattr(self.stage, "log_every", 1)
        how = f"it logs every {every} steps; " if every > 1 else ""
        raise ValueError(
            f"stage {self.stage.name!r} of {self.run} has no figures of step {step} ({how}logged are: "
            f"{_ranges(logged) or 'none'})"
        )

    def _starts(self) -> list[Start]:
        from policy.checkpoint import checkpoints

        starts = [Start(step=step, checkpoint=path) for step, path in checkpoints(self.path / "checkpoints").items()]
        loss = getattr(self.stage, "loss", LossConfig())
        first = self.first_model
        if first is None or (first / "config.json").is_file():
            starts.append(Start(step=0, checkpoint=None))
        elif loss.kl_coef > 0:
            return []  # the reference is the model that the stage began with, whatever the checkpoint
        return starts

    def _stored(self) -> set[int]:
        if isinstance(self.stage, SftStage):  # rows follow from the data
            return set(range(self.stage.steps))
        names = [_STORED.fullmatch(path.name) for path in (self.path / "rollouts").glob("step-*.jsonl")]
        return {int(match[1]) for match in names if match}

    @staticmethod
    def _reaches(start: Start, step: int, stored: set[int]) -> bool:
        return start.step <= step and all(i in stored for i in range(start.step, step + 1))


class Replayer(Workers):
    """A run's workers without engines, the learner in this process: what is asked of it is what the run asked.

    Args:
        stored: the stage.
        threads: CPU threads of the learner.
    """

    def __init__(self, stored: StoredStage, threads: int) -> None:
        from pipelines.learner_service import LearnerService

        self._stored = stored
        self._recipe = stored.recipe
        self.seed, self._engine, self.base_version = stored.recipe.seed, stored.recipe.engine, stored.base_version
        self._service: LearnerService = LearnerService(stored.recipe.model, stored.recipe.seed, threads)

    def replay(self, start: Start, step: int, advance: Advance) -> Recomputed:
        """Goes from a state to a step and computes it.

        Raises:
            ValueError: a model, a checkpoint or the data cannot be read.
        """
        stage, first = self._stored.stage, self._stored.first_model
        own = first is None or not (first / "config.json").is_file()
        if own:
            check_same_model(self._stored.run, self._recipe.model, "")
        self._ask_learner("load")
        if first is not None and not own:
            self.load_model(first)
        self.tokenizer = self._service.tokenizer
        updates = stage.steps * getattr(stage, "mini_batches", 1)
        self.begin_stage(
            stage.optimizer, getattr(stage, "loss", LossConfig()), stage.learner, stage.router, total_steps=updates
        )
        extra = {} if start.checkpoint is None else self._ask_learner("restore", str(start.checkpoint))
        take = self._grpo(stage) if isinstance(stage, GrpoStage) else self._sft(stage, step, extra)
        for done in range(start.step, step):
            advance(done - start.step, step - start.step + 1)
            # A fault of the machine does not come again; the run went on without that update, and so must this.
            kept = read_bad_step(self._stored.path, done)
            self._service.learner.recall_bad_updates([] if kept is None else [u["mini_batch"] for u in kept["updates"]])
            take(done)
        self._service.learner.recall_bad_updates([])
        advance(step - start.step, step - start.step + 1)
        return self._last(step, take)

    def sft_step(self, rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, float]:
        """One supervised step."""
        return self._ask_learner("sft_step", rows)

    def _ask_learner(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._service, method)(*args, **kwargs)

    def _grpo(self, stage: GrpoStage) -> _Take:
        def take(step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
            groups, signal = group_advantages(self._stored.groups(step), stage.advantages)
            learned = self.learner_step(stage, groups)
            sync = SyncReport(version=self.base_version + step + 1, seconds=0.0, bytes=self._weight_bytes(),
                              mean_abs=0.0, max_abs=0.0, checksum="")  # fmt: skip
            return {**step_metrics(stage, groups, signal, sync, 0, 0.0), **learned}, names_of(stage, groups)

        return take

    def _sft(self, stage: SftStage, last: int, extra: Mapping[str, Any]) -> _Take:
        @cache
        def prompts() -> PromptStream:
            stream = ProblemSets(self._recipe).stream(stage)
            if extra:
                stream.restore(extra["prompts"])
            return stream

        def take(step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
            kept = read_bad_step(self._stored.path, step)
            if kept is not None and step == last:  # its rows are kept: the data may be gone
                return self.sft_step(kept["rows"]), [{"problem": name} for name in kept["problems"]]
            problems = prompts().next(stage.batch_size)
            rows = demonstrations(stage, step, problems, resolve_target(stage), self)
            return self.sft_step(rows), [{"problem": problem.id} for problem in problems]

        return take

    def _last(self, step: int, take: _Take) -> Recomputed:
        from policy.trace import Trace

        went_wrong = read_bad_step(self._stored.path, step) is not None
        trace = Trace(self._service.model) if went_wrong else None
        with trace or nullcontext():
            figures, names = take(step)
        told = None if trace is None else {**trace.to_json(), "sentence": trace.sentence()}
        bad = [with_names(update, names) for update in self.bad_updates()]
        return Recomputed(figures=figures, bad=bad, trace=told)

    def _weight_bytes(self) -> int:
        from pipelines.weight_sync import sent_tensors

        sent = sent_tensors(self._service.model, self._recipe.model.dtype)
        return sum(tensor.numel() * tensor.element_size() for _, tensor in sent)


def _event(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
        whole = isinstance(event, dict) and isinstance(event.get("recipe", ""), str)
        if whole and "stage" in event and "machine" in event:
            whole = isinstance(event["machine"], dict) and type(event["machine"].get("cores")) is int
        if whole and "stage" in event and event.get("event") == "resumed":
            whole = type(event.get("step")) is int
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{path}:{number}: this line is damaged: put it back or delete it")
    return event


def _ranges(steps: Sequence[int]) -> str:
    """``0-3, 7, 9-12``"""
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in _runs(steps))


def _runs(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    low = high = None
    for step in steps:
        if high is not None and step == high + 1:
            high = step
            continue
        if low is not None:
            yield low, cast(int, high)
        low = high = step
    if low is not None:
        yield low, cast(int, high)

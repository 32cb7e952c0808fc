"""The ``sft`` stage: supervised fine-tuning on demonstrations (R1's cold start)."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from rollout.prompts import DataConfig, PromptStream
from rollout.template import check_template
from rollout.types import Problem

if TYPE_CHECKING:
    from pipelines.run_dir import StageDir
    from pipelines.tracking import Tracker
    from pipelines.workers import Workers


@dataclass(frozen=True, kw_only=True)
class SftStage:
    """Supervised fine-tuning.

    Attributes:
        kind, name: the stage's kind and the name of its folder.
        data: training problems; the held-out problems of every stage are removed from them.
        target: what is imitated: the name of a column (in ``metadata``, or ``answer``), or ``module:function``, a
            function ``(problem, rng) -> completion text`` (what follows the forced ``<think>``).
        target_params: further keyword arguments of that function.
        steps: optimizer steps.
        batch_size: demonstrations per step.
        template: how a prompt is rendered: ``chat`` | ``r1-zero`` | ``raw``.
        optimizer, learner, router: see their own descriptions.
        log_every: one line of metrics every n steps.
    """

    kind: str = "sft"
    name: str = "sft"
    data: DataConfig
    target: str = "answer"
    target_params: dict[str, Any] = field(default_factory=dict)
    steps: int
    batch_size: int = 64
    template: str = "chat"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine"))
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    log_every: int = 10

    def __post_init__(self) -> None:
        check_template(self.template)
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def train_sft(
    stage: SftStage, workers: Workers, prompts: PromptStream, folder: StageDir, tracker: Tracker
) -> dict[str, Any]:
    """Runs the stage from its last checkpoint to its end; returns its headline figures.

    Raises:
        ValueError: the target column or function is not there, or a demonstration does not fit into the context.
    """
    demonstrate = resolve_target(stage)
    workers.begin_stage(stage.optimizer, LossConfig(), stage.learner, total_steps=stage.steps)
    start = workers.resume(folder, prompts)
    for step in range(start, stage.steps):
        clock = tracker.clock(step)
        problems = prompts.next(stage.batch_size)
        rows = [
            workers.encode_demonstration(problem, demonstrate(problem, _rng(workers.seed, step, i)), stage.template)
            for i, problem in enumerate(problems)
        ]
        with clock("learner"):
            learned = workers.sft_step(rows)
        if (step + 1) % stage.log_every == 0 or step + 1 == stage.steps:
            tracker.log(step, {**learned, **clock.metrics()})
        else:
            tracker.advance(step)
        workers.checkpoint(folder, step + 1, prompts, last=step + 1 == stage.steps)
    workers.export(folder)
    return tracker.headline("learner/loss")


def resolve_target(stage: SftStage) -> Callable[[Problem, random.Random], str]:
    """The function that turns a problem into the completion to imitate.

    Raises:
        ValueError: ``module:function`` cannot be imported.
    """
    if ":" in stage.target:
        module, _, name = stage.target.rpartition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"stages.{stage.name}.target {stage.target!r} cannot be imported: {error}") from None
        return lambda problem, rng: function(problem, rng=rng, **stage.target_params)

    def column(problem: Problem, rng: random.Random) -> str:
        del rng
        value = problem.answer if stage.target == "answer" else problem.metadata.get(stage.target)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"problem {problem.id}: no text in column {stage.target!r} to imitate "
                f"(columns: {', '.join(['answer', *problem.metadata])}): set sft.target"
            )
        return value

    return column


def _rng(seed: int, step: int, index: int) -> random.Random:
    return random.Random(f"{seed}/{step}/{index}")

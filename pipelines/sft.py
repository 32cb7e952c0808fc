"""The ``sft`` stage: supervised fine-tuning on demonstrations (R1's cold start)."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.bad_steps import check_rows
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from rollout.prompts import DataConfig, PromptStream
from rollout.template import check_template, render_prompt
from rollout.types import Problem

if TYPE_CHECKING:
    from pipelines.run_dir import StageDir
    from pipelines.tracking import Tracker
    from pipelines.workers import Workers

Demonstrate = Callable[[Problem, random.Random], str]


class Encoder(Protocol):
    """Turns a demonstration into tokens; what a stage has in its workers."""

    @property
    def seed(self) -> int: ...

    def encode_demonstration(self, problem: Problem, text: str, template: str) -> tuple[list[int], int]: ...


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
        if self.router.replay:
            raise ValueError("router.replay replays a sampler's choice, and demonstrations have none: set it to false")
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def train_sft(
    stage: SftStage, workers: Workers, prompts: PromptStream, folder: StageDir, tracker: Tracker
) -> dict[str, Any]:
    """Runs the stage from its last checkpoint to its end; returns its headline figures.

    Raises:
        ValueError: the target column or function is not there, or a demonstration does not fit into the context.
        NonFiniteError: too many optimizer steps in a row were not finite.
    """
    demonstrate = resolve_target(stage)
    workers.begin_stage(stage.optimizer, LossConfig(), stage.learner, stage.router, total_steps=stage.steps)
    start = workers.resume(folder, prompts)
    for step in range(start, stage.steps):
        clock = tracker.clock(step)
        problems = prompts.next(stage.batch_size)
        rows = demonstrations(stage, step, problems, demonstrate, workers)
        with clock("learner"):
            learned = workers.sft_step(rows)
        check_rows(workers, folder, step, learned, problems, rows)
        if (step + 1) % stage.log_every == 0 or step + 1 == stage.steps:
            tracker.log(step, {**learned, **clock.metrics()})
        else:
            tracker.advance(step)
        workers.checkpoint(folder, step + 1, prompts, last=step + 1 == stage.steps)
    workers.export(folder)
    return tracker.headline("learner/loss")


def resolve_target(stage: SftStage) -> Demonstrate:
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


def demonstrations(
    stage: SftStage, step: int, problems: Sequence[Problem], demonstrate: Demonstrate, encoder: Encoder
) -> list[tuple[list[int], int]]:
    """The step's rows: ``(token ids, prompt length)`` of each problem. They follow from data and seed alone."""
    texts = (demonstrate(problem, random.Random(f"{encoder.seed}/{step}/{i}")) for i, problem in enumerate(problems))
    pairs = zip(problems, texts, strict=True)
    return [encoder.encode_demonstration(problem, text, stage.template) for problem, text in pairs]


def encode_demonstration(
    problem: Problem, text: str, template: str, tokenizer: Any, limit: int
) -> tuple[list[int], int]:
    """``(token ids, prompt length)`` of a prompt followed by ``text`` and the end-of-sequence token.

    Raises:
        ValueError: longer than ``limit``, which is ``engine.max_model_len``.
    """
    prompt = render_prompt(problem, tokenizer, template)
    answer = tokenizer.encode(text, add_special_tokens=False)
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    if len(ids) > limit:
        raise ValueError(
            f"problem {problem.id}: prompt and demonstration take {len(ids)} tokens, engine.max_model_len is "
            f"{limit}: shorten the data or raise it"
        )
    return ids, len(prompt)

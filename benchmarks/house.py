"""A real run in a scratch folder: the recipe, the run folder, the actors. What is measured is what ``r1 run`` runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import Options
from pipelines.config import LoadedRecipe, Recipe
from pipelines.grpo import GrpoStage
from pipelines.problem_sets import ProblemSets
from pipelines.run_dir import RunConfig, RunDir, StageDir
from pipelines.tracking import TrackingConfig
from policy.config import ModelConfig, OptimizerConfig
from rewards.base import RewardConfig
from rewards.rubric import RubricConfig
from rollout.engine import EngineConfig
from rollout.prompts import DataConfig, PromptStream
from rollout.types import SamplingParams

if TYPE_CHECKING:
    from pipelines.workers import Workers

GROUP_SIZE = 8
LEARNING_RATE = 1e-6
ENGINE = EngineConfig(max_model_len=1024, max_num_seqs=256, kv_cache_gib=1.0)
_NEVER = 10**9


@dataclass(frozen=True, kw_only=True)
class House:
    """A run that has been started: its engines are on their way.

    Attributes:
        recipe: what runs.
        run: its folder.
        workers: learner and rollout workers.
        problems: its data.
    """

    recipe: Recipe
    run: RunDir
    workers: Workers
    problems: ProblemSets

    def stage(self, index: int) -> tuple[GrpoStage, StageDir, PromptStream]:
        """A stage with its folder and its problems."""
        stage = self.recipe.stages[index]
        assert isinstance(stage, GrpoStage)
        return stage, self.run.stage(index, stage.name, stage.kind), self.problems.stream(stage)


def grpo_stage(name: str, prompts: Path, *, steps: int, problems: int, max_tokens: int) -> GrpoStage:
    """GRPO with the benchmark's reward, group size and learning rate."""
    return GrpoStage(
        name=name,
        data=DataConfig(source=f"jsonl:{prompts}"),
        rewards=RubricConfig(functions=(RewardConfig(path="benchmarks.reward:spread", style="trl"),), processes=1),
        steps=steps,
        problems_per_step=problems,
        group_size=GROUP_SIZE,
        sampling=SamplingParams(max_tokens=max_tokens),
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
    )


@contextmanager
def open_house(options: Options, folder: Path, stages: tuple[GrpoStage, ...]) -> Iterator[House]:
    """Starts learner and engines on the model in ``folder``; ends every process afterwards."""
    from pipelines.workers import Workers

    recipe = Recipe(
        name="benchmark",
        seed=options.seed,
        model=ModelConfig(path=str(folder)),
        engine=ENGINE,
        stages=stages,
        tracking=TrackingConfig(console=False),
        run=RunConfig(dir=str(options.scratch / "runs"), checkpoint_every=_NEVER),
    )
    loaded = LoadedRecipe(recipe=recipe, origins={}, source="benchmarks", text="")
    problems = ProblemSets(recipe)
    with RunDir.open(recipe.run.dir, loaded) as run, Workers(recipe, run, problems) as workers:
        workers.start_engines()
        yield House(recipe=recipe, run=run, workers=workers, problems=problems)

"""What ``r1 verify`` verifies: a recipe's learner, its engine, and samples that it could be trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.actors import Handle, LocalHandle, settle
from pipelines.grpo import GrpoStage
from pipelines.learner_group import start_learner
from pipelines.resources import own_cores, start_ray
from pipelines.run_models import model_folder
from pipelines.sft import SftStage
from pipelines.verify_engine import EngineProbe
from pipelines.verify_rows import PROPERTIES
from pipelines.verify_samples import (
    Questions,
    before_tied_choices,
    choose_stage,
    demonstrations,
    questions,
    ragged_samples,
    random_completions,
)
from pipelines.verify_service import VerifyService
from policy.config import LossConfig, ParallelConfig

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe, Recipe
    from policy.batch import Sample
    from policy.invariance import Bench
    from rollout.types import Completion

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What the command line says.

    Attributes:
        stage: name of the training stage; None takes the first of RL, else of SFT.
        model: Hugging Face or run folder instead of the recipe's model.
        samples: sequences to measure on, >= 2.
        max_tokens: most tokens of a completion, beside the recipe's limit.
        dtype: ``float64`` or ``recipe``: in which cuts and ranks are measured.
        only: properties to measure.
        full: more ranks too.
    """

    stage: str | None = None
    model: str | None = None
    samples: int = 12
    max_tokens: int = 128
    dtype: str = "float64"
    only: frozenset[str] = frozenset(PROPERTIES)
    full: bool = False


def _given_model(name: str) -> str:
    """The folder that ``--model`` means, or what may be a hub id.

    Raises:
        ValueError: there is no such folder, or no model in it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(model_folder(path))
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"--model: there is no folder {name}; give a model, stage or run folder, or a hub id")
    return name


class Subject:
    """What is verified: the recipe's learner, and samples that it could be trained on.

    Args:
        loaded: the recipe.
        options: what the command line says.
        scratch: a folder for models and checkpoints, removed afterwards.

    Raises:
        ValueError: the recipe trains nothing, or its model or data cannot be read.
    """

    def __init__(self, loaded: LoadedRecipe, options: VerifyOptions, scratch: Path) -> None:
        recipe = loaded.recipe
        # A user's own modules (data rewrites, targets) are found in the working directory and beside the recipe.
        sys.path.extend(p for p in (str(Path.cwd()), str(Path(loaded.source).absolute().parent)) if p not in sys.path)
        if options.model is not None:
            source = _given_model(options.model)
            recipe = replace(recipe, model=replace(recipe.model, preset=None, path=source, overrides={}))
        self.recipe: Recipe = recipe
        self.options, self.scratch = options, scratch
        self.stage = choose_stage(recipe, options.stage)
        self.cores = own_cores(recipe.run.cpus)
        self.service = VerifyService(recipe.model, recipe.seed, len(self.cores))
        self.service.load()
        self.engine: EngineProbe | None = None
        self.asked: Questions | None = None
        self.completions: list[Completion] = []
        self.samples: list[Sample] = []
        self.origin = ""

    @contextmanager
    def learner(self, parallel: ParallelConfig | None = None) -> Iterator[Callable[..., Any]]:
        """What asks a learner of the recipe's layout, or another: one rank in this process, more in actors."""
        recipe, layout = self.recipe, parallel or self.recipe.parallel
        if layout.ranks == 1:
            handle: Handle = LocalHandle(lambda: VerifyService(recipe.model, recipe.seed, len(self.cores)))
        else:
            start_ray(recipe.run.ray_address, len(self.cores))
            handle = start_learner(recipe.model, recipe.seed, layout, len(self.cores), VerifyService)
        try:
            yield lambda method, *args, **kwargs: settle(handle.submit(method, *args, **kwargs))
        finally:
            handle.kill()

    @property
    def loss(self) -> LossConfig:
        """The stage's loss; of SFT one that has SFT's gradient when every advantage is 1."""
        return self.stage.loss if isinstance(self.stage, GrpoStage) else LossConfig(importance_cap=None)

    @cached_property
    def routed(self) -> bool:
        """Whether the model has routers that the engine's choice of experts can be compared with."""
        from policy.moe import Router

        return any(isinstance(module, Router) for module in self.service.model.modules())

    @property
    def temperature(self) -> float:
        """The sampler's."""
        return self.stage.sampling.temperature if isinstance(self.stage, GrpoStage) else 1.0

    @property
    def constant_length(self) -> int:
        """Denominator of the ``constant`` aggregation, tokens."""
        return self.stage.sampling.max_tokens if isinstance(self.stage, GrpoStage) else 1

    @property
    def mini_batches(self) -> int:
        """Optimizer steps of one step; 0 stands for SFT."""
        return self.stage.mini_batches if isinstance(self.stage, GrpoStage) else 0

    def gather(self, *, start_engine: bool, note: Note) -> None:
        """Starts the engine, if any row needs it, and gets the samples."""
        recipe, stage, options = self.recipe, self.stage, self.options
        count = options.samples
        self.asked = questions(
            recipe, stage, self.service.tokenizer, count=count, max_tokens=options.max_tokens, experts=self.routed
        )
        if self.asked is not None and start_engine:
            note("starting an engine")
            folder = self.scratch / "model"
            self.service.export(str(folder))
            self.engine = EngineProbe(recipe, folder, experts=self.routed)
            self.completions = self.engine.draw(self.asked)
        if isinstance(stage, SftStage):
            self.samples = demonstrations(recipe, stage, self.service.tokenizer, count)
            self.origin = f"{len(self.samples)} demonstrations of stage {stage.name}"
            return
        assert self.asked is not None
        said = "completions of the recipe's prompts by its engine"
        drawn = self.completions
        if self.engine is None:
            vocabulary = len(self.service.tokenizer)
            drawn, said = random_completions(self.asked, vocabulary, recipe.seed), "random tokens after its prompts"
        self.samples = ragged_samples(drawn, recipe.seed)
        self.origin = f"{len(self.samples)} {said}, advantages drawn at random"

    @cached_property
    def cut(self) -> Cut | str:
        """The model in the dtype in which cuts are measured, and samples that can be compared in it; or why not."""
        import torch

        from policy.invariance import Bench, measured_model, nearby_reference

        name = "float64" if self.options.dtype == "float64" else self.recipe.model.dtype
        model = measured_model(self.service.model, getattr(torch, name))
        samples = self.samples
        if name != "float64":
            margins = self.service.router_margins([sample.token_ids for sample in samples])
            samples = before_tied_choices(samples, margins, name)
            if not samples:
                return (
                    f"in {name} the routers' choices for most tokens are as good as ties, which rounding decides: "
                    "measure in float64"
                )
        replayable = all(sample.routed_experts is not None for sample in samples)
        bench = Bench(
            model=model,
            loss=self.loss,
            config=replace(self.stage.learner, threads=self.stage.learner.threads or len(self.cores)),
            router=replace(self.stage.router, replay=self.stage.router.replay and replayable),
            reference=nearby_reference(model, self.recipe.seed) if self.loss.kl_coef > 0 else None,
            temperature=self.temperature,
            constant_length=self.constant_length,
        )
        return Cut(bench=bench, samples=samples, dtype=name)

    def close(self) -> None:
        """Ends what was started."""
        self.close_engine()
        self.service.close()
        if "ray" in sys.modules:
            import ray

            ray.shutdown()

    def close_engine(self) -> None:
        """Ends the engine: what follows needs the cores."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What cuts are measured with: the model and its loss, samples, and the dtype's name."""

    bench: Bench
    samples: list[Sample]
    dtype: str

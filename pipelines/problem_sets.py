"""The problems of a recipe: held-out sets first, then training streams that provably share none with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rollout.prompts import DataConfig, PromptStream, check_disjoint, fingerprints, load_problems
from rollout.types import Problem

if TYPE_CHECKING:
    from pipelines.config import Recipe
    from pipelines.evaluate import HeldoutSet


class ProblemSets:
    """Loads each data set of a recipe once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._heldout: dict[str, list[Problem]] = {}
        self._train: dict[str, list[Problem]] = {}

    def heldout_sets(self) -> Iterator[HeldoutSet]:
        """Every held-out set that any stage names."""
        for stage in self._recipe.stages:
            yield from getattr(stage, "sets", ())
            yield from getattr(stage, "eval_sets", ())

    def heldout(self, item: HeldoutSet) -> list[Problem]:
        """The problems of a held-out set.

        Raises:
            ValueError: the data set is missing, empty or broken.
        """
        key = repr((item.data, item.benchmark, item.limit, item.data_dir, item.template))
        if key not in self._heldout:
            self._heldout[key] = item.load()
        return self._heldout[key]

    def training(self, config: DataConfig) -> list[Problem]:
        """Training problems without any held-out one.

        Raises:
            ValueError: the data set is missing, empty, broken, or holds nothing but held-out problems.
        """
        key = repr(config)
        if key not in self._train:
            sets = list(self.heldout_sets())
            exclude = {print_ for item in sets for p in self.heldout(item) for print_ in fingerprints(p)}
            problems = load_problems(config, exclude=exclude)
            for item in sets:
                check_disjoint(problems, self.heldout(item), heldout_name=item.name)
            self._train[key] = problems
        return self._train[key]

    def stream(self, stage: Any) -> PromptStream:
        """An endless, resumable stream over the training problems of a stage."""
        return PromptStream(self.training(stage.data), seed=self._recipe.seed)

    def everything(self) -> Iterator[tuple[list[Problem], str]]:
        """Every list of problems that the recipe asks for, with the template that renders it."""
        for item in self.heldout_sets():
            yield self.heldout(item), item.template
        for stage in self._recipe.stages:
            data, template = getattr(stage, "data", None), getattr(stage, "template", "")
            if data is not None and template:
                yield self.training(data), template

    def canary(self) -> tuple[list[Problem], str]:
        """Two problems to attest weight syncs with, and the template that renders them."""
        problems, template = next(self.everything(), ([], "raw"))
        return problems[:2], template

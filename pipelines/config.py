"""The recipe: what a run does. Composes the dataclasses that sit beside the code which reads them.

A recipe is one YAML file with the keys of :class:`Recipe`. Values come from three places, the later ones win: the
defaults of the dataclasses, the file, and overrides ``a.b=value`` from the command line. ``load_recipe`` remembers for
every value which of them it was.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from evals.contamination import MODES
from pipelines.recipe_source import (
    COMMAND_LINE,
    DEFAULT,
    Node,
    Origin,
    RecipeError,
    apply_override,
    dump_yaml,
    nearest,
    parse_override,
    parse_recipe,
)
from pipelines.run_dir import RunConfig
from pipelines.schema import Builder, plain
from pipelines.tracking import TrackingConfig
from policy.config import ModelConfig, ParallelConfig
from rollout.engine import EngineConfig
from rollout.types import SamplingParams

__all__ = [
    "STAGE_KINDS", "LoadedRecipe", "Recipe", "RecipeError", "Stage", "load_recipe", "resolved_yaml", "shipped_recipes",
    "stage_class",
]  # fmt: skip

STAGE_KINDS = {
    "sft": "pipelines.sft:SftStage",
    "grpo": "pipelines.grpo:GrpoStage",
    "eval": "pipelines.evaluate:EvalStage",
}
"""Stage kinds and the dataclass that describes each; imported when a recipe names it."""

_RECIPES = "pipelines.recipes"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Stage(Protocol):
    """What every stage dataclass has; the rest depends on its kind."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        name: names the run folder ``<run.dir>/<name>``; letters, digits, ``-``, ``_`` and ``.``.
        seed: seed of everything random in the run, >= 0; the same recipe and seed give the same result.
        model: the policy that is trained.
        parallel: how many processes share the learner's work.
        engine: the rollout workers, used by every stage that samples.
        stages: what happens, in this order; each has ``kind: sft | grpo | eval`` and the keys of that kind.
        tracking: where the numbers go.
        run: the run folder, its checkpoints, and the Ray cluster.
        contamination: what happens when a stage trains on texts that share most of their words with what the recipe
            evaluates: ``refuse``, ``warn`` or ``off``.
    """

    name: str
    seed: int = 0
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stages: tuple[Stage, ...]
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    contamination: str = "refuse"

    def __post_init__(self) -> None:
        if self.contamination not in MODES:
            raise ValueError(f"contamination must be one of {', '.join(MODES)}, got {self.contamination!r}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be a folder name of letters, digits, - _ and ., got {self.name!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.model.lora is not None and self.model.lora.experts and self.parallel.expert_parallel > 1:
            raise ValueError(
                "model.lora.experts needs all experts on every rank: set parallel.expert_parallel to 1, or "
                "experts to false"
            )
        if not self.stages:
            raise ValueError("stages is empty: a recipe needs at least one stage")
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if not _NAME.fullmatch(name):
                raise ValueError(f"stages.{index}: a stage's name is letters, digits, - _ and ., got {name!r}")
            if name in names[:index]:
                raise ValueError(
                    f"stages {names.index(name)} and {index} are both named {name!r}; give each a name of its own"
                )


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the resolved recipe.
        origins: dotted path of every leaf (list elements by index) -> where its value was written.
        source: the file as error messages name it.
        text: the file's text, kept in the run folder.
        overrides: what the command line added.
    """

    recipe: Recipe
    origins: dict[str, Origin]
    source: str
    text: str
    overrides: tuple[str, ...] = ()


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads a shipped recipe by name or a YAML file by path, applies overrides, and checks everything.

    Args:
        name_or_path: ``r1-tiny``, or a path (it has a ``/`` or ends in .yaml or .yml).
        overrides: ``a.b=value``; a list element is named by its index, name or kind: ``stages.grpo.steps=5``.

    Raises:
        RecipeError: one line that names the place, the path, what is wrong, and the nearest valid key.
    """
    source, text = _read(str(name_or_path))
    root = parse_recipe(text, source)
    for override in overrides:
        apply_override(root, *parse_override(override))
    builder = Builder()
    builder.special[Stage] = _stage_builder(builder)
    recipe = builder.build(Recipe, root)
    for path, message in _broken_rules(recipe):
        raise RecipeError(f"{_origin(builder.origins, path)}: {path} {message}")
    return LoadedRecipe(recipe=recipe, origins=builder.origins, source=source, text=text, overrides=tuple(overrides))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    names = (item.name for item in resources.files(_RECIPES).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every value spelled out; ``load_recipe`` reads it back to an equal recipe."""
    return dump_yaml(plain(recipe))


def stage_class(kind: str) -> type:
    """The dataclass of a stage kind.

    Raises:
        KeyError: there is no such kind.
    """
    module, _, name = STAGE_KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _read(name_or_path: str) -> tuple[str, str]:
    """The name for messages and the text of a recipe."""
    path = Path(name_or_path).expanduser()
    if "/" not in name_or_path and path.suffix not in (".yaml", ".yml"):
        names = shipped_recipes()
        if name_or_path in names:
            return f"{name_or_path}.yaml", (resources.files(_RECIPES) / f"{name_or_path}.yaml").read_text("utf-8")
        if not path.is_file():
            raise RecipeError(f"there is no shipped recipe {name_or_path!r}{nearest(name_or_path, names)}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RecipeError(f"{name_or_path}: this is no regular file; name a YAML file")
    try:
        return name_or_path, path.read_text("utf-8")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"there is no recipe file {name_or_path}{nearest(path.name, beside)}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name_or_path}: this is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{name_or_path}: cannot be read: {error.strerror}") from None


def _stage_builder(builder: Builder) -> Callable[[Node, str], Any]:
    def build(node: Node, path: str) -> Any:
        if not isinstance(node.value, dict) or "kind" not in node.value:
            raise RecipeError(f"{node.origin}: {path} must be a mapping with kind: {' | '.join(STAGE_KINDS)}")
        kind = node.value["kind"].value
        if kind not in STAGE_KINDS:
            at = node.value["kind"].origin
            raise RecipeError(f"{at}: {path}.kind: there is no stage kind {kind!r}{nearest(str(kind), STAGE_KINDS)}")
        return builder.build(stage_class(kind), node, path)

    return build


def _broken_rules(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Rules across dataclasses, as ``(path, what is wrong with it and the mend)``."""
    limit = recipe.engine.max_model_len
    evaluated: set[str] = set()
    for index, stage in enumerate(recipe.stages):
        path = f"stages.{index}"
        for at, sampling in _find(stage, SamplingParams, path):
            if sampling.max_tokens >= limit:
                yield (
                    f"{at}.max_tokens",
                    f"is {sampling.max_tokens}, but engine.max_model_len is {limit} for prompt and completion: "
                    "lower it or raise engine.max_model_len",
                )
        optimizer = getattr(stage, "optimizer", None)
        if optimizer is not None and recipe.parallel.ranks > 1:
            for key, wrong in (("kind", optimizer.kind == "adamw8bit"), ("offload", optimizer.offload)):
                if wrong:
                    yield (
                        f"{path}.optimizer.{key}",
                        f"is {getattr(optimizer, key)!r}, which works with one learner rank, and parallel.ranks is "
                        f"{recipe.parallel.ranks}: leave one of them out",
                    )
        gate = getattr(stage, "gate", None)
        if gate is not None and gate.set not in evaluated:
            known = nearest(gate.set, sorted(evaluated)) or "; put an eval stage with it before this one"
            yield f"{path}.gate.set", f"names {gate.set!r}, which no earlier eval stage evaluates{known}"
        evaluated |= {item.name for item in getattr(stage, "sets", ())}


def _find(value: Any, cls: type, path: str) -> Iterator[tuple[str, Any]]:
    """Every instance of ``cls`` inside nested dataclasses and tuples, with its path."""
    if isinstance(value, cls):
        yield path, value
        return
    children: Iterable[tuple[str, Any]] = ()
    if is_dataclass(value) and not isinstance(value, type):
        children = ((item.name, getattr(value, item.name)) for item in fields(value))
    elif isinstance(value, tuple):
        children = ((str(i), item) for i, item in enumerate(value))
    for key, child in children:
        yield from _find(child, cls, f"{path}.{key}")


def _origin(origins: dict[str, Origin], path: str) -> Origin:
    """Where a path, or else what stands nearest above it, was written."""
    found = origins.get(path, DEFAULT)
    while found == DEFAULT and "." in path:
        path = path.rpartition(".")[0]
        inside = [o for key, o in origins.items() if key.startswith(f"{path}.") and o not in (DEFAULT, COMMAND_LINE)]
        found = min(inside, key=lambda origin: origin.line, default=DEFAULT)
    return found

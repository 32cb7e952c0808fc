"""The ``eval`` stage: held-out sets on the live engines, sampled and greedy, with 95 % intervals."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.benchmark import find_benchmark
from evals.protocol import protocol_of
from pipelines.files import write_atomic
from pipelines.tracking import eval_metrics
from rewards.rubric import RubricConfig
from rollout.prompts import ORIGINAL_PROMPT, DataConfig, check_disjoint, load_problems
from rollout.template import check_template
from rollout.types import Problem, SamplingParams

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe
    from pipelines.problem_sets import ProblemSets
    from pipelines.run_dir import StageDir
    from pipelines.tracking import Tracker
    from pipelines.workers import Workers


@dataclass(frozen=True, kw_only=True)
class HeldoutSet:
    """Problems that no stage trains on: data of one's own with what judges them, or a benchmark.

    Attributes:
        name: how results are named; the benchmark's name when left out.
        benchmark: a benchmark by name, or a YAML file; it brings problems, prompts and grader.
        limit: only so many of the benchmark's problems; 0 all.
        data_dir: where the benchmark's data lie; else R1_DATA, else the hub.
        data: where the problems come from; ``data.size`` of them.
        samples: completions per problem at ``sampling`` (k).
        greedy: also one completion per problem at temperature 0.
        sampling: how the k samples are drawn.
        template: how a prompt is rendered: ``chat`` | ``r1-zero`` | ``raw``.
        rewards: what judges a completion: a score >= 1 of ``rewards.judge`` passes.
    """

    name: str = ""
    benchmark: str = ""
    limit: int = 0
    data_dir: str = ""
    data: DataConfig | None = None
    rewards: RubricConfig | None = None
    samples: int = 8
    greedy: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template: str = "chat"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")
        if self.limit < 0:
            raise ValueError(f"limit must be >= 0 (0 takes all problems), got {self.limit}")
        check_template(self.template)
        if self.benchmark:
            if self.data is not None or self.rewards is not None:
                raise ValueError("a set has a benchmark, or data with rewards: a benchmark brings its own")
            if self.template == "raw":
                raise ValueError("a benchmark in a recipe is asked by the template chat or r1-zero, got raw")
            found = find_benchmark(self.benchmark)
            object.__setattr__(self, "name", self.name or found.name.replace("/", "-"))
        elif self.data is None or self.rewards is None:
            raise ValueError("a set needs data and rewards, or a benchmark")
        elif self.limit or self.data_dir:
            raise ValueError("limit and data_dir are for a benchmark; data has its own size and source")
        if not self.name or "/" in self.name:
            raise ValueError(f"a set's name must be non-empty and without '/', got {self.name!r}")

    @property
    def rubric(self) -> RubricConfig:
        """What judges a completion; a benchmark's grader never stops a run, what it fails on is counted."""
        if self.rewards is not None:
            return self.rewards
        return RubricConfig(functions=(find_benchmark(self.benchmark).grader,), max_error_rate=1.0)

    def load(self) -> list[Problem]:
        """The problems.

        Raises:
            ValueError: the data set is missing, empty or broken.
        """
        if self.data is not None:
            return load_problems(self.data)
        from evals.benchmark_data import load_benchmark

        # Problems and prompts alone come from the protocol; how completions are drawn, the recipe says.
        protocol = protocol_of("deepseek", template=self.template)
        folder = Path(self.data_dir) if self.data_dir else None
        benchmark = find_benchmark(self.benchmark)
        problems = load_benchmark(benchmark, protocol=protocol, data_dir=folder, limit=self.limit).problems
        # The bare question is what a training set would hold.
        end = f"\n{benchmark.instruction}"
        return [
            replace(each, metadata={**each.metadata, ORIGINAL_PROMPT: each.prompt.removesuffix(end)})
            for each in problems
        ]


@dataclass(frozen=True, kw_only=True)
class EvalStage:
    """Evaluation of the policy as the stage before left it.

    Attributes:
        kind, name: the stage's kind and the name of its folder.
        sets: the held-out sets.
    """

    kind: str = "eval"
    name: str = "eval"
    sets: tuple[HeldoutSet, ...]

    def __post_init__(self) -> None:
        if not self.sets:
            raise ValueError("sets is empty: name at least one held-out set")
        names = [item.name for item in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"names of held-out sets must differ, got {', '.join(names)}")


def run_eval(stage: EvalStage, workers: Workers, folder: StageDir, tracker: Tracker) -> dict[str, Any]:
    """Evaluates every set; returns ``{"results": {set: {"pass_at_1", "ci95", "greedy", "n", "k", …}}}``.

    Finished groups are kept in the stage's folder, so that a killed evaluation draws only what is missing.

    Raises:
        AttestationError: the engines do not hold the weights that are to be evaluated.
    """
    workers.sync_weights(0)
    finished = 0

    def advance(samples: int) -> None:
        nonlocal finished
        finished += samples
        tracker.advance_eval(finished)

    results = evaluate_sets(stage.sets, workers, folder, tag="eval", advance=advance)
    tracker.log(0, eval_metrics(results), done=finished)
    return {"results": results}


def evaluate_sets(
    sets: Sequence[HeldoutSet],
    workers: Workers,
    folder: StageDir,
    *,
    tag: str,
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, dict[str, Any]]:
    """Draws and scores the sets under the current weights; ``tag`` names their journals in the folder."""
    from evals.run import evaluate_set

    results: dict[str, dict[str, Any]] = {}
    for item in sets:
        sampled = workers.heldout_rollouts(item, folder, tag=tag, greedy=False, advance=advance)
        greedy = workers.heldout_rollouts(item, folder, tag=tag, greedy=True, advance=advance) if item.greedy else None
        results[item.name] = evaluate_set(item.name, sampled, greedy=greedy, judge=item.rubric.judge).to_json()
    return results


def completions_of(stage: EvalStage, problems: ProblemSets) -> int:
    """Completions that an evaluation draws."""
    return sum(len(problems.heldout(item)) * (item.samples + item.greedy) for item in stage.sets)


def evaluate_model(
    model: str, loaded: LoadedRecipe, *, out: Path | None = None, trained_by: LoadedRecipe | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint on the held-out sets of a recipe.

    Args:
        model: Hugging Face folder or hub id.
        loaded: the recipe whose held-out sets are drawn.
        out: keep completions and ``results.json`` here and go on from what is there; None keeps nothing.
        trained_by: the recipe that trained the model, where it is known: none of its training problems may be held out.

    Returns:
        ``{"model", "results": {set: {"pass_at_1", "ci95", "greedy", "n", "k", …}}}``.

    Raises:
        ValueError: the recipe has no held-out set, the model cannot be loaded, a held-out problem was trained on, or
            ``out`` holds the completions of other weights.
    """
    from pipelines.problem_sets import ProblemSets
    from pipelines.run import run_recipe
    from policy.config import ModelConfig

    problems = ProblemSets(loaded.recipe)
    sets = {item.name: item for item in problems.heldout_sets()}
    if not sets:
        raise ValueError(f"{loaded.source} has no held-out set: add an eval stage to it, or name another --recipe")
    if trained_by is not None:
        for other in trained_by.recipe.stages:
            if (data := getattr(other, "data", None)) is not None:
                trained = ProblemSets(trained_by.recipe).training(data)
                for item in sets.values():
                    check_disjoint(trained, problems.heldout(item), heldout_name=item.name)
    stage = EvalStage(sets=tuple(sets.values()))
    with tempfile.TemporaryDirectory(prefix="r1-eval-") as scratch:
        folder = Path(scratch) / "eval" if out is None else out.expanduser().absolute()
        _check_same_weights(folder, model)
        recipe = replace(
            loaded.recipe, name=folder.name, stages=(stage,), run=replace(loaded.recipe.run, dir=str(folder.parent)),
            model=ModelConfig(path=model, dtype=loaded.recipe.model.dtype),
        )  # fmt: skip
        summary = run_recipe(replace(loaded, recipe=recipe))
        answer = {"model": model, "results": summary["stages"][0]["results"]}
        if out is not None:
            write_atomic(folder / "results.json", json.dumps(answer, indent=2) + "\n")
    return answer


def _check_same_weights(folder: Path, model: str) -> None:
    """Refuses to go on with completions that other weights at the same place have drawn.

    Raises:
        ValueError: the model's files are not those that the folder was begun with.
    """
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    now = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    marker = folder.with_name(f".{folder.name}.weights.json")
    if marker.exists() and folder.exists() and json.loads(marker.read_text("utf-8")) != now:
        raise ValueError(
            f"{folder} was begun with other weights at {model}: name another folder with --out, or remove that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(marker, json.dumps(now) + "\n")

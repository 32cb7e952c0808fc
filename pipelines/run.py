"""A recipe is a list of stages: check everything, run them in order, go on where a killed run stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.contamination import check_contamination
from pipelines.evaluate import EvalStage, completions_of, run_eval
from pipelines.first_model import check_same_model, record_model
from pipelines.grpo import GrpoStage, check_gate, train_grpo
from pipelines.machine import machine
from pipelines.problem_sets import ProblemSets
from pipelines.resources import check_here, own_cores
from pipelines.run_dir import RunDir, StageDir
from pipelines.schema import plain
from pipelines.sft import SftStage, resolve_target, train_sft
from pipelines.tracking import Tracker
from policy.config import RouterConfig
from rewards.base import BUILT_IN, RewardConfig, check_problems
from rewards.bounded import BoundedCalls, Overrun
from rewards.calling import bind
from rewards.rubric import RubricConfig
from rollout.types import Problem

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe, Recipe
    from pipelines.workers import Workers


_LOADING_S = 60.0  # for the import of a user's module
_LOADING_BYTES = 64 << 30  # of address space: some import torch


def run_recipe(loaded: LoadedRecipe, *, fresh: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Runs a recipe, or goes on with it; returns the run's summary.

    Args:
        loaded: the recipe and where its values came from.
        fresh: move an existing run folder aside and start over.
        dry_run: check everything that can be checked without starting a process, and return what was found.

    Raises:
        ValueError: something in the recipe, its data, its model or its reward functions is not usable.
        OSError: the run folder cannot be written.
    """
    recipe = loaded.recipe
    # A user's own modules (rewards, data rewrites) are found in the working directory and beside the recipe.
    sys.path.extend(p for p in (str(Path.cwd()), str(Path(loaded.source).absolute().parent)) if p not in sys.path)
    problems = ProblemSets(recipe)
    report = check_recipe(recipe, problems)
    if dry_run:
        return report
    with RunDir.open(recipe.run.dir, loaded, fresh=fresh) as run:
        folders = [run.stage(index, stage.name, stage.kind) for index, stage in enumerate(recipe.stages)]
        if any(folder.done is None for folder in folders):
            _know_model(recipe, run)
            run.write_summary(summary_of(recipe, folders))
            _run_stages(recipe, run, folders, problems)
        summary = summary_of(recipe, folders)
        run.write_summary(summary)
        return summary


def check_recipe(recipe: Recipe, problems: ProblemSets) -> dict[str, Any]:
    """Loads data, resolves functions and finds the model, so that a run does not fail late.

    Returns:
        ``{"name", "seed", "stages": [{"name", "kind", "problems", …}]}``, and ``"mtp"`` where the model has
        multi-token-prediction weights: what becomes of them.

    Raises:
        ValueError: names what is missing and where.
    """
    from policy.layout import check_layout
    from policy.loading import check_model
    from policy.routing import check_routing

    _check_machine(recipe)
    mtp = check_model(recipe.model)
    check_layout(recipe.model, recipe.parallel)
    _check_tensor_parallel(recipe)
    stages = []
    for stage in recipe.stages:
        entry: dict[str, Any] = {"name": stage.name, "kind": stage.kind}
        router, experts = getattr(stage, "router", RouterConfig()), recipe.engine.return_routed_experts
        check_routing(recipe.model, router, f"stages.{stage.name}", return_experts=experts)
        if isinstance(stage, SftStage | GrpoStage):
            entry["problems"] = len(problems.training(stage.data))
            entry["steps"] = stage.steps
            wanted = stage.batch_size if isinstance(stage, SftStage) else stage.problems_per_step
            if wanted > entry["problems"]:
                raise ValueError(
                    f"stages.{stage.name}: a step asks for {wanted} different problems and its data has "
                    f"{entry['problems']}: lower it, or raise data.size"
                )
        if isinstance(stage, SftStage):
            _check_target(stage, problems.training(stage.data)[0])
        if isinstance(stage, GrpoStage):
            _check_rewards(stage.name, stage.rewards, problems.training(stage.data))
        for item in (*getattr(stage, "sets", ()), *getattr(stage, "eval_sets", ())):
            _check_rewards(f"{stage.name}.{item.name}", item.rubric, problems.heldout(item))
            entry.setdefault("heldout", {})[item.name] = len(problems.heldout(item))
        stages.append(entry)
    _check_gates(recipe.stages)
    _check_contamination(recipe, problems)
    report = {"name": recipe.name, "seed": recipe.seed, "stages": stages}
    return report if mtp is None else {**report, "mtp": mtp}


def _check_machine(recipe: Recipe) -> None:
    """Sees that this machine can carry the run; a cluster is asked when it has been joined.

    Raises:
        ValueError: it cannot.
    """
    cores = len(own_cores(recipe.run.cpus))
    if recipe.run.ray_address is not None:
        return
    offloading = (
        f"stages.{stage.name}.optimizer.offload"
        for stage in recipe.stages
        if isinstance(stage, SftStage | GrpoStage) and stage.optimizer.offload
    )
    check_here(recipe.engine, cores=cores, learners=recipe.parallel.ranks, offloading=next(offloading, None))


def _check_tensor_parallel(recipe: Recipe) -> None:
    """Sees that an engine's ranks can share the heads; vLLM would refuse it when the first stage has been trained.

    Raises:
        ValueError: they cannot.
    """
    from policy.presets import config_of

    heads = getattr(config_of(recipe.model).get_text_config(), "num_attention_heads", None)
    if heads is not None and heads % recipe.engine.tensor_parallel:
        raise ValueError(
            f"engine.tensor_parallel is {recipe.engine.tensor_parallel}, which does not divide the model's {heads} "
            "attention heads: set it to a divisor"
        )


def _know_model(recipe: Recipe, run: RunDir) -> None:
    """Keeps what is in the folder ``model.path`` when the run begins, and refuses to go on with anything else."""
    mend = ", give the run another name, or begin anew with --fresh"
    if run.resumed and check_same_model(run.path, recipe.model, mend):
        return
    if record_model(run.path, recipe.model) and run.resumed:  # killed before, or begun by an earlier version
        run.note({"event": "model_recorded_late", "model": recipe.model.path})


def _run_stages(recipe: Recipe, run: RunDir, folders: Sequence[StageDir], problems: ProblemSets) -> None:
    from pipelines.console import open_view
    from pipelines.workers import Workers

    remaining = [stage for stage, folder in zip(recipe.stages, folders, strict=True) if folder.done is None]
    view = open_view(live=recipe.tracking.console, line_every_s=recipe.tracking.line_every_s)
    with closing(view), Workers(recipe, run, problems) as workers:
        for asked, template in problems.everything():
            workers.check_prompts(asked, template)
        if any(isinstance(stage, GrpoStage | EvalStage) for stage in remaining):
            workers.start_engines()
        results: dict[str, Any] = {}
        model: Path | None = None
        for stage, folder in zip(recipe.stages, folders, strict=True):
            figures = folder.done
            if figures is None:
                if model is not None:
                    workers.load_model(model)
                if isinstance(stage, GrpoStage):
                    check_gate(stage.gate, results)
                started = time.monotonic()
                run.note(
                    {"event": "stage_started", "stage": stage.name, "kind": stage.kind, "machine": machine(recipe)}
                )
                with Tracker(
                    folder, recipe.tracking, recipe.name, total=_total(stage, problems), view=view, recipe=plain(recipe)
                ) as tracker:
                    figures = _run_stage(stage, workers, folder, problems, tracker)
                figures["seconds"] = round(time.monotonic() - started, 3)
                folder.mark_done(figures)
                run.write_summary(summary_of(recipe, folders))
            if isinstance(stage, SftStage | GrpoStage):
                model = folder.model
            if isinstance(stage, GrpoStage):
                workers.base_version = int(figures["policy_version"])
            results |= figures.get("results", {})


def _run_stage(
    stage: Any, workers: Workers, folder: StageDir, problems: ProblemSets, tracker: Tracker
) -> dict[str, Any]:
    if isinstance(stage, EvalStage):
        return run_eval(stage, workers, folder, tracker)
    stream = problems.stream(stage)
    if isinstance(stage, SftStage):
        return train_sft(stage, workers, stream, folder, tracker)
    return train_grpo(stage, workers, stream, folder, tracker)


def _total(stage: Any, problems: ProblemSets) -> int:
    return completions_of(stage, problems) if isinstance(stage, EvalStage) else stage.steps


def summary_of(recipe: Recipe, folders: Sequence[StageDir]) -> dict[str, Any]:
    """What summary.json holds: every stage, its status and its headline figures."""
    stages = []
    for stage, folder in zip(recipe.stages, folders, strict=True):
        figures = folder.done
        status = "pending" if figures is None else "done"
        stages.append({"name": stage.name, "kind": stage.kind, "status": status, **(figures or {})})
    return {"name": recipe.name, "seed": recipe.seed, "stages": stages}


def _check_contamination(recipe: Recipe, problems: ProblemSets) -> None:
    """Looks for what is evaluated in what is trained on; equal prompts are kept apart when the data are loaded.

    Raises:
        ValueError: there is some, and the recipe refuses it.
    """
    heldout = {item.name: problems.heldout(item) for item in problems.heldout_sets()}
    seen: set[str] = set()
    for stage in recipe.stages if heldout else ():
        data = getattr(stage, "data", None)
        if data is None or repr(data) in seen:
            continue
        seen.add(repr(data))
        check_contamination(
            problems.training(data), heldout, mode=recipe.contamination, train_name=f"stages.{stage.name}.data"
        )


def _check_target(stage: SftStage, problem: Problem) -> None:
    """Makes one demonstration, so that a broken function shows before anything starts."""
    import random

    text = resolve_target(stage)(problem, random.Random(0))
    if not isinstance(text, str):
        raise ValueError(f"stages.{stage.name}.target {stage.target!r} must return a text, got {type(text).__name__}")


def _check_rewards(place: str, rubric: RubricConfig, problems: Sequence[Problem]) -> None:
    """Finds every reward function and what it asks for, and the problems that it could never judge.

    Raises:
        ValueError: names the place in the recipe, and the problem.
    """
    for function in rubric.functions:
        try:
            if function.path not in BUILT_IN and (fault := _fault_of_loading(function)):
                raise ValueError(fault)
            bound = bind(function)
        except Exception as error:  # importing a user's module may raise anything: the reward boundary
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"stages.{place}.rewards: {function.path!r}: {kind}{error}") from error
        try:
            check_problems(bound.function, problems)
        except ValueError as error:
            raise ValueError(f"stages.{place}.data, for the reward {function.name!r}: {error}") from error


def _fault_of_loading(function: RewardConfig) -> str | None:
    """What importing a user's module and looking at its function raises or does to the process that does it."""
    calls = BoundedCalls(memory=_LOADING_BYTES)
    try:
        return calls.call(_load, function, timeout_s=_LOADING_S)
    except Overrun as error:
        return f"importing it does not end, or ends the process: {error}"
    finally:
        calls.close()


def _load(function: RewardConfig) -> str | None:
    try:
        bind(function)
    except ValueError as error:
        return str(error)
    except BaseException as error:  # SystemExit among them
        return f"importing it raises {type(error).__name__}: {error}"
    return None


def _check_gates(stages: Sequence[Any]) -> None:
    seen: set[str] = set()
    for stage in stages:
        if isinstance(stage, GrpoStage) and stage.gate is not None and stage.gate.set not in seen:
            raise ValueError(
                f"stages.{stage.name}.gate.set: no eval stage before it has a set named {stage.gate.set!r} "
                f"(there are: {', '.join(sorted(seen)) or 'none'})"
            )
        if isinstance(stage, EvalStage):
            seen |= {item.name for item in stage.sets}

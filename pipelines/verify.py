"""``r1 verify``: measures on a recipe's own model and problems that nothing depends on how the work is cut.

The order: an engine is started and draws; it is compared with the learner; the learner's loss and gradients are
computed in many ways from what was drawn; ranks, and a saved and loaded state, come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.verify_agreement import engine_rows
from pipelines.verify_ranks import rank_rows
from pipelines.verify_rows import OF_THE_ENGINE, PROPERTIES, Finding, Row, measured, unmeasured
from pipelines.verify_samples import as_groups
from pipelines.verify_subject import Cut, Note, Subject, VerifyOptions

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe
    from policy.invariance import Deviation

__all__ = ["VerifyOptions", "verify"]


def verify(loaded: LoadedRecipe, options: VerifyOptions, note: Note, show: Callable[[Row], None]) -> dict[str, Any]:
    """Measures what ``options.only`` names.

    Args:
        loaded: the recipe.
        options: what the command line says.
        note: receives what is being done.
        show: receives each row as soon as it is there.

    Returns:
        ``{"ok", "recipe", "stage", "model", "dtype", "samples", "rows": [Row.to_json()]}``; ``ok`` when no row failed.

    Raises:
        ValueError: the recipe, its model or its data cannot be used.
        EngineDied: the engine's process is gone.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="r1-verify-")))
        note("loading the model")
        subject = Subject(loaded, options, scratch)
        stack.callback(subject.close)
        subject.gather(start_engine=bool(options.only & set(OF_THE_ENGINE)), note=note)
        for part in (engine_rows, cut_rows, rank_rows, state_rows):
            for row in part(subject, note):
                rows.append(row)
                show(row)
        model = subject.recipe.model
        facts = {
            "recipe": subject.recipe.name, "stage": subject.stage.name, "model": model.path or f"preset {model.preset}",
            "dtype": "float64" if options.dtype == "float64" else model.dtype, "engine_dtype": model.dtype,
            "samples": subject.origin,
        }  # fmt: skip
    order = list(PROPERTIES)
    rows.sort(key=lambda row: order.index(row.property))
    return {"ok": all(row.ok is not False for row in rows), **facts, "rows": [row.to_json() for row in rows]}


def cut_rows(subject: Subject, note: Note) -> Iterator[Row]:
    """Loss and gradient by many cuts."""
    from policy import invariance

    wanted = [name for name in PROPERTIES if name in _CUTS and name in subject.options.only]
    if not wanted:
        return
    cut = subject.cut
    if isinstance(cut, str):
        yield from (unmeasured(name, cut) for name in wanted)
        return
    bench, samples = cut.bench, cut.samples
    note("computing loss and gradient in one piece")
    base = bench.outcome(samples, **invariance.whole(samples, bench.config))
    ways: dict[str, Callable[[], Deviation]] = {
        "micro_batch": lambda: invariance.micro_batches(bench, samples, base),
        "packing": lambda: invariance.packing(bench, samples),
        "neighbours": lambda: invariance.neighbours(bench, samples),
        "order": lambda: invariance.orders(bench, samples, base, subject.recipe.seed),
        "logprob_chunk": lambda: invariance.logprob_chunks(bench, samples, base),
        "checkpointing": lambda: invariance.checkpointing(bench, samples, base),
        "step": lambda: invariance.whole_step(bench, samples, subject.stage.optimizer, subject.mini_batches),
    }
    for name in wanted:
        if name == "checkpointing" and not invariance.recomputed_layers(bench.model):
            yield unmeasured(name, "not applicable: the model has no layers that can be computed again")
            continue
        note(PROPERTIES[name])
        yield measured(name, partial(_cut_finding, name, cut, ways[name]))


_CUTS = ("micro_batch", "packing", "neighbours", "order", "logprob_chunk", "checkpointing", "step")


def _cut_finding(name: str, cut: Cut, measure: Callable[[], Deviation]) -> Finding:
    from policy.invariance import gradient_tolerance, logprob_tolerance

    found = measure()
    model = cut.bench.model
    if name == "neighbours":
        tolerance, reason = logprob_tolerance(model.dtype, model)
        return Finding(worst=found.worst, where=found.where, tolerance=tolerance, reason=reason, unit="nats")
    tokens = sum(len(s.token_ids) - s.prompt_length for s in cut.samples)
    tolerance, reason = gradient_tolerance(model.dtype, tokens, model)
    return Finding(worst=found.worst, where=found.where, tolerance=tolerance, reason=reason)


def state_rows(subject: Subject, note: Note) -> Iterator[Row]:
    """A saved and loaded state goes on bit for bit."""
    if "save_load" in subject.options.only:
        note(PROPERTIES["save_load"])
        yield measured("save_load", partial(_save_load, subject))


def _save_load(subject: Subject) -> Finding:
    """step, save, step; a fresh learner loads and takes the second step: every bit of both states must be the same."""
    folder = subject.scratch / "checkpoints" / "step-000001"
    seed = subject.recipe.seed

    def straight(ask: Callable[..., Any]) -> Any:
        _begin(subject, ask)
        _train(subject, ask)
        ask("save", str(folder), {"step": 1})
        _train(subject, ask)

    def resumed(ask: Callable[..., Any]) -> Any:
        _begin(subject, ask)
        extra = ask("restore", str(folder))
        _train(subject, ask)
        return extra

    states: list[dict[str, str]] = []
    extra = None
    with subject.learner() as ask:
        for number, way in enumerate((straight, resumed)):
            ask("seed_everything", seed + number)  # a new process knows nothing of the old one's random numbers
            ask("start_over")
            extra = way(ask)
            states.append(ask("digests"))
        ask("close")
    expected, found = states
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong += [] if extra == {"step": 1} else ["what was saved beside the state"]
    ranks = subject.recipe.parallel.ranks
    return Finding(
        worst=float(len(wrong)), where=", ".join(wrong[:3]), tolerance=0.0, unit="tensors",
        reason=f"the same bits in all {len(expected)} tensors and numbers of the state: nothing is rounded on the way",
        detail={"compared": len(expected), "ranks": ranks},
    )  # fmt: skip


def _begin(subject: Subject, ask: Callable[..., Any]) -> None:
    stage = subject.stage
    steps = stage.steps * max(1, subject.mini_batches)
    ask(
        "begin", optimizer=stage.optimizer, loss=subject.loss, config=stage.learner,
        router=replace(stage.router, replay=False), total_steps=max(steps, 4),
    )  # fmt: skip


def _train(subject: Subject, ask: Callable[..., Any]) -> None:
    """One step of the stage on the samples."""
    if not subject.mini_batches:
        ask("sft_step", [(sample.token_ids, sample.prompt_length) for sample in subject.samples])
        return
    ask(
        "grpo_step", as_groups(subject.samples), mask_truncated=False, mini_batches=subject.mini_batches,
        temperature=subject.temperature, constant_length=subject.constant_length,
    )  # fmt: skip

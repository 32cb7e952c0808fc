"""The rows of ``r1 verify`` about ranks: loss and gradient of one process, and of Ray actors that share the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.resources import count_gpus, start_ray
from pipelines.verify_rows import PROPERTIES, Finding, Row, measured, unmeasured
from pipelines.verify_subject import Cut, Note, Subject
from policy.config import ParallelConfig

if TYPE_CHECKING:
    from policy.invariance import Deviation

_SHARING = {"ranks": 1, "expert_parallel": 2}
"""The rows, and how many ranks share the experts in them."""


def rank_rows(subject: Subject, note: Note) -> Iterator[Row]:
    """Loss and gradient over 2 ranks (and 4), and with the experts shared by two of them."""
    wanted = [name for name in _SHARING if name in subject.options.only]
    if not wanted:
        return
    cut, left = subject.cut, {}
    for name in wanted:
        if isinstance(cut, str) or (why := _obstacle(name, subject)) is not None:
            left[name] = unmeasured(name, cut if isinstance(cut, str) else str(why))
    yield from left.values()
    wanted = [name for name in wanted if name not in left]
    if not wanted or isinstance(cut, str):
        return
    found: dict[str, list[Deviation]] = {name: [] for name in wanted}
    seconds = dict.fromkeys(wanted, 0.0)
    for size in _sizes(subject):
        for name, deviation, took in _of_size(subject, cut, size, wanted, note):
            found[name].append(deviation)
            seconds[name] += took
    for name in wanted:
        row = measured(name, lambda name=name: _finding(cut, found[name]))
        yield replace(row, seconds=seconds[name])


def _sizes(subject: Subject) -> Sequence[int]:
    """Numbers of processes; as many as there are GPUs, where there are any."""
    gpus = count_gpus()
    return [size for size in ((2, 4) if subject.options.full else (2,)) if gpus == 0 or size <= gpus]


def _obstacle(name: str, subject: Subject) -> str | None:
    """Why a row cannot be measured here; None when it can."""
    if name == "expert_parallel":
        lora, config = subject.recipe.model.lora, subject.service.model.config
        if not subject.routed:
            return "not applicable: the model has no mixture of experts of DeepSeek-V3's kind"
        if lora is not None and lora.experts:
            return "not applicable: experts with adapters are not shared out"
        if config.n_routed_experts % 2:
            return f"not applicable: 2 ranks cannot share {config.n_routed_experts} experts"
    start_ray(subject.recipe.run.ray_address, len(subject.cores))
    return None if _sizes(subject) else "not measured: 2 ranks need 2 GPUs, and there is one"


def _of_size(
    subject: Subject, cut: Cut, size: int, wanted: Sequence[str], note: Note
) -> Iterator[tuple[str, Deviation, float]]:
    """Each row's deviation with so many processes, and the seconds it took; the same processes for all rows."""
    from policy.invariance import compare, loss_scale, whole

    bench, samples = cut.bench, cut.samples
    base = bench.outcome(samples, **whole(samples, bench.config))
    scale = loss_scale(samples, bench.loss, bench.constant_length)
    longest, total = max(len(s.token_ids) for s in samples), sum(len(s.token_ids) for s in samples)
    # Three micro-batches or so: with two ranks one of them is left without work in the last round.
    config = replace(bench.config, micro_batch_tokens=max(longest, total // 3))
    fields: dict[str, Any] = {
        "loss": bench.loss, "config": config, "router": bench.router, "temperature": bench.temperature,
        "constant_length": bench.constant_length,
    }  # fmt: skip
    layouts = [ParallelConfig(ranks=size, expert_parallel=_SHARING[name]) for name in wanted]
    note(f"starting {size} ranks")
    began = time.monotonic()
    with subject.learner(layouts[0]) as ask:
        for name, layout in zip(wanted, layouts, strict=True):
            note(f"{PROPERTIES[name]}: {_way(layout)}")
            if layout != layouts[0]:
                ask("regroup", layout)
            ask("load_for_measuring", cut.dtype, reference=bench.reference is not None)
            outcome = ask("outcome", fields, samples)
            yield name, compare(base, outcome, scale, _way(layout)), time.monotonic() - began
            began = time.monotonic()


def _way(layout: ParallelConfig) -> str:
    data = layout.ranks // layout.expert_parallel
    if layout.expert_parallel == 1:
        return f"{layout.ranks} ranks"
    return f"{data} x {layout.expert_parallel} ranks" if data > 1 else f"experts shared by {layout.expert_parallel}"


def _finding(cut: Cut, found: Sequence[Deviation]) -> Finding:
    from policy.invariance import Deviation, gradient_tolerance

    worst = Deviation.largest(found)
    tokens = sum(len(s.token_ids) - s.prompt_length for s in cut.samples)
    model = cut.bench.model
    tolerance, reason = gradient_tolerance(model.dtype, tokens, model)
    ways = [each.where.partition(":")[0] for each in found]
    return Finding(worst=worst.worst, where=worst.where, tolerance=tolerance, reason=reason, detail={"layouts": ways})

"""Seconds of a whole weight sync (publish, update, attest by bytes and by meaning) against a plain copy of the same
bytes."""

from __future__ import annotations

from benchmarks.house import grpo_stage, open_house
from benchmarks.machine import copy_seconds
from benchmarks.measure import Comparison, Series, mean_of, take_turns, timed
from benchmarks.options import Options
from benchmarks.workload import prompts, write_model, write_prompts

_WARMUP = 2  # the first syncs compile kernels and map memory


def run(options: Options) -> list[Comparison]:
    """See the module."""
    folder, rows = options.scratch / "model", options.scratch / "prompts.jsonl"
    write_model(folder, seed=options.seed)
    write_prompts(rows, prompts(2, options.seed))
    stage = grpo_stage("sync", rows, steps=1, problems=2, max_tokens=64)
    with open_house(options, folder, (stage,)) as house:
        options.say("starting the rollout workers")
        first = house.workers.sync_weights(0)
        step = 0
        inside: list[float] = []

        def sync() -> None:
            nonlocal step
            step += 1
            inside.append(house.workers.sync_weights(step).seconds)

        values = take_turns(
            {"ours": lambda: timed(sync), "copy": lambda: copy_seconds(first.bytes)},
            rounds=options.pick(20, 5),
            warmup=_WARMUP,
        )
    measured = inside[_WARMUP:]
    publish = mean_of([whole - part for whole, part in zip(values["ours"], measured, strict=True)])
    return [
        Comparison(
            key="sync",
            title="Weight sync with both attestations against a plain memory copy of the same bytes",
            unit="s",
            ours=Series(name="r1 weight sync", values=values["ours"]),
            peers=(Series(name="memory copy", values=values["copy"]),),
            reading="times the seconds of one copy",
            notes={
                "workload": f"{first.bytes / 1e6:.1f} MB to every rollout worker; one copy by the learner into shared "
                "memory, one load by each engine, 4 canary texts of which each engine continues 16 tokens",
                "parts": f"publishing {publish * 1e3:.0f} ms, updating and attesting {mean_of(measured) * 1e3:.0f} ms "
                "(means)",
                "agreement": f"largest |Δlogp| between engine and learner {first.max_abs:.1e} nats",
            },
        )
    ]

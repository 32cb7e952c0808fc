"""Samples/s of a GRPO step against TRL's GRPOTrainer: same weights, prompts, group size, token limit and reward.

Ours is ``train_grpo`` itself, with its journal, its metrics and its attested weight sync; TRL runs in a process of
its own. The two take turns, one whole step each. Nobody is told how long a completion will be: both sample until
end-of-sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.house import GROUP_SIZE, LEARNING_RATE, House, grpo_stage, open_house
from benchmarks.measure import Comparison, Series, mean_of
from benchmarks.options import Options
from benchmarks.peer import Peer
from benchmarks.trl_peer import TrlStep, TrlWorkload, serve
from benchmarks.workload import MEAN_TOKENS, prompts, write_model, write_prompts
from pipelines.grpo import GrpoStage, train_grpo
from pipelines.tracking import StepClock, Tracker

if TYPE_CHECKING:
    from pipelines.run_dir import StageDir


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One comparison.

    Attributes:
        key, title: of the comparison.
        problems: prompts per step, each sampled ``GROUP_SIZE`` times.
        max_tokens: limit of a completion.
        rounds: measured steps; ``warmup`` steps before them are not counted.
        micro_batch: sequences of one of TRL's forward passes.
        goal: samples/s over TRL's.
    """

    key: str
    title: str
    problems: int
    max_tokens: int
    rounds: int
    warmup: int
    micro_batch: int
    goal: float

    @property
    def steps(self) -> int:
        return self.warmup + self.rounds

    @property
    def samples(self) -> int:
        return self.problems * GROUP_SIZE


def workloads(options: Options) -> tuple[Workload, ...]:
    """The short one comes first and warms both sides up for the ragged one."""
    pick = options.pick
    short, ragged = pick(16, 8), pick(32, 8)
    limit = pick(512, 256)
    return (
        Workload(
            key="grpo-short", title=f"GRPO step, {short * GROUP_SIZE} samples of at most 64 tokens", problems=short,
            max_tokens=64, rounds=pick(4, 2), warmup=1, micro_batch=32, goal=2.0,
        ),
        Workload(
            key="grpo-ragged", title=f"GRPO step, {ragged * GROUP_SIZE} samples, ragged up to {limit} tokens",
            problems=ragged, max_tokens=limit, rounds=1, warmup=0, micro_batch=32, goal=5.0,
        ),
    )  # fmt: skip


def run(options: Options) -> list[Comparison]:
    """See the module."""
    folder, rows = options.scratch / "model", options.scratch / "prompts.jsonl"
    write_model(folder, seed=options.seed)
    work = workloads(options)
    write_prompts(rows, prompts(max(w.problems for w in work) * 2, options.seed))
    stages = tuple(grpo_stage(w.key, rows, steps=w.steps, problems=w.problems, max_tokens=w.max_tokens) for w in work)
    theirs = tuple(_for_trl(w, rows, options.seed) for w in work)
    with Peer("TRL", serve, folder, options.scratch, theirs) as trl:
        experts = trl.ask("ready")  # it measures its choices: alone on the machine
        options.say(f"TRL: experts {experts} are the fastest; starting learner and rollout workers")
        with open_house(options, folder, stages) as house:
            found = []
            for index, workload in enumerate(work):
                options.say(workload.title)
                found.append(_compare(house, index, workload, trl, experts))
                house.workers.base_version += workload.steps
            return found


def _compare(house: House, index: int, workload: Workload, trl: Peer, experts: str) -> Comparison:
    stage, folder, stream = house.stage(index)
    peer_steps: list[TrlStep] = []
    metronome = Metronome(house, folder, stage, before=lambda: peer_steps.append(trl.ask("step")))
    with metronome:
        train_grpo(stage, house.workers, stream, folder, metronome)
    ours, theirs = metronome.steps[workload.warmup :], peer_steps[workload.warmup :]
    rows = metronome.rows[workload.warmup :]
    phases = ("rollout", "learner", "sync", "journal")
    parts = {p: mean_of([row[f"seconds/{p}"] for row in rows if f"seconds/{p}" in row]) for p in phases}
    return Comparison(
        key=workload.key,
        title=workload.title,
        unit="samples/s",
        ours=Series(name="r1 train_grpo", values=tuple(workload.samples / s for s in ours)),
        peers=(Series(name="TRL GRPOTrainer", values=tuple(workload.samples / s.seconds for s in theirs)),),
        goal=workload.goal,
        notes={
            "workload": f"{workload.problems} prompts x {GROUP_SIZE} samples, end-of-sequence after every token with "
            f"probability 1/{MEAN_TOKENS}; mean length {mean_of([r['rollout/length_mean'] for r in rows]):.0f} tokens "
            f"(r1), {mean_of([n for step in theirs for n in step.lengths]):.0f} (TRL)",
            "seconds": f"r1 {mean_of(ours):.1f} a step ({', '.join(f'{k} {v:.2f}' for k, v in parts.items())}), "
            f"TRL {mean_of([s.seconds for s in theirs]):.1f}",
            "TRL": f"transformers generate, fp32, experts {experts} (the faster of eager and grouped_mm), "
            f"micro-batches of {workload.micro_batch}, no gradient checkpointing, no reference model",
        },
    )


class Metronome(Tracker):
    """A tracker that lets the peer take its step before each of ours, and times ours from its clock to its log.

    Args:
        house: the run.
        folder, stage: the stage that is tracked.
        before: called before each step, outside of the measured time.
    """

    def __init__(self, house: House, folder: StageDir, stage: GrpoStage, *, before: Callable[[], None]) -> None:
        super().__init__(folder, house.recipe.tracking, house.recipe.name, total=stage.steps)
        self._before = before
        self._began = 0.0
        self.steps: list[float] = []
        self.rows: list[Mapping[str, float]] = []

    def clock(self, step: int) -> StepClock:
        """The peer's turn, then ours begins."""
        self._before()
        self._began = time.perf_counter()
        return super().clock(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Our step ends when its metrics are on the disk."""
        super().log(step, metrics)
        self.steps.append(time.perf_counter() - self._began)
        self.rows.append(metrics)


def _for_trl(workload: Workload, rows: Path, seed: int) -> TrlWorkload:
    return TrlWorkload(
        prompts=rows,
        problems=workload.problems,
        group_size=GROUP_SIZE,
        max_tokens=workload.max_tokens,
        steps=workload.steps,
        micro_batch=workload.micro_batch,
        learning_rate=LEARNING_RATE,
        seed=seed,
    )

"""Sampled tokens/s of the rollout workers (Ray actors, scored and journaled) against bare vLLM on the same cores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.house import ENGINE, GROUP_SIZE, House, grpo_stage, open_house
from benchmarks.machine import core_groups, usable_cores
from benchmarks.measure import Comparison, Series, mean_of, take_turns
from benchmarks.options import Options
from benchmarks.peer import Peer
from benchmarks.vllm_peer import BareAnswer, BareConfig, BareJob, serve, split
from benchmarks.workload import MEAN_TOKENS, prompts, write_model, write_prompts
from rollout.template import render_prompt
from rollout.types import sampling_seed

_REST_S = 1.5  # an idle vLLM spins for a second before it sleeps
_WARMUP = 1


def run(options: Options) -> list[Comparison]:
    """See the module."""
    folder, rows = options.scratch / "model", options.scratch / "prompts.jsonl"
    write_model(folder, seed=options.seed)
    problems, limit, rounds = options.pick(32, 16), options.pick(512, 256), options.pick(4, 2)
    write_prompts(rows, prompts(problems, options.seed))
    stage = grpo_stage("rollouts", rows, steps=1, problems=problems, max_tokens=limit)
    groups = core_groups(usable_cores(), min(4, len(usable_cores())))
    with ExitStack() as stack:
        options.say(f"starting {len(groups)} rollout workers and {len(groups)} bare engines")
        house = stack.enter_context(open_house(options, folder, (stage,)))
        bare = [stack.enter_context(Peer("bare vLLM", serve, bare_config(folder, cores))) for cores in groups]
        house.workers.sync_weights(0)
        for peer in bare:
            peer.ask("ready")
        ours, theirs = _Ours(house), _Bare(house, bare, limit)
        values = take_turns(
            {"ours": ours.tokens_per_s, "bare": theirs.tokens_per_s}, rounds=rounds, warmup=_WARMUP, pause_s=_REST_S
        )
    return [
        Comparison(
            key="rollout",
            title="Rollout workers against bare vLLM on the same cores",
            unit="tokens/s",
            ours=Series(name="r1 rollout workers", values=values["ours"]),
            peers=(Series(name="bare vLLM", values=values["bare"]),),
            goal=0.95,
            notes={
                "workload": f"{problems * GROUP_SIZE} completions of at most {limit} tokens, {problems} prompts; "
                f"lengths geometric with mean {MEAN_TOKENS} before the limit",
                "ours": f"{len(groups)} Ray actors with {len(groups[0])} core(s) each; from the problems to scored, "
                f"journaled groups; mean length {mean_of(ours.lengths):.0f}",
                "bare": f"{len(groups)} processes with vllm.LLM on the same cores, vLLM's own defaults, the requests "
                f"dealt out evenly, no text made of the tokens; mean length {mean_of(theirs.lengths):.0f}",
            },
        )
    ]


class _Ours:
    """The rollout workers, driven as ``train_grpo`` drives them."""

    def __init__(self, house: House) -> None:
        self._workers = house.workers
        self._stage, self._folder, self._stream = house.stage(0)
        self._step = 0
        self.lengths: list[int] = []

    def tokens_per_s(self) -> float:
        """One round of rollouts."""
        problems = self._stream.next(self._stage.problems_per_step)
        began = time.perf_counter()
        groups, _ = self._workers.rollouts(self._stage, self._step, problems, self._folder)
        seconds = time.perf_counter() - began
        self._step += 1
        drawn = [len(r.completion.token_ids) for group in groups for r in group.rollouts]
        self.lengths += drawn
        return sum(drawn) / seconds


class _Bare:
    """Bare engines side by side; they get the same prompts and the same seeds, step by step."""

    def __init__(self, house: House, engines: Sequence[Peer], limit: int) -> None:
        self._engines, self._limit, self._seed = engines, limit, house.recipe.seed
        self._tokenizer = house.workers.tokenizer
        self._stage, _, self._stream = house.stage(0)
        self._step = 0
        self.lengths: list[int] = []

    def tokens_per_s(self) -> float:
        """One round: from the first job sent to the last answer."""
        jobs = [BareJob(requests=part, max_tokens=self._limit) for part in split(self._requests(), len(self._engines))]
        began = time.perf_counter()
        for engine, job in zip(self._engines, jobs, strict=True):
            engine.send(job)
        answers: list[BareAnswer] = [engine.answer() for engine in self._engines]
        seconds = time.perf_counter() - began
        drawn = [length for answer in answers for length in answer.lengths]
        self.lengths += drawn
        return sum(drawn) / seconds

    def _requests(self) -> list[tuple[tuple[int, ...], int]]:
        step, self._step = self._step, self._step + 1
        return [
            (tuple(render_prompt(problem, self._tokenizer, self._stage.template)),
             sampling_seed(self._seed, step, problem.id, index))
            for problem in self._stream.next(self._stage.problems_per_step)
            for index in range(self._stage.group_size)
        ]  # fmt: skip


def bare_config(folder: Path, cores: Sequence[int]) -> BareConfig:
    """A bare engine of the sizes that ours have."""
    return BareConfig(
        folder=folder,
        cores=tuple(cores),
        max_model_len=ENGINE.max_model_len,
        max_num_seqs=ENGINE.max_num_seqs,
        kv_cache_gib=ENGINE.kv_cache_gib,
    )

"""Sampled tokens/s of ``r1 eval`` (Ray actors, graded while they draw) against bare vLLM on the same cores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.house import ENGINE
from benchmarks.machine import core_groups, usable_cores
from benchmarks.measure import Comparison, Series, mean_of, take_turns
from benchmarks.options import Options
from benchmarks.peer import Peer
from benchmarks.rollout import bare_config
from benchmarks.vllm_peer import BareAnswer, BareJob, serve, split
from benchmarks.workload import MEAN_TOKENS, prompts, write_model
from evals.benchmark import find_benchmark
from evals.benchmark_data import BenchmarkData, load_benchmark
from evals.protocol import Protocol
from evals.samples import Sample
from pipelines.eval_run import EvalPlan, evaluate_benchmarks
from pipelines.eval_samplers import Ask, Drawn, EngineSampler
from rollout.types import Problem, SamplingParams, sampling_seed

_REST_S = 1.5  # an idle vLLM spins for a second before it sleeps
_OWN = """
task: ragged
data_file: ragged.jsonl
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
metadata: {version: 1}
"""


def run(options: Options) -> list[Comparison]:
    """See the module."""
    folder = options.scratch / "model"
    write_model(folder, seed=options.seed)
    count, samples = options.pick(48, 16), options.pick(8, 4)
    limit, rounds = options.pick(512, 256), options.pick(3, 1)
    protocol = Protocol(name="deepseek", sampling=SamplingParams(max_tokens=limit), samples=samples)
    data = _data(options.scratch, prompts(count, options.seed), protocol)
    groups = core_groups(usable_cores(), min(4, len(usable_cores())))
    with ExitStack() as stack:
        options.say(f"starting {len(groups)} engines of r1 and {len(groups)} bare ones")
        sampler = _Kept(EngineSampler(
            folder, protocol, ENGINE, dtype="float32", seed=options.seed, note=lambda event: None, attest=False
        ))  # fmt: skip
        stack.callback(sampler.end)
        bare = [stack.enter_context(Peer("bare vLLM", serve, bare_config(folder, cores))) for cores in groups]
        for peer in bare:
            peer.ask("ready")
        ours = _Ours(sampler, data, protocol, samples, options.scratch)
        theirs = _Bare(sampler, bare, data, samples, limit)
        values = take_turns(
            {"ours": ours.tokens_per_s, "bare": theirs.tokens_per_s}, rounds=rounds, warmup=1, pause_s=_REST_S
        )
    return [
        Comparison(
            key="eval",
            title="r1 eval against bare vLLM on the same cores",
            unit="tokens/s",
            ours=Series(name="r1 eval", values=values["ours"]),
            peers=(Series(name="bare vLLM", values=values["bare"]),),
            goal=0.95,
            notes={
                "workload": f"{count} problems, {samples} completions each, of at most {limit} tokens; lengths "
                f"geometric with mean {MEAN_TOKENS} before the limit",
                "ours": f"{len(groups)} Ray actors with {len(groups[0])} core(s) each, from the first request until "
                f"the last verdict: drawn, kept, graded, kept again; mean length {mean_of(ours.lengths):.0f}",
                "bare": f"{len(groups)} processes with vllm.LLM on the same cores, vLLM's own defaults, no text made "
                f"of the tokens; mean length {mean_of(theirs.lengths):.0f}",
                "grading": f"the last verdict came {mean_of(ours.tails):.2f} s after the last completion",
            },
        )
    ]


def _data(scratch: Path, texts: Sequence[str], protocol: Protocol) -> BenchmarkData:
    rows = [{"prompt": text, "answer": str(number)} for number, text in enumerate(texts)]
    (scratch / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scratch / "ragged.yaml").write_text(_OWN)
    return load_benchmark(find_benchmark(scratch / "ragged.yaml"), protocol=protocol, data_dir=scratch)


class _Kept:
    """A sampler whose engines live on from one evaluation to the next."""

    def __init__(self, sampler: EngineSampler) -> None:
        self.sampler = sampler
        self._started = False
        self.began = self.drawn = 0.0

    @property
    def forced_think(self) -> bool:
        """See ``Sampler``."""
        return self.sampler.forced_think

    def describe(self) -> Mapping[str, Any]:
        """See ``Sampler``."""
        return self.sampler.describe()

    def start(self, problems: Sequence[Problem]) -> None:
        """See ``Sampler``."""
        if not self._started:
            self.sampler.start(problems)
            self._started = True

    def draw(self, asks: Iterable[Ask]) -> Iterator[Drawn]:
        """See ``Sampler``; waits for the engines before the time begins."""
        self.sampler.ready()
        self.began = time.perf_counter()
        for drawn in self.sampler.draw(asks):
            self.drawn = time.perf_counter()
            yield drawn

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Ends the engines."""
        self.sampler.close()


class _Clock:
    """A view that notes when the last verdict came, and the lengths."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.graded_at = 0.0

    def begin(self, name: str, *, total: int, drawn: int, graded: int) -> None:
        """See ``View``."""

    def drawn(self, name: str, tokens: int) -> None:
        """See ``View``."""
        self.lengths.append(tokens)

    def graded(self, name: str, samples: Sequence[Sample]) -> None:
        """See ``View``."""
        self.graded_at = time.perf_counter()

    def close(self) -> None:
        """See ``View``."""


class _Ours:
    def __init__(self, sampler: _Kept, data: BenchmarkData, protocol: Protocol, samples: int, scratch: Path) -> None:
        self._sampler, self._data, self._protocol, self._samples = sampler, data, protocol, samples
        self._scratch, self._round = scratch, 0
        self.lengths: list[int] = []
        self.tails: list[float] = []

    def tokens_per_s(self) -> float:
        """One evaluation, under a seed of its own."""
        clock = _Clock()
        plan = EvalPlan(
            model="ragged", identity={}, benchmarks=[self._data], samples={"ragged": self._samples},
            protocol=self._protocol, seed=self._round, out=self._scratch / f"eval-{self._round}", processes=1,
        )  # fmt: skip
        self._round += 1
        evaluate_benchmarks(plan, self._sampler, clock)
        self.lengths += clock.lengths
        self.tails.append(clock.graded_at - self._sampler.drawn)
        return sum(clock.lengths) / (clock.graded_at - self._sampler.began)


class _Bare:
    def __init__(self, sampler: _Kept, engines: Sequence[Peer], data: BenchmarkData, samples: int, limit: int) -> None:
        self._sampler, self._engines, self._data = sampler, engines, data
        self._samples, self._limit, self._round = samples, limit, 0
        self.lengths: list[int] = []

    def tokens_per_s(self) -> float:
        """One round: from the first job sent to the last answer; the seeds are those of the evaluation."""
        requests = [
            (self._sampler.sampler.prompt(problem), sampling_seed(self._round, -1, f"ragged/{problem.id}", index))
            for problem in self._data.problems
            for index in range(self._samples)
        ]
        self._round += 1
        jobs = [BareJob(requests=part, max_tokens=self._limit) for part in split(requests, len(self._engines))]
        began = time.perf_counter()
        for engine, job in zip(self._engines, jobs, strict=True):
            engine.send(job)
        answers: list[BareAnswer] = [engine.answer() for engine in self._engines]
        seconds = time.perf_counter() - began
        drawn = [length for answer in answers for length in answer.lengths]
        self.lengths += drawn
        return sum(drawn) / seconds

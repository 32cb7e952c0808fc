"""``r1 eval MODEL --benchmarks …``: draws, grades while it draws, keeps every sample, and goes on where it was stopped.

A completion is kept (``drawn.jsonl``) the moment it ends, and again with its verdict (``samples.jsonl.gz``) when it is
graded; so a kill at any moment costs what the engines were drawing, and nothing else.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from evals.benchmark_data import BenchmarkData, as_answer, digest
from evals.grading import Grader, prompt_hash
from evals.page import write_pages
from evals.protocol import Protocol as EvalProtocol
from evals.samples import DRAWN, SAMPLES, Sample, SampleStore
from evals.summary import summarise
from pipelines.eval_samplers import Ask, Drawn, Sampler
from pipelines.files import Lock, write_atomic, writing
from rewards.base import check_machine, check_problems, resolve
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, sampling_seed

_EVAL_STEP = -1  # as in recipes: the same problem is drawn with the same seed before, in and after training
_BATCH, _BATCH_S = 64, 2.0  # graded samples are written so many at a time, or after so many seconds


class View(Protocol):
    """Shows how far an evaluation is."""

    def begin(self, name: str, *, total: int, drawn: int, graded: int) -> None:
        """A benchmark with so many samples, of which some are there already."""
        ...

    def drawn(self, name: str, tokens: int) -> None:
        """One more completion of so many tokens."""
        ...

    def graded(self, name: str, samples: Sequence[Sample]) -> None:
        """So many more verdicts."""
        ...

    def close(self) -> None:
        """The evaluation is over, however it ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """What is evaluated.

    Attributes:
        model: as the results name it.
        identity: what tells these weights from others, JSON values.
        benchmarks: their problems, each name once.
        samples: k by benchmark.
        protocol: prompts and sampling.
        seed: of all sampling.
        out: the output folder.
        limit: problems per benchmark that were asked for; 0 all.
        processes: grading processes per benchmark, >= 1.
        search: folders where a grader of the user's is looked for.
        own: file of each benchmark that is the user's own.
    """

    model: str
    identity: Mapping[str, Any]
    benchmarks: Sequence[BenchmarkData]
    samples: Mapping[str, int]
    protocol: EvalProtocol
    seed: int
    out: Path
    limit: int = 0
    processes: int = 2
    search: Sequence[str] = ()
    own: Mapping[str, str] = field(default_factory=dict)


def evaluate_benchmarks(plan: EvalPlan, sampler: Sampler, view: View) -> dict[str, Any]:
    """Draws what is missing, grades it, and writes ``summary.json`` and the pages; returns the summary.

    Raises:
        ValueError: the folder holds another evaluation, or what draws or grades cannot be used. What was finished is
            kept: the same command goes on.
        OSError: the folder cannot be written.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        with writing(plan.out):
            plan.out.mkdir(parents=True, exist_ok=True)
        stack.callback(Lock.acquire(plan.out / ".lock", f"the folder {plan.out}").release)
        stack.callback(view.close)
        check_same(plan)
        problems = [problem for data in plan.benchmarks for problem in data.problems]
        stack.callback(sampler.close)
        courses = {data.benchmark.name: _Course(data, plan, view) for data in plan.benchmarks}
        asks = [ask for course in courses.values() for ask in course.missing()]
        if asks or any(course.ungraded() for course in courses.values()):
            for course in courses.values():
                course.check()
            sampler.start(problems)
            _note(plan.out, forced_think=sampler.forced_think)
            for course in courses.values():
                stack.callback(course.close)
                course.begin(sampler.forced_think)
            for drawn in sampler.draw(asks) if asks else ():
                courses[drawn.problem.source].take(drawn)
            for course in courses.values():
                course.end()
        summary = _summary(plan, sampler, courses, drawn=bool(asks), seconds=time.monotonic() - began)
    write_atomic(plan.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_pages(plan.out)
    return summary


def check_same(plan: EvalPlan) -> None:
    """Compares what is asked with what the folder was begun with, and notes it there.

    Benchmarks may be added, and samples; everything else must be the same.

    Raises:
        ValueError: names the first thing that differs, and both values.
    """
    protocol = {key: value for key, value in plan.protocol.to_json().items() if key != "samples"}
    asked: dict[str, Any] = {"model": dict(plan.identity), "protocol": protocol, "seed": plan.seed}
    benchmarks = {
        data.benchmark.name: {
            "version": data.benchmark.version,
            "limit": plan.limit,
            "files": data.files,
            "digest": digest(data),
        }
        for data in plan.benchmarks
    }
    asked = json.loads(json.dumps(asked, default=str))
    begun = [data.benchmark.name for data in plan.benchmarks if (plan.out / data.benchmark.name / SAMPLES).exists()]
    benchmarks = json.loads(json.dumps(benchmarks, default=str))
    path = plan.out / "eval.json"
    try:
        kept = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        kept = {**asked, "benchmarks": {}}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): name another folder with --out") from None
    if (plan.out / "recipe.resolved.yaml").exists():
        raise ValueError(f"{plan.out} is the folder of a run: name another one with --out")
    if not any(path.stat().st_size for kind in (SAMPLES, DRAWN) for path in plan.out.glob(f"*/{kind}")):
        kept = {**asked, "benchmarks": {}}  # nothing was drawn: there is nothing to be mixed up
    rows = kept.get("benchmarks") if isinstance(kept, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path} is damaged (not what an evaluation notes there): name another folder with --out")
    if strangers := [name for name in begun if name not in rows]:
        raise ValueError(
            f"{plan.out / strangers[0]} holds samples, and {path} does not say of what: name another folder with --out"
        )
    same = {key: kept.get(key) for key in asked}
    known = {
        name: {key: value for key, value in row.items() if key != "path"}
        for name, row in kept.get("benchmarks", {}).items()
        if name in benchmarks
    }
    for before, now in ((same, asked), (known, {name: benchmarks[name] for name in known})):
        if (found := _difference(before, now)) is not None:
            where, old, new = found
            if where.endswith(".digest"):
                raise ValueError(
                    f"{plan.out} holds samples of {where.removesuffix('.digest')} as it was before: its problems, gold "
                    "answers or grader have changed; where the prompts have not, `r1 eval regrade` judges them as "
                    "it is now; or name another --out"
                )
            raise ValueError(
                f"{plan.out} holds another evaluation: {where} was {old}, now it is {new}; name another folder with "
                "--out, or ask for the same"
            )
    rows = {name: {**row, "path": plan.own[name]} if name in plan.own else row for name, row in benchmarks.items()}
    _note(plan.out, **{**kept, **asked, "benchmarks": {**kept.get("benchmarks", {}), **rows}})


def _note(folder: Path, **values: Any) -> None:
    """Adds to ``eval.json``."""
    path = folder / "eval.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_atomic(path, json.dumps({**kept, **values}, indent=2) + "\n")


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, str, str] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*before, *(key for key in now if key not in before)):
            if found := _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return None
    return None if before == now else (where, json.dumps(before)[:80], json.dumps(now)[:80])


class _Course:
    """One benchmark on its way: its store, and the thread in which it is graded."""

    def __init__(self, data: BenchmarkData, plan: EvalPlan, view: View) -> None:
        self.name, self.data, self._plan, self._view = data.benchmark.name, data, plan, view
        self.k = plan.samples[self.name]
        self.store = SampleStore(plan.out / self.name)
        if self.store.cut:
            print(f"{self.store.path}: {self.store.cut} bytes that a write left unfinished were cut off; what stood "
                  "there is drawn again", file=sys.stderr)  # fmt: skip
        self._problems = {problem.id: problem for problem in data.problems}
        self._check_prompts()
        self._queue: queue.SimpleQueue[RolloutGroup | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._grader: Grader | None = None
        self._error: BaseException | None = None
        total = self.k * len(data.problems)
        graded = sum(key in self.store for key in self._keys())
        view.begin(self.name, total=total, drawn=graded + len(self.ungraded()), graded=graded)

    def missing(self) -> Iterator[Ask]:
        """The completions that nobody has drawn yet, in the order of the problems."""
        waiting = self.ungraded()
        params = self._plan.protocol.sampling_for(self.data.benchmark)
        for problem_id, index in self._keys():
            if (problem_id, index) not in self.store and (problem_id, index) not in waiting:
                seed = sampling_seed(self._plan.seed, _EVAL_STEP, f"{self.name}/{problem_id}", index)
                yield Ask(problem=self._problems[problem_id], index=index, seed=seed, params=params)

    def ungraded(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What an earlier run drew and did not come to grade."""
        found = {key: row for key, row in self.store.drawn().items() if key[0] in self._problems}
        for (problem, index), row in found.items():
            if set(row) != {"seed", "text", "tokens", "finish_reason"}:
                raise ValueError(
                    f"{self.store.path.with_name(DRAWN)}: sample {index} of problem {problem!r} is no whole "
                    "completion; delete its line, and it is drawn again"
                )
        return found

    def check(self) -> None:
        """Sees that the grader, the machine and every problem are fit, before anything is drawn.

        Raises:
            ValueError: says what is not.
        """
        grader = self.data.benchmark.grader
        function = resolve(grader.path, self._plan.search, grader.factory)
        check_machine(function, grader.params)
        check_problems(function, self.data.problems)

    def begin(self, forced_think: bool) -> None:
        """Grades what an earlier run left; the grader's processes start with the first completion."""
        self._forced_think = forced_think
        for (problem_id, index), row in self.ungraded().items():
            self._hand_over(Drawn(problem=self._problems[problem_id], index=index, **row))

    def take(self, drawn: Drawn) -> None:
        """Keeps a completion and hands it to the grader."""
        self._raise()
        row = {"seed": drawn.seed, "text": drawn.text, "tokens": drawn.tokens, "finish_reason": drawn.finish_reason}
        self.store.draw(drawn.problem.id, drawn.index, row)
        self._view.drawn(self.name, drawn.tokens)
        self._hand_over(drawn)

    def end(self) -> None:
        """Everything is drawn: waits for the last verdict."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._raise()
        self.store.finish()

    def close(self) -> None:
        """Ends the grader; what it has not come to is graded by the next run."""
        self._queue.put(None)
        if self._grader is not None:
            self._grader.close()

    def _hand_over(self, drawn: Drawn) -> None:
        if self._thread is None:
            self._grader = Grader(
                self.data.benchmark, forced_think=self._forced_think, processes=self._plan.processes,
                search=self._plan.search, as_answer=partial(_as_answer, self.data, self._plan.protocol),
            )  # fmt: skip
            self._thread = threading.Thread(target=self._grade, name=f"grade {self.name}", daemon=True)
            self._thread.start()
        self._queue.put(_group(drawn))

    def _grade(self) -> None:
        waiting: list[Sample] = []
        written = time.monotonic()
        assert self._grader is not None
        try:
            for samples in self._grader.grade(iter(self._queue.get, None)):
                waiting += samples
                self._view.graded(self.name, samples)
                if len(waiting) >= _BATCH or time.monotonic() - written > _BATCH_S:
                    self.store.append(waiting)
                    waiting, written = [], time.monotonic()
            self.store.append(waiting)
        except BaseException as error:  # handed to the thread that draws
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _keys(self) -> Iterator[tuple[str, int]]:
        for problem in self.data.problems:
            for index in range(self.k):
                yield problem.id, index

    def _check_prompts(self) -> None:
        """Refuses samples of prompts that read otherwise now."""
        for sample in self.store.read():
            problem = self._problems.get(sample.problem)
            if problem is not None and sample.prompt_hash != prompt_hash(problem):
                raise ValueError(
                    f"{self.store.path}: problem {sample.problem!r} was asked in other words than it is now; name "
                    "another folder with --out"
                )


def _as_answer(data: BenchmarkData, protocol: EvalProtocol, problem: Problem, text: str) -> str:
    return as_answer(data.benchmark, protocol, problem, text)


def _group(drawn: Drawn) -> RolloutGroup:
    """What a grader is shown; token ids are not kept, their number is."""
    completion = Completion(
        prompt_token_ids=(), token_ids=(0,) * drawn.tokens, text=drawn.text, rollout_logprobs=(),
        finish_reason=FinishReason(drawn.finish_reason), policy_version=0, sample_index=drawn.index, seed=drawn.seed,
    )  # fmt: skip
    return RolloutGroup(problem=drawn.problem, rollouts=(Rollout(completion=completion),))


def _earlier(path: Path) -> dict[str, Any]:
    """An earlier summary; empty where there is none, or a damaged one, which is written anew."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
    found = found if isinstance(found, dict) else {}
    rows = {key: found[key] if isinstance(found.get(key), dict) else {} for key in ("results", "files", "sampler")}
    seconds = found.get("seconds")
    return {**rows, "seconds": seconds if isinstance(seconds, int | float) else 0.0}


def _with_earlier(now: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("faults", "finish_reasons"):
        if key in now and isinstance(before.get(key), dict):
            now[key] = dict(Counter(before[key]) + Counter(now[key]))
    if "uncounted" in now and isinstance(before.get("uncounted"), int):
        now["uncounted"] += before["uncounted"]
    return now


def _summary(
    plan: EvalPlan, sampler: Sampler, courses: Mapping[str, _Course], *, drawn: bool, seconds: float
) -> dict[str, Any]:
    """The figures of everything that the folder holds."""
    before = _earlier(plan.out / "summary.json")
    results, files = before["results"], before["files"]
    for name, course in courses.items():
        ids = {problem.id for problem in course.data.problems}
        kept = [s for s in course.store.read() if s.index < course.k and s.problem in ids]
        results[name] = summarise(course.data.benchmark, kept, problems=len(course.data.problems), k=course.k)
        files[name] = course.data.files
    return {
        "model": plan.model,
        "protocol": plan.protocol.to_json(),
        "seed": plan.seed,
        "forced_think": json.loads((plan.out / "eval.json").read_text("utf-8")).get("forced_think"),
        # Of a run that drew nothing there is nothing to say; what an endpoint counted adds up over the runs.
        "sampler": _with_earlier(dict(sampler.describe()), before["sampler"]) if drawn else before["sampler"],
        "seconds": round(before["seconds"] + seconds, 1),
        "results": results,
        "files": files,
    }

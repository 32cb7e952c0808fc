"""Samples in the formats of other tools: human-eval, evalplus and lm-evaluation-harness."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.benchmark import Benchmark
from evals.members import fsync_folder, writing
from evals.samples import Sample, Status
from rollout.types import Problem, SamplingParams

FORMATS = ("human-eval", "evalplus", "lm-eval")
_INVALID = "[invalid]"  # lm-evaluation-harness's word for an answer that was not found
_OURS = ("doc_id", "groups")  # what the loader adds to a row


def export_rows(kind: str, benchmark: Benchmark, samples: Sequence[Sample]) -> Iterator[dict[str, str]]:
    """One row per sample as human-eval or evalplus read them, in the order of the data.

    ``human-eval`` is ``{"task_id", "completion"}``: of a coding problem the program that was found (empty when there
    was none), else the whole text. ``evalplus`` is ``{"task_id", "solution"}``, the program.

    Raises:
        ValueError: evalplus, and the benchmark has no programs.
    """
    assert kind in ("human-eval", "evalplus")
    programs = benchmark.grader.path == "code_tests"
    if kind == "evalplus" and not programs:
        raise ValueError(f"evalplus takes programs, and {benchmark.name} has none: use human-eval or lm-eval")
    column = "completion" if kind == "human-eval" else "solution"
    for sample in in_order(samples):
        yield {"task_id": sample.problem, column: (sample.answer or "") if programs else sample.text}


@dataclass(frozen=True, kw_only=True)
class LmEvalTask:
    """A benchmark as a task of lm-evaluation-harness.

    Attributes:
        benchmark: whose samples are exported.
        problems: by id; they hold the prompts.
        sampling: how the samples were drawn.
        num_fewshot: examples before each question.
    """

    benchmark: Benchmark
    problems: Mapping[str, Problem]
    sampling: SamplingParams
    num_fewshot: int

    @property
    def metric(self) -> str:
        """What the harness calls the share of right samples."""
        return "pass@1" if self.benchmark.grader.path == "code_tests" else "exact_match"

    @property
    def generation(self) -> dict[str, Any]:
        """The sampling in the harness's words (generation_kwargs)."""
        given = self.sampling
        return {"until": list(given.stop), "max_gen_toks": given.max_tokens, "do_sample": given.temperature > 0,
                "temperature": given.temperature, "top_p": given.top_p}  # fmt: skip


def lm_eval_rows(task: LmEvalTask, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """One row per problem as lm-evaluation-harness logs them (``--log_samples``).

    The k samples of a problem stand together in ``resps``, what was extracted from them in ``filtered_resps``; the
    metric is the share of them that are right, None when the grader failed on all of them.

    Raises:
        ValueError: the problem of a sample is not there.
    """
    together: dict[str, list[Sample]] = {}
    for sample in in_order(samples):
        together.setdefault(sample.problem, []).append(sample)
    for name, each in together.items():
        if name not in task.problems:
            raise ValueError(f"{task.benchmark.name} has no problem {name!r} in the data that are found here")
        problem = task.problems[name]
        doc = {column: value for column, value in problem.metadata.items() if column not in _OURS}
        target = "" if problem.answer is None else str(problem.answer)
        judged = [sample.status == Status.RIGHT for sample in each if sample.status != Status.ERROR]
        answers = [_INVALID if sample.answer is None else sample.answer for sample in each]
        yield {
            "doc_id": each[0].doc_id,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": problem.prompt, "arg_1": task.generation}},
            "resps": [[sample.text for sample in each]],
            "filtered_resps": answers if len(answers) == 1 else [answers],  # as take_first and take_first_k leave them
            "filter": "none",
            "metrics": [task.metric],
            "doc_hash": _hash(json.dumps(doc, indent=2, default=str, ensure_ascii=False)),
            "prompt_hash": _hash(problem.prompt),
            "target_hash": _hash(target),
            task.metric: fmean(map(float, judged)) if judged else None,
        }


def lm_eval_results(tasks: Mapping[str, LmEvalTask], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a folder as lm-evaluation-harness writes its results.

    Args:
        tasks: those to show, by name.
        summary: the folder's ``summary.json``.
    """
    results, configs, samples = {}, {}, {}
    for name, task in tasks.items():
        found, benchmark = summary["results"][name], task.benchmark
        stderr = "N/A" if found.get("se") is None else found["se"]
        figures = {f"{task.metric},none": found["pass_at_1"], f"{task.metric}_stderr,none": stderr}
        figures |= {f"pass@{k},none": figure["value"] for k, figure in found.get("pass_at", {}).items()}
        results[name] = {"alias": name, **figures}
        configs[name] = {
            "task": name,
            "dataset_path": benchmark.dataset_path,
            "dataset_name": benchmark.dataset_name or None,
            "test_split": benchmark.test_split,
            "doc_to_text": benchmark.doc_to_text,
            "doc_to_target": benchmark.doc_to_target,
            "output_type": "generate_until",
            "generation_kwargs": task.generation,
            "repeats": found["k"],
            "num_fewshot": task.num_fewshot,
            "metadata": {"version": benchmark.version},
        }
        samples[name] = {"original": len(task.problems), "effective": found["n"]}
    model = str(summary.get("model", ""))
    return {
        "results": results,
        "group_subtasks": {},
        "configs": configs,
        "versions": {name: task.benchmark.version for name, task in tasks.items()},
        "n-shot": {name: task.num_fewshot for name, task in tasks.items()},
        "higher_is_better": {name: {task.metric: True} for name, task in tasks.items()},
        "n-samples": samples,
        "config": {"model": "r1", "model_args": model, "random_seed": summary.get("seed")},
        "date": time.time(),
        "model_source": "r1",
        "model_name": model,
        "model_name_sanitized": "".join(c if c.isalnum() or c in "-_." else "_" for c in model),
        "total_evaluation_time_seconds": str(summary.get("seconds", "")),
    }


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """Samples in the order of the data, whatever the order in which they were finished."""
    return sorted(samples, key=lambda each: (each.doc_id, each.problem, each.index))


def date_id(now: datetime | None = None) -> str:
    """The date as it stands in lm-evaluation-harness's file names."""
    return (now or datetime.now()).isoformat().replace(":", "-")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes JSON lines, compressed where the name ends in ``.gz``; returns how many. The file is whole or not there.

    Raises:
        SampleFileError: the disk is full, or the file cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} is there already, and an export overwrites nothing: remove it, or name another --to")
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    data = "".join(lines).encode("utf-8", "backslashreplace")  # half a surrogate pair as its JSON escape
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return len(lines)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file: afterwards it holds the old bytes or the new ones, on the disk, never a part.

    Raises:
        SampleFileError: the disk is full, or the file cannot be written; the old one is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

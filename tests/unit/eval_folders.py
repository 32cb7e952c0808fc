"""Output folders of evaluations, made by hand: what the pages and the comparison read."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.metrics import maj_at_k, mean_interval, pass_at_1, pass_at_k
from evals.samples import Sample, Status

PROTOCOL = {
    "name": "deepseek", "samples": 4, "template": "chat", "force_think": True, "num_fewshot": 0,
    "sampling": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_tokens": 512, "stop": []},
}  # fmt: skip


def sample(problem: str, index: int, status: Status | str, **more: Any) -> Sample:
    """A sample whose fields follow from its status, but for those that are given."""
    right = status == Status.RIGHT
    filled: dict[str, Any] = {
        "benchmark": "sums", "doc_id": int(problem) if problem.isdecimal() else 0,
        "text": f"<think>\n{problem}\n</think>\n7",
        "prompt_hash": hashlib.sha256(problem.encode("utf-8", "replace")).hexdigest(), "tokens": 40 + index,
        "finish_reason": "stop",
        "seed": 11, "answer": "7" if right else "8", "gold": "7", "score": float(right),
    } | more  # fmt: skip
    return Sample(problem=problem, index=index, status=Status(status), **filled)


def results(samples: Sequence[Sample], **more: Any) -> dict[str, Any]:
    """The figures of these samples, as an evaluation writes them."""
    judged: dict[str, list[Sample]] = {}
    for each in samples:
        if each.status != Status.ERROR:
            judged.setdefault(each.problem, []).append(each)
    flags = [[s.status == Status.RIGHT for s in group] for group in judged.values()]
    first, k = pass_at_1(flags), max(map(len, flags))
    shares = {status.value: sum(s.status == status for s in samples) / len(samples) for status in list(Status)[2:]}
    tokens = [s.tokens for s in samples]
    by: dict[str, dict[str, list[float]]] = {}
    for group, right in zip(judged.values(), flags, strict=True):
        for column, value in group[0].groups.items():
            by.setdefault(column, {}).setdefault(value, []).append(sum(right) / len(right))
    means = [sum(s.tokens for s in g) / len(g) for g in judged.values()]
    figure = lambda e: {"value": e.value, "ci95": list(e.ci95), "n": e.n}  # noqa: E731
    return {
        "pass_at_1": first.value, "ci95": list(first.ci95), "sampling_se": first.sampling_se, "n": first.n, "k": k,
        "pass_at": {str(2**i): figure(pass_at_k([f for f in flags if len(f) >= 2**i], 2**i))
                    for i in range(1, k.bit_length())},
        **({"maj": figure(maj_at_k([[s.answer for s in g] for g in judged.values()], flags))} if k > 1 else {}),
        "samples": len(samples), "missing": 0, "left_out": 0,
        "shares": {"truncated": sum(s.finish_reason == "length" for s in samples) / len(samples), **shares},
        "tokens": {"mean": sum(tokens) / len(tokens), "mean_ci95": list(mean_interval(means, low=-1e9, high=1e9)),
                   "max": max(tokens), "total": sum(tokens)},
        "shares_ci95": {name: [0.0, 0.5] for name in ("truncated", *shares)},
        "by": {c: {v: {"pass_at_1": sum(m) / len(m), "ci95": list(mean_interval(m)), "n": len(m)}
                   for v, m in values.items()} for c, values in by.items()},
        "by_problem": {p: sum(f) / len(f) for p, f in zip(judged, flags, strict=True)}, "errors": {}, "version": "1",
    } | more  # fmt: skip


def shares(*values: float, k: int = 4, **more: Any) -> dict[str, Any]:
    """The results of problems p0, p1, … by their share of right samples."""
    first = pass_at_1([[i < round(v * k) for i in range(k)] for v in values])
    return {
        "pass_at_1": first.value, "ci95": list(first.ci95), "sampling_se": first.sampling_se, "n": first.n, "k": k,
        "by_problem": {f"p{i}": value for i, value in enumerate(values)}, "version": "1", "missing": 0,
    } | more  # fmt: skip


def summary(benchmarks: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A whole ``summary.json``."""
    return {
        "model": "models/tiny", "protocol": PROTOCOL, "seed": 3, "seconds": 61.2, "results": dict(benchmarks),
        "files": {name: [{"file": f"{name}/test.jsonl", "rows": 9, "sha256": "ab" * 32}] for name in benchmarks},
    } | more  # fmt: skip


def write_folder(folder: Path, content: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]]) -> Path:
    """Writes them where an evaluation would; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content), "utf-8")
    for name, each in samples.items():
        (folder / name).mkdir(exist_ok=True)
        lines = "".join(json.dumps(s.to_json()) + "\n" for s in each)
        (folder / name / "samples.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def evaluation(folder: Path, benchmarks: Mapping[str, Sequence[Sample]], **more: Any) -> Path:
    """A folder with these samples and their figures."""
    return write_folder(folder, summary({n: results(s) for n, s in benchmarks.items()}, **more), benchmarks)

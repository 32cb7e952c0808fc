"""``r1 eval regrade``: the samples of a folder are graded again, without a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.eval_options import add_choice, check_processes, percent

if TYPE_CHECKING:
    from pipelines.eval_folder import OutputFolder

_CHANGES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="the --out folder of an evaluation, ended or not")
    add_choice(parser)
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="grading processes")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Grades the samples of a folder again, without a model; only verdicts, figures and pages change.

    Returns:
        ``{"folder", "benchmarks": {name: {"samples", "changed", "changes": [{"problem", "index", "was", "is"}],
        "pass_at_1", "ci95", "was_pass_at_1", "version"}}}``.

    Raises:
        ValueError: no evaluation there, or its data or grader cannot be used.
        OSError: another process uses the folder, or a file is damaged or cannot be written. Each benchmark's samples
            are then wholly the old ones or wholly the new.
    """
    from pipelines.eval_folder import OutputFolder, write_summary

    check_processes(options)
    folder = OutputFolder.read(options.folder, options.benchmark)
    found: dict[str, Any] = {}
    with folder.locked():
        summary = folder.summary()
        for name in folder.names:
            if (row := _regrade_one(folder, name, summary, options)) is not None:
                found[name] = row
        if not found:
            raise ValueError(f"{folder.path} holds no samples yet")
        folder.now_graded_as({name: row.pop("graded_as") for name, row in found.items()})
        write_summary(folder.path, summary)
    answer = {"folder": str(folder.path), "benchmarks": found}
    if not options.json:
        _print_changes(answer)
    return answer


def _regrade_one(
    folder: OutputFolder, name: str, summary: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any] | None:
    """Rewrites one benchmark's samples, and its figures in the summary; what changed, None where there are none."""
    from evals.benchmark_data import as_answer, digest
    from evals.grading import Grader, regraded
    from evals.samples import SampleStore
    from evals.summary import summarise

    store = SampleStore(folder.path / name)
    if not (old := store.read()):
        return None
    data = folder.load(name, options.data_dir)
    benchmark = data.benchmark
    problems = {problem.id: problem for problem in data.problems}
    with Grader(
        benchmark, forced_think=folder.forced_think, processes=options.processes, search=folder.search,
        as_answer=partial(as_answer, benchmark, folder.protocol),
    ) as grader:  # fmt: skip
        grader.ready()
        new = regraded(grader, problems, old)
    store.replace(new)
    before = summary["results"].get(name, {})
    k = int(before.get("k", 0)) or max(sample.index + 1 for sample in new)
    figures = summarise(benchmark, [s for s in new if s.index < k], problems=len(data.problems), k=k)
    summary["results"][name], summary["files"][name] = figures, data.files
    changes = [
        {"problem": was.problem, "index": was.index, "was": was.status.value, "is": now.status.value}
        for was, now in zip(old, new, strict=True)
        if was.status != now.status
    ]
    return {
        "samples": len(new), "changed": len(changes), "changes": changes, "pass_at_1": figures["pass_at_1"],
        "ci95": figures["ci95"], "was_pass_at_1": before.get("pass_at_1"), "version": benchmark.version,
        "graded_as": {"version": benchmark.version, "files": data.files, "digest": digest(data)},
    }  # fmt: skip


def _print_changes(answer: Mapping[str, Any]) -> None:
    from pipelines.console import printable

    for name, row in answer["benchmarks"].items():
        was = f" (was {percent(row['was_pass_at_1'])})" if row["was_pass_at_1"] is not None else ""
        print(f"{name}: {row['changed']} of {row['samples']} verdicts changed; pass@1 "
              f"{percent(row['pass_at_1'], row['ci95'])}{was}")  # fmt: skip
        for change in row["changes"][:_CHANGES_SHOWN]:
            print(printable(f"  {change['problem']}, sample {change['index']}: {change['was']} -> {change['is']}"))
        if len(row["changes"]) > _CHANGES_SHOWN:
            print(f"  and {len(row['changes']) - _CHANGES_SHOWN} more (--json shows all)")

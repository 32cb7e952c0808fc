"""``r1 eval grade``: completions that others made, graded as our own are."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.eval_options import check_processes, percent

if TYPE_CHECKING:
    from evals.benchmark import Benchmark
    from evals.benchmark_data import BenchmarkData
    from evals.samples import Sample
    from rollout.types import RolloutGroup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("--benchmark", metavar="B", required=True, help="a benchmark by name, or a YAML file")
    parser.add_argument("--samples", metavar="FILE", type=Path, required=True,
                        help=".jsonl or .jsonl.gz: task_id, problem, doc_id or question; completion, response, text, "
                        "resps or solution")  # fmt: skip
    parser.add_argument("--protocol", help="read the texts just as `r1 eval` reads those of this protocol")
    parser.add_argument("--forced-think", action=argparse.BooleanOptionalAction, default=None,
                        help="the prompts ended in <think>; default: as the texts show")  # fmt: skip
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=None,
                        help="an answer needs no box; default: where no text of the file has one")  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", type=Path, help="where the data lie; else R1_DATA, else the hub")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep graded samples, figures and pages in this folder")
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="grading processes")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Grades completions that others made.

    Returns:
        The figures of :func:`evals.summary.summarise`, ``benchmark``, ``mean`` (the share of right samples among the
        judged ones, each counting alike), ``of`` (problems of the benchmark), and how the texts were read:
        ``forced_think``, ``plain``.

    Raises:
        ValueError: the benchmark, its data or the file cannot be used; names the first row that matches no problem.
    """
    from evals.benchmark import find_benchmark
    from evals.benchmark_data import as_answer, load_benchmark
    from evals.foreign import Reading, as_program, how_to_read, read_foreign, readable
    from evals.protocol import protocol_of
    from evals.summary import summarise

    check_processes(options)
    benchmark = find_benchmark(options.benchmark)
    protocol = protocol_of(options.protocol or "deepseek")
    data = load_benchmark(benchmark, protocol=protocol, data_dir=options.data_dir)
    groups = read_foreign(options.samples.expanduser(), data.problems)
    reading = Reading(forced_think=protocol.force_think, plain=False) if options.protocol else how_to_read(groups)
    reading = Reading(
        forced_think=reading.forced_think if options.forced_think is None else options.forced_think,
        plain=reading.plain if options.plain is None else options.plain,
    )
    benchmark = readable(benchmark, reading)
    as_read = partial(as_answer, benchmark, protocol) if options.protocol else None
    if benchmark.grader.path == "code_tests" and not options.protocol:
        as_read = as_program
    samples = _graded(benchmark, groups, reading.forced_think, as_read, options)
    found = summarise(benchmark, samples, problems=len(groups))
    judged = [sample.status == "right" for sample in samples if sample.status != "error"]
    own = all(not group.problem.source for group in groups)  # rows with their own gold answers
    answer = {"benchmark": benchmark.name, **found, "mean": sum(judged) / len(judged) if judged else None,
              "of": len(groups) if own else len(data.problems), "forced_think": reading.forced_think,
              "plain": bool(benchmark.grader.params.get("bare"))}  # fmt: skip
    if not any(sample.tokens for sample in samples):
        del answer["tokens"]  # such files do not say
    if options.out is not None:
        _keep(options, data, {key: answer[key] for key in ("forced_think", "plain")}, samples, found)
    if not options.json:
        _print_figures(answer)
    return answer


def _graded(
    benchmark: Benchmark, groups: Sequence[RolloutGroup], forced_think: bool, as_read: Any, options: argparse.Namespace
) -> list[Sample]:
    from evals.grading import Grader

    search = [os.getcwd(), *filter(None, [benchmark.folder])]
    with Grader(benchmark, forced_think=forced_think, processes=options.processes, search=search,
                as_answer=as_read) as grader:  # fmt: skip
        grader.ready()
        grader.check([group.problem for group in groups])
        return [sample for each in grader.grade(groups) for sample in each]


def _keep(
    options: argparse.Namespace, data: BenchmarkData, reading: Mapping[str, Any], samples: Sequence[Sample],
    figures: Mapping[str, Any],
) -> None:  # fmt: skip
    """Graded samples, figures and pages in a folder of their own. How the texts were drawn, nobody knows."""
    from evals.samples import SampleStore
    from pipelines.eval_folder import write_summary

    name, out = data.benchmark.name, options.out.expanduser().absolute()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: name a folder that is not there yet")
    SampleStore(out / name).replace(samples)
    write_summary(
        out,
        {"model": str(options.samples), "protocol": {"name": "completions of a file", **reading}, "seed": None,
         "seconds": 0.0, "results": {name: figures}, "files": {name: data.files}},
    )  # fmt: skip


def _print_figures(answer: Mapping[str, Any]) -> None:
    missing = f", {answer['missing']} fewer than k each" if answer["missing"] else ""
    print(f"{answer['benchmark']}: {answer['samples']} samples of {answer['n']} of {answer['of']} problems{missing}")
    print(f"pass@1 {percent(answer['pass_at_1'], answer['ci95'])}")
    for k, figure in answer["pass_at"].items():
        print(f"pass@{k} {percent(figure['value'], figure['ci95'])} (n {figure['n']})")
    if answer.get("maj"):
        print(f"maj@{answer['k']} {percent(answer['maj']['value'], answer['maj']['ci95'])}")
    shares = {name: share for name, share in answer["shares"].items() if share}
    print("not answered plainly: " + (", ".join(f"{n} {v:.1%}" for n, v in shares.items()) or "none"))
    for sample, error in answer["errors"].items():
        print(f"the grader failed on {sample}: {error}")
    print("read as: " + ("begun inside a thinking" if answer["forced_think"] else "whole texts")
          + (", answers without a box" if answer["plain"] else ""))  # fmt: skip

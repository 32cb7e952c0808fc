"""``r1 eval contamination``: which training rows share words with what is evaluated, and what they share."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from evals.contamination import Hit
    from evals.overlap import OverlapIndex
    from rollout.types import Problem

_STEP = 500  # rows between two updates of the bar
_SHOWN = 10  # hits of a benchmark in the table
_SPAN = 120  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    add = parser.add_argument
    add("--train", metavar="DATA", nargs="+", required=True,
        help="training data: .jsonl, .jsonl.gz or .parquet files, or hf:NAME[:SPLIT]")  # fmt: skip
    add("--benchmarks", metavar="A,B", required=True, help="names or YAML files, with commas between")
    add("--data-dir", metavar="D", type=Path, help="folder of the benchmarks' data (R1_DATA)")
    add("--field", metavar="COLUMN", action="append", default=[],
        help="look only at this column of the training data (can be repeated); else at all texts")  # fmt: skip
    add("--min-share", metavar="X", type=float, default=0.0,
        help="share of a question or solution that a hit must hold, 0 (any N words, the default) to 1")  # fmt: skip
    add("--ngram", metavar="N", type=int, default=10, help="shortest shared run, in words (10, as for R1)")
    add("--questions-only", action="store_true", help="leave the benchmarks' reference solutions out")
    add("--out", metavar="FILE.jsonl", type=Path, help="write every hit here, in the training data's order")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; ``ok`` of the returned object says that nothing was found.

    Returns:
        ``{"ok", "n_train", "train_rows", "benchmarks": {name: {"n", "contaminated", "hits", "rows"}}}`` as
        :meth:`evals.contamination.Tally.to_json` describes it.

    Raises:
        ValueError: training data or a benchmark cannot be read, or an option is out of its range.
        OSError: ``--out`` cannot be written.
    """
    from evals.contamination import Tally, passages_of
    from evals.overlap import OverlapIndex

    if not 0 <= options.min_share <= 1:
        raise ValueError(f"--min-share must be in [0, 1], got {options.min_share}")
    sources = [source_of(data) for data in options.train]
    problems = load_questions(options.benchmarks.split(","), options.data_dir)
    solutions = not options.questions_only
    index = OverlapIndex(
        (p for name, asked in problems.items() for p in passages_of(name, asked, solutions=solutions)), n=options.ngram
    )
    tally = Tally({name: len(asked) for name, asked in problems.items()})
    with _lines(options.out) as out:
        for hits in _scan(index, sources, options.field, options.min_share):
            tally.add(hits)
            for hit in hits if out else ():
                print(json.dumps(hit.to_json(), ensure_ascii=False), file=out)
        if not tally.rows:
            raise ValueError(f"there are no training rows in {', '.join(options.train)}")
    answer = tally.to_json()
    if not options.json:
        _print(answer)
    return answer


def source_of(data: str) -> str:
    """Training data as rollout.sources names them: ``jsonl:…``, ``parquet:…`` or ``hf:…``.

    Raises:
        ValueError: a file that is not there, or of no kind that can be read.
    """
    kind, _, place = data.partition(":")
    if kind == "hf" and place:
        return data
    path = Path(place if kind in ("jsonl", "parquet") and place else data).expanduser()
    if not path.is_file():
        raise ValueError(
            f"the training data {path} are not there (seen from {Path.cwd()}); a data set is hf:NAME:SPLIT"
        )
    if path.name.endswith((".jsonl", ".jsonl.gz")) or kind == "jsonl":
        return f"jsonl:{path}"
    if path.suffix == ".parquet" or kind == "parquet":
        return f"parquet:{path}"
    raise ValueError(f"training data are .jsonl, .jsonl.gz or .parquet files or hf:NAME:SPLIT, got {data}")


def load_questions(names: Sequence[str], data_dir: Path | None) -> dict[str, list[Problem]]:
    """By benchmark, its problems; the prompts are the bare questions.

    Raises:
        ValueError: an unknown benchmark, or data that are not there.
    """
    from dataclasses import replace

    from evals.benchmark import find_benchmark
    from evals.benchmark_data import load_benchmark
    from evals.protocol import protocol_of

    found: dict[str, list[Problem]] = {}
    for name in filter(None, map(str.strip, names)):
        benchmark = replace(find_benchmark(name), instruction="", description="")
        data = load_benchmark(benchmark, protocol=protocol_of("greedy", num_fewshot=0), data_dir=data_dir)
        if found.setdefault(benchmark.name, data.problems) is not data.problems:
            raise ValueError(f"--benchmarks names {benchmark.name} twice")
    if not found:
        raise ValueError("--benchmarks names none: write their names with commas between, e.g. gsm8k,math500")
    return found


def _scan(index: OverlapIndex, sources: Sequence[str], fields: Sequence[str], min_share: float) -> Iterator[list[Hit]]:
    """What is found in each training row, one after the other; a bar on standard error shows how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evals.contamination import hits_in, texts_of
    from rollout.sources import read_rows

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    watched = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched) as progress:
        for source in sources:
            name = source.partition(":")[2]
            task = progress.add_task(Path(name).name, total=_count(source) if watched else None, rate="")
            number = 0
            for number, (row_id, row) in enumerate(read_rows(source, {}), 1):
                if number % _STEP == 0:
                    speed = progress.tasks[task].speed
                    progress.update(task, completed=number, rate=f"{speed:,.0f} rows/s" if speed else "")
                # Two files may have the same name: rows are called by the whole path.
                place = f"{name}:{row_id.rpartition(':')[2]}"
                try:
                    yield hits_in(index, place, texts_of(row, fields), min_share=min_share)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
            progress.update(task, completed=number, total=number)


def _count(source: str) -> int | None:
    """Rows of a file, for the bar; None where counting would mean to load it."""
    kind, _, place = source.partition(":")
    if kind == "hf":
        return None
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(place).metadata.num_rows
        with gzip.open(place, "rb") if place.endswith(".gz") else open(place, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError, zlib.error, ValueError):  # whoever reads the rows says what is wrong
        return None


@contextmanager
def _lines(path: Path | None) -> Iterator[TextIO | None]:
    """A file for the hits that appears when it is whole."""
    if path is None:
        yield None
        return
    from pipelines.files import writing

    path = path.expanduser()
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        file = temporary.open("w", encoding="utf-8")
    try:
        with file:
            yield file
        with writing(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _print(answer: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipelines.console import printable

    console = Console()
    summary = Table(
        title=f"{answer['n_train']:,} training rows, {answer['train_rows']:,} with a hit", title_justify="left"
    )
    summary.add_column("benchmark")
    for column in ("problems", "contaminated", "hits"):
        summary.add_column(column, justify="right")
    for name, found in answer["benchmarks"].items():
        cells = [f"{found[key]:,}" for key in ("n", "contaminated", "hits")]
        summary.add_row(Text(name), *cells, style="red" if found["contaminated"] else "")
    console.print(summary)
    for name, found in answer["benchmarks"].items():
        if not found["rows"]:
            continue
        table = Table(title=Text(f"{name}: the gravest, one of each problem"), title_justify="left")
        for column in ("share", "words"):
            table.add_column(column, justify="right")
        for column in ("problem", "training row", "shared words"):
            table.add_column(column, overflow="fold")
        first = {row["problem"]: row for row in reversed(found["rows"])}
        for row in [row for row in found["rows"] if first[row["problem"]] is row][:_SHOWN]:
            span = row["span"] if len(row["span"]) <= _SPAN else f"{row['span'][: _SPAN - 1]}…"
            problem = row["problem"] if row["part"] == "question" else f"{row['problem']} (solution)"
            texts = [Text(printable(text)) for text in (problem, Path(row["train_row"]).name, span)]
            table.add_row(f"{row['share']:.0%}", str(row["words"]), *texts)
        console.print(table)
    if answer["train_rows"]:
        console.print(
            "Small shares are often phrases that everybody uses; --min-share 0.5 leaves copies and near-copies."
        )

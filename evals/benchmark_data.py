"""A benchmark's rows -> problems, with the prompt that a protocol asks for.

Row -> ``process_docs`` -> question (``doc_to_text``), gold answer (``doc_to_target``), id -> Problem. Everything that
is wrong with the data is an error here, before anything is drawn: a checksum, a count, a null answer, a gold answer
that the grader cannot read, an id that occurs twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evals.benchmark import GYM, GYM_PROBLEMS, Benchmark
from evals.benchmark_yaml import tell
from evals.continuation import as_answer
from evals.data_files import local_or_hub_rows, on_purpose, rows_digest
from evals.hooks import HARNESS, find_function, one_line
from evals.protocol import Protocol
from evals.templates import NoAnswer, render
from rewards.base import check_problems, resolve
from rollout.prompts import fingerprint
from rollout.sources import reasoning_gym_entries
from rollout.types import Problem

__all__ = ["BenchmarkData", "as_answer", "load_benchmark"]

_GYM_SEED = 20_260_000  # far from the seeds that recipes train with: what is evaluated is not what was learned


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """A benchmark, ready to be asked.

    Attributes:
        benchmark: which one.
        problems: in the order of the data.
        files: ``{"file", "rows", "sha256"}`` of what they were read from.
    """

    benchmark: Benchmark
    problems: list[Problem]
    files: list[dict[str, Any]]


def load_benchmark(
    benchmark: Benchmark, *, protocol: Protocol, data_dir: Path | None = None, limit: int = 0, seed: int = 0
) -> BenchmarkData:
    """Finds, verifies and renders the data of a benchmark.

    Args:
        benchmark: from :func:`evals.benchmark.find_benchmark`.
        protocol: says how prompts are put together: instruction or few-shot examples.
        data_dir: folder of local files; before the one that the variable ``R1_DATA`` names.
        limit: the first so many problems; 0 takes all. Counts and checksums are those of the whole all the same.
        seed: of problems that are generated. Options of a multiple choice are shuffled by the problem's id alone, so
            that every run asks the same.

    Returns:
        Problems whose metadata are the row's columns (as far as JSON can hold them), ``doc_id`` (row number, 0-based)
        and ``groups`` (``{column: value}`` as texts, by ``group_by``).

    Raises:
        ValueError: one line: what is missing or wrong, where, and how to mend it or go on.
    """
    if limit < 0:
        raise ValueError(f"limit must be >= 0 (0 takes all problems), got {limit}")
    examples = _examples(benchmark, protocol.shots_for(benchmark))
    if f"{benchmark.dataset_path}:" == GYM:
        return _generated(benchmark, protocol, limit, seed, examples)
    rows, file = local_or_hub_rows(benchmark, data_dir)
    numbered = list(enumerate(rows))
    if benchmark.process_docs:
        numbered = _processed(benchmark, rows)
    problems: list[Problem] = []
    for number, row in numbered:
        try:
            problems.append(_problem(benchmark, protocol, number, row, examples))
        except NoAnswer as error:
            if not benchmark.drop_unanswered:
                raise ValueError(f"{error}: mend the row, or leave such rows out with drop_unanswered: true") from None
    if dropped := len(numbered) - len(problems):
        tell(f"{benchmark.name}: {dropped} of {len(numbered)} rows have no answer and are left out (drop_unanswered)")
    if benchmark.problems and len(problems) != benchmark.problems:
        raise ValueError(
            f"{benchmark.name}: {file['file']} gives {len(problems)} problems, expected {benchmark.problems}; "
            + on_purpose(benchmark, "problems")
        )
    _check(benchmark, problems)
    return BenchmarkData(benchmark=benchmark, problems=problems[: limit or None], files=[file])


def digest(data: BenchmarkData) -> str:
    """Hash over what verdicts depend on beside the completions: problems, gold answers, the grader and its source."""
    benchmark = data.benchmark
    path = benchmark.grader.path.partition(":")[0]
    places = [Path(path).expanduser(), Path(benchmark.folder) / path]
    found = [each for each in places if path.endswith(".py") and each.is_file()]
    source = found[0].read_text("utf-8", "replace") if found else ""
    told = [
        asdict(benchmark.grader), source, benchmark.base_answer, benchmark.answer_prefix, benchmark.until,
        [(problem.id, problem.prompt, problem.answer) for problem in data.problems],
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=16).hexdigest()


def _processed(benchmark: Benchmark, rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(row number, row) after the benchmark's own function.

    Raises:
        ValueError: the function fails, or returns what is no row.
    """
    path = benchmark.process_docs
    function = find_function(path, benchmark.folder)
    if path.startswith(HARNESS):  # data set -> data set
        import datasets

        try:
            return list(enumerate(dict(row) for row in function(datasets.Dataset.from_list(rows))))
        except Exception as error:  # a user's code
            raise ValueError(f"{benchmark.name}: {path} failed: {type(error).__name__}: {one_line(error)}") from error
    found = []
    for number, row in enumerate(rows):
        try:
            processed = function(row)
        except Exception as error:  # a user's code
            raise ValueError(
                f"{benchmark.name}, row {number}: process_docs {path} failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        if processed is None:
            continue
        if not isinstance(processed, Mapping):
            kind = type(processed).__name__
            raise ValueError(f"{benchmark.name}, row {number}: {path} must return a row or None, got a {kind}")
        found.append((number, dict(processed)))
    return found


def _problem(benchmark: Benchmark, protocol: Protocol, number: int, row: Mapping[str, Any], examples: str) -> Problem:
    place = f"{benchmark.name}, row {number}"

    def rendered(field: str) -> Any:
        return render(getattr(benchmark, field), row, place=f"{place}: {field}", folder=benchmark.folder)

    try:
        question = str(rendered("doc_to_text"))
        id_ = str(rendered("doc_id")) if benchmark.doc_id else f"{benchmark.name}/{number}"
        prompt = _prompt(benchmark, protocol, {**row, "question": question}, examples, place)
    except NoAnswer as error:
        raise ValueError(str(error)) from None
    if not question.strip():
        raise ValueError(f"{place}: doc_to_text makes an empty question")
    answer = rendered("doc_to_target") if benchmark.doc_to_target else None
    if isinstance(answer, str) and not answer.strip():
        raise NoAnswer(f"{place}: doc_to_target makes an empty answer")
    groups = {}
    for column in benchmark.group_by:
        if column not in row:
            raise ValueError(f"{place}: group_by: no column {column!r}; the columns are {', '.join(map(str, row))}")
        groups[column] = str(row[column])
    columns = {str(name): value for name, value in row.items() if _is_json(value)}
    return Problem(
        id=id_,
        prompt=prompt,
        answer=answer,
        source=benchmark.name,
        metadata={**columns, "doc_id": number, "groups": groups},
    )


def _prompt(benchmark: Benchmark, protocol: Protocol, columns: Mapping[str, Any], examples: str, place: str) -> str:
    """Description, examples, and the question: as a base model is asked for ``raw``, else with the instruction.

    ``columns`` are the row's, with ``question`` as doc_to_text made it.
    """
    start = examples
    if benchmark.description:
        start = f"{render(benchmark.description, columns, place=f'{place}: description', constant=True)}{examples}"
    if protocol.template == "raw":
        return start + _base_text(benchmark, columns, place)
    question = columns["question"]
    return start + (f"{question}\n{benchmark.instruction}" if benchmark.instruction else question)


def _examples(benchmark: Benchmark, count: int) -> str:
    """The first ``count`` few-shot examples, each with the delimiter behind it."""
    texts = [
        _example(benchmark, example, f"{benchmark.name}, example {number}")
        for number, example in enumerate(benchmark.fewshot[:count])
    ]
    return "".join(text + benchmark.fewshot_delimiter for text in texts)


def _base_text(benchmark: Benchmark, columns: Mapping[str, Any], place: str) -> str:
    if not benchmark.base_text:
        return str(columns["question"])
    return str(render(benchmark.base_text, columns, place=f"{place}: base_text", folder=benchmark.folder))


def _example(benchmark: Benchmark, example: Mapping[str, Any], place: str) -> str:
    """One example: its question, as a base model is asked, and its target.

    ``question`` and ``target`` are taken as they stand. An example of the data's columns goes through doc_to_text and
    doc_to_target; so does one with ``question`` where doc_to_text is all that shapes a prompt.
    """
    shaped = not benchmark.base_text or "question" not in example
    if shaped:
        text = str(render(benchmark.doc_to_text, example, place=f"{place}: doc_to_text", folder=benchmark.folder))
    else:
        text = str(example["question"])
    asked = _base_text(benchmark, {**example, "question": text}, place)
    target = example.get("target")
    if target is None:
        target = render(benchmark.doc_to_target, example, place=f"{place}: doc_to_target", folder=benchmark.folder)
    return f"{asked}{benchmark.target_delimiter}{target}"


def _generated(benchmark: Benchmark, protocol: Protocol, limit: int, seed: int, examples: str) -> BenchmarkData:
    """Different problems of a reasoning-gym generator, whose own question takes the place of a row.

    A generator that has fewer gives what it has, and one line says so.
    """
    name, params, size = benchmark.dataset_name, dict(benchmark.dataset_kwargs), benchmark.problems or GYM_PROBLEMS
    wanted = min(limit or size, size)
    problems: list[Problem] = []
    seen: set[str] = set()
    for index, real_seed, entry in reasoning_gym_entries(name, params, _GYM_SEED + seed, size):
        row = {"question": entry["question"], "answer": entry["answer"]}
        if (print_ := fingerprint(row["question"])) in seen:
            continue
        seen.add(print_)
        number = len(problems)
        metadata = {**row, "dataset": name, "params": params, "entry": entry, "doc_id": number, "groups": {}}
        problems.append(
            Problem(
                id=f"{name}-{real_seed:x}-{index}",
                prompt=_prompt(benchmark, protocol, row, examples, f"{benchmark.name}, problem {number}"),
                answer=row["answer"],
                source=benchmark.name,
                metadata=metadata,
            )
        )
        if len(problems) == wanted:
            break
    else:
        tell(f"{benchmark.name}: its generator has no more than {len(problems)} different problems of the {wanted}")
    _check(benchmark, problems)
    made_by = {"reasoning_gym": version("reasoning_gym"), "name": name, "params": params, "seed": seed, "size": size}
    file = {"file": f"{GYM}{name}", "rows": size, "sha256": rows_digest([made_by])}
    return BenchmarkData(benchmark=benchmark, problems=problems, files=[file])


def _check(benchmark: Benchmark, problems: list[Problem]) -> None:
    """Refuses data on which no figure could be right.

    Raises:
        ValueError: no problems, an id twice, or a problem that the grader could never judge.
    """
    if not problems:
        raise ValueError(f"{benchmark.name}: no problem is left")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{benchmark.name}: the id {problem.id!r} occurs twice: name another doc_id, or none")
        seen.add(problem.id)
    try:
        grader = resolve(
            benchmark.grader.path, (benchmark.folder,) if benchmark.folder else (), benchmark.grader.factory
        )
    except Exception as error:  # a user's module
        raise ValueError(f"{benchmark.name}: grader: {one_line(error)}") from error
    check_problems(grader, problems)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True

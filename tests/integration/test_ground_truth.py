"""Ground truth that lies beside the benchmark data: runs where R1_DATA names its folder, skipped elsewhere.

Graders against judged answers, the sandbox against hostile programs, and the reference solutions of every code
benchmark against their own tests, as they are and with one operator changed.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from rewards.code_rows import humaneval_plus, mbpp_plus
from rewards.code_tasks import BadTests, Task, task_of
from rewards.code_tests import run_tests
from rewards.grading_cases import confusion
from rewards.probe import probe
from rewards.sandbox import Limits

ROOT = Path(__file__).parents[2]
# Some references take seconds and gigabytes on the largest inputs of the plus sets.
GENEROUS = Limits(test_s=60, total_s=90, memory=4 << 30, output=64 << 20, parts=8_000_000)


@pytest.fixture
def cases(data_folder: Path) -> Path:
    folder = data_folder.parent / "cases"
    if not folder.is_dir():
        pytest.skip("no folder of cases lies beside the benchmark data")
    return folder


# -- answers ----------------------------------------------------------------------------------------------------------

#                                        least share right, largest share of wrong answers that are accepted
ANSWERS = {
    "real_gsm8k_openai.jsonl.gz": (1.0, 0.0),
    "real_math500_answers.jsonl": (0.995, 0.0),
    "own_nasty.jsonl": (0.96, 0.01),
    "upstream_math_verify_lighteval.jsonl": (0.96, 0.01),
    "own_bombs.jsonl.gz": (0.0, 1.0),
}


# Gold answers that nobody can read (a box that never closes): refused, and counted as a right answer missed.
UNREADABLE_GOLDS = {"upstream_math_verify_lighteval.jsonl": 1}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_graded_as_people_graded_them(name: str, cases: Path) -> None:
    path = cases / "math_answers" / name
    row = confusion([path])[str(path)]
    right, wrong = row["true_accept"] + row["true_reject"], row["false_accept"] + row["false_reject"]
    print(name, row)
    assert right + wrong == row["n"]
    assert row["errors"] <= UNREADABLE_GOLDS.get(name, 0)
    if row["n"]:
        least, most = ANSWERS[name]
        assert right / row["n"] >= least
        assert row["false_accept"] <= most * max(1, row["true_reject"] + row["false_accept"])


# -- hostile programs -------------------------------------------------------------------------------------------------


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the programs try to read, change, reach and kill."""
    folder = Path("/tmp/rl_canary")
    folder.mkdir(exist_ok=True)
    (folder / "keep.txt").write_text("keep")
    (folder / "secret.txt").write_text("SECRET")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "rl_canary_victim"])
    descriptor = os.open(folder / "secret.txt", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("CANARY_SECRET", "SECRET")
        monkeypatch.setenv("CANARY_PORT", str(listener.getsockname()[1]))
        yield
    os.close(descriptor)
    victim.kill()
    victim.wait()


@pytest.mark.timeout(1200)
def test_no_hostile_program_gets_what_it_wants(cases: Path, canaries: None, capfd: pytest.CaptureFixture[str]) -> None:
    if probe().level != "bubblewrap":
        pytest.skip(f"bubblewrap does not work here: {probe().missing}")
    manifest = cases / "hostile_programs" / "manifest.jsonl"
    assert main(["reward", "sandbox", "--manifest", str(manifest), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert answer["level"] == "bubblewrap" and len(answer["programs"]) == len(rows) == 70
    wrong = {}
    for row in rows:
        got = answer["programs"][row["id"]]
        as_expected = row["expected_pass"] in (None, got["passed"]) and got["status"] in row["status_any_of"]
        if not as_expected or got["violated"] or got["seconds"] > row["max_seconds"]:
            wrong[row["id"]] = got
    assert wrong == {}


# -- reference solutions ----------------------------------------------------------------------------------------------

Item = tuple[str, Task, str]


def rows(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def items(folder: Path, file: str, task: Callable[[dict[str, Any]], Task], program: tuple[str, ...]) -> list[Item]:
    return [(str(row["task_id"]), task(row), "".join(row[part] for part in program)) for row in rows(folder / file)]


SETS: dict[str, tuple[int, Callable[[Path], list[Item]]]] = {
    "humaneval": (164, partial(
        items, file="humaneval/HumanEval.jsonl.gz", task=task_of, program=("prompt", "canonical_solution"))),
    "mbpp": (974, partial(items, file="mbpp/mbpp.jsonl", task=task_of, program=("code",))),
    "mbpp_sanitized": (427, partial(
        items, file="mbpp/sanitized-mbpp.jsonl", task=task_of, program=("code",))),
    "humaneval_plus": (164, partial(
        items, file="humanevalplus/HumanEvalPlus.jsonl.gz", task=humaneval_plus,
        program=("prompt", "canonical_solution"))),
    "mbpp_plus": (378, partial(
        items, file="mbppplus/MbppPlus.jsonl.gz", task=mbpp_plus, program=("canonical_solution",))),
}  # fmt: skip


@pytest.fixture
def level() -> str:
    if not probe().level:
        pytest.skip(f"no level of isolation works here: {probe().missing}")
    return probe().level


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SETS)
def test_reference_solutions_pass(name: str, data_folder: Path, level: str) -> None:
    count, read = SETS[name]
    found = read(data_folder)
    assert len(found) == count
    failed = {}
    for task_id, task, program in found:
        try:
            verdict = run_tests(task, program, level=level, limits=GENEROUS)
        except BadTests as error:
            failed[task_id] = str(error)
            continue
        if verdict.status != "passed":
            failed[task_id] = str(verdict)
    assert failed == {}


_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt,
    ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def changed(program: str, name: str) -> str | None:
    """The program with the first operator of the function under test replaced by an opposite one; None without one.

    ``name`` is the function's, if it is known; else the last one is taken.
    """
    tree = ast.parse(program)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = next((node for node in functions if node.name == name), functions[-1] if functions else tree)
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
            node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
            return ast.unparse(tree)
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
            return ast.unparse(tree)
    return None


def passes_plainly(task: Task, program: str) -> bool:
    """The verdict of a second judge: program and tests in one plain process. Only for programs that nobody forged."""
    if task.kind == "check":
        tests = f"{task.code}\ncheck({task.entry_point})\n"
    else:
        tests = "\n".join([task.code, *task.asserts])
    text = f"{task.helpers}\n{program}\n{tests}\nprint('and all of it ran')"
    try:
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.endswith(b"and all of it ran\n")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "most"), [("humaneval", 0.05), ("mbpp_sanitized", 0.1)])
def test_one_changed_operator_fails_and_every_verdict_is_that_of_a_plain_run(
    name: str, most: float, data_folder: Path, level: str
) -> None:
    passed, tried = [], 0
    for task_id, task, program in SETS[name][1](data_folder):
        broken = changed(program, task.entry_point)
        if broken is None:
            continue
        tried += 1
        verdict = run_tests(task, broken, level=level, limits=Limits(test_s=10, total_s=20))
        if verdict.status == "passed":
            passed.append(task_id)
        assert (verdict.status == "passed") == passes_plainly(task, broken), (task_id, verdict, broken)
    print(name, f"{len(passed)} of {tried} pass all the same: {passed}")
    assert tried > 100 and len(passed) <= most * tried

"""The verb ``r1 reward``: a user's function tried from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.reward_test import lines, values

ROOT = Path(__file__).parents[2]
FUNCTIONS = """\
def exact(reasoning, problem, weight=1.0):
    text = reasoning.answer.removeprefix("<answer>").removesuffix("</answer>")
    return weight * float(reasoning.closed and text == problem.answer)

def naive(completion, problem):
    return float(str(problem.answer) in completion.text)

def raises(completion):
    raise KeyError("gold")

def make(factor):
    return lambda completion: factor
"""
CASES = [
    {"id": "a", "gold": "42", "prediction": "42", "expected": True, "kind": "answer"},
    {"id": "b", "gold": "42", "prediction": "41", "expected": False, "kind": "answer"},
    {"id": "c", "gold": "42", "prediction": "142", "expected": False, "kind": "answer", "contested": True},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.process_time(); from pipelines.cli import main\n"
        "found = [main(['reward', *words, '--help']) for words in ([], ['test'], ['sandbox'])]\n"
        "heavy = {'torch', 'vllm', 'ray', 'numpy', 'rich', 'sympy'} & set(sys.modules)\n"
        "print('RESULT', found, sorted(heavy), time.process_time() - began < 0.5)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "RESULT [0, 0, 0] [] True", found.stderr
    assert "--param K=V" in found.stdout and "--manifest FILE" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["reward"], 2, "verbs:"),
        (["reward", "tset"], 2, "r1: there is no verb 'reward tset'; there are reward test, reward sandbox"),
        (["reward", "test"], 2, "r1 reward test: the following arguments are required: PATH:FN"),
        (["reward", "test", "mine.py:nothing"], 1, "has no 'nothing'"),
        (["reward", "test", "acuracy"], 1, "reward path must be accuracy"),
        (["reward", "test", "mine.py:exact", "--param", "scale=2"], 1, "takes no parameter 'scale'"),
        (["reward", "test", "mine.py:exact", "--param", "scale"], 1, "--param is written K=V or {k: v}, got 'scale'"),
        (["reward", "test", "mine.py:exact", "--style", "openrlhf"], 1, "reward style must be one of"),
        (["reward", "test", "mine.py:make", "--factory", "fctor=1"], 1, "cannot be made from factory"),
        (["reward", "test", "mine.py:exact", "--cases", "nothing.jsonl"], 1, "there is no case file nothing.jsonl"),
    ],
)
def test_wrong_usage(
    folder: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
    assert arguments == ["reward"] or len(shown.err.splitlines()) == 1


def test_a_good_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:exact", "--param", "weight=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["judges"] and found["hackable"] is False
    assert {row["case"]: row["score"] for row in found["cases"]}["right_tags"] == 2.0


def test_a_hackable_function_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:naive", "--problem", "answer=19"]) == 0
    text = capsys.readouterr().out
    assert "attacks are paid like a right answer: both_boxed" in text and "repeatable  yes" in text
    assert "failures    none" in text


def test_a_function_that_raises_is_not_fit_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:raises", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["failure"] == "error: KeyError: 'gold'"
    assert "raise KeyError" in found["traceback"] and "the first failure: error: KeyError" in "\n".join(lines(found))


def test_a_factory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:make", "--factory", "{factor: 0.5}", "--json"]) == 0
    assert {row["score"] for row in json.loads(capsys.readouterr().out)["cases"]} == {0.5}


def test_case_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cases.jsonl").write_text("\n".join(map(json.dumps, CASES)))
    assert cli.main(["reward", "test", "mine.py:naive", "--cases", "cases.jsonl", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["files"]["cases.jsonl"]
    assert counts.pop("seconds") >= 0
    assert {name: counts[name] for name in ("n", "true_accept", "true_reject", "false_accept", "false_reject")} == {
        "n": 2, "true_accept": 1, "true_reject": 1, "false_accept": 0, "false_reject": 0,
    }  # fmt: skip
    assert counts["contested"] == 1 and counts["timeouts"] == 0
    assert cli.main(["reward", "test", "mine.py:naive", "--cases", "cases.jsonl"]) == 0
    assert "cases.jsonl" in capsys.readouterr().out


def test_values_are_read_as_a_recipes_are() -> None:
    assert values(["a=1e-6", "b=[1, x]", "{c: {d: null}, e: true}"], "--param") == {
        "a": 1e-6, "b": [1, "x"], "c": {"d": None}, "e": True,
    }  # fmt: skip
    assert values(["text=a=b"], "--param") == {"text": "a=b"}

"""Sets whose rows need code: options, contests, evalplus, reasoning-gym; and the real data where they are."""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import pytest

from evals.benchmark import DataFile, find_benchmark
from evals.choice_sets import gpqa, shuffled
from evals.code_sets import livecodebench
from evals.protocol import PROTOCOLS
from rewards.code_tasks import task_of
from rewards.reasoning_gym import reasoning_gym
from rewards.sandbox import Status
from rollout.template import split_reasoning
from tests.unit.sandbox_programs import machine, verdict
from tests.unit.test_eval_data import loaded, no_data_folder, put  # noqa: F401 - an autouse fixture

BASE = PROTOCOLS["few-shot"]


# --- sets that need code


GPQA = {
    "Question": " Which? ", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3", "High-level domain": "Physics", "Subdomain": "Optics",
}  # fmt: skip


def test_options_are_shuffled_by_the_id_alone(tmp_path):
    rows = [{**GPQA, "Record ID": f"rec{n}"} for n in range(40)]
    letters = [gpqa(row)["answer"] for row in rows]
    assert letters == [gpqa(row)["answer"] for row in reversed(rows)][::-1]
    assert set(letters) == set("ABCD") and shuffled(4, "rec0") == shuffled(4, "rec0")
    assert all(row["choices"]["ABCD".index(row["answer"])] == "right" for row in map(gpqa, rows))
    put(tmp_path, rows, "gpqa/gpqa_diamond.jsonl")
    benchmark = replace(find_benchmark("gpqa_diamond"), data=DataFile(file="gpqa/gpqa_diamond.jsonl"), problems=0)
    problem = loaded(tmp_path, benchmark, seed=1).problems[3]
    assert problem == loaded(tmp_path, benchmark, seed=2).problems[3]
    assert problem.id == "rec3" and problem.metadata["groups"] == {"domain": "Physics", "subdomain": "Optics"}
    assert f"({problem.answer}) right\n" in problem.prompt and problem.prompt.startswith("Which?\n\n(A) ")
    base = loaded(tmp_path, benchmark, protocol=BASE).problems[3].prompt
    assert base.startswith("Question: Which?\n\n(A) ") and base.endswith("\nAnswer:")
    assert gpqa({**GPQA, "Record ID": None})["id"] == gpqa(GPQA)["id"] != "None"


def packed(tests: list) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def contest(kind: str, tests: list, *, private: str, **columns) -> dict:
    public = [{"input": given, "output": expected, "testtype": kind} for given, expected in tests]
    return {
        "question_id": "q1", "question_content": "Double it.", "platform": "x", "difficulty": "easy",
        "starter_code": "", "public_test_cases": json.dumps(public), "private_test_cases": private,
        "contest_date": "2025-01-04T00:00:00",
        "metadata": json.dumps(columns.pop("metadata", {})), **columns,
    }  # fmt: skip


def test_contest_problems_on_standard_input(tmp_path):
    hidden = packed([{"input": "5\n", "output": "10", "testtype": "stdin"}])
    put(tmp_path, [contest("stdin", [("2\n", "4\n")], private=hidden)], "livecodebench/test.jsonl")
    [problem] = loaded(tmp_path, find_benchmark("livecodebench")).problems
    assert problem.prompt.startswith("Double it.\n\nThe program reads from standard input")
    assert problem.metadata["groups"] == {"platform": "x", "difficulty": "easy"}
    assert "private_test_cases" not in problem.metadata and problem.metadata["contest_date"] == "2025-01-04"
    task = task_of(json.loads(json.dumps(problem.metadata)))
    assert (task.kind, task.inputs, task.outputs) == ("stdin", ("2\n", "5\n"), ("4\n", "10"))


def test_contest_problems_with_a_function(tmp_path):
    starter = "class Solution:\n    def total(self, xs: List[int], k: int) -> int:\n"
    hidden = json.dumps([{"input": "[5]\n\n0", "output": "5", "testtype": "functional"}])
    row = contest(
        "functional", [("[1, 2]\n3", "6")], private=hidden, starter_code=starter, metadata={"func_name": "total"}
    )
    put(tmp_path, [row], "livecodebench/test.jsonl")
    [problem] = loaded(tmp_path, find_benchmark("livecodebench")).problems
    assert f"```python\n{starter}" in problem.prompt and "standard input" not in problem.prompt
    task = task_of(json.loads(json.dumps(problem.metadata)))
    assert task.inputs == ([[1, 2], 3], [[5], 0]) and task.outputs == (6, 5)
    if not machine().level:
        pytest.skip(f"no level of isolation works here: {machine().missing}")
    body = "        return list(accumulate(xs, initial=k))[-1]\n"
    assert verdict(f"{starter}{body}", task).status is Status.PASSED  # without its imports
    assert verdict(f"{starter}        return k + xs[0]\n", task).status is Status.WRONG_ANSWER
    assert verdict("def total(xs, k):\n    return sum(xs) + k\n", task).status is Status.PASSED
    assert verdict("def other(xs, k):\n    return sum(xs) + k\n", task).status is Status.RUNTIME_ERROR


class _Runs:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (contest("stdin", [], private="[]"), "tests must be functional or stdin, all of them, got none"),
        (contest("stdin", [("1", "1")], private=packed([{"testtype": "functional"}])), "got functional, stdin"),
        (contest("functional", [("1", "1")], private="[]"), "metadata names no func_name"),
        (contest("functional", [("1", "1")], private="[]", metadata={"func_name": "f(); x"}), "names no func_name"),
        (contest("stdin", [("1", "1")], private="{}"), "private_test_cases must hold a list of tests"),
        (contest("stdin", [("1", "1")], private="???"), "private_test_cases is neither JSON nor packed JSON"),
        (
            contest("stdin", [("1", "1")], private=base64.b64encode(zlib.compress(pickle.dumps(_Runs()))).decode()),
            "it names builtins.print",
        ),
    ],
)
def test_contest_tests_that_cannot_be_used(row, message, capsys):
    with pytest.raises(ValueError, match=message):
        livecodebench(row)
    assert "executed" not in capsys.readouterr().out


def test_plus_rows_keep_their_types_through_json(tmp_path):
    row = {
        "task_id": "Mbpp/2", "prompt": '"""\nAdd.\nassert add((1, 2)) == 3\n"""\n', "entry_point": "add", "atol": 0,
        "canonical_solution": "def add(t):\n    assert type(t) is tuple\n    return sum(t)\n",
        "base_input": [[[1, 2]]], "plus_input": [[[3, 4]]], "assertion": "assert add((1, 2)) == 3", "contract": "",
    }  # fmt: skip
    put(tmp_path, [row], "m.jsonl")
    benchmark = replace(find_benchmark("mbpp_plus"), data=DataFile(file="m.jsonl"), problems=0)
    [problem] = loaded(tmp_path, benchmark).problems
    assert problem.prompt.startswith("Add.\nassert add((1, 2)) == 3\nPlease") and problem.answer is None
    task = task_of(json.loads(json.dumps(problem.metadata)))
    assert task.inputs == (((1, 2),), ((3, 4),)) and task.reference == row["canonical_solution"]
    human = {
        **row,
        "prompt": "import math\n\ndef add(t):\n    '''Add.'''\n",
        "canonical_solution": "    return sum(t)\n",
    }
    task = task_of({**human, "task": {"row": "humaneval_plus"}})
    assert task.helpers == f"{human['prompt']}    pass\n" and task.inputs == (([1, 2],), ([3, 4],))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": {"row": "mbpp"}}, "task.row must be one of humaneval_plus, mbpp_plus, got 'mbpp'"),
        ({"task": {"row": "mbpp_plus"}}, "a row of mbpp_plus needs the column 'entry_point'"),
        ({"task": {"kind": "calls", "input": []}}, "task does not hold the fields of a task: .*input"),
        ({"task": {"kind": "stdin", "inputs": ["1"]}}, "a task needs outputs"),
        ({"task": {"level": 3}}, "the problem has no tests"),
    ],
)
def test_a_ready_task_is_checked(row, message):
    with pytest.raises(ValueError, match=message):
        task_of(row)


def test_mbpp_takes_the_test_split(tmp_path):
    rows = [
        {"task_id": n, "text": "t", "code": "", "test_setup_code": "", "test_list": ["assert f(1)"]}
        for n in (2, 11, 510, 511)
    ]
    put(tmp_path, rows, "mbpp.jsonl")
    benchmark = replace(find_benchmark("mbpp"), data=DataFile(file="mbpp.jsonl", rows=4), problems=2)
    data = loaded(tmp_path, benchmark)
    assert [(p.id, p.metadata["doc_id"]) for p in data.problems] == [("11", 1), ("510", 2)] and data.files[0][
        "rows"
    ] == 4


def test_reasoning_gym_problems_are_judged_by_their_own_scorer():
    benchmark = find_benchmark("reasoning_gym:chain_sum")
    data = loaded(None, benchmark, limit=3)
    assert len(data.problems) == 3 and data.files[0]["rows"] == 100
    problem = data.problems[0]
    assert problem.source == benchmark.name and problem.metadata["groups"] == {} and problem.metadata["doc_id"] == 0
    assert problem.prompt == f"{problem.metadata['question']}\n{benchmark.instruction}"
    right = split_reasoning(f"</think><answer>{problem.answer}</answer>")
    assert reasoning_gym(problem, right, **benchmark.grader.params).value == 1.0
    again, other = loaded(None, benchmark, limit=3), loaded(None, benchmark, limit=3, seed=1)
    assert again.problems == data.problems and again.files == data.files != other.files
    more = loaded(None, benchmark, limit=5)
    assert more.problems[:3] == data.problems and more.files == data.files and len(more.problems) == 5
    assert {p.prompt for p in other.problems}.isdisjoint(p.prompt for p in data.problems)
    assert loaded(None, benchmark, protocol=BASE).problems[0].prompt.startswith("Question: ")


def test_a_generator_with_few_problems_gives_what_it_has(tmp_path, caplog):
    keys = (
        "dataset_path: reasoning_gym\ndataset_name: chain_sum\nproblems: 30\ndoc_to_text: question\n"
        "dataset_kwargs: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1, allow_negation: false}\n"
        "grader: {path: reasoning_gym, params: {strict: true}}\n"
    )
    (tmp_path / "few.yaml").write_text(keys.replace("problems: 30", "problems: 300"))
    data = loaded(None, find_benchmark(tmp_path / "few.yaml"))
    assert 150 <= len({problem.prompt for problem in data.problems}) == len(data.problems) < 300
    assert f"no more than {len(data.problems)} different problems of the 300" in caplog.text
    (tmp_path / "few.yaml").write_text(keys)
    assert len(loaded(None, find_benchmark(tmp_path / "few.yaml")).problems) == 30


# --- the real data, where they are


COUNTS = {
    "aime24": (30, "204"), "aime25": (30, "70"), "gsm8k": (1319, "18"), "humaneval": (164, None),
    "humaneval_plus": (164, None), "math": (5000, "2"), "math500": (500, r"\left( 3, \frac{\pi}{2} \right)"),
    "mbpp": (500, None), "mbpp_plus": (378, None),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_the_real_data(data_folder, name):
    benchmark = find_benchmark(name)
    chat = loaded(data_folder, benchmark)
    count, gold = COUNTS[name]
    assert len(chat.problems) == count and chat.problems[0].answer == gold
    first = chat.problems[0]
    assert first.prompt.endswith(f"\n{benchmark.instruction}") and "<think>" not in first.prompt
    assert benchmark.data is not None and chat.files[0]["sha256"] in benchmark.data.sha256.split()
    if "plus" in name:
        return
    base = loaded(data_folder, benchmark, protocol=BASE, limit=5).problems[0]
    assert (base.id, base.answer, base.metadata) == (first.id, first.answer, first.metadata)
    if benchmark.num_fewshot:
        assert benchmark.fewshot[0]["question"] in base.prompt and benchmark.instruction not in base.prompt


def test_the_gold_answers_of_math_are_those_of_math500(data_folder):
    whole = {
        problem.metadata["problem"]: problem.answer for problem in loaded(data_folder, find_benchmark("math")).problems
    }
    some = loaded(data_folder, find_benchmark("math500")).problems
    shared = [problem for problem in some if problem.metadata["problem"] in whole]
    assert len(shared) >= 490
    differing = [p.id for p in shared if whole[p.metadata["problem"]].replace(" ", "") != p.answer.replace(" ", "")]
    assert len(differing) <= 5, differing


def test_null_answers_of_the_real_training_file(data_folder, tmp_path, caplog):
    path = tmp_path / "math_train.yaml"
    keys = "data_file: math/train_answers.jsonl.gz\nrows: 7474\ndoc_to_text: problem\ndoc_to_target: answer\n"
    path.write_text(keys)
    with pytest.raises(ValueError, match=r"math_train, row \d+: doc_to_target: the column 'answer' is null"):
        loaded(data_folder, find_benchmark(path))
    path.write_text(f"{keys}drop_unanswered: true\nproblems: 7470\n")  # two are null, two empty
    assert len(loaded(data_folder, find_benchmark(path)).problems) == 7470

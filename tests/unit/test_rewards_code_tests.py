"""Code rewards: which program counts, which tests a row has, and when a result is right."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import RewardConfig, Score, check_problems
from rewards.calling import bind
from rewards.code_judge import candidate_names, shadowed_builtin
from rewards.code_rows import humaneval_plus, learned_kinds, mbpp_plus, restored
from rewards.code_tasks import BadTests, Task, task_of
from rewards.code_tests import code_tests, last_program
from rewards.isolation import TooWeak
from rewards.oracles import agrees, close, same_lines
from rewards.sandbox import Limits
from rollout.template import split_reasoning
from rollout.types import Problem
from tests.unit.sandbox_programs import machine, verdict

RIGHT, WRONG = "def double(x):\n    return 2 * x\n", "def double(x):\n    return x * x\n"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n"


def needs_a_level() -> None:
    if not machine().level:
        pytest.skip(f"no level of isolation works here: {machine().missing}")


def completion(program: str) -> str:
    return f"I double it.</think>Here:\n```python\n{program}```\n"


def problem(**columns: object) -> Problem:
    return Problem(id="1", prompt="Double it.", metadata=columns)


def scored(text: str, row: Problem, **params) -> Score:
    needs_a_level()
    return code_tests(row, split_reasoning(text), level=machine().level, **params)


def test_a_right_program_scores_one_and_a_wrong_one_zero():
    row = problem(entry_point="double", test=CHECK)
    good, bad = scored(completion(RIGHT), row), scored(completion(WRONG), row)
    assert (good.value, good.metrics["answered"], good.metrics["tests_passed"]) == (1.0, 1.0, 1.0)
    assert (bad.value, bad.metrics["wrong_answer"], bad.metrics["timeout"]) == (0.0, 1.0, 0.0)


def test_only_a_closed_block_after_the_thinking_is_a_program():
    row = problem(entry_point="double", test=CHECK)
    for text in (f"```python\n{RIGHT}```", f"```\n{RIGHT}```</think>no", f"</think>```python\n{RIGHT}", "</think>"):
        found = scored(text, row)
        assert (found.value, found.metrics["answered"]) == (0.0, 0.0)


def test_the_last_block_counts():
    texts = {
        "</think>```\na\n```\nor\n```python\nb\n```\nso": "b\n",
        "</think>~~~\na\n```\nb\n~~~": "a\n```\nb\n",
        "</think>````\n```\nx\n```\n````": "```\nx\n```\n",
        "</think>```\na\n```\n```\ncut": "a\n",
        "</think>```python\n```": None,
    }
    assert {text: last_program(split_reasoning(text)) for text in texts} == texts


def test_partial_credit_is_the_share_of_tests():
    row = problem(fn_name="double", inputs=[[2], [3], [0], [5]], outputs=[4, 6, 0, 10])
    assert scored(completion(WRONG), row, partial=True).value == 0.5  # 2 and 0
    assert scored(completion(WRONG), row).value == 0.0


def test_programs_that_read_standard_input():
    row = problem(input_output='{"inputs": ["2\\n", "5"], "outputs": ["4", "10\\n"]}')
    assert scored(completion("print(2 * int(input()))\n"), row).value == 1.0
    assert scored(completion("print(int(input()) + 2)\n"), row).value == 0.0


def test_tests_in_the_style_of_pytest():
    tests = """
import pytest
from solution import Stack, double

@pytest.mark.parametrize("x, y", [(1, 2), (4, 8)])
def test_values(x, y):
    assert double(x) == y

def test_error():
    with pytest.raises(ValueError):
        double(None)

class TestStack:
    def test_order(self):
        stack = Stack()
        stack.push(1)
        stack.push([2])
        assert (stack.pop(), len(stack), stack.items) == ([2], 1, [1])
"""
    program = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
def double(x):
    if x is None: raise ValueError("no")
    return 2 * x
"""
    row = problem(test=tests)
    assert scored(completion(program), row).value == 1.0
    found = scored(completion(program.replace("2 * x", "3 * x")), row, partial=True)
    assert found.value == pytest.approx(2 / 3)


def test_a_class_of_the_candidate_can_be_built_by_the_tests():
    needs_a_level()
    task = task_of({"test_setup_code": "root = Node(1)\nroot.left = Node(2)", "test_list": ["assert depth(root) == 2"]})
    node = "class Node:\n    def __init__(s, v): s.v, s.left = v, None\n"
    assert verdict(node + "def depth(n): return 0 if n is None else 1 + depth(n.left)", task).status == "passed"
    assert verdict(node + "def depth(n): return 1", task).status == "wrong_answer"


def test_a_reference_makes_the_outputs():
    needs_a_level()
    row = {"entry_point": "double", "inputs": [[1], [2.5]], "reference": RIGHT, "atol": 1e-3}
    assert verdict("def double(x): return 2 * x + 5e-4", task_of(row)).status == "passed"
    assert verdict("def double(x): return 2 * x + 5e-3", task_of(row)).status == "wrong_answer"
    with pytest.raises(BadTests, match=r"the reference program fails on input 1: .*unsupported"):
        verdict(RIGHT, task_of({**row, "inputs": [[1], [{}]]}))


def test_a_run_refuses_what_it_could_never_judge(monkeypatch):
    with pytest.raises(ValueError, match="problem '1': the problem has no tests: give it test, test_list, or inputs"):
        check_problems(code_tests, [problem(answer=3)])
    monkeypatch.setattr("rewards.code_tests.require", _refuse)
    with pytest.raises(TooWeak, match="bubblewrap"):
        bind(RewardConfig(path="code_tests"))
    with pytest.raises(TooWeak, match="namespaces"):
        bind(RewardConfig(path="code_tests", params={"level": "namespaces", "test_s": 1.0}))


def _refuse(level, packages):
    raise TooWeak(level)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"test": CHECK}, "needs entry_point"),
        ({"inputs": ["1"], "outputs": []}, "needs outputs, or a reference"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
        ({"inputs": [], "outputs": []}, "at least one input"),
        ({"input_output": "{"}, "not JSON"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "f", "oracle": "near"}, "oracle must be one of"),
    ],
)
def test_rows_without_usable_tests_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        task_of(columns)


def test_which_names_are_the_candidates():
    assert candidate_names("import math\nassert f(x, len(y)) == math.pi", {"x": 1}) == {"f", "y"}
    assert candidate_names("assert [g(i) for i in range(3)] == [0]", {}) == {"g"}
    assert shadowed_builtin(["assert sum(10, 15) == 6", "assert sum(1, 2) == 1"]) == "sum"
    assert shadowed_builtin(["assert set(f(1)) == set()"]) == ""
    with pytest.raises(BadTests, match="not Python"):
        candidate_names("assert (", {})


def test_lines_are_compared_whole():
    assert same_lines("1\n2\n", b"1  \r\n2\n\n")
    assert not same_lines("1\n2", b"1")
    assert not same_lines("1", b"1\n2")
    assert not same_lines("5", b"\n5") and not same_lines("x", b"\xff")


def test_floats_agree_within_the_tolerance():
    assert close(1e10, 1e10 + 900) and not close(1e10, 1e10 + 1100)  # 1e-7 relative
    assert close([0.0, (1, math.nan)], [9e-7, (1, math.nan)]) and not close([0.0], [2e-6])
    assert close({"a": 1.0}, {"a": 1.0 + 1e-8}) and not close(1, 1.5) and not close(1, "1") and not close([1], [1, 2])
    assert not close(1.0, 10**400) and not close(1.0, None)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x)))
def test_a_value_agrees_with_itself(value):
    if value == value:
        assert close(value, value)


def test_special_oracles():
    def right(oracle, expected, result, given=(0,)):
        task = Task(kind="calls", entry_point="f", inputs=(given,), outputs=(expected,), oracle=oracle)
        return agrees(task, given, expected, result)

    assert right("set", (1, 2), [2, 1, 1]) and not right("set", (1, 2), [1]) and not right("set", (1,), 1)
    assert right("not_none", True, "x") and right("not_none", None, None) and not right("not_none", None, 0)
    assert right("root", 0.0, -0.5, ([1, 2],)) and not right("root", 0.0, 0.5, ([1, 2],))
    assert not right("root", 0.0, math.nan, ([1, 2],)) and not right("root", 0.0, 10**400, ([1, 2],))


def test_types_that_json_lost_come_back():
    kinds = learned_kinds("assert f([(1, 2), (3,)], {4}) == 5\nassert f([], set()) == 0", "f", [[[[1, 2], [3]], [4]]])
    assert restored([[7, 8], []], (0,), kinds) == [(7, 8), ()]
    assert restored([7, 7], (1,), kinds) == {7}
    kinds = learned_kinds("assert f(1j, 2)", "f", [["1j", 2]])
    assert (restored("3j", (0,), kinds), restored("1.5", (1,), kinds), restored(7, (1,), kinds)) == (3j, 1.5, 7)


def test_rows_of_the_plus_sets():
    row = {
        "task_id": "HumanEval/32", "entry_point": "find_zero", "prompt": "def find_zero(xs):\n    '''x'''\n",
        "canonical_solution": "    return 1\n", "base_input": [[[1, 2]]], "plus_input": [[[3, 4]]], "atol": 1e-4,
    }  # fmt: skip
    task = humaneval_plus(row)
    assert (task.oracle, task.inputs, task.atol) == ("root", (([1, 2],), ([3, 4],)), 1e-4)
    plus = {
        **row,
        "task_id": "Mbpp/2",
        "entry_point": "Diff",
        "assertion": "assert Diff((1,)) == 1",
        "base_input": [[[1]]],
    }
    assert (mbpp_plus(plus).oracle, mbpp_plus(plus).inputs) == ("set", (((1,),), ((3, 4),)))


def test_a_program_that_is_too_long_is_refused():
    assert verdict("#" * 200_001, level="bubblewrap").status == "output_limit"


def test_the_limits_of_a_call_stay_below_its_deadline():
    assert Limits().total_s + 1 < RewardConfig(path="code_tests").timeout_s

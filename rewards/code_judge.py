"""The tests of a coding problem, run by the parent; its calls of the candidate go to the sandbox and back as values.

What the tests call is looked up in trusted code first: builtins, what the tests define and import themselves, and the
problem's own helpers. Only names that none of these knows are the candidate's. So it cannot bring its own ``set`` or
``isclose`` into a comparison.

The tests themselves are trusted, like the data set that they come from: they run with the rights of this process.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.code_tasks import BadTests, Task
from rewards.isolation import Isolation
from rewards.oracles import agrees, same_lines
from rewards.references import FromCandidate, Reference, WrongAnswer, lookup
from rewards.sandbox import CandidateError, Limits, Sandbox, SandboxEnded, Status

# Names that tests use without importing them; the candidate's own of that name would decide the comparison.
_MODULES = ("math", "cmath", "re", "sys", "os", "copy", "random", "itertools", "collections", "datetime", "string")
_ALIASES = {**{name: name for name in _MODULES}, "np": "numpy", "numpy": "numpy"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a program.

    Attributes:
        status: ``passed`` only when every test passed, else why the first one did not.
        tests, passed: how many there are, and how many passed.
        detail: one line for a person; partly the candidate's own words.
    """

    status: Status
    tests: int
    passed: int
    detail: str = ""


def judge(task: Task, program: str, isolation: Isolation, limits: Limits, *, stop_early: bool = True) -> Verdict:
    """Runs the tests of a task on a program.

    Args:
        stop_early: the first failed test ends it; else all tests run, and ``passed`` counts.

    Raises:
        BadTests: the tests themselves do not work.
    """
    tests = list(_tests_of(task, isolation, limits))
    first: Verdict | None = None
    passed, position = 0, 0
    while position < len(tests):
        with Sandbox(isolation, limits) as sandbox:
            failed = _load(task, program, sandbox)
            if failed is not None:
                return Verdict(status=failed[0], tests=len(tests), passed=passed, detail=failed[1])
            while position < len(tests) and sandbox.ended is None:
                sandbox.begin_test()
                status, detail = _outcome(tests[position], sandbox, program)
                position += 1
                passed += status is Status.PASSED
                if status is not Status.PASSED and first is None:
                    first = Verdict(status=status, tests=len(tests), passed=0, detail=f"test {position}: {detail}")
                if first is not None and stop_early:
                    return replace(first, passed=passed)
                if sandbox.ended is not None and sandbox.spent:
                    position = len(tests)
    return replace(first, passed=passed) if first else Verdict(status=Status.PASSED, tests=len(tests), passed=passed)


_Test = Callable[[Sandbox, str], None]


def _load(task: Task, program: str, sandbox: Sandbox) -> tuple[Status, str] | None:
    """Loads the program; why it cannot be tested, if so. Programs that read standard input are loaded per test."""
    if task.kind == "stdin":
        return None
    try:
        sandbox.ask("load", program, task.helpers)
        if task.entry_point:
            sandbox.ask("get", task.entry_point)
    except CandidateError as error:
        return _status_of(error.names), str(error)
    except SandboxEnded as end:
        return end.status, str(end)
    return None


def _status_of(names: Sequence[str]) -> Status:
    for name, status in (
        ("SyntaxError", Status.SYNTAX_ERROR),
        ("MemoryError", Status.MEMORY_LIMIT),
    ):
        if name in names:
            return status
    return Status.RUNTIME_ERROR


def _outcome(test: _Test, sandbox: Sandbox, program: str) -> tuple[Status, str]:
    """What one test says. Whatever the tests swallow, an ended sandbox never passes."""
    status, detail = Status.PASSED, ""
    try:
        test(sandbox, program)
    except SandboxEnded:
        pass
    except (CandidateError, FromCandidate) as error:
        status, detail = _status_of(getattr(error, "names", ())), str(error)
    except BadTests:
        raise
    except Exception as error:  # an assertion, or the tests choking on what they were given
        kind = type(error).__name__
        names = getattr(error, "candidate_names", None)
        status = _status_of(names) if names else Status.WRONG_ANSWER
        text = _text_of(error)
        detail = f"{kind}: {text}" if text else kind
    if sandbox.ended is not None:
        return sandbox.ended.status, str(sandbox.ended)
    return status, detail


def _text_of(error: Exception) -> str:
    """One line; the text may hold a reference, and then it is the candidate that is asked for it."""
    try:
        return " ".join(str(error).split())[:200]
    except (Exception, SandboxEnded):
        return ""


def _tests_of(task: Task, isolation: Isolation, limits: Limits) -> list[_Test]:
    if task.kind == "check":
        return [_check_test(task)]
    if task.kind == "asserts":
        task = replace(task, entry_point=task.entry_point or shadowed_builtin(task.asserts))
        return [_assert_test(task, statement) for statement in task.asserts]
    if task.kind == "pytest":
        from rewards.pytest_style import pytest_tests

        return pytest_tests(task.code, lambda code, sandbox: _namespace(task, code, sandbox))
    if task.kind == "stdin":
        pairs = zip(task.inputs, task.outputs, strict=True)
        return [_stdin_test(str(given), str(expected), limits) for given, expected in pairs]
    outputs = task.outputs or reference_outputs(task, isolation, limits)
    return [_call_test(task, given, expected) for given, expected in zip(task.inputs, outputs, strict=True)]


def candidate_names(code: str, known: Mapping[str, Any]) -> set[str]:
    """Names that a piece of tests reads and that nobody trusted knows.

    Raises:
        BadTests: it is no Python.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise BadTests(f"the tests are not Python: {error}") from None
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return {name for name in read - bound if name not in known and not hasattr(builtins, name)}


def shadowed_builtin(asserts: Sequence[str]) -> str:
    """The builtin that is itself under test (a problem may ask for a function called ``sum``); empty if none is.

    Only where the asserts name nothing else that could be the candidate's; and never by what the candidate defines.
    """
    if any(candidate_names(each, {}) for each in asserts):
        return ""
    called = [
        {
            node.func.id
            for node in ast.walk(ast.parse(each))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for each in asserts
    ]
    common = set.intersection(*called)
    return common.pop() if len(common) == 1 else ""


def _namespace(task: Task, code: str, sandbox: Sandbox) -> dict[str, Any]:
    """Globals of the tests: helpers, modules, and the candidate's functions."""
    names: dict[str, Any] = {"__name__": "tests"}
    if task.helpers:
        exec(compile(task.helpers, "<helpers>", "exec"), names)
    for name in candidate_names(code, {} if task.entry_point else names):
        module = _ALIASES.get(name)
        if name in names and name != task.entry_point:
            continue
        if module is not None and name != task.entry_point:
            with contextlib.suppress(ImportError):
                names[name] = importlib.import_module(module)
                continue
        names[name] = lookup(sandbox, name)
    if task.entry_point:
        names[task.entry_point] = lookup(sandbox, task.entry_point)
    return names


def _check_test(task: Task) -> _Test:
    def test(sandbox: Sandbox, _: str) -> None:
        names = _namespace(task, task.code, sandbox)
        exec(compile(task.code, "<tests>", "exec"), names)
        if "check" not in names:
            raise BadTests("the tests define no check(candidate)")
        names["check"](names[task.entry_point])

    return test


def _assert_test(task: Task, statement: str) -> _Test:
    def test(sandbox: Sandbox, _: str) -> None:
        code = f"{task.code}\n{statement}"
        exec(compile(code, "<tests>", "exec"), _namespace(task, code, sandbox))

    return test


def _stdin_test(given: str, expected: str, limits: Limits) -> _Test:
    def test(sandbox: Sandbox, program: str) -> None:
        try:
            status, output = sandbox.ask("case", program, given.encode(), limits.test_s, limits.output // 4)
        except CandidateError as error:
            if "OverflowError" in error.names:
                raise sandbox.fail(Status.OUTPUT_LIMIT, str(error)) from None
            raise
        except (TypeError, ValueError):
            raise WrongAnswer("it wrote to the channel of the answers") from None
        if type(status) is not int or type(output) is not bytes:
            raise WrongAnswer("it wrote to the channel of the answers")
        if status:
            names = {77: ("MemoryError",), 78: ("SyntaxError",)}.get(status, ())
            raise FromCandidate(CandidateError((*names, "exit"), f"status {status}"))
        if not same_lines(expected, output):
            raise WrongAnswer("the output is another one")

    return test


def _call_test(task: Task, given: Any, expected: Any) -> _Test:
    def test(sandbox: Sandbox, _: str) -> None:
        result = lookup(sandbox, task.entry_point)(*given)
        if not agrees(task, given, expected, result):
            raise WrongAnswer("the result is another one")

    return test


def reference_outputs(task: Task, isolation: Isolation, limits: Limits) -> tuple[Any, ...]:
    """What the reference program returns for each input, from a sandbox of its own.

    Raises:
        BadTests: it fails on one of them.
    """
    with Sandbox(isolation, limits) as sandbox:
        failed = _load(task, task.reference, sandbox)
        if failed is not None:
            raise BadTests(f"the reference program fails: {failed[1]}")
        outputs = []
        for number, given in enumerate(task.inputs):
            sandbox.begin_test()
            try:
                outputs.append(lookup(sandbox, task.entry_point)(*given))
            except (Exception, SandboxEnded) as error:
                raise BadTests(f"the reference program fails on input {number}: {error}") from None
            if isinstance(outputs[-1], Reference) and task.oracle == "not_none":
                outputs[-1] = True
            if isinstance(outputs[-1], Reference):
                raise BadTests(f"the reference program returns an object on input {number}")
    return tuple(outputs)

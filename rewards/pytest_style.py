"""Tests written for pytest, without its fixtures: functions ``test_…``, and classes ``Test…`` with such methods.

pytest itself is needed only where the tests import it. ``parametrize`` is honoured; one function is one test.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rewards.code_tasks import BadTests
from rewards.references import lookup
from rewards.sandbox import Sandbox

MODULES = ("solution", "main", "candidate")
"""Names under which tests may import the candidate."""


class _Module(types.ModuleType):
    """The candidate as a module: what is imported from it is looked up inside the sandbox."""

    def __init__(self, name: str, sandbox: Sandbox) -> None:
        super().__init__(name)
        self.__dict__["_sandbox"] = sandbox

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lookup(self.__dict__["_sandbox"], name)


def pytest_tests(code: str, bind: Callable[[str, Sandbox], dict[str, Any]]) -> list[Callable[[Sandbox, str], None]]:
    """The tests of a module, each as a function of the sandbox.

    Args:
        bind: makes the globals of a piece of tests.

    Raises:
        BadTests: no Python, or no tests.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise BadTests(f"the tests are not Python: {error}") from None
    names: list[tuple[str, ...]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names.append((node.name,))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = (each.name for each in node.body if isinstance(each, ast.FunctionDef))
            names += [(node.name, method) for method in methods if method.startswith("test")]
    if not names:
        raise BadTests("the tests have no function whose name begins with test")
    return [_test(code, path, bind) for path in names]


def _test(
    code: str, path: tuple[str, ...], bind: Callable[[str, Sandbox], dict[str, Any]]
) -> Callable[[Sandbox, str], None]:
    def test(sandbox: Sandbox, _: str) -> None:
        with _importable(sandbox):
            names = bind(code, sandbox)
            exec(compile(code, "<tests>", "exec"), names)
            target = names[path[0]]
            if len(path) == 2:
                instance = target()
                getattr(instance, "setup_method", lambda *_: None)()
                target = getattr(instance, path[1])
            for arguments in _parameters(target):
                target(**arguments)

    return test


@contextmanager
def _importable(sandbox: Sandbox) -> Iterator[None]:
    kept = {name: sys.modules.get(name) for name in MODULES}
    sys.modules.update({name: _Module(name, sandbox) for name in MODULES})
    try:
        yield
    finally:
        for name, module in kept.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _parameters(target: Any) -> list[dict[str, Any]]:
    """Arguments of each call; one empty set where nothing is parametrized."""
    axes: list[list[dict[str, Any]]] = []
    for mark in getattr(target, "pytestmark", ()):
        if mark.name == "parametrize":
            names, rows = mark.args[0], mark.args[1]
            fields = [each.strip() for each in names.split(",")] if isinstance(names, str) else list(names)
            values = [getattr(row, "values", row) if not isinstance(row, dict) else row for row in rows]
            axes.append([dict(zip(fields, row if len(fields) > 1 else (row,), strict=True)) for row in values])
    found = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]
    missing = inspect.signature(target).parameters.keys() - (found[0].keys() if found else set())
    if missing:
        raise BadTests(f"the tests ask for the fixture {min(missing)!r}; fixtures of pytest are not there")
    return found

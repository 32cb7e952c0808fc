"""What a coding problem demands: the task, and how it is read from the columns of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("check", "asserts", "stdin", "calls", "pytest")
ORACLES = ("equal", "set", "not_none", "root")


class BadTests(ValueError):
    """The tests of a problem cannot be run, whatever the candidate does."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The tests of one problem.

    Attributes:
        kind: ``check`` (code that defines ``check(candidate)``), ``asserts`` (a list of them), ``stdin`` (whole
            programs), ``calls`` (arguments and results), ``pytest`` (code with functions ``test_…``).
        entry_point: name of the function under test; needed by ``check`` and ``calls``.
        helpers: code of the problem itself that candidate and tests may use; it runs on both sides.
        code: the tests of ``check`` and ``pytest``; what runs before ``asserts``.
        asserts: one statement each.
        inputs: per test the arguments (``calls``) or the text of standard input (``stdin``).
        outputs: per test what must come back; empty where ``reference`` says it.
        reference: a right program, run in a sandbox of its own for the results of ``calls``.
        oracle: how results are compared: ``equal`` (numbers within a tolerance), ``set``, ``not_none`` (both are
            None, or neither is), ``root`` (the result is a root of the polynomial that is the first argument).
        atol: absolute tolerance of numbers; 0 takes 1e-6 where the expected value holds a float.
    """

    kind: str
    entry_point: str = ""
    helpers: str = ""
    code: str = ""
    asserts: tuple[str, ...] = ()
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    reference: str = ""
    oracle: str = "equal"
    atol: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a task must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.oracle not in ORACLES:
            raise ValueError(f"oracle must be one of {', '.join(ORACLES)}, got {self.oracle!r}")
        if self.kind in ("check", "calls") and not self.entry_point:
            raise ValueError(f"a task of kind {self.kind} needs entry_point, the name of the function under test")
        if self.kind in ("stdin", "calls") and not self.inputs:
            raise ValueError("a task needs at least one input")
        if self.outputs and len(self.outputs) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs: they must be as many")
        if self.kind in ("stdin", "calls") and not self.outputs and not self.reference:
            raise ValueError("a task needs outputs, or a reference program that makes them")
        if (self.kind == "asserts" and not self.asserts) or (
            self.kind in ("check", "pytest") and not self.code.strip()
        ):
            raise ValueError("a task needs at least one test")


def task_of(row: Mapping[str, Any]) -> Task:
    """The task in a row's columns; which of them are there decides its kind.

    ``test`` with ``check(candidate)`` inside
        ``check``; ``entry_point`` is needed, ``prompt`` is the code that the program continues, if any.
    ``test`` with functions ``test_…``
        ``pytest``.
    ``test_list``
        ``asserts``; ``test_setup_code`` and ``test_imports`` run before each.
    ``inputs`` with ``outputs``
        ``stdin``, or ``calls`` where ``fn_name`` or ``entry_point`` names a function. ``reference``, a program, may
        stand for the outputs of calls; ``oracle`` and ``atol`` say how results are compared.

    ``input_output``, a JSON text with inputs, outputs and fn_name, is read as if its keys were columns.

    ``task``, a mapping, goes before all of these: the fields of :class:`Task` (``kind`` among them), or ``{"row":
    "humaneval_plus"}`` or ``{"row": "mbpp_plus"}`` for a row of these sets (:mod:`rewards.code_rows`).

    Raises:
        ValueError: the columns make no task.
    """
    task = row.get("task")
    if isinstance(task, Mapping) and ("kind" in task or "row" in task):
        return _ready(task, row)
    if isinstance(row.get("input_output"), str):
        row = {**row, **_json(row["input_output"])}
    test = str(row.get("test") or "")
    entry_point = str(row.get("entry_point") or row.get("fn_name") or "")
    if "inputs" in row:
        kind = "calls" if entry_point or row.get("reference") else "stdin"
        common = {key: row[key] for key in ("oracle", "atol", "reference") if row.get(key)}
        outputs = tuple(row.get("outputs") or ())
        return Task(kind=kind, entry_point=entry_point, inputs=tuple(row["inputs"]), outputs=outputs, **common)
    if row.get("test_list"):
        setup = "\n".join([*(row.get("test_imports") or ()), str(row.get("test_setup_code") or "")])
        return Task(kind="asserts", asserts=tuple(row["test_list"]), code=setup)
    if "def check(" in test:
        prompt = str(row.get("prompt") or "")
        helpers = f"{prompt.rstrip()}\n    pass\n" if prompt else ""
        return Task(kind="check", entry_point=entry_point, helpers=helpers, code=test)
    if "def test" in test:
        return Task(kind="pytest", code=test)
    raise ValueError("the problem has no tests: give it test, test_list, or inputs with outputs")


def _ready(task: Mapping[str, Any], row: Mapping[str, Any]) -> Task:
    """The task that a row holds ready-made; JSON knows no tuples."""
    if "row" in task:
        from rewards import code_rows

        readers = {"humaneval_plus": code_rows.humaneval_plus, "mbpp_plus": code_rows.mbpp_plus}
        if task["row"] not in readers:
            raise ValueError(f"task.row must be one of {', '.join(readers)}, got {task['row']!r}")
        try:
            return readers[task["row"]](row)
        except KeyError as error:
            raise ValueError(f"a row of {task['row']} needs the column {error}") from None
    fields: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in task.items()}
    try:
        return Task(**fields)
    except TypeError as error:
        raise ValueError(f"task does not hold the fields of a task: {error}") from None


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"input_output is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("input_output must be a JSON object with inputs and outputs")
    return found

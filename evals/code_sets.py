"""Rows of program benchmarks where YAML is not enough: which rows are the test split, and what their tests are.

Named by ``process_docs`` of the catalogue: row -> row with a ``task`` (rewards.code_tasks.task_of), or None.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

_LARGEST = 1 << 30  # bytes of the tests of one problem
_MBPP_TEST = range(11, 511)  # the ids of the published test split

# What solutions on LeetCode may use without importing it. No star import of math, operator or builtins: they would take
# the place of pow and the like.
_PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt
from typing import *
"""
# The method of a class Solution under the name of a function; a program that defines the function itself replaces it.
_METHOD = """
def {name}(*args):
    return Solution().{name}(*args)
"""


def mbpp(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Rows of the test split: task 11 to 510. The others are for prompts, validation and training."""
    return row if int(row["task_id"]) in _MBPP_TEST else None


def mbpp_plus(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tests from base and further inputs, against the row's own solution."""
    return {**row, "task": {"row": "mbpp_plus"}}


def humaneval_plus(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tests from base and further inputs, against the row's own solution."""
    return {**row, "task": {"row": "humaneval_plus"}}


def livecodebench(row: Mapping[str, Any]) -> dict[str, Any]:
    """Public and private tests as one task: calls of a method where they are ``functional``, else standard input.

    Raises:
        ValueError: the tests cannot be read, are of two kinds, or name no function.
    """
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    kinds = sorted({str(test.get("testtype")) for test in tests})
    if kinds == ["functional"]:
        task = _functional(row, tests)
    elif kinds == ["stdin"]:
        task = {
            "kind": "stdin",
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
        }
    else:
        raise ValueError(f"tests must be functional or stdin, all of them, got {', '.join(kinds) or 'none'}")
    kept = {name: value for name, value in row.items() if name not in ("public_test_cases", "private_test_cases")}
    date = str(row.get("contest_date") or "")[:10]
    return {**kept, "contest_date": date, "starter_code": str(row.get("starter_code") or ""), "task": task}


def _functional(row: Mapping[str, Any], tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Each line of an input is one argument in JSON, the output is the result in JSON."""
    metadata = row.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("metadata names no func_name")
    return {
        "kind": "calls",
        "entry_point": name,
        "helpers": _PRELUDE + _METHOD.format(name=name),
        "inputs": [[json.loads(line) for line in test["input"].split("\n") if line.strip()] for test in tests],
        "outputs": [json.loads(test["output"]) for test in tests],
    }


def _tests(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The tests in a column: JSON, or JSON in a pickled text, compressed and in base 64."""
    value = row.get(column) or "[]"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = json.loads(_unpacked(str(value), column))
    if not isinstance(value, list):
        raise ValueError(f"{column} must hold a list of tests")
    return value


def _unpacked(text: str, column: str) -> str:
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(text, validate=True), _LARGEST)
        found = _TextOnly(io.BytesIO(raw)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{column} is neither JSON nor packed JSON: {error}") from None
    if not isinstance(found, str):
        raise ValueError(f"{column} holds a {type(found).__name__} where a text belongs")
    return found


class _TextOnly(pickle.Unpickler):
    """Reads plain values. A pickle that names a class or a function would run it: refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

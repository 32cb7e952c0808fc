"""``r1 reward test``: a reward function on golden and adversarial completions, or on files of graded answers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MEANINGS = {
    "score": "", "none": "does not apply", "error": "raised", "invalid": "no finite number", "timeout": "timed out",
    "crash": "its process ended", "memory": "took too much memory",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("function", metavar="PATH:FN", help="file.py:function, module:function, or a built-in's name")
    parser.add_argument("--cases", metavar="FILE", nargs="+", type=Path,
                        help="grade these files (.jsonl or .jsonl.gz: gold, prediction, expected) instead")  # fmt: skip
    parser.add_argument("--style", default="plain", help="plain (default), trl, trl_chat, verl, verl_batch")
    parser.add_argument("--param", metavar="K=V", action="append", default=[],
                        help="an argument of the function, as in YAML; also {k: v, …}")  # fmt: skip
    parser.add_argument("--factory", metavar="K=V", action="append", default=None,
                        help="PATH:FN makes the function when it is called with these; {} for none")  # fmt: skip
    parser.add_argument("--problem", metavar="K=V", action="append", default=[],
                        help="prompt, answer, wrong (a wrong answer), or a column that the function needs")  # fmt: skip
    parser.add_argument("--timeout", metavar="S", type=float, default=10.0, help="deadline of one call, seconds")
    parser.add_argument("--free-think", action="store_true", help="the prompt does not end in <think>")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; what it found stands in the returned object, ``ok`` says whether the function is fit for a run.

    Raises:
        ValueError: the function or a file cannot be used.
    """
    from rewards.base import RewardConfig
    from rewards.trial import DEFAULT_PROBLEM, run_trial, with_columns

    config = RewardConfig(
        path=options.function, style=options.style, timeout_s=options.timeout, params=values(options.param, "--param"),
        factory=None if options.factory is None else values(options.factory, "--factory"),
    )  # fmt: skip
    if options.cases:
        from rewards.grading_cases import confusion

        answer = {"files": confusion(options.cases, function=config, search=[os.getcwd()])}
        if not options.json:
            _print_files(config.path, answer["files"])
        return answer
    columns = values(options.problem, "--problem")
    wrong = str(columns.pop("wrong", ""))
    columns |= {name: str(columns[name]) for name in ("prompt", "answer") if isinstance(columns.get(name), int | float)}
    problem = with_columns(DEFAULT_PROBLEM, columns)
    found = run_trial(config, problem=problem, wrong=wrong, forced_think=not options.free_think, search=[os.getcwd()])
    if not options.json:
        _print_trial(found)
    return found


def values(texts: Sequence[str], option: str) -> dict[str, Any]:
    """``["a=1", "{b: [2]}"]`` -> ``{"a": 1, "b": [2]}``; values are read as a recipe's are.

    Raises:
        ValueError: neither K=V nor a mapping.
    """
    from pipelines.recipe_source import parse_override
    from pipelines.schema import Builder

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        mapping = text.lstrip().startswith("{")
        if not mapping and not (equals and key.isidentifier()):
            raise ValueError(f"{option} is written K=V or {{k: v}}, got {text!r}")
        node = parse_override(f"mapping={text}" if mapping else text)[1]
        value = Builder().convert(Any, node, option)
        found |= value if mapping else {key: value}
    return found


def _print_trial(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipelines.console import printable

    table = Table(title=Text(f"{found['function']}, style {found['style']}"), title_justify="left")
    for column in ("completion", "kind", "score", "ms", "what happened"):
        table.add_column(column, justify="right" if column in ("score", "ms") else "left")
    for row in found["cases"]:
        hacked = row["case"] in found["hacks"]
        what = [_MEANINGS[row["outcome"]], "" if row["same"] else "differs from call to call", "paid" if hacked else ""]
        score = "" if row["score"] is None else f"{row['score']:.4g}"
        style = "red" if hacked or row["error"] or not row["same"] else ""
        cells = (row["case"], row["kind"], score, f"{1000 * row['seconds']:.1f}", ", ".join(filter(None, what)))
        table.add_row(*cells, style=style)
    console = Console()
    console.print(table)
    for line in lines(found):
        console.print(Text(printable(line)), soft_wrap=True)


def lines(found: Mapping[str, Any]) -> list[str]:
    """What a trial found, in words."""
    cases, hacks = len(found["cases"]), found["hacks"]
    failures = {_MEANINGS[k]: n for k, n in found["outcomes"].items() if k not in ("score", "none")}
    judged = (
        f"{len(hacks)} attacks are paid like a right answer: {', '.join(hacks)}" if hacks
        else "a right answer is paid, a wrong one and every attack are not" if found["judges"]
        else "it pays no golden form more than every wrong one: it does not judge the answer, or not in these forms"
    )  # fmt: skip
    text = [
        f"judges      {judged}",
        f"speed       {found['calls_per_s']:,.0f} calls/s; {found['slowest']} takes {1000 * found['slowest_s']:.1f} ms",
        "repeatable  " + ("yes" if found["deterministic"] else "NO: some scores differ from call to call"),
        "failures    " + (", ".join(f"{k}: {n} of {cases}" for k, n in failures.items()) or "none"),
    ]
    if found["executes_text"]:
        text.append("DANGER      it executed code that stood in a completion")
    if found["failure"]:
        text += ["", f"the first failure: {found['failure']}", found["traceback"].rstrip()]
    return text


def _print_files(function: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("n", "true_accept", "true_reject", "false_accept", "false_reject", "contested", "timeouts", "seconds")
    table = Table(title=Text(function), title_justify="left")
    table.add_column("file", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for file, counts in files.items():
        cells = [f"{counts[c]:.1f}" if c == "seconds" else str(counts[c]) for c in columns]
        table.add_row(Text(Path(file).name), *cells)
    Console().print(table)

"""``r1 reward sandbox``: how strongly this machine locks programs in, and what becomes of a folder of hostile ones.

A manifest has one line per program: ``id``, ``file``, ``task`` (a key of ``tasks.json`` beside it), ``max_seconds`` and
``invariants``. The canaries (a folder, a listener, a victim, an inheritable descriptor) are made by whoever runs it:
what is looked at here are the folder and the process of ``CANARY`` below, where they are there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CANARY = Path("/tmp/rl_canary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument(
        "--manifest", metavar="FILE", type=Path, help="run the programs of this list, one after the other"
    )
    parser.add_argument("--level", default="", help="rlimits, namespaces or bubblewrap (the strongest one that works)")
    parser.add_argument("--probe", action="store_true", help="say what this machine gives and how to get more")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb.

    Raises:
        ValueError: the manifest cannot be read, or the machine does not reach the level.
    """
    from rewards.probe import probe, require

    found = require(options.level) if options.level else probe()
    level = options.level or found.level
    if options.manifest is None:
        answer = {
            "level": found.level,
            "missing": found.missing,
            "packages": list(found.packages),
            "own_uid": found.own_uid,
        }
        if not options.json:
            _print_probe(answer)
        return answer
    if not level:
        raise ValueError(f"no level of isolation works here: {found.missing['rlimits']}")
    answer = {"level": level, "programs": _programs(options.manifest, level)}
    if not options.json:
        _print_programs(answer)
    return answer


def _programs(manifest: Path, level: str) -> dict[str, Any]:
    from pipelines.hostile import Watch, read_manifest
    from rewards.code_tests import run_tests
    from rewards.sandbox import Limits

    found: dict[str, Any] = {}
    for row, task, program in read_manifest(manifest):
        watch = Watch(CANARY)
        began = time.monotonic()
        verdict = run_tests(task, program, level=level, limits=Limits(test_s=5, total_s=10))
        seconds = time.monotonic() - began
        found[row["id"]] = {
            "passed": verdict.status == "passed",
            "status": str(verdict.status),
            "violated": watch.violated(row.get("invariants", ())),
            "seconds": round(seconds, 3),
        }
    return found


def _print_probe(answer: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"level: {answer['level'] or 'none: code cannot be run here'}", markup=False)
    if answer["level"]:
        console.print(f"a user id of its own per program: {'yes' if answer['own_uid'] else 'no (start as root)'}")
        console.print(f"importable: {', '.join(['the standard library', *answer['packages']])}", markup=False)
    for level, reason in answer["missing"].items():
        console.print(f"for {level}: {reason}", markup=False)


def _print_programs(answer: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"programs at the level {answer['level']}", title_justify="left")
    for header in ("program", "passed", "status", "violated", "seconds"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    for name, row in answer["programs"].items():
        table.add_row(name, str(row["passed"]), row["status"], " ".join(row["violated"]), f"{row['seconds']:.2f}")
    Console().print(table)

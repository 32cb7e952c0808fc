"""``python -m benchmarks [NAME …] [--quick] [--out DIR]``: r1 against its peers.

Each benchmark runs in a process of its own. A full run rewrites docs/benchmarks.md and docs/benchmarks.json; a quick
one writes the same two files below runs/benchmarks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.apart import run_apart
from benchmarks.peer import PeerFailed
from benchmarks.report import Measurement, table, write

NAMES = ("grpo", "rollout", "sync", "learner", "learner-cost", "learner-long", "grading", "sandbox", "evals")
_FULL, _QUICK = Path("docs"), Path("runs/benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen benchmarks; 0 when all of them ran, 1 when one failed (its figures are then not written)."""
    parser = _parser()
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    from rich.console import Console

    from benchmarks.machine import BUSY, busy_share, describe_machine, quiet_environment

    quiet_environment()
    console = Console()
    names = [name for name in NAMES if name in args.names] or list(NAMES)
    command = command_of(args.names, quick=args.quick)
    machine, busy = describe_machine(), busy_share()
    console.print(f"{machine['cores']}, {machine['memory']}; others use {busy:.0%} of the cores")
    if busy > BUSY:
        console.print("[yellow]the machine is not idle: ratios measured now are not to be trusted[/yellow]")
    done: list[Measurement] = []
    failed: list[str] = []
    for name in names:
        began = time.perf_counter()
        console.rule(name)
        try:
            comparisons = run_apart(name, quick=args.quick, seed=args.seed)
        except PeerFailed as error:
            console.print(str(error), markup=False, highlight=False)
            failed.append(name)
            continue
        done.append(
            Measurement(
                name=name, comparisons=comparisons, command=command, date=f"{datetime.now(UTC):%Y-%m-%d}",
                machine=machine, busy=busy, seconds=round(time.perf_counter() - began, 1), quick=args.quick,
            )
        )  # fmt: skip
        console.print(table(done[-1:]))
    if len(done) > 1:
        console.print(table(done))
    if done:
        data, page = write(done, args.out or (_QUICK if args.quick else _FULL))
        console.print(f"written: {page}, {data}")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/red]")
    return 1 if failed else 0


def command_of(names: Sequence[str], *, quick: bool) -> str:
    """The command that a reader types to run the same again."""
    words = [*(name for name in NAMES if name in names), *(["--quick"] if quick else [])]
    return " ".join(["python -m benchmarks", *words])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="r1 against its peers, as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="small workloads and few rounds; for a look")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling (0)")
    parser.add_argument("--out", type=Path, help=f"where the files go ({_FULL}; with --quick {_QUICK})")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What the verbs on samples share: options, and how a figure is printed. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_choice(parser: argparse.ArgumentParser) -> None:
    """``--benchmark`` and ``--data-dir`` of an output folder."""
    parser.add_argument("--benchmark", metavar="B", action="append", default=[],
                        help="only this one; a YAML file for one of your own; may be repeated")  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", type=Path, help="where the data lie; else R1_DATA, else the hub")


def check_processes(options: argparse.Namespace) -> None:
    """Refuses less than one grading process.

    Raises:
        ValueError: says so.
    """
    if options.processes < 1:
        raise ValueError(f"--processes must be >= 1, got {options.processes}")


def percent(value: float | None, ci95: Sequence[float] | None = None) -> str:
    """``39.2 [36.7, 41.7] %``; ``-`` for a figure that there is none of."""
    if value is None:
        return "-"
    interval = f" [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]" if ci95 else ""
    return f"{100 * value:.1f}{interval} %"

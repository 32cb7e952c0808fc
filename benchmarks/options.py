"""What every benchmark is told. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one run of the benchmarks.

    Attributes:
        scratch: an empty folder for models, prompts and run folders; removed afterwards.
        quick: smaller workloads and fewer rounds; for a look, not for docs/benchmarks.md.
        seed: of weights, prompts and lengths.
        say: shows one line of progress.
    """

    scratch: Path
    quick: bool = False
    seed: int = 0
    say: Callable[[str], None] = print

    def pick(self, full: int, quick: int) -> int:
        """The full or the quick size of something."""
        return quick if self.quick else full

"""How far an evaluation is: bars with rate and expected end on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from evals.samples import Sample, Status
from pipelines.console import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class _Counts:
    """What both views know of one benchmark."""

    def __init__(self, total: int, drawn: int, graded: int) -> None:
        self.total, self.drawn, self.graded, self.tokens = total, drawn, graded, 0
        self.before = drawn  # by an earlier run: not part of the rate
        self.verdicts: Counter[Status] = Counter()

    def judged(self) -> str:
        """``right 12/40``; what the grader failed on is named."""
        count = sum(self.verdicts.values()) - self.verdicts[Status.ERROR]
        failed = f", {self.verdicts[Status.ERROR]} not judged" if self.verdicts[Status.ERROR] else ""
        return f"right {self.verdicts[Status.RIGHT]}/{count}{failed}"


class BarView:
    """Bars of rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress: Progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
            console=Console(file=stream),
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._counts: dict[str, _Counts] = {}
        self._first = 0.0

    def begin(self, name: str, *, total: int, drawn: int, graded: int) -> None:
        """See ``pipelines.eval_run.View``."""
        self._progress.start()
        self._counts[name] = _Counts(total, drawn, graded)
        self._tasks[name] = self._progress.add_task(name, total=total, completed=drawn, said="", rate="starting")

    def drawn(self, name: str, tokens: int) -> None:
        """See ``pipelines.eval_run.View``."""
        counts = self._counts[name]
        counts.drawn, counts.tokens = counts.drawn + 1, counts.tokens + tokens
        self._first = self._first or time.monotonic()
        passed = time.monotonic() - self._first
        every = sum(each.tokens for each in self._counts.values())
        self._progress.update(
            self._tasks[name], completed=counts.drawn, rate=f"{every / passed:.0f} tokens/s" if passed > 1 else ""
        )

    def graded(self, name: str, samples: Sequence[Sample]) -> None:
        """See ``pipelines.eval_run.View``."""
        counts = self._counts[name]
        counts.verdicts.update(sample.status for sample in samples)
        self._progress.update(self._tasks[name], said=counts.judged())

    def close(self) -> None:
        """See ``pipelines.eval_run.View``."""
        self._progress.stop()


class LineView:
    """A line every few seconds.

    Args:
        stream: where to.
        every_s: least time between two lines of one benchmark.
    """

    def __init__(self, stream: TextIO, every_s: float = 5.0) -> None:
        self._stream, self._every_s = stream, every_s
        self._counts: dict[str, _Counts] = {}
        self._began = self._last = time.monotonic()
        self._first = 0.0
        self._lock = threading.Lock()  # verdicts come from threads

    def begin(self, name: str, *, total: int, drawn: int, graded: int) -> None:
        """See ``pipelines.eval_run.View``."""
        self._counts[name] = _Counts(total, drawn, graded)
        kept = f", {drawn} of them drawn before" if drawn else ""
        self._say(f"{name}: {total} samples{kept}")

    def drawn(self, name: str, tokens: int) -> None:
        """See ``pipelines.eval_run.View``."""
        counts = self._counts[name]
        counts.drawn, counts.tokens = counts.drawn + 1, counts.tokens + tokens
        now = time.monotonic()
        self._first = self._first or now
        if now - self._last < self._every_s and counts.drawn < counts.total:
            return
        self._last = now
        parts = [f"{name}: {counts.drawn}/{counts.total} drawn", counts.judged()]
        passed, fresh = now - self._first, counts.drawn - counts.before
        if passed > 1:
            parts.append(f"{counts.tokens / passed:.0f} tokens/s")
            if counts.total > counts.drawn:
                parts.append(f"{duration((counts.total - counts.drawn) * passed / fresh)} left")
        self._say("  ".join(parts))

    def graded(self, name: str, samples: Sequence[Sample]) -> None:
        """See ``pipelines.eval_run.View``."""
        with self._lock:
            self._counts[name].verdicts.update(sample.status for sample in samples)

    def close(self) -> None:
        """See ``pipelines.eval_run.View``."""
        for name, counts in self._counts.items():
            if counts.verdicts:
                self._say(f"{name}: {counts.drawn}/{counts.total} drawn  graded now: {counts.judged()}")
        self._counts.clear()

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def open_eval_view(stream: TextIO | None = None) -> BarView | LineView:
    """Bars on a terminal that moves its cursor, lines elsewhere."""
    target = sys.stdout if stream is None else stream
    if target.isatty():
        from rich.console import Console

        if not Console(file=target).is_dumb_terminal:
            return BarView(target)
    return LineView(target)

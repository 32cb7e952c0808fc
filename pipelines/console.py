"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere.

Both are fed by the tracker and never touch the run. Text of the policy is shown literally: terminal escapes and markup
in it do nothing.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from evals.report import sparkline
from rollout.types import RolloutGroup

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = {
    "reward/mean": "reward", "reward/pass_rate": "pass", "rollout/length_mean": "length", "learner/loss": "loss",
    "learner/entropy": "entropy", "mismatch/mean_abs": "mismatch", "rollout/tokens_per_s": "tok/s",
}  # fmt: skip
"""Metrics on the console and their short names, in this order."""
_CURVES = ("reward/mean", "reward/pass_rate", "learner/loss")
_SAMPLE_CHARS = 600
_RATE_WINDOW = 20


class View(Protocol):
    """Shows the progress of one stage after the other."""

    def begin(self, name: str, kind: str, total: int) -> None:
        """A stage begins; ``total`` is in steps (or completions), 0 when it is not known."""
        ...

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """``done`` steps of the stage are finished; the last one's metrics."""
        ...

    def sample(self, group: RolloutGroup) -> None:
        """One completion of this group may be shown."""
        ...

    def line(self, text: str) -> None:
        """Something happened that deserves a line of its own."""
        ...

    def end(self, how: str = "done in") -> None:
        """The stage is finished, or was stopped."""
        ...

    def close(self) -> None:
        """The run is over, however it ended; safe to call twice."""
        ...


def open_view(*, live: bool = True, line_every_s: float = 5.0, stream: TextIO | None = None) -> View:
    """The live view when ``live`` and the stream (standard output) is a terminal that moves its cursor, else lines."""
    target: TextIO = sys.stdout if stream is None else stream
    if live and target.isatty():
        from rich.console import Console

        console = Console(file=target)
        if not console.is_dumb_terminal:
            return LiveView(console)
    return LineView(target, line_every_s)


class Progress:
    """How far a stage is: rate and remaining time from the latest steps of this process.

    Args:
        total: 0 when it is not known.
        now: seconds, monotonic.
    """

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._now = now
        self._began = now()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)

    def advance(self, done: int) -> None:
        """``done`` steps are finished; the first call says where a resumed stage went on."""
        self.done = done
        self._marks.append((self._now(), done))

    @property
    def rate(self) -> float | None:
        """Steps per second over the latest steps; None before there are two."""
        if len(self._marks) < 2:
            return None
        (t0, d0), (t1, d1) = self._marks[0], self._marks[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 and d1 > d0 else None

    def text(self) -> str:
        """``12/60  0.31 step/s  2:34 left``, what is not known left out."""
        parts = [f"{self.done}/{self.total}" if self.total else str(self.done)]
        rate = self.rate
        if rate:
            parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
            if self.total > self.done:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return "  ".join(parts)

    def elapsed(self) -> str:
        """Time since the stage began in this process."""
        return duration(self._now() - self._began)


def duration(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figures(metrics: Mapping[str, float]) -> str:
    """The shown metrics in one line: ``reward 0.412  pass 0.391  length 23.1``."""
    return "  ".join(f"{short} {_number(metrics[name])}" for name, short in _SHOWN.items() if name in metrics)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def printable(text: str) -> str:
    """A text without anything that a terminal would act on: control characters are shown as their code."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


class LineView:
    """Plain lines, at most one in ``every_s`` seconds per stage, besides the first and the last."""

    def __init__(self, stream: TextIO, every_s: float = 5.0, now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._every, self._now = stream, every_s, now
        self._name, self._progress = "", Progress(0, now)
        self._metrics: Mapping[str, float] = {}
        self._last, self._pending = float("-inf"), False

    def begin(self, name: str, kind: str, total: int) -> None:
        """See :class:`View`."""
        self._name, self._progress, self._metrics = name, Progress(total, self._now), {}
        self._last, self._pending = float("-inf"), False
        unit = "completions" if kind == "eval" else "steps"
        self.line(f"{name}: begins{f', {total} {unit}' if total else ''}")

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """See :class:`View`."""
        self._progress.advance(done)
        self._metrics = metrics or self._metrics
        self._pending = True
        if self._now() - self._last >= self._every:
            self._print_progress()

    def sample(self, group: RolloutGroup) -> None:
        """Plain lines show no completions; they are in the run folder."""

    def line(self, text: str) -> None:
        """See :class:`View`."""
        try:
            print(printable(text), file=self._stream, flush=True)
        except (OSError, ValueError):  # a closed pipe: nobody reads, the run goes on
            self._every = float("inf")

    def end(self, how: str = "done in") -> None:
        """See :class:`View`."""
        if self._pending:
            self._print_progress()
        self.line(f"{self._name}: {how} {self._progress.elapsed()}")

    def close(self) -> None:
        """See :class:`View`."""

    def _print_progress(self) -> None:
        self._last, self._pending = self._now(), False
        self.line(f"{self._name}: {self._progress.text()}  {figures(self._metrics)}".rstrip())


class LiveView:
    """A block at the bottom of the terminal: a bar per stage, the last figures and curves, one sample completion."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live

        self._console = console
        console.on_broken_pipe = self._mute  # rich would end the process
        self._finished: list[tuple[str, str]] = []
        self._name, self._progress = "", Progress(0)
        self._metrics: Mapping[str, float] = {}
        self._curves: dict[str, deque[float]] = {}
        self._sample: tuple[str, str, str] | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        self._live.start()

    def begin(self, name: str, kind: str, total: int) -> None:
        """See :class:`View`."""
        self._name, self._progress, self._metrics, self._sample = name, Progress(total), {}, None
        self._curves = {metric: deque(maxlen=60) for metric in _CURVES}

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """See :class:`View`."""
        self._progress.advance(done)
        if metrics:
            self._metrics = dict(metrics)
            for name, curve in self._curves.items():
                if name in metrics:
                    curve.append(metrics[name])

    def sample(self, group: RolloutGroup) -> None:
        """See :class:`View`."""
        if group.rollouts:
            rollout = group.rollouts[0]
            reward = "no reward" if rollout.reward is None else f"reward {rollout.reward:.3g}"
            self._sample = (group.problem.prompt, rollout.completion.text, reward)

    def line(self, text: str) -> None:
        """See :class:`View`."""
        with suppress(OSError, ValueError):
            self._console.print(printable(text), markup=False, highlight=False)

    def end(self, how: str = "done in") -> None:
        """See :class:`View`."""
        if self._name:
            self._finished.append((self._name, f"{how} {self._progress.elapsed()}  {figures(self._metrics)}"))
            self._name = ""

    def close(self) -> None:
        """See :class:`View`."""
        with suppress(OSError, ValueError):
            self._live.stop()

    def _mute(self) -> None:
        """The terminal is gone: nobody reads, the run goes on."""
        self._console.quiet = True

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, text in self._finished:
            table.add_row(Text(name, "bold"), Text("✓", "green"), Text(text, "dim"))
        parts: list[Any] = [table]
        if self._name:
            bar = ProgressBar(total=self._progress.total or None, completed=self._progress.done, width=30)
            table.add_row(Text(self._name, "bold"), bar, Text(f"{self._progress.text()}  {self._progress.elapsed()}"))
            curves = Table.grid(padding=(0, 2))
            for metric, values in self._curves.items():
                if len(values) > 1:
                    label = Text(_SHOWN[metric], "dim")
                    curves.add_row(label, Text(sparkline(values), "cyan"), Text(_number(values[-1])))
            parts += [Text(figures(self._metrics)), curves]
            if self._sample:
                prompt, answer, reward = (printable(text)[:_SAMPLE_CHARS] for text in self._sample)
                body = Text.assemble((f"{prompt}\n", "dim"), (answer, ""))
                parts.append(Panel(body, title=Text(f"a completion, {reward}"), title_align="left", border_style="dim"))
        return Group(*parts)

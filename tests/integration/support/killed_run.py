"""``killed_run.py RECIPE DRAWN POINT [override …]`` runs a recipe and kills its own driver (SIGKILL) at a chosen point.

POINT is ``none``, one of ``POINTS``, ``terminate`` (SIGTERM in the middle of the first stage) or ``engine`` (not the
driver but an engine's process is killed, in the middle of rollouts). DRAWN is a file that gets one line per batch of
jobs that is really drawn.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

POINTS = ("sft", "evaluation", "rollouts", "learner", "sync", "checkpoint")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_politely() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_a_busy_engine() -> None:
    """Kills one engine's process in the second step of RL, when every engine has been given jobs and finished none."""
    from pipelines.rollout_pool import Job, RolloutPool

    original, struck = RolloutPool._dispatch, False

    def patched(self: RolloutPool, queue: deque[Job]) -> None:
        nonlocal struck
        assert self._source is not None
        if struck or not queue or self._source.update.version != 1:
            return original(self, queue)
        struck = True
        victim, *others = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]
        for engine in (victim, *others):
            engine.suspend()  # so fast are they that the victim might otherwise have no job left
        original(self, queue)
        victim.kill()
        for engine in others:
            engine.resume()

    RolloutPool._dispatch = patched  # type: ignore[method-assign]


def on_call(
    owner: type,
    name: str,
    nth: int,
    *,
    delay_s: float | None,
    only: Callable[..., bool] | None = None,
    act: Callable[[], None] = die,
) -> None:
    """Acts in the nth matching call: after it (delay None) or that many seconds into it."""
    original = getattr(owner, name)
    seen = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if only is None or only(*args, **kwargs):
            seen += 1
            if seen == nth and delay_s is not None:
                threading.Timer(delay_s, act).start()
        result = original(*args, **kwargs)
        if seen == nth and delay_s is None and (only is None or only(*args, **kwargs)):
            act()
        return result

    setattr(owner, name, patched)


def arm(point: str) -> None:
    from pipelines.run_dir import Journal
    from pipelines.workers import Workers

    def in_folder(part: str) -> Callable[..., bool]:
        return lambda journal, *_: part in str(journal.path)

    if point == "terminate":
        on_call(Workers, "sft_step", 3, delay_s=0.01, act=end_politely)
    elif point == "engine":
        kill_a_busy_engine()
    elif point == "sft":
        on_call(Workers, "sft_step", 5, delay_s=0.01)
    elif point == "evaluation":
        on_call(Journal, "append", 3, delay_s=None, only=in_folder("02-eval"))
    elif point == "rollouts":
        on_call(Journal, "append", 7, delay_s=None, only=in_folder("03-grpo"))
    elif point == "learner":
        on_call(Workers, "learner_step", 1, delay_s=0.02)
    elif point == "sync":
        on_call(Workers, "sync_weights", 2, delay_s=0.02)
    elif point == "checkpoint":
        on_call(Workers, "checkpoint", 2, delay_s=0.01)
    else:
        assert point == "none", point


def count_draws(path: Path) -> None:
    from pipelines.rollout_pool import Job, RolloutPool

    original = RolloutPool.generate

    def counted(self: RolloutPool, jobs: Iterable[Job]) -> Iterator[Any]:
        listed = list(jobs)
        with path.open("a") as file:
            file.write(f"{len(listed)}\n")
        return original(self, listed)

    RolloutPool.generate = counted  # type: ignore[method-assign]


def main() -> None:
    recipe, drawn, point, *overrides = sys.argv[1:]
    count_draws(Path(drawn))
    arm(point)
    from pipelines.cli import main as r1

    sys.exit(r1(["run", recipe, *overrides]))


if __name__ == "__main__":
    main()

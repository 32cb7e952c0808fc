"""``killed_run.py RECIPE DRAWN POINT [override …]`` runs a recipe and kills its own driver (SIGKILL) at a chosen point.

POINT is ``none``, one of ``POINTS``, ``terminate`` (SIGTERM in the middle of the first stage), ``engine`` (not the
driver but an engine's process is killed, in the middle of rollouts; the run goes on) or ``lost-learner`` (the learner's
process is killed while it writes a checkpoint). DRAWN is a file that gets one line per batch of jobs that is really
drawn. Beside it, ``processes`` gets one line per process of the run, as they were when it ended: point, id, start time,
name.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

POINTS = ("evaluation", "rollouts", "learner", "sync", "checkpoint")


def descendants(name: str = "") -> list[psutil.Process]:
    """The processes of this run beside the driver, those whose name contains ``name``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in process.name():
                found.append(process)
    return found


def list_processes(path: Path, point: str) -> None:
    """Adds the processes that live now to the file."""
    with path.open("a") as file:
        for process in descendants():
            with suppress(psutil.NoSuchProcess):
                file.write(f"{point} {process.pid} {process.create_time()!r} {process.name()}\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_politely() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_a_busy_engine() -> None:
    """Kills one engine's process in a later step of RL, when every engine has been given jobs and finished none."""
    from pipelines.rollout_pool import Job, RolloutPool

    original, struck = RolloutPool._dispatch, False

    def patched(self: RolloutPool, queue: deque[Job]) -> None:
        nonlocal struck
        assert self._source is not None
        if struck or len(queue) < 4 or self._source.version < 1:
            return original(self, queue)
        struck = True
        victim, *others = descendants("EngineCore")
        for engine in (victim, *others):
            engine.suspend()  # so fast are they that the victim might otherwise have no job left
        original(self, queue)
        victim.kill()
        for engine in others:
            engine.resume()

    RolloutPool._dispatch = patched  # type: ignore[method-assign]


def kill_a_saving_learner() -> None:
    """Kills the learner's process in the middle of the first checkpoint, when that is half on the disk."""
    from pipelines.workers import Workers

    original = Workers._ask_learner

    def strike(learner: psutil.Process, folder: Path) -> bool:
        """Waits until it is half written and kills; False when the blow came too late."""
        half = folder.with_name(f".partial-{folder.name}")
        while not folder.exists():
            if half.exists():
                learner.suspend()
                if half.exists():
                    learner.kill()
                    return True
                learner.resume()
            time.sleep(0.0005)
        return False

    def patched(self: Workers, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "save":
            return original(self, method, *args, **kwargs)
        [learner] = descendants("LearnerService")
        folder = Path(args[0])
        while True:  # until the blow comes in time
            with ThreadPoolExecutor(1) as beside:
                struck = beside.submit(strike, learner, folder)
                original(self, method, *args, **kwargs)
            if struck.result():
                return  # the driver hears of it when it next asks
            shutil.rmtree(folder)

    Workers._ask_learner = patched  # type: ignore[method-assign]


def on_call(
    owner: type,
    name: str,
    nth: int,
    *,
    delay_s: float | None,
    only: Callable[..., bool] | None = None,
    act: Callable[[], None] = die,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Acts in the nth matching call: after it (delay None) or that many seconds into it.

    ``before`` is called first of all, outside of what is timed.
    """
    original = getattr(owner, name)
    seen = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if only is None or only(*args, **kwargs):
            seen += 1
            if seen == nth:
                before()
                if delay_s is not None:
                    threading.Timer(delay_s, act).start()
        result = original(*args, **kwargs)
        if seen == nth and delay_s is None and (only is None or only(*args, **kwargs)):
            act()
        return result

    setattr(owner, name, patched)


def arm(point: str, processes: Path) -> None:
    from pipelines.run_dir import Journal
    from pipelines.workers import Workers

    def list_them() -> None:
        list_processes(processes, point)

    def in_folder(part: str) -> Callable[..., bool]:
        return lambda journal, *_: part in str(journal.path)

    # A run that is not killed ends its processes by itself.
    on_call(Workers, "close", 1, delay_s=None, act=lambda: None, before=list_them)
    strike = partial(on_call, before=list_them)
    if point == "terminate":
        strike(Workers, "sft_step", 3, delay_s=0.01, act=end_politely)
    elif point == "engine":
        kill_a_busy_engine()
    elif point == "lost-learner":
        kill_a_saving_learner()
    elif point == "evaluation":
        strike(Journal, "append", 3, delay_s=None, only=in_folder("02-eval"))
    elif point == "rollouts":
        strike(Journal, "append", 7, delay_s=None, only=in_folder("03-grpo"))
    elif point == "learner":
        strike(Workers, "learner_step", 1, delay_s=0.02)
    elif point == "sync":
        strike(Workers, "sync_weights", 2, delay_s=0.02)
    elif point == "checkpoint":
        strike(Workers, "checkpoint", 2, delay_s=0.01)
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
    from pipelines import cli

    recipe, drawn, point, *overrides = sys.argv[1:]
    cli.quiet_libraries()  # before what is patched here imports them
    count_draws(Path(drawn))
    arm(point, Path(drawn).with_name("processes"))
    sys.exit(cli.main(["run", recipe, *overrides]))


if __name__ == "__main__":
    main()

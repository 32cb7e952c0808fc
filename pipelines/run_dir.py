"""The run folder: everything a run leaves behind, written so that a kill at any moment loses nothing finished.

    runs/<name>/recipe.yaml            the recipe as it was given
                recipe.resolved.yaml   every value spelled out; a resumed run must match it
                model.fingerprint.json sizes and checksums of the folder model.path; a resumed run must find the same
                events.jsonl           what happened and when
                summary.json           headline figures of the finished stages
                NN-kind/metrics.jsonl  one line per step
                        rollouts/      one file per step (or held-out set), one line per finished group
                        checkpoints/   complete state, step-NNNNNN/
                        model/         Hugging Face folder
                        done           marks a finished stage and holds its headline figures

Small files are replaced atomically. Line files are appended; the torn last line of a killed process is cut off before
the next line is written. Only one process holds a run folder at a time.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.files import Lock, RunDirError, append_line, read_lines, write_atomic, writing
from pipelines.recipe_source import dump_yaml
from pipelines.schema import flatten, plain
from rollout.types import RolloutGroup, group_from_json, group_to_json

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe

__all__ = ["Journal", "RunConfig", "RunDir", "RunDirError", "StageDir"]

_GIVEN = "recipe.yaml"
# What may change between a run and its continuation, because it does not touch the result, or is the mend of an error.
_FREE_KEYS = (
    "run.", "tracking.", "parallel.",
    *(f"engine.{key}" for key in ("workers", "max_replacements", "timeout_s", "kv_cache_gib", "gpu_memory_utilization",
                                  "max_num_seqs", "max_model_len", "attest_tolerance")),
)  # fmt: skip
_FREE_ENDINGS = (".learner.max_bad_steps",)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how often it saves. Nothing here changes what is trained.

    Attributes:
        dir: parent of the run folders, relative to the working directory.
        checkpoint_every: steps between complete checkpoints, >= 1; the last step of a stage is always saved.
        checkpoint_background: write checkpoints while training goes on; a step then waits only for a copy of the
            learner's state in the CPU's memory (12 bytes per weight), not for the disk. The last of a stage is always
            waited for.
        keep_checkpoints: newest checkpoints kept per stage, >= 1; one more while the next is being made.
        ray_address: address of a running Ray cluster (``auto`` finds it); null starts one on this machine.
        cpus: CPU cores that learner and rollout workers share on this machine; 0 takes all. (With another number of
            cores the learner's sums round differently in their last bits.)
    """

    dir: str = "runs"
    checkpoint_every: int = 10
    checkpoint_background: bool = True
    keep_checkpoints: int = 2
    ray_address: str | None = None
    cpus: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.cpus < 0:
            raise ValueError(f"cpus must be >= 0 (0 takes all), got {self.cpus}")
        address = self.ray_address
        if address is not None and not re.fullmatch(r"auto|local|.+:\d{1,5}", address):
            raise ValueError(f"ray_address must be auto or host:port (null starts Ray here), got {address!r}")
        if not self.dir:
            raise ValueError("dir must name a folder, got an empty text")


class Journal:
    """Finished rollout groups of one step or one held-out set, one JSON line each.

    A group is written when it is finished and reaches the operating system at once, so that killing the process loses
    none. When all are there, ``complete`` rewrites the file atomically.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, group: RolloutGroup) -> None:
        """Adds one finished group.

        Raises:
            RunDirError: the disk is full or the folder cannot be written.
        """
        append_line(self.path, _group_line(group))

    def groups(self) -> list[RolloutGroup]:
        """All groups in the file, in its order; a torn last line is ignored.

        Raises:
            RunDirError: a line in the middle is damaged.
        """
        found = []
        for number, line in read_lines(self.path):
            try:
                found.append(group_from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirError(
                    f"{self.path}:{number}: this line is damaged ({type(error).__name__}); delete the line, its group "
                    "is then drawn again"
                ) from None
        return found

    def finished(self) -> dict[str, RolloutGroup]:
        """The finished groups by the id of their problem."""
        return {group.problem.id: group for group in self.groups()}

    def complete(self, groups: Sequence[RolloutGroup]) -> None:
        """Replaces the file by the final groups (with scores and advantages) in the given order.

        Raises:
            RunDirError: the disk is full; the file is then as it was.
        """
        write_atomic(self.path, "".join(f"{_group_line(group)}\n" for group in groups))


class StageDir:
    """The folder of one stage.

    Attributes:
        path: ``runs/<name>/NN-kind``, NN counting from 01.
        name, kind: of the stage.
        metrics: ``metrics.jsonl``.
        rollouts, checkpoints, model: the folders of that name (``model`` is made by whoever writes it).
    """

    def __init__(self, path: Path, name: str, kind: str, note: Callable[[Mapping[str, Any]], None]) -> None:
        self.path, self.name, self.kind = path, name, kind
        self.metrics = path / "metrics.jsonl"
        self.rollouts, self.checkpoints, self.model = path / "rollouts", path / "checkpoints", path / "model"
        self._note = note
        for folder in (self.rollouts, self.checkpoints):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def journal(self, name: str) -> Journal:
        """The journal ``rollouts/<name>.jsonl``."""
        return Journal(self.rollouts / f"{name}.jsonl")

    def complete_step(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Writes the final groups of a step; see :meth:`Journal.complete`."""
        self.journal(step_name(step)).complete(groups)

    def note(self, row: Mapping[str, Any]) -> None:
        """Adds an event of this stage to the run's events.jsonl."""
        self._note({"stage": self.name, **row})

    @property
    def done(self) -> dict[str, Any] | None:
        """The headline figures of a finished stage; None while it is not finished.

        Raises:
            RunDirError: the marker is damaged.
        """
        return read_json(self.path / "done")

    def mark_done(self, figures: Mapping[str, Any]) -> None:
        """Marks the stage as finished; it is skipped from then on."""
        write_atomic(self.path / "done", _pretty(figures))


class RunDir:
    """The folder of one run; a context manager that holds its lock and keeps the traceback of what ended the run.

    Attributes:
        path: ``<run.dir>/<name>``.
        resumed: the folder was there already.
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path, self.resumed = path, False
        self._lock = lock

    @classmethod
    def open(cls, root: str | Path, loaded: LoadedRecipe, *, fresh: bool = False) -> RunDir:
        """Creates ``root/<name>`` or takes it up again.

        Args:
            root: parent of the run folders, ``run.dir``.
            loaded: the recipe; where the folder has one already it must be the same but for ``run``, ``tracking`` and
                the limits in ``engine``.
            fresh: move an existing folder aside (``<name>.1``, …; nothing is deleted) and begin anew.

        Raises:
            RunDirError: another process holds the folder, or it cannot be written.
            ValueError: the folder belongs to a different recipe; names the keys that changed.
        """
        path = Path(root).expanduser() / loaded.recipe.name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that `fresh` can move the folder away while it is held.
        run = cls(path, Lock.acquire(path.with_name(f".{path.name}.lock"), f"run folder {path}"))
        try:
            run._prepare(loaded, fresh)
        except BaseException:
            run.close()
            raise
        return run

    def _prepare(self, loaded: LoadedRecipe, fresh: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError(f"{self.path} is a file, not a run folder: move it away or set run.dir")
        if fresh and self.path.exists():
            with writing(self.path):
                self.path.rename(_free_name(self.path))
        resolved = self.path / "recipe.resolved.yaml"
        self.resumed = resolved.exists()
        if self.resumed:
            _check_same_recipe(resolved, loaded)
        elif self.path.exists() and any(not p.name.startswith(".") for p in self.path.iterdir() if p.name != _GIVEN):
            raise RunDirError(f"{self.path} has files but no {resolved.name}, so it is no run folder: move it away")
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        write_atomic(self.path / _GIVEN, loaded.text)
        write_atomic(resolved, dump_yaml(plain(loaded.recipe)))  # last: it marks a folder that can be resumed
        self.note(
            {"event": "resumed" if self.resumed else "started", "recipe": loaded.source,
             "overrides": list(loaded.overrides), "pid": os.getpid()}
        )  # fmt: skip

    def stage(self, index: int, name: str, kind: str) -> StageDir:
        """The folder of stage ``index`` (0-based), created when it is not there."""
        return StageDir(stage_path(self.path, index, kind), name, kind, self.note)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What ``summary.json`` holds; None before it is first written."""
        return read_json(self.path / "summary.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces ``summary.json``; what there is one of per problem stays in the stages' ``done`` files.

        Args:
            summary: ``{"name", "seed", "stages": [{"name", "kind", "status", "seconds", …headline figures}]}``.

        Raises:
            RunDirError: the disk is full.
        """
        stages = [brief(stage) for stage in summary.get("stages", ())]
        write_atomic(self.path / "summary.json", _pretty({**summary, "stages": stages}))

    def note(self, row: Mapping[str, Any]) -> None:
        """Adds one line to events.jsonl, with the time (UTC), and waits until the disk has it.

        Raises:
            RunDirError: the disk is full or the folder cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_line(self.path / "events.jsonl", json.dumps({"time": now, **row}, default=str), fsync=True)

    def close(self) -> None:
        """Lets go of the folder; safe to call twice."""
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                what = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                text = "".join(traceback.format_exception(error))
                with suppress(RunDirError):  # a full disk must not hide the error that is on its way
                    self.note({"event": what, "error": f"{type(error).__name__}: {error}", "traceback": text})
        finally:
            self.close()


def step_name(step: int) -> str:
    """``step-000012``: of rollouts and checkpoints."""
    return f"step-{step:06d}"


def stage_path(run: Path, index: int, kind: str) -> Path:
    """``runs/<name>/NN-kind`` of stage ``index`` (0-based)."""
    return run / f"{index + 1:02d}-{kind}"


def brief(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Headline figures without what there is one of per problem; a stage's ``done`` file keeps everything."""
    if "results" not in figures:
        return dict(figures)
    results = {
        name: {key: value for key, value in row.items() if not key.endswith("by_problem")}
        for name, row in figures["results"].items()
    }
    return {**figures, "results": results}


def _free_name(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


def _check_same_recipe(resolved: Path, loaded: LoadedRecipe) -> None:
    try:
        old = flatten(yaml.safe_load(resolved.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RunDirError(f"{resolved} is damaged: restore it, or begin anew with --fresh") from None
    new = flatten(plain(loaded.recipe))
    keys = [k for k in dict.fromkeys((*old, *new)) if not (k.startswith(_FREE_KEYS) or k.endswith(_FREE_ENDINGS))]
    changed = [f"{k}: {_show(old, k)} -> {_show(new, k)}" for k in keys if _show(old, k) != _show(new, k)]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"the recipe differs from the one that {resolved.parent} was begun with ({'; '.join(changed[:4])}{more}): "
            "undo the change, give it another name, or begin anew with --fresh"
        )


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "(absent)"


def _group_line(group: RolloutGroup) -> str:
    return json.dumps(group_to_json(group))  # ASCII: half a surrogate pair in a text must not stop a run


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path) -> Any:
    """What a small JSON file holds; None when there is none.

    Raises:
        RunDirError: the file is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunDirError(f"{path} is damaged: delete it and run again") from None

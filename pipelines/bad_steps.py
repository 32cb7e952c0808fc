"""Updates that the learner skipped because something was not finite: kept in the run folder, told, and the run stopped.

    NN-kind/bad/step-000012.json    what was not finite, where, and what the step can be computed from again

A step of RL has its batch in ``rollouts/`` already, so the file names it; a supervised batch is in the file itself.
The state before the step is that of the newest checkpoint before it and the steps from there on, all of which are in
the run folder. That checkpoint is kept when the others are pruned (:func:`pinned`); nothing else is written, because a
state of a large model takes minutes and the schedule of checkpoints says already what the run can afford.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.files import write_atomic, writing
from pipelines.run_dir import RunDirError, StageDir, read_json, step_name
from policy.errors import NonFiniteError
from rollout.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from pipelines.grpo import GrpoStage
    from pipelines.workers import Workers
    from policy.guards import BadUpdate

FOLDER = "bad"
_OF_UPDATE = {"mini_batch": int, "what": str, "text": str, "parameters": list, "losses": list, "sequences": list}
_OF_ROWS = ("problems", "rows")
Rows = Sequence[tuple[Sequence[int], int]]


def check_groups(
    stage: GrpoStage, workers: Workers, folder: StageDir, step: int, learned: dict[str, float],
    groups: Sequence[RolloutGroup],
) -> None:  # fmt: skip
    """After a step of RL: keeps and tells of the updates that were skipped, if any.

    Raises:
        NonFiniteError: more than ``learner.max_bad_steps`` in a row, or the weights are not finite.
    """
    if not learned.get("learner/bad_steps"):
        return _forget(folder, step)
    batch = {"rollouts": f"{folder.rollouts.name}/{step_name(step)}.jsonl"}
    _keep(workers, folder, step, names_of(stage, groups), batch)


def check_rows(
    workers: Workers, folder: StageDir, step: int, learned: dict[str, float], problems: Sequence[Problem], rows: Rows
) -> None:
    """The same after a supervised step.

    Raises:
        NonFiniteError: as :func:`check_groups`.
    """
    if not learned.get("learner/bad_steps"):
        return _forget(folder, step)
    names = [problem.id for problem in problems]
    batch = {"problems": names, "rows": [[list(ids), prompt] for ids, prompt in rows]}
    _keep(workers, folder, step, [{"problem": name} for name in names], batch)


def names_of(stage: GrpoStage, groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """Problem and sample_index of every sequence that the learner is given, in its order."""
    from policy.batch import training_rollouts

    trained = training_rollouts(groups, mask_truncated=stage.truncated == "mask")
    return [{"problem": group.problem.id, "sample_index": each.completion.sample_index} for group, each in trained]


def with_names(update: BadUpdate, names: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A bad update as plain values, its ``samples`` as ``sequences`` with names."""
    row = update.to_json()
    return {**row, "sequences": [names[i] for i in row.pop("samples")]}


def read_bad_step(folder: Path, step: int) -> dict[str, Any] | None:
    """What was kept of a bad step of a stage; None when it had none.

    Raises:
        RunDirError: the file is damaged.
    """
    path = _file(folder, step)
    return _read(path) if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    kept = read_json(path)
    lacks = _lacking(kept) if isinstance(kept, dict) else ["updates"]
    if lacks:
        raise RunDirError(f"{path} is damaged (it lacks or spoils: {', '.join(lacks)}): put it back or delete it")
    return kept


def _lacking(kept: dict[str, Any]) -> list[str]:
    updates = kept.get("updates")
    if not isinstance(updates, list) or not updates or not all(isinstance(each, dict) for each in updates):
        return ["updates"]
    lacks = [key for key, kind in _OF_UPDATE.items() if any(type(each.get(key)) is not kind for each in updates)]
    if not isinstance(kept.get("checkpoint", 0), str | None):
        lacks.append("checkpoint")
    if not isinstance(kept.get("rollouts"), str) and not all(isinstance(kept.get(k), list) for k in _OF_ROWS):
        lacks.append("rollouts, or problems and rows")
    return lacks


def pinned(folder: Path, most: int) -> list[str]:
    """Names of the checkpoints that the newest bad steps of a stage start from; at most ``most``."""
    kept = sorted((folder / FOLDER).glob("step-*.json"), reverse=True)
    names = dict.fromkeys(name for path in kept if (name := _checkpoint(path)) is not None)
    return list(names)[:most]


def _checkpoint(path: Path) -> str | None:
    kept = read_json(path)
    if not isinstance(kept, dict) or not isinstance(kept.get("checkpoint", 0), str | None):
        raise RunDirError(f"{path} is damaged (it lacks or spoils: checkpoint): put it back or delete it")
    return kept["checkpoint"]


def _keep(workers: Workers, folder: StageDir, step: int, names: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    from policy.checkpoint import latest_checkpoint

    updates = [with_names(update, names) for update in workers.bad_updates()]

    latest = latest_checkpoint(folder.checkpoints)
    replay = f"r1 replay {shlex.quote(str(folder.path.parent))} {step} --stage {folder.name}"
    path = _file(folder.path, step)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    checkpoint = None if latest is None else latest.name
    row = {"step": step, "replay": replay, "checkpoint": checkpoint, "updates": updates, **batch}
    write_atomic(path, json.dumps(row, ensure_ascii=False) + "\n")
    for update in updates:
        problems = list(dict.fromkeys(name["problem"] for name in update["sequences"]))
        folder.note(
            {"event": "bad_step", "step": step, "what": update["what"], "text": update["text"],
             "parameters": update["parameters"], "problems": problems, "in_a_row": update["in_a_row"],
             "kept": str(path.relative_to(folder.path.parent)), "replay": replay}
        )  # fmt: skip
    if updates[-1]["stops"]:
        raise NonFiniteError(_last_words(folder, step, updates[-1], checkpoint, replay), updates[-1]["what"])


def _file(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"{step_name(step)}.json"


def _forget(folder: StageDir, step: int) -> None:
    """A step that a resumed run repeats went well this time: what the run goes on from has seen its updates."""
    if _file(folder.path, step).exists():
        _file(folder.path, step).unlink()
        folder.note({"event": "bad_step_passed", "step": step})


def _last_words(folder: StageDir, step: int, update: dict[str, Any], checkpoint: str | None, replay: str) -> str:
    place = f"stage {folder.name!r}, step {step}: {update['text']}"
    if update["what"] == "weights":
        good = f"the last good one is {checkpoint}" if checkpoint else "there is none of this stage yet"
        return f"{place}; the run stops and no checkpoint is written ({good}); look at it with: {replay}"
    count, limit = update["in_a_row"], update["in_a_row"] - 1
    return (
        f"{place}; {count} optimizer steps in a row were not finite (learner.max_bad_steps is {limit}), so the run "
        f"stops; look at it with: {replay}"
    )

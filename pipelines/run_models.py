"""The model that a path means: a Hugging Face folder, or one that a run left behind."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.files import read_lines
from policy.manifest import verify


def model_folder(path: Path, which: str = "last") -> Path:
    """The Hugging Face folder that a path means: itself, a stage's ``model/``, or that of a run's last trained stage.

    Args:
        path: a model, stage or run folder.
        which: ``last``; ``best``: of the checkpoints that were kept, the one whose evaluation during training has the
            highest mean pass@1; or the number of a kept step.

    Raises:
        ValueError: there is no model in it, or no such checkpoint.
        OSError: the checkpoint's model is damaged.
    """
    if which != "last":
        return _checkpoint_model(path, which)
    if (path / "config.json").is_file():
        return path
    found = [path / "model", *sorted(path.glob("[0-9][0-9]-*/model"), reverse=True)]
    for folder in found:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{path} holds no model: name a Hugging Face folder (with config.json), a run or a stage folder")


def _checkpoint_model(path: Path, which: str) -> Path:
    parents = [path / "checkpoints", *sorted(path.glob("[0-9][0-9]-*/checkpoints"), reverse=True)]
    parent = next((each for each in parents if list(each.glob("step-*/complete.json"))), None)
    if parent is None:
        raise ValueError(f"{path} holds no checkpoints: name a run or a stage folder, or take the last model")
    steps = {int(each.parent.name.removeprefix("step-")): each.parent for each in parent.glob("step-*/complete.json")}
    kept = ", ".join(map(str, sorted(steps)))
    if which != "best":
        if not which.isdecimal() or int(which) not in steps:
            raise ValueError(f"{parent} holds no checkpoint {which!r}: take last, best or one of {kept}")
        return _whole_model(steps[int(which)])
    scores: dict[int, float] = {}
    for _, line in read_lines(parent.parent / "evals.jsonl"):
        row = json.loads(line)
        values = [result["pass_at_1"] for result in row["results"].values()]
        scores[row["step"] + 1] = sum(values) / len(values)  # logged by the step that it followed
    known = {step: scores[step] for step in steps if step in scores}
    if not known:
        raise ValueError(
            f"{parent.parent}: none of the kept checkpoints ({kept}) was evaluated while it was trained: set "
            "eval_every and run.keep_checkpoints, or name a step"
        )
    return _whole_model(steps[max(known, key=lambda step: (known[step], step))])


def _whole_model(checkpoint: Path) -> Path:
    verify(checkpoint, "model")
    return checkpoint / "model"

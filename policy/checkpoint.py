"""Policies from presets and folders; checkpoints that are complete or not there at all.

A checkpoint folder::

    step-000120/
        model/          a Hugging Face folder (config, safetensors, tokenizer), which vLLM serves as it is
        learner.pt      the learner's state (moments, schedule, counters, random numbers)
        extra.json      what the caller wants back (cursor, step, ...)
        complete.json   name and size of every file above; written last

It is written beside its place under a hidden name, flushed to the disk, and renamed: a kill or a full disk leaves the
earlier checkpoints as they were, and at most a hidden leftover, which the next prune removes.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policy.errors import one_line

_STEP = re.compile(r"(?:\.replaced-)?step-(\d{6,})")
_PARTIAL, _REPLACED = ".partial-", ".replaced-"
_MANIFEST = "complete.json"
# config, tokenizer and file-system blocks beside the tensors
_OVERHEAD_BYTES = 1 << 20


class CheckpointError(OSError):
    """A checkpoint or model folder cannot be written or read; earlier ones are intact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where it lies.
        model_folder: its Hugging Face folder, for ``ModelConfig(path=...)``.
        learner_state: for ``Learner.load_state_dict``; tensors on the CPU.
        extra: what was saved with it.
    """

    folder: Path
    model_folder: Path
    learner_state: dict[str, Any]
    extra: dict[str, Any]


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a Hugging Face folder that vLLM and transformers load unchanged; an existing one is replaced as a whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    with _whole_folder(Path(folder), _tensor_bytes(model.state_dict())) as partial:
        _write_model(model, tokenizer, partial)


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learner_state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Writes a complete checkpoint or none.

    Args:
        folder: named ``step-NNNNNN``; an existing one of this name is replaced as a whole.
        model, tokenizer: go to ``folder/model``.
        learner_state: ``Learner.state_dict()``.
        extra: JSON-serialisable.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
        ValueError: the folder has another name.
    """
    folder = Path(folder)
    if not _STEP.fullmatch(folder.name) or folder.name.startswith("."):
        raise ValueError(f"a checkpoint folder is named step-NNNNNN, got {folder.name!r}")
    text = json.dumps(dict(extra), indent=1, sort_keys=True)
    needed = _tensor_bytes(model.state_dict()) + _tensor_bytes(learner_state)
    with _whole_folder(folder, needed) as partial:
        _write_model(model, tokenizer, partial / "model")
        # through a file object: torch's own writer hides the reason of a failure
        with (partial / "learner.pt").open("wb") as file:
            torch.save(dict(learner_state), file)
        (partial / "extra.json").write_text(text)
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads what :func:`save_checkpoint` wrote; the model itself is left to ``load_policy(path=...)``.

    Raises:
        CheckpointError: the checkpoint is not there, incomplete or unreadable.
    """
    folder = Path(folder)
    problem = _incomplete(folder)
    if problem:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({problem}): resume from an earlier one")
    try:
        state = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True)
        extra = json.loads((folder / "extra.json").read_text())
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read ({one_line(error)}): resume from an earlier one") from error
    return Checkpoint(folder=folder, model_folder=folder / "model", learner_state=state, extra=extra)


def latest_checkpoint(parent: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``parent``; None when there is none. Torn ones do not count."""
    return max(_complete(Path(parent)), key=_age, default=None)


def prune(parent: Path, keep: int) -> list[Path]:
    """Removes all but the ``keep`` newest complete checkpoints, and everything torn. Returns what was removed.

    Raises:
        ValueError: ``keep`` < 1.
        CheckpointError: a folder cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    parent = Path(parent)
    kept = sorted(_complete(parent), key=_age)[-keep:]
    doomed = [p for p in _entries(parent) if p not in kept and (_STEP.fullmatch(p.name) or _is_leftover(p))]
    for path in doomed:
        _remove(path)
    return doomed


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _generation_config(model, tokenizer).save_pretrained(folder)


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's, with the tokenizer's end-of-sequence among those that end a completion (vLLM reads it here)."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    ends = config.eos_token_id
    known = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    config.eos_token_id = known[0] if len(known) == 1 else known or None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    return config


@contextmanager
def _whole_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yields a folder to write into; it takes the place of ``folder`` when everything is on the disk.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind and ``folder`` is as it was.
    """
    needed += _OVERHEAD_BYTES
    partial = folder.with_name(_PARTIAL + folder.name)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        if shutil.disk_usage(partial.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        yield partial
        _flush(partial)
        _take_place(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _disk_full(error):
            raise CheckpointError(_disk_full_line(folder, needed)) from error
        if isinstance(error, RuntimeError):
            raise
        raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error


def _disk_full_line(folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder.parent).free
    return (
        f"disk full: {folder} needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; earlier "
        "checkpoints are intact: free space, or keep fewer checkpoints, and run again"
    )


def _disk_full(error: BaseException | None) -> bool:
    """Whether the disk (or quota) is the reason; writers in C++ and Rust wrap or rename the system's error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"os error (28|122)\b", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(partial: Path, folder: Path) -> None:
    """Renames; a folder that is there already stays readable under a hidden name until the new one is in place."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Out of sight first, so that a kill in the middle does not leave a torn checkpoint under a good name."""
    hidden = path if path.name.startswith(_PARTIAL) else path.with_name(_PARTIAL + path.name.lstrip("."))
    try:
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise CheckpointError(f"cannot remove {path}: {one_line(error)}") from error


def _entries(parent: Path) -> list[Path]:
    return [p for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _complete(parent: Path) -> list[Path]:
    return [p for p in _entries(parent) if _STEP.fullmatch(p.name) and not _incomplete(p)]


def _age(folder: Path) -> tuple[int, bool]:
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), not folder.name.startswith(".")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith((_PARTIAL + "step-", _REPLACED + "step-", _PARTIAL + "replaced-step-"))


def _incomplete(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when it is complete."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {_MANIFEST}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(v) for v in value)
    return 0

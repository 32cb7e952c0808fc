"""Checkpoints that are complete or not there at all, of one process or of many ranks.

A checkpoint folder::

    step-000120/
        model/          a Hugging Face folder (config, safetensors, tokenizer), which vLLM serves as it is
        state/          the learner's state: weights (fp32 masters), moments, schedule, counters, random numbers
        extra.json      what the caller wants back (cursor, step, ...)
        complete.json   every file above with its size and checksum; written last

It is written beside its place under a hidden name, flushed to the disk, and renamed when every rank has written its
part: a kill or a full disk leaves the earlier checkpoints as they were, and at most a hidden leftover, which the next
prune removes. Ranks on several machines need a file system that they share.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policy.config import ModelConfig
from policy.errors import one_line
from policy.lora import has_adapters
from policy.manifest import adapters_of, checksums, incomplete, verify, write_manifest
from policy.model_folder import ModelWriter
from policy.parallel import sharded
from policy.state import (
    DamagedState,
    SavedTensors,
    StateError,
    flatten,
    read_state,
    stage,
    stored_tensors,
    total_bytes,
    unflatten,
    write_state,
)
from policy.whole_folder import PARTIAL, REPLACED, CheckpointError, Peers, whole_folder

__all__ = ["CheckpointError", "Peers", "Snapshot", "checkpoints", "latest_checkpoint", "load_checkpoint", "prune",
           "save_checkpoint", "save_model"]  # fmt: skip

_STEP = re.compile(r"(?:\.replaced-)?step-(\d{6,})")
_STATE, _EXTRA = "state", "extra.json"
_MODEL, _MOMENTS = "model.", "optimizer.moments."


class Stateful(Protocol):
    """What is saved: a ``Learner``."""

    model: PreTrainedModel

    def state_dict(self) -> dict[str, Any]:
        """The complete state, as ``Learner.state_dict`` gives it; the tensors are the live ones."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        ...

    def prepare_moments(self, names: set[str]) -> None:
        """Makes room for the moments of these parameters, and of no others."""
        ...


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    source: ModelConfig | None = None,
    peers: Peers | None = None,
) -> None:
    """Writes a Hugging Face folder that vLLM and transformers load unchanged; an existing one is replaced as a whole.

    Tensor by tensor: beside the model itself one tensor is in memory.

    Args:
        model, tokenizer: what is written; adapters are merged, and written beside in PEFT's form.
        folder: where to.
        source: what the model was loaded from (:class:`ModelWriter`).
        peers: the ranks of a sharded model, which all call this; rank 0 writes.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    writer, peers = ModelWriter(model, tokenizer, source), peers or Peers()
    assert peers.group is not None or sharded(model) is None
    with whole_folder(Path(folder), writer.bytes, peers) as partial:
        adapters, tensors = writer.adapters(writer.live()), writer.tensors(writer.live())
        failure: Exception | None = None
        if peers.first:
            try:
                writer.write(partial, tensors, adapters)
            except Exception as error:  # raised below: the others are in the middle of gathering
                failure = error
        for _ in tensors:  # each is gathered by all ranks in step, whether or not it is written
            pass
        peers.on_first(lambda: _raise(failure))


class Snapshot:
    """A learner's state at one moment, ready to be written while the learner goes on.

    Args:
        learner: of every rank its own.
        tokenizer: goes to ``model/``.
        extra: JSON-serialisable.
        source: what the model was loaded from (:class:`ModelWriter`).
        copy: take copies on the CPU; without, the learner must not take a step before :meth:`write` returns.
    """

    def __init__(
        self,
        learner: Stateful,
        tokenizer: PreTrainedTokenizerBase,
        extra: Mapping[str, Any],
        *,
        source: ModelConfig | None = None,
        copy: bool = False,
    ) -> None:
        self._extra = json.dumps(dict(extra), indent=1, sort_keys=True)
        self._model = ModelWriter(learner.model, tokenizer, source)
        self._adapters = _adapters(learner.model)
        flat = flatten(learner.state_dict())
        self._bytes = total_bytes(flat) + self._model.bytes
        self._state = stage(flat) if copy else flat

    def write(self, folder: Path, peers: Peers) -> None:
        """Writes a complete checkpoint or none; all ranks call this.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
            ValueError: the folder is not named ``step-NNNNNN``.
        """
        folder = Path(folder)
        if not _STEP.fullmatch(folder.name) or folder.name.startswith("."):
            raise ValueError(f"a checkpoint folder is named step-NNNNNN, got {folder.name!r}")
        with torch.no_grad(), whole_folder(folder, self._bytes, peers) as partial:
            write_state(self._state, partial / _STATE, peers.group)
            known = peers.gathered(lambda rank: checksums(partial, _parts_of(rank, partial)))
            peers.on_first(lambda: self._finish(partial, peers, known))

    def _finish(self, partial: Path, peers: Peers, known: Mapping[str, str]) -> None:
        """The rest, when all ranks have written their parts of the state."""
        tensors: Mapping[str, Tensor] = SavedTensors(partial / _STATE, _MODEL)
        if peers.group is None:  # they are all here
            tensors = {k.removeprefix(_MODEL): t for k, t in self._state.items() if k.startswith(_MODEL)}
        tensors = self._model.stored(tensors)
        self._model.write(partial / "model", self._model.tensors(tensors), self._model.adapters(tensors))
        (partial / _EXTRA).write_text(self._extra)
        write_manifest(partial, known, self._adapters)


def save_checkpoint(
    folder: Path,
    *,
    learner: Stateful,
    tokenizer: PreTrainedTokenizerBase,
    extra: Mapping[str, Any],
    source: ModelConfig | None = None,
) -> None:
    """Writes a complete checkpoint of one process now; see :class:`Snapshot` and ``policy.saver``.

    Args:
        folder: named ``step-NNNNNN``; an existing one of this name is replaced as a whole.
        learner: whose state.
        tokenizer: goes to ``folder/model``.
        extra: JSON-serialisable.
        source: what the model was loaded from.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
        ValueError: the folder has another name.
    """
    Snapshot(learner, tokenizer, extra, source=source).write(folder, Peers())


def load_checkpoint(folder: Path, learner: Stateful) -> dict[str, Any]:
    """Takes a learner to the moment of a checkpoint, whatever the layout that wrote it; returns ``extra``.

    The learner has the model's architecture, as ``load_policy`` makes it from the recipe or from ``folder/model``; what
    it knows besides is replaced. Each rank reads its parts by itself, and the whole state once for its checksums.

    Raises:
        CheckpointError: the checkpoint is not there, incomplete, damaged or of another model.
    """
    folder = Path(folder)
    problem = incomplete(folder)
    if problem:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({problem}): resume from an earlier one")
    if not (folder / _STATE).is_dir():
        raise CheckpointError(
            f"{folder} was written by an earlier version (learner.pt), which this one does not read: begin anew from "
            f"{folder / 'model'}"
        )
    verify(folder, _STATE, _EXTRA)  # first: damaged pickles are not opened
    try:
        extra = json.loads((folder / _EXTRA).read_text())
        if not isinstance(extra, dict):
            raise DamagedState(f"{_EXTRA} holds no names and values")
        _check_adapters(adapters_of(folder), _adapters(learner.model))
        stored = stored_tensors(folder / _STATE)
        learner.prepare_moments(_with_moments(stored, learner.state_dict()["model"]))
        tree = learner.state_dict()
        flat = flatten(tree)
        read_state(flat, folder / _STATE)
        learner.load_state_dict(unflatten(tree, flat))
    except (OSError, ValueError) as error:
        damaged = (
            ""
            if isinstance(error, StateError) and not isinstance(error, DamagedState)
            else ": resume from an earlier one"
        )
        raise CheckpointError(f"{folder} cannot be read ({one_line(error)}){damaged}") from error
    return extra


def latest_checkpoint(parent: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``parent``; None when there is none. Torn ones do not count."""
    return max(_complete(Path(parent)), key=_age, default=None)


def checkpoints(parent: Path) -> dict[int, Path]:
    """The complete checkpoints under ``parent`` by their step, oldest first."""
    return {_age(path)[0]: path for path in sorted(_complete(Path(parent)), key=_age)}


def prune(parent: Path, keep: int, also: Collection[str] = (), writing: str | None = None) -> list[Path]:
    """Removes all but the ``keep`` newest complete checkpoints, and everything torn. Returns what was removed.

    Args:
        also: names of checkpoints that are kept whatever their age.
        writing: name of one that may still be written in the background, which is left alone.

    Raises:
        ValueError: ``keep`` < 1.
        CheckpointError: a folder cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    parent = Path(parent)
    kept = sorted(_complete(parent), key=_age)[-keep:]
    kept += [p for p in _complete(parent) if p.name in also]
    if writing is not None:  # it may become complete at any moment
        kept += [parent / f"{mark}{writing}" for mark in ("", PARTIAL, REPLACED)]
    doomed = [p for p in _entries(parent) if p not in kept and (_STEP.fullmatch(p.name) or _is_leftover(p))]
    for path in doomed:
        _remove(path)
    return doomed


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _parts_of(rank: int, folder: Path) -> list[str]:
    """The files of the state that a rank wrote."""
    return [str(path.relative_to(folder)) for path in (folder / _STATE).glob(f"__{rank}_*")]


def _adapters(model: PreTrainedModel) -> dict[str, Any] | None:
    """What scales and places a model's adapters, beside their shapes; None of a model without."""
    if not has_adapters(model):
        return None
    [config] = model.__dict__["peft_config"].values()
    beside = config.target_parameters or ()  # stacked experts, and layers that PEFT would take for those
    experts = {name for name in beside if name.startswith("experts.")}
    return {
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "targets": sorted({*config.target_modules, *(name.removesuffix(".weight") for name in beside)} - experts),
        "experts": bool(experts),
    }


def _check_adapters(stored: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> None:
    if stored == own:
        return
    if stored is None or own is None:
        name, old, new = "adapters", *("none" if each is None else "some" for each in (stored, own))
    else:
        name = next(key for key in own if stored.get(key) != own[key])
        old, new = stored.get(name), own[name]
    raise StateError(f"set model.lora to what it was written with ({name}: {old} there, {new} here)")


def _with_moments(keys: Iterable[str], names: Collection[str]) -> set[str]:
    """The parameters among ``names`` of which moments are stored."""
    found = set()
    for key in keys:
        name = key.removeprefix(_MOMENTS) if key.startswith(_MOMENTS) else ""
        while name and name not in names:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def _remove(path: Path) -> None:
    """Out of sight first, so that a kill in the middle does not leave a torn checkpoint under a good name."""
    hidden = path if path.name.startswith(PARTIAL) else path.with_name(PARTIAL + path.name.lstrip("."))
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
    return [p for p in _entries(parent) if _STEP.fullmatch(p.name) and not incomplete(p)]


def _age(folder: Path) -> tuple[int, bool]:
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), not folder.name.startswith(".")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith((PARTIAL + "step-", REPLACED + "step-", PARTIAL + "replaced-step-"))

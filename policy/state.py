"""A learner's complete state on the disk, through torch.distributed.checkpoint: saved on one layout, loaded on another.

The state is a tree of dictionaries; its leaves are tensors and numbers. On the disk it is flat: every leaf has a key,
the names on its way joined by dots, and every number is a tensor of no dimensions. Keys contain names of parameters,
never places in a list, and tensors have their whole shape, of which each rank writes and reads the part that it holds:
so one process, ranks that shard (FSDP2) and ranks that share experts read one another's files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.futures import Future

from policy.errors import one_line

Tree = Mapping[str, Any]
"""Dictionaries whose leaves are tensors and numbers."""

_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


class StateError(ValueError):
    """A state cannot be stored, or does not fit what it is loaded into."""


class DamagedState(StateError):
    """A stored state cannot be read."""


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """The leaves of a tree by their keys. Tensors are the tree's own, numbers become tensors.

    A tensor that is made of others (8-bit moments: codes and scales) is stored as these, under keys of their own.

    Raises:
        StateError: a leaf that cannot be stored.
    """
    flat: dict[str, Tensor] = {}
    for name, leaf in tree.items():
        key = f"{prefix}{name}"
        if isinstance(leaf, Mapping):
            flat |= flatten(leaf, f"{key}.")
        elif isinstance(leaf, Tensor):
            flat |= _parts(key, leaf.detach())
        elif type(leaf) in _NUMBERS:
            flat[key] = torch.tensor(leaf, dtype=_NUMBERS[type(leaf)])
        else:
            raise StateError(f"{key} is a {type(leaf).__name__}: a state is made of tensors and numbers")
    return flat


def unflatten(tree: Tree, flat: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The tree again, its numbers taken from ``flat``; its tensors were read in place and are left as they are."""
    found: dict[str, Any] = {}
    for name, leaf in tree.items():
        key = f"{prefix}{name}"
        if isinstance(leaf, Mapping):
            found[name] = unflatten(leaf, flat, f"{key}.")
        else:
            found[name] = leaf if isinstance(leaf, Tensor) else type(leaf)(flat[key].item())
    return found


def stage(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which the training that goes on does not touch; of a sharded tensor this rank's part.

    From a GPU into page-locked memory, which torch keeps for the next time, all tensors at once.
    """
    copies = {key: _copy(tensor) for key, tensor in flat.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def total_bytes(flat: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, of sharded ones on all ranks together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flat.values())


def write_state(flat: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a state, tensor by tensor; returns when all ranks have. What is not sharded rank 0 writes alone.

    Args:
        flat: this rank's tensors.
        folder: made when it is not there.
        group: the ranks, which all call this; its backend works with CPU tensors. None for one process alone.

    Raises:
        OSError: a rank could not write; the same on every rank.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    first = group is None or dist.get_rank(group) == 0
    own = {key: tensor for key, tensor in flat.items() if first or isinstance(tensor, DTensor)}
    try:
        save(
            own,
            storage_writer=_Writer(folder, sync_files=False),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise _cause(error) from error


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a stored state.

    Raises:
        DamagedState: the folder is damaged.
    """
    entries = _read_metadata(_Reader(folder)).state_dict_metadata
    return {
        key: (entry.size, entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_state(into: Mapping[str, Tensor], folder: Path) -> None:
    """Fills tensors with what is stored under their keys; every rank reads its parts by itself.

    What else is stored is left alone: a learner of another kind may have kept more.

    Raises:
        StateError: a key is not there or has another shape or dtype, which shows before anything is filled.
        DamagedState: the files are damaged; the tensors then hold a mixture.
    """
    stored = stored_tensors(folder)
    for key, tensor in into.items():
        if key not in stored:
            raise StateError(f"it holds no {key}: it belongs to another model, optimizer or version")
        shape, dtype = stored[key]
        if shape != tensor.shape or dtype != tensor.dtype:
            raise StateError(
                f"its {key} is {dtype} {list(shape)}, where the learner has {tensor.dtype} {list(tensor.shape)}: it "
                "belongs to another model or optimizer"
            )
    _load(dict(into), _Reader(folder))


class SavedTensors(Mapping[str, Tensor]):
    """The whole tensors under ``prefix`` of a stored state, each read when it is asked for, and not kept.

    Raises:
        DamagedState: the folder is damaged.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._reader, self._prefix = _Reader(folder), prefix
        self._stored = {k: v for k, v in stored_tensors(folder).items() if k.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        shape, dtype = self._stored[key]
        place = {key: torch.empty(shape, dtype=dtype)}
        _load(place, self._reader)
        return place[key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Writer(FileSystemWriter):
    """Tells the system's own error where torch's writer says only that something failed."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise error if cause is None else OSError(cause.errno, cause.strerror) from error


class _Reader(FileSystemReader):
    """Reads the list of what is stored once, however often it is asked."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata(*args, **kwargs)
        return self._known


def _load(place: dict[str, Tensor], reader: _Reader) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            load(place, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise DamagedState(f"it cannot be read ({one_line(_cause(error))})") from error


def _read_metadata(reader: _Reader) -> Metadata:
    try:
        return reader.read_metadata()
    except Exception as error:  # a damaged pickle may raise anything, MemoryError and TypeError among it
        raise DamagedState(f"its list of tensors cannot be read ({one_line(error)})") from error


def _cause(error: CheckpointException) -> Exception:
    """What really happened, on the first rank on which it did."""
    _, (cause, _) = min(error.failures.items())
    return cause if isinstance(cause, Exception) else RuntimeError(one_line(cause))


def _parts(key: str, tensor: Tensor) -> dict[str, Tensor]:
    inner: Any = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if not hasattr(inner, "__tensor_flatten__"):
        return {key: tensor}
    if isinstance(tensor, DTensor):
        raise StateError(
            f"{key} is a {type(inner).__name__} over several ranks, whose parts fit no other layout: take "
            "optimizer.kind adamw, or parallel.ranks 1"
        )
    names, _ = inner.__tensor_flatten__()
    found: dict[str, Tensor] = {}
    for name in names:
        found |= _parts(f"{key}.{name}", getattr(inner, name).detach())
    return found


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        # By its constructor: from_local would move the copy back to the mesh's device.
        return DTensor(_copy(tensor._local_tensor), copy.copy(tensor._spec), requires_grad=False)
    if tensor.device.type == "cpu":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return place.copy_(tensor.detach(), non_blocking=True)

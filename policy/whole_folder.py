"""A folder that is there as a whole or not at all, written by one process or by many ranks together."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from policy.errors import one_line
from policy.parallel import Ranks

PARTIAL, REPLACED = ".partial-", ".replaced-"
# config, tokenizer and file-system blocks beside the tensors
_OVERHEAD_BYTES = 1 << 20


class CheckpointError(OSError):
    """A checkpoint or model folder cannot be written or read; earlier ones are intact."""


class Peers:
    """The processes that write one checkpoint together: this one alone, or the ranks of a group.

    Args:
        group: works with CPU tensors, and nobody else uses it at the same time.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.first = group is None or dist.get_rank(group) == 0

    @classmethod
    def of(cls, ranks: Ranks) -> Peers:
        """These ranks, with a group of their own; all of them call this together."""
        group = None if ranks.size == 1 else dist.new_group(backend="gloo")
        assert not isinstance(group, int)
        return cls(group)

    def on_first(self, call: Callable[[], object]) -> None:
        """Rank 0 alone makes a call; all ranks learn how it went, after it is over.

        Raises:
            Exception: what it raised; on the other ranks a CheckpointError that says so.
        """
        if self.group is None:
            call()
            return
        failure: list[str | None] = [None]
        raised: Exception | None = None
        if self.first:
            try:
                call()
            except Exception as error:  # raised again below: the others wait for word
                raised, failure = error, [one_line(error)]
        dist.broadcast_object_list(failure, group=self.group, group_src=0)
        if raised is not None:
            raise raised
        if failure[0] is not None:
            raise CheckpointError(f"rank 0: {failure[0]}")

    def gathered(self, call: Callable[[int], dict[str, str]]) -> dict[str, str]:
        """What the calls of all ranks, each with its number, return together.

        Raises:
            Exception: what it raised here; on the other ranks a CheckpointError that says so.
        """
        if self.group is None:
            return call(0)
        own: dict[str, str] | str
        raised: Exception | None = None
        try:
            own = call(dist.get_rank(self.group))
        except Exception as error:  # raised again below: the others wait for word
            raised, own = error, one_line(error)
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, own, group=self.group)
        if raised is not None:
            raise raised
        together: dict[str, str] = {}
        for rank, each in enumerate(found):
            if isinstance(each, str):
                raise CheckpointError(f"rank {rank}: {each}")
            together |= each
        return together


@contextmanager
def whole_folder(folder: Path, needed: int, peers: Peers) -> Iterator[Path]:
    """Yields a folder to write into; it takes the place of ``folder`` when everything is on the disk.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind and ``folder`` is as it was.
    """
    needed += _OVERHEAD_BYTES
    partial = folder.with_name(PARTIAL + folder.name)
    try:
        peers.on_first(lambda: _begin(partial, needed))
        yield partial
        peers.on_first(lambda: _end(partial, folder))
    except Exception as error:
        if peers.first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        if _disk_full(error):
            raise CheckpointError(_disk_full_line(folder, needed)) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error
        raise


def _begin(partial: Path, needed: int) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(partial.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial.mkdir()


def _end(partial: Path, folder: Path) -> None:
    _flush(partial)
    _take_place(partial, folder)


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
    replaced = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)

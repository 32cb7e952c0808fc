"""The ``shm`` form of weights: one file under /dev/shm that holds every tensor back to back. Loads no torch by itself.

The learner writes a segment per version (``Segment.create``), the engines map it (``Segment.open``). A segment is
named after the process that wrote it, so that what a killed run left behind can be told from what a living one needs.

    r1-weights-<run id>-<pid>-<start time of the pid>-v<version>
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DIRECTORY = Path("/dev/shm")
ALIGNMENT = 64  # bytes; every tensor starts on a cache line, whatever the dtype before it
_NAME = re.compile(r"r1-weights-(?P<run>.*)-(?P<pid>\d+)-(?P<start>\d+)-v(?P<version>-?\d+)")


def new_hash(algorithm: str) -> Any:
    """A hash object (``update``, ``hexdigest``): ``xxh3_128`` runs at memory speed, ``blake2b`` at about 1 GB/s.

    Raises:
        ValueError: the algorithm is unknown.
    """
    if algorithm == "xxh3_128":
        import xxhash  # a package with a compiled core: not everyone who imports this module hashes

        return xxhash.xxh3_128()
    if algorithm == "blake2b":
        return hashlib.blake2b(digest_size=16)
    raise ValueError(f"unknown checksum algorithm {algorithm!r}; known: xxh3_128, blake2b")


class Segment:
    """A mapped file. ``buffer`` is writable in either case: a reader's mapping is private, the file stays as it is."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer

    @classmethod
    def create(cls, run_id: str, version: int, size: int, directory: Path = DIRECTORY) -> Segment:
        """A new segment of ``size`` zero bytes, all of them reserved.

        Raises:
            OSError: no room. Reserved at once because a page that cannot be had later would kill the process (SIGBUS).
        """
        path = directory / segment_name(run_id, version)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
            return cls(path, mmap.mmap(handle, size))
        except OSError as error:
            path.unlink()
            if error.errno != errno.ENOSPC:
                raise
            room = os.statvfs(directory)
            raise OSError(
                errno.ENOSPC,
                f"no room for one copy of the weights: {size / 1e6:.0f} MB wanted, "
                f"{room.f_bavail * room.f_frsize / 1e6:.0f} MB free; enlarge it (docker run --shm-size=…)",
                str(directory),
            ) from error
        finally:
            os.close(handle)

    @classmethod
    def open(cls, path: str | Path, size: int) -> Segment:
        """Maps what another process wrote.

        Raises:
            ValueError: it is gone, or its size is another.
        """
        path = Path(path)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(
                f"weights are not at {path}: the learner has published two versions since, or runs on another host "
                "(engine.weight_backend shm needs one host)"
            ) from None
        try:
            found = os.fstat(handle).st_size
            if found != size:
                raise ValueError(f"{path} holds {found} bytes, {size} were announced")
            return cls(path, mmap.mmap(handle, size, access=mmap.ACCESS_COPY))
        finally:
            os.close(handle)

    def digest(self, algorithm: str) -> str:
        """Hex digest over all bytes."""
        found = new_hash(algorithm)
        with memoryview(self.buffer) as view:
            found.update(view)
        return found.hexdigest()

    def tensors(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], offsets: Sequence[int]
    ) -> Iterator[tuple[str, Any]]:
        """(name, tensor) in the order of sending; tensors are views of the mapping, which lives as long as one does."""
        import torch  # here alone: who only names, hashes or removes segments needs no torch

        for name, dtype, shape, offset in zip(names, dtypes, shapes, offsets, strict=True):
            kind, count = getattr(torch, dtype), math.prod(shape)
            if count == 0:
                yield name, torch.empty(tuple(shape), dtype=kind)
            else:
                yield name, torch.frombuffer(self.buffer, dtype=kind, count=count, offset=offset).view(tuple(shape))

    def unlink(self) -> None:
        """Removes the name; who has it mapped keeps it until the mapping ends."""
        self.path.unlink(missing_ok=True)


def segment_name(run_id: str, version: int) -> str:
    """File name of this process' segment of one version."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "_", run_id)[:80]
    return f"r1-weights-{safe}-{os.getpid()}-{_start_time(os.getpid())}-v{version}"


def remove_stale(directory: Path = DIRECTORY) -> list[str]:
    """Unlinks the segments of processes that are no more; returns their names."""
    removed = []
    for path in directory.glob("r1-weights-*"):
        match = _NAME.fullmatch(path.name)
        if match and _start_time(int(match["pid"])) != int(match["start"]):
            with contextlib.suppress(PermissionError):  # another user's: theirs to remove
                path.unlink(missing_ok=True)
                removed.append(path.name)
    return sorted(removed)


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began, -1 when there is none: pids are used again, pairs are not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(stat.rpartition(")")[2].split()[19])

"""Writing files so that neither a kill nor a full disk leaves half of one behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_FULL_BYTES = 1 << 20


class RunDirError(OSError):
    """The run folder cannot be used: a full disk, no permission, a damaged file, another process.

    ``str()`` is one line with the mend. What was finished before is intact.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code


@contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Turns what a failed write raises into a :class:`RunDirError` that names the path and the mend.

    Args:
        path: what is being written.
        also: further exceptions that a library raises for a full disk (``torch.save`` a RuntimeError, …); they are
            translated only when the disk is full.

    Raises:
        RunDirError: the disk is full, or the operating system refused the write.
    """
    try:
        yield
    except RunDirError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path) from error
        raise RunDirError(f"{path}: cannot be written: {error.strerror or error}", error.errno) from error
    except also as error:
        if _is_full(path):
            raise _full(path) from error
        raise


def _full(path: Path) -> RunDirError:
    return RunDirError(
        f"the disk is full while writing {path}: free some space and run the same command again; "
        "what was finished is intact and the run goes on from there",
        errno.ENOSPC,
    )


def _is_full(path: Path) -> bool:
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free < _NEARLY_FULL_BYTES


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file: afterwards it holds the old text or the new one, on the disk, never a part.

    Raises:
        RunDirError: the disk is full or the file cannot be written; the old file is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _fsync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def append_line(path: Path, line: str, *, fsync: bool = False) -> None:
    """Adds one line to a file in a single write to the operating system: a killed process loses nothing written before.

    A torn last line, left by a process that was killed while writing, is cut off first.

    Args:
        fsync: also wait until the disk has it, which a power cut then survives.

    Raises:
        RunDirError: the disk is full or the file cannot be written; the file then ends with its last whole line.
    """
    assert "\n" not in line, "one line at a time"
    data = f"{line}\n".encode()
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = _whole_lines(handle)
            if end < os.fstat(handle).st_size:
                os.ftruncate(handle, end)
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(handle, data[written:], end + written)
                if fsync:
                    os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Whole lines of a file with their numbers from 1; nothing when there is no file. A torn last line is ignored.

    Raises:
        RunDirError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield number, line.decode("utf-8")[:-1]
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise RunDirError(f"{path} is damaged (not UTF-8): delete the damaged line or the file") from None
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}", error.errno) from error


class Lock:
    """A lock file that one process holds; it ends with the process, however that ends.

    A POSIX lock is not inherited by forked children: a worker that outlives its killed parent does not hold it.
    """

    _held: ClassVar[set[Path]] = set()  # a POSIX lock does not exclude its own process

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle

    @classmethod
    def acquire(cls, path: Path, what: str) -> Lock:
        """Takes the lock.

        Args:
            path: of the lock file; it is created and stays.
            what: is protected, for the error message.

        Raises:
            RunDirError: another process (or this one) holds it, or the file cannot be written.
        """
        path = path.absolute()
        if path in cls._held:
            raise RunDirError(f"{what} is open in this process already")
        with writing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise RunDirError(f"{path} cannot be locked ({error.strerror}): set run.dir to a local disk") from None
            raise RunDirError(
                f"{what} is in use by process {holder}: wait for it, stop it, or choose another name"
            ) from None
        lock = cls(path, handle)
        cls._held.add(path)
        try:
            with writing(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
        except RunDirError:
            lock.release()
            raise
        return lock

    def release(self) -> None:
        """Lets go of it; safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            self._held.discard(self._path)


def _whole_lines(handle: int, block: int = 1 << 16) -> int:
    """Bytes up to and including the last newline."""
    end = os.fstat(handle).st_size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A file of gzip members that only grows. What a kill leaves of the last member is told from damage."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BLOCK = 1 << 14  # compressed bytes that are read at once
_ZEROS = 8  # so many zero bytes at the end are what a power cut leaves, not the end of a member
_MAGIC = b"\x1f\x8b\x08"


class SampleFileError(OSError):
    """A file of samples cannot be used: damaged, a full disk, no permission. ``str()`` is one line with the mend."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code


def members(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and content of every whole gzip member; a torn one at the end is passed over.

    Nothing when there is no file. Another process may append meanwhile.

    Raises:
        SampleFileError: a member is damaged otherwise, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        start, size = 0, os.fstat(handle).st_size
        while start < size:
            payload, end = _inflated(handle, start)
            if payload is None:
                if _is_torn(os.pread(handle, size - start, start)):
                    return
                raise SampleFileError(
                    f"{path} is damaged at byte {start} of {size}: restore it from a copy, or {cut_at(path, start)}"
                )
            yield start, end, payload
            start = end
    except SampleFileError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(handle)


def cut_at(path: Path, start: int) -> str:
    """How a person gives up what stands in a file from a byte on."""
    return f"`truncate -s {start} {path}` keeps what stands before, and the rest is drawn again"


def _inflated(source: int | bytes, start: int) -> tuple[bytes | None, int]:
    """Content and end of the member that begins at ``start`` of an open file or of bytes.

    The content is None when it is cut short or damaged, and the end then -1 when it is only cut short.
    """
    inflate, parts, position = zlib.decompressobj(31), [], start
    while not inflate.eof:
        block = (
            source[position : position + _BLOCK] if isinstance(source, bytes) else os.pread(source, _BLOCK, position)
        )
        if not block:
            return None, -1
        try:
            parts.append(inflate.decompress(block))
        except zlib.error:
            return None, position
        position += len(block)
    return b"".join(parts), position - len(inflate.unused_data)


def _is_torn(rest: bytes) -> bool:
    """Whether a kill, a full disk or a power cut explains what stands at the end of a file.

    It does when this is the beginning of a member, perhaps with zeros behind it, and no whole member follows.
    """
    position = 0
    while (position := rest.find(_MAGIC, position + 1)) >= 0:
        if _inflated(rest, position)[0] is not None:
            return False
    written = rest.rstrip(b"\0")
    return _inflated(written if len(rest) - len(written) >= _ZEROS else rest, 0) == (None, -1)


def write_at(handle: int, data: bytes, end: int, *, fsync: bool) -> None:
    """Writes at the end of an open file, all or nothing."""
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(handle, data[written:], end + written)
        if fsync:
            os.fsync(handle)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line what the operating system refused.

    Raises:
        SampleFileError: the disk is full, or the write was refused.
    """
    try:
        yield
    except SampleFileError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SampleFileError(
                f"the disk is full while writing {path}: free some space and run the same command again; every sample "
                "that was finished is kept",
                error.errno,
            ) from error
        raise SampleFileError(f"{path}: cannot be written: {error.strerror or error}", error.errno) from error


def unreadable(path: Path, error: OSError) -> SampleFileError:
    """What to raise when a file cannot be read."""
    return SampleFileError(f"{path}: cannot be read: {error.strerror or error}", error.errno)


def fsync_folder(folder: Path) -> None:
    """Waits until the disk has the names of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

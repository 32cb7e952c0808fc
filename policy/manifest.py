"""``complete.json``: which files a checkpoint consists of, their sizes and checksums, and what its adapters are.

Sizes tell cheaply whether a checkpoint is whole. Checksums (XXH3, 128 bits) tell whether the disk gives back what was
written; they cost one reading of the files and are compared when a file is about to be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import xxhash

from policy.errors import one_line
from policy.whole_folder import CheckpointError

NAME = "complete.json"
_FILES, _SUMS, _ADAPTERS = "files", "xxh3_128", "adapters"


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The checksums of files of a folder, in hexadecimal, by their names.

    Raises:
        OSError: one cannot be read.
    """
    return {name: _checksum(folder / name) for name in names}


def write_manifest(folder: Path, known: Mapping[str, str], adapters: Mapping[str, Any] | None) -> None:
    """Lists everything below a folder.

    Args:
        folder: whose files are all written.
        known: checksums that need not be computed again.
        adapters: settings of the learner's LoRA adapters; None without.

    Raises:
        OSError: a file cannot be read, or the list not written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    sums = {**known, **checksums(folder, (name for name in sizes if name not in known))}
    text = json.dumps({_FILES: sizes, _SUMS: {name: sums[name] for name in sizes}, _ADAPTERS: adapters}, indent=1)
    (folder / NAME).write_text(text)


def incomplete(folder: Path) -> str:
    """What is wrong with a checkpoint folder by the sizes of its files; empty when it is complete."""
    files = _read(folder).get(_FILES)
    if not isinstance(files, dict) or not files:
        return f"no readable {NAME}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def verify(folder: Path, *parts: str) -> None:
    """Compares the files of a complete checkpoint with their checksums.

    Args:
        folder: of the checkpoint.
        parts: names of the files and folders inside that are about to be used.

    Raises:
        CheckpointError: one is damaged, or an earlier version wrote no checksums.
    """
    listed = _read(folder)
    sums = listed.get(_SUMS)
    if not isinstance(sums, dict):
        raise CheckpointError(
            f"{folder} was written by an earlier version ({NAME} without checksums), which this one does not read: "
            f"begin anew from {folder / 'model'}"
        )
    for name in listed.get(_FILES) or ():
        if Path(name).parts[0] not in parts:
            continue
        try:
            wrong = "" if _checksum(folder / name) == sums.get(name) else "it is not what was written"
        except OSError as error:
            wrong = one_line(error)
        if wrong:
            raise CheckpointError(f"{folder / name} is damaged ({wrong}): resume from an earlier one")


def adapters_of(folder: Path) -> Any:
    """The adapters of the learner that wrote a complete checkpoint; None: it had none."""
    return _read(folder).get(_ADAPTERS)


def _read(folder: Path) -> dict[str, Any]:
    """What is listed; nothing when that cannot be read."""
    try:
        found = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, cast(Callable[[], Any], xxhash.xxh3_128)).hexdigest()

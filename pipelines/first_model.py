"""What the folder ``model.path`` held when a run began: whoever goes on with the run must find the same.

The recipe names the folder only. With other weights or another ``config.json`` in it a resumed run would be held
against another reference policy, or compute with another architecture, and no figure would tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.files import RunDirError, write_atomic
from policy.config import ModelConfig

_FILE = "model.fingerprint.json"
_KINDS = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
_WHOLE = 1 << 30  # bytes of a file that is read whole
_BLOCKS, _BLOCK = 16, 1 << 20  # of a larger one so many blocks of so many bytes, the first and the last among them


def record_model(run: Path, model: ModelConfig) -> bool:
    """Keeps in a run folder what the model's folder holds; False for a preset or a model of the hub, which have none.

    Raises:
        OSError: the model cannot be read, or the run folder not written.
    """
    folder = _folder(model)
    if folder is None:
        return False
    write_atomic(run / _FILE, json.dumps({"path": str(folder), "files": _prints(folder)}, indent=1) + "\n")
    return True


def check_same_model(run: Path, model: ModelConfig, mend: str) -> bool:
    """Compares the model's folder with what was kept; False when nothing was.

    Args:
        run: the run folder.
        model: of its recipe.
        mend: what can be done beside putting the model back, appended to the error.

    Raises:
        ValueError: the folder holds something else; names the files.
        RunDirError: what was kept is damaged.
        OSError: the model cannot be read.
    """
    path = run / _FILE
    try:
        kept: dict[str, Any] = json.loads(path.read_text("utf-8"))["files"]
        old = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in kept.items()}
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunDirError(f"{path} is damaged: restore it, or begin anew with --fresh") from None
    folder = _folder(model)
    if folder is None:
        raise ValueError(f"model.path: {model.path}, which {run} was begun with, is gone: put it back{mend}")
    new = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in _prints(folder).items()}
    changes = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
    }
    told = "; ".join(f"{what}: {_some(names)}" for what, names in changes.items() if names)
    if told:
        raise ValueError(
            f"model.path: {folder} is not the model that {run} was begun with ({told}): put that back{mend}"
        )
    return True


def _folder(model: ModelConfig) -> Path | None:
    path = None if model.path is None else Path(model.path).expanduser()
    return path if path is not None and path.is_dir() else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _prints(folder: Path) -> dict[str, dict[str, Any]]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _KINDS and path.is_file()]
    return {path.name: {"bytes": path.stat().st_size, "xxh3_128": _digest(path)} for path in files}


def _digest(path: Path) -> str:
    import xxhash

    digest, size = xxhash.xxh3_128(), path.stat().st_size
    starts = range(0, size, _BLOCK)
    if size > _WHOLE:
        starts = [round((size - _BLOCK) * block / (_BLOCKS - 1)) for block in range(_BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()

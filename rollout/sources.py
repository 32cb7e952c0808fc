"""Rows of data from where they lie: jsonl and parquet files, Hugging Face data sets, reasoning-gym generators.

Heavy readers (pyarrow, datasets, reasoning_gym) are imported by the call that needs them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import importlib.util
import json
import sys
import threading
import types
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, Mapping[str, Any]]

# A generator is asked for so many entries per problem wanted, before it counts as exhausted.
DRAWS_PER_PROBLEM = 50
_IMPORT_LOCK = threading.Lock()


def read_rows(source: str, params: Mapping[str, Any]) -> Iterator[Row]:
    """(row id, row) of a file or data set, in its order.

    Raises:
        ValueError: it is not there, cannot be read, or a row is not an object of columns.
    """
    kind, _, place = source.partition(":")
    if kind == "jsonl":
        return _jsonl_rows(Path(place).expanduser())
    if kind == "parquet":
        return _parquet_rows(Path(place).expanduser())
    assert kind == "hf", kind
    return _hf_rows(place, params)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"the data file {path} is not there (seen from {Path.cwd()})")
    return path


def _jsonl_rows(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(_existing(path), "rt", encoding="utf-8") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a line must be an object of columns, got {type(row).__name__}")
            yield f"{path.name}:{number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(_existing(path))
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _hf_rows(place: str, params: Mapping[str, Any]) -> Iterator[Row]:
    import datasets

    name, _, split = place.partition(":")
    split = split or "train"
    folder = Path(name).expanduser()
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
            rows = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else name, split=split, **params)
    except KeyError as error:
        raise ValueError(f"the data set {name} has no split {error}") from error
    except (OSError, ValueError, ImportError) as error:
        # One line: datasets' own messages run over many.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load the data set {name} (split {split}): {reason[:300].rstrip('.')}. Without a network give a "
            "local folder; one that was downloaded before loads at once with HF_HUB_OFFLINE=1"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name}:{split}:{number}", dict(row)


def generator_seed(name: str, params: Mapping[str, Any], seed: int) -> int:
    """Seed of a reasoning-gym generator, in [0, 2^31).

    Its entry ``i`` depends on ``seed + i`` alone, so that neighbouring seeds give almost the same problems. Hashing
    the seed with the name and the parameters puts every data set at a place of its own.
    """
    key = json.dumps([name, dict(params), seed], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") >> 1


def reasoning_gym_entries(
    name: str, params: Mapping[str, Any], seed: int, size: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(index, generator seed, entry) of a reasoning-gym data set, at most ``DRAWS_PER_PROBLEM * size`` of them.

    Raises:
        ValueError: no such data set, or parameters that its generator refuses.
    """
    real_seed = generator_seed(name, params, seed)
    draws = size * DRAWS_PER_PROBLEM
    data = _create(name, {**params, "seed": real_seed, "size": draws})
    for index in range(draws):
        try:
            entry = data[index]
        except IndexError:
            return
        yield index, real_seed, entry


def _create(name: str, params: dict[str, Any]) -> Any:
    registry = _registry_with(name)
    if name not in registry:
        raise ValueError(f"reasoning_gym has no data set {name!r}; it has {', '.join(sorted(registry))}")
    make_dataset, make_config = registry[name]
    try:
        return make_dataset(config=make_config(**params))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{name} refuses its params: {error}") from error


def _registry_with(name: str) -> dict[str, Any]:
    """reasoning-gym's registry of data sets, with at least ``name`` in it when it exists.

    ``import reasoning_gym`` loads all 106 task sets, and with them sympy and matplotlib: 2.6 s. One task set alone
    takes 0.15 s, when the packages above it are stood in for while its module is loaded.
    """
    with _IMPORT_LOCK:
        if "reasoning_gym" not in sys.modules:
            found = _single_module(name)
            if found is not None:
                return found
        importlib.import_module("reasoning_gym")
        return importlib.import_module("reasoning_gym.factory").DATASETS


@functools.cache
def _single_module(name: str) -> dict[str, Any] | None:
    """The registry after loading the one module that is called like the data set; None when that does not do."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("reasoning_gym is not installed: it is part of the requirements, run the set-up again")
    root = Path(spec.submodule_search_locations[0])
    matches = sorted(root.glob(f"*/{name}.py"))
    if len(matches) != 1:
        return None
    category = matches[0].parent.name
    for package, place in (("reasoning_gym", root), (f"reasoning_gym.{category}", matches[0].parent)):
        stand_in = types.ModuleType(package)
        stand_in.__path__ = [str(place)]
        sys.modules[package] = stand_in
    try:
        importlib.import_module(f"reasoning_gym.{category}.{name}")
        registry = dict(importlib.import_module("reasoning_gym.factory").DATASETS)
        return registry if name in registry else None
    except (ImportError, AttributeError):
        return None  # the module leans on its package after all
    finally:
        # A later ``import reasoning_gym`` finds nothing half-loaded and starts afresh.
        for module in [m for m in sys.modules if m.partition(".")[0] == "reasoning_gym"]:
            del sys.modules[module]

"""The rows of a benchmark from where they lie: a local file, verified, or the hub.

Order: beside a user's own YAML, the data folder that was named, the folder that ``R1_DATA`` names, the hub.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evals.benchmark import Benchmark, DataFile
from evals.hooks import find_function, one_line
from rollout.sources import read_rows

DATA_VARIABLE = "R1_DATA"
_PATIENCE_S = 5.0
_KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def local_or_hub_rows(benchmark: Benchmark, data_dir: Path | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and ``{"file", "rows", "sha256"}`` of where they came from.

    The checksum of rows that came from no file is that of their JSON.

    Raises:
        ValueError: there are none (says which file belongs where), they cannot be read, or they are not what the
            benchmark says they are.
    """
    if benchmark.custom_dataset:
        rows = _custom_rows(benchmark)
        return rows, _described(benchmark.custom_dataset.rpartition("/")[2], rows)
    folders = _folders(benchmark, data_dir)
    if benchmark.data is not None:
        found = _find(benchmark.data, folders)
        if found is not None:
            name, path = found
            digest = _verified(benchmark, benchmark.data, path)
            rows = list(_file_rows(path))
            if benchmark.data.rows and len(rows) != benchmark.data.rows:
                raise ValueError(
                    f"{benchmark.name}: {path} has {len(rows)} rows, expected {benchmark.data.rows}; "
                    + on_purpose(benchmark, "rows and problems")
                )
            return rows, {"file": name, "rows": len(rows), "sha256": digest}
    return _hub_rows(benchmark, folders)


def on_purpose(benchmark: Benchmark, keys: str) -> str:
    """How to go on with data that are not what they should be."""
    return f"to use it on purpose, write a YAML with `include: {benchmark.name}` and its own {keys}, and name that file"


def _folders(benchmark: Benchmark, data_dir: Path | None) -> list[tuple[str, Path]]:
    """(what names it, folder) where a local file may lie, in order.

    Raises:
        ValueError: a folder was named and is not there.
    """
    found = [("the YAML's own folder", Path(benchmark.folder))] if benchmark.folder else []
    named = [("the data folder", data_dir)] if data_dir is not None else []
    if variable := os.environ.get(DATA_VARIABLE):
        named.append((DATA_VARIABLE, Path(variable)))
    for what, folder in named:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{what} names {folder}, which is no folder")
        found.append((what, folder))
    return found


def _find(data: DataFile, folders: list[tuple[str, Path]]) -> tuple[str, Path] | None:
    """(name, path) of the first file that is there; a name is taken with and without ``.gz``."""
    for _, folder in folders:
        for name in (data.file, *data.also):
            for variant in (name, name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"):
                path = folder / Path(variant).expanduser()
                if path.is_file():
                    return variant, path
    return None


def _verified(benchmark: Benchmark, data: DataFile, path: Path) -> str:
    """The sha256 of a file as it lies.

    Raises:
        ValueError: neither it nor, for a ``.gz``, what it holds is what is expected.
    """
    accepted = data.sha256.split()
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not accepted or digest in accepted:
            return digest
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() in accepted:  # type: ignore[arg-type]
                    return digest
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{benchmark.name}: {path} cannot be read: {one_line(error)}") from None
    raise ValueError(
        f"{benchmark.name}: the sha256 of {path} is {digest}, expected {' or '.join(accepted)}; "
        + on_purpose(benchmark, "sha256")
    )


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        return (dict(row) for _, row in read_rows(f"jsonl:{path}", {}))
    if name.endswith(".parquet"):
        return (dict(row) for _, row in read_rows(f"parquet:{path}", {}))
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith(".json"):
        return _json_rows(path)
    raise ValueError(f"{path}: the name of a data file ends in {', '.join(_KINDS)}")


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise ValueError(f"{path}: a row has more or fewer fields than the header")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no readable CSV: {one_line(error)}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects")
    yield from rows


def _custom_rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    """What a user's function returns for the split; it is given ``dataset_kwargs``, as in lm-evaluation-harness."""
    function = find_function(benchmark.custom_dataset, benchmark.folder)
    try:
        splits = function(**benchmark.dataset_kwargs)
        rows = [dict(row) for row in splits[benchmark.test_split]]
    except Exception as error:  # a user's code
        raise ValueError(
            f"{benchmark.name}: {benchmark.custom_dataset} must return {{split: rows}} with the split "
            f"{benchmark.test_split!r}; it failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    return rows


def _hub_rows(benchmark: Benchmark, folders: list[tuple[str, Path]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    if not benchmark.dataset_path:
        raise ValueError(_missing(benchmark, folders, "the hub has no copy that is read here"))
    name = benchmark.dataset_name
    params: Mapping[str, Any] = {**({"name": name} if name else {}), **benchmark.dataset_kwargs}
    try:
        with _no_retries_without_network():
            rows = [dict(row) for _, row in read_rows(f"hf:{benchmark.dataset_path}:{benchmark.test_split}", params)]
    except ValueError as error:
        reason = one_line(error, 160).partition(". Without a network")[0]
        raise ValueError(_missing(benchmark, folders, reason)) from None
    data = benchmark.data
    if not benchmark.problems and data is not None and data.rows and len(rows) != data.rows:
        raise ValueError(
            f"{benchmark.name}: {benchmark.dataset_path} ({benchmark.test_split}) has {len(rows)} rows, expected "
            f"{data.rows}; " + on_purpose(benchmark, "rows")
        )
    return rows, _described(":".join(filter(None, ("hub", benchmark.dataset_path, name, benchmark.test_split))), rows)


@contextlib.contextmanager
def _no_retries_without_network() -> Iterator[None]:
    """Where the hub cannot be reached only its cache is asked: else each file costs half a minute of retries."""
    from datasets import config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before) and not _reachable(constants.ENDPOINT):
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _reachable(endpoint: str) -> bool:
    """Whether something answers at an address within a few seconds; a proxy is taken at its word."""
    if any(os.environ.get(name) for each in ("https_proxy", "all_proxy") for name in (each, each.upper())):
        return True
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True


def _missing(benchmark: Benchmark, folders: list[tuple[str, Path]], reason: str) -> str:
    """The one line that says which file belongs where."""
    data = benchmark.data
    if data is None:
        return f"{benchmark.name}: its data cannot be had: {reason}"
    notes = [f"{data.rows:,} rows"] if data.rows else []
    notes += [benchmark.origin] if benchmark.origin else []
    size = f" ({'; '.join(notes)})" if notes else ""
    looked = ", ".join(f"{folder} ({what})" for what, folder in folders)
    where = f"below {looked}" if looked else f"below a data folder, and name that with --data-dir or {DATA_VARIABLE}"
    return f"{benchmark.name}: its data are missing: put {data.file}{size} {where}; {reason}"


def _described(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"file": name, "rows": len(rows), "sha256": rows_digest(rows)}


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """sha256 over the JSON of the rows, one a line."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()

"""The safetensors files of a folder, read tensor by tensor.

Tensors are read straight into their place, or into memory that is free again when the caller drops it. The library's
own reader maps the files: what has been read then counts as the process's memory until its file is closed, and of a
model in one file that is all of it.

Format: 8 bytes, little-endian: the length of a JSON header ``{name: {dtype, shape, data_offsets}}``; then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100 << 20  # bytes; the format's own limit
_PIECE = 4 << 20  # bytes that are read at once of a tensor that changes its dtype

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: its safetensors file.
        dtype, shape: its own.
        start: first byte in the file.
        size: bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards(Mapping[str, Stored]):
    """Names of all tensors of a folder, and where they lie; :meth:`read` reads one.

    The files are those of the folder's index, or ``model.safetensors`` where there is none.

    Args:
        folder: a Hugging Face folder.

    Raises:
        ValueError: no weights, a file that the index names is missing, cut off or no safetensors file, a tensor lies
            in two of them or not where the index says, or a model.safetensors lies there that the index does not name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, Stored] = {}
        for file in weight_files(folder):
            for name, stored in _header(file).items():
                if name in self._stored:
                    raise ValueError(f"{name} lies both in {self._stored[name].file.name} and in {file.name}")
                self._stored[name] = stored
        for name, place in _index(folder).items():
            if name not in self._stored or self._stored[name].file.name != Path(place).name:
                raise ValueError(f"{INDEX} says that {name} lies in {place}, and it does not")
        self._open: tuple[Path, BinaryIO] | None = None
        self._staging = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file that was read last; another read opens it again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def bytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors on the disk."""
        return sum(self[name].size for name in names)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which they lie on the disk, file by file."""
        return sorted(names, key=lambda name: (self[name].file, self[name].start))

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, in memory of its own.

        Raises:
            OSError: the file cannot be read.
        """
        stored = self[name]
        out = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read_into(name, out)
        return out

    def read_into(self, name: str, place: Tensor) -> None:
        """Fills ``place``, which has the stored shape, with the tensor, cast to its dtype.

        Raises:
            OSError: the file cannot be read.
        """
        stored, place = self[name], place.detach()
        assert tuple(place.shape) == stored.shape, name
        if place.dtype == stored.dtype and place.is_contiguous() and place.device.type == "cpu":
            self._fill(name, place, stored.start)
            return
        rows = max(1, _PIECE * max(len(place), 1) // max(stored.size, 1)) if stored.shape else 1
        start = stored.start
        for part in place.split(rows) if stored.shape else (place,):
            piece = self._piece(part.numel() * stored.dtype.itemsize).view(stored.dtype).view(part.shape)
            self._fill(name, piece, start)
            part.copy_(piece)
            start += piece.numel() * piece.element_size()

    def _piece(self, size: int) -> Tensor:
        """Memory for so many bytes, always the same: holes of many pieces would add up beside the model."""
        if len(self._staging) < size:
            self._staging = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._staging[:size]

    def _fill(self, name: str, target: Tensor, start: int) -> None:
        """Reads bytes from ``start`` on into a contiguous tensor on the CPU."""
        if not target.numel():
            return
        buffer = _bytes(target)
        file = self._file(self[name].file)
        file.seek(start)
        if file.readinto(buffer) != len(buffer):  # pyright: ignore[reportAttributeAccessIssue]
            raise OSError(f"{self[name].file} ends within {name}")

    def _file(self, path: Path) -> BinaryIO:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, path.open("rb"))
        return self._open[1]


def write_tensors(
    file: Path, layout: Sequence[tuple[str, torch.dtype, Sequence[int]]], tensors: Iterable[Tensor]
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Args:
        file: is replaced.
        layout: name, dtype and shape of every tensor.
        tensors: as laid out.

    Raises:
        OSError: no room on the disk.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want the data aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, dtype, shape), tensor in zip(layout, tensors, strict=True):
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
            if tensor.numel():
                out.write(_bytes(tensor.detach().contiguous()))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model of a folder.

    Raises:
        ValueError: there are none, one that the index names is missing, or there is another model beside the index.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} has no weights ({WEIGHTS} or {INDEX})")
        return [folder / WEIGHTS]
    names = sorted(set(_index(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{len(missing)} of {len(names)} weight files are missing, e.g. {', '.join(missing[:1])}")
    if WEIGHTS not in names and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has {WEIGHTS} beside {INDEX}, which names other files: take the wrong one out")
    return [folder / name for name in names]


def _index(folder: Path) -> dict[str, str]:
    """File of every tensor that a folder's index names; empty where it has none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        places = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(place, str) for place in places.values()):
            raise TypeError("a file's name must be text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of safetensors files") from error
    return places


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU that is not empty."""
    plain: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(plain)


def _header(file: Path) -> dict[str, Stored]:
    """What a file says it holds, checked against its length."""
    size = file.stat().st_size
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(source.read(length))
        header.pop("__metadata__", None)
        found = {name: _stored(file, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is cut off or no safetensors file ({error})") from error
    end = max((stored.start + stored.size for stored in found.values()), default=8 + length)
    if end != size:
        raise ValueError(f"{file} is cut off or damaged: its header speaks of {end} bytes, it has {size}")
    reached = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
        if stored.start != reached:  # the format allows neither: what lies there would be read twice, or never
            kind = "leaves bytes out before" if stored.start > reached else "lets others overlap with"
            raise ValueError(f"{file} is damaged: its header {kind} {name}")
        reached += stored.size
    return found


def _stored(file: Path, base: int, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError(f"shape {list(shape)} at {[begin, end]}: whole numbers >= 0 are wanted")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a {entry['dtype']} of shape {list(shape)}")
    return Stored(file, dtype, shape, base + begin, end - begin)

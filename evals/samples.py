"""Graded samples on disk: append-only, so that a killed evaluation goes on without a lost or a doubled one.

``samples.jsonl.gz`` is a row of gzip members, one per :meth:`SampleStore.append`, each with one JSON line per sample;
any gzip reader shows them as one text. What a kill or a full disk leaves of the last member is cut off when the file is
opened for writing: its samples were not finished, and they are drawn again.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from evals.members import SampleFileError, cut_at, fsync_folder, members, unreadable, write_at, writing

SAMPLES, DRAWN = "samples.jsonl.gz", "drawn.jsonl"

_PER_MEMBER = 256  # samples of one member when a file is rewritten
_BLOCK = 1 << 16  # bytes that are looked at once for the end of a line


class Status(StrEnum):
    """What the grader made of a sample. Every status but ERROR counts; RIGHT alone counts as right."""

    RIGHT = "right"
    WRONG = "wrong"
    UNANSWERED = "unanswered"  # no answer was found
    UNPARSED = "unparsed"  # an answer that no parser knows
    REFUSED = "refused"  # an answer too long, deep or large to be parsed
    TIMEOUT = "timeout"  # the comparison, or the program, did not end in time
    ERROR = "error"  # the grader failed: neither right nor wrong, left out of every figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One graded completion.

    Attributes:
        benchmark: its name.
        problem: the problem's id.
        doc_id: the problem's row number in the data, 0-based.
        index: which of the problem's samples, 0-based.
        prompt_hash: SHA-256 of the prompt before any template, in hex.
        text: what was sampled, without the prompt.
        tokens: its length, tokens.
        finish_reason: ``stop`` or ``length`` (cut at the limit).
        seed: of the request.
        answer: what the grader took for the answer; None when there was none.
        gold: the right answer.
        status, score: the verdict; the score is None where the grader gave none.
        detail: why, in a line.
        groups: what the problem belongs to, by column (subject, level).
    """

    benchmark: str
    problem: str
    doc_id: int
    index: int
    prompt_hash: str
    text: str
    tokens: int
    finish_reason: str
    seed: int
    answer: str | None
    gold: Any
    status: Status
    score: float | None
    detail: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """Problem and sample index: what a sample is known by within its benchmark."""
        return self.problem, self.index

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "status": self.status.value, "groups": dict(self.groups)}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Sample:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong kind.
        """
        names = [each.name for each in fields(Sample)]
        if missing := [name for name in names if name not in row and name not in ("detail", "groups")]:
            raise ValueError(f"{missing[0]} is missing")
        if unknown := [name for name in row if name not in names]:
            raise ValueError(f"{unknown[0]} is unknown")
        for name in ("doc_id", "index", "tokens", "seed"):
            if type(row[name]) is not int or (row[name] < 0 and name != "seed"):
                raise ValueError(f"{name} must be a whole number, got {row[name]!r}")
        if row["score"] is not None and type(row["score"]) not in (int, float):
            raise ValueError(f"score must be a number or null, got {row['score']!r}")
        for name in ("benchmark", "problem", "prompt_hash", "text", "finish_reason"):
            if type(row[name]) is not str:
                raise ValueError(f"{name} must be a text, got {row[name]!r}")
        return Sample(**{**row, "status": Status(row["status"])})


class SampleStore:
    """The samples of one benchmark in its folder. One writer at a time.

    Args:
        folder: is made when it is not there.

    Attributes:
        path: of ``samples.jsonl.gz``.
        cut: bytes of a torn end that were cut off when it was opened.

    Raises:
        SampleFileError: a file is damaged before its end, cannot be read or written, or holds a sample twice.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES
        self._drawn_path = folder / DRAWN
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._keys: set[tuple[str, int]] = set()
        self._end = 0
        for _, end, sample in _read(self.path):
            self._keys.add(sample.key)
            self._end = end
        size = self.path.stat().st_size if self.path.exists() else 0
        self.cut = size - self._end
        if self.cut:
            with writing(self.path):
                os.truncate(self.path, self._end)
        _cut_torn_line(self._drawn_path)
        self._drawn = {key for key, _ in _drawn_rows(self._drawn_path)}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._keys

    def append(self, samples: Iterable[Sample]) -> None:
        """Adds samples at the end, all or none of them; afterwards the disk has them.

        Raises:
            ValueError: one of them is there already.
            SampleFileError: the disk is full or refuses; the file is then as it was before.
        """
        added = list(samples)
        if not added:
            return
        keys = self._new_keys(added, self._keys)
        data = _member(added)
        with writing(self.path):
            is_new = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(handle).st_size != self._end:
                    raise SampleFileError(f"{self.path} was changed by another process: let one evaluation write it")
                write_at(handle, data, self._end, fsync=True)
            finally:
                os.close(handle)
            if is_new:
                fsync_folder(self.path.parent)
        self._keys |= keys
        self._end += len(data)

    def read(self) -> list[Sample]:
        """All samples, in the order in which they were added.

        Raises:
            SampleFileError: the file is damaged.
        """
        return [sample for _, _, sample in _read(self.path)]

    def replace(self, samples: Sequence[Sample]) -> None:
        """Puts these samples in the place of all others: afterwards the file holds the old ones or the new ones.

        Raises:
            ValueError: a sample occurs twice.
            SampleFileError: the disk is full or refuses; the old file is then intact.
        """
        keys = self._new_keys(samples, set())
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        size = 0
        with writing(self.path):
            try:
                with temporary.open("wb") as file:
                    for start in range(0, len(samples), _PER_MEMBER):
                        size += file.write(_member(samples[start : start + _PER_MEMBER]))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
                fsync_folder(self.path.parent)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
        self._keys, self._end = keys, size

    def draw(self, problem: str, index: int, completion: Mapping[str, Any]) -> None:
        """Keeps a completion that is not graded yet; a killed process loses none that was kept.

        Raises:
            ValueError: it was kept or graded before.
            SampleFileError: the disk is full or refuses.
        """
        if (problem, index) in self._keys or (problem, index) in self._drawn:
            raise ValueError(f"{self._drawn_path}: sample {index} of problem {problem!r} was drawn already")
        data = _line({"problem": problem, "index": index, "completion": dict(completion)})
        with writing(self._drawn_path):
            handle = os.open(self._drawn_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                write_at(handle, data, os.fstat(handle).st_size, fsync=False)
            finally:
                os.close(handle)
        self._drawn.add((problem, index))

    def drawn(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Completions that were drawn and are not graded yet, by problem and sample index, in the order drawn."""
        return {key: row for key, row in _drawn_rows(self._drawn_path) if key not in self._keys}

    def finish(self) -> None:
        """Every sample is graded: ``drawn.jsonl`` is not needed any more."""
        with writing(self._drawn_path):
            self._drawn_path.unlink(missing_ok=True)
        self._drawn.clear()

    def _new_keys(self, samples: Sequence[Sample], known: set[tuple[str, int]]) -> set[tuple[str, int]]:
        keys: set[tuple[str, int]] = set()
        for sample in samples:
            if sample.key in known or sample.key in keys:
                raise ValueError(f"{self.path}: sample {sample.index} of problem {sample.problem!r} is there already")
            keys.add(sample.key)
        return keys


def read_samples(path: Path) -> list[Sample]:
    """The samples of a benchmark's folder or file, without changing it; a torn end is passed over.

    For those who only read, also while an evaluation is writing. Nothing when there is no file.

    Raises:
        SampleFileError: the file is damaged before its end, or holds a sample twice.
    """
    return [sample for _, _, sample in _read(path / SAMPLES if path.is_dir() else path)]


def _member(samples: Sequence[Sample]) -> bytes:
    return gzip.compress(b"".join(_line(sample.to_json()) for sample in samples), 6, mtime=0)


def _line(row: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes the JSON escape that it came from.
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")


def _read(path: Path) -> Iterator[tuple[int, int, Sample]]:
    """Start and end of the member, and the sample, of every whole sample of a file."""
    seen: set[tuple[str, int]] = set()
    for start, end, payload in members(path):
        for line in payload.splitlines():
            try:
                sample = Sample.from_json(json.loads(line))
            except (ValueError, TypeError, AttributeError) as error:
                raise SampleFileError(
                    f"{path}: what stands after {len(seen)} samples (at byte {start}) is no sample: {error}; "
                    f"{cut_at(path, start)}"
                ) from None
            if sample.key in seen:
                raise SampleFileError(
                    f"{path}: sample {sample.index} of problem {sample.problem!r} stands there twice, again at byte "
                    f"{start}; {cut_at(path, start)}"
                )
            seen.add(sample.key)
            yield start, end, sample


def _drawn_rows(path: Path) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Key and completion of every whole line; a torn last one is passed over."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                yield _drawn_row(path, number, line)
    except FileNotFoundError:
        return
    except SampleFileError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error


def _drawn_row(path: Path, number: int, line: bytes) -> tuple[tuple[str, int], dict[str, Any]]:
    try:
        row = json.loads(line)
        completion = dict(row["completion"])
        if completion and not _is_whole(completion):
            raise ValueError
        return (str(row["problem"]), int(row["index"])), completion
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SampleFileError(
            f"{path}, line {number}: no drawn completion; delete the line (`sed -i {number}d {path}`), and it is drawn "
            "again"
        ) from None


def _is_whole(completion: Mapping[str, Any]) -> bool:
    """The fields that are there are what they should be; who draws says which there are."""
    kinds = {"text": str, "seed": int, "tokens": int, "finish_reason": str}
    right = all(type(completion[name]) is kind for name, kind in kinds.items() if name in completion)
    return right and completion.get("finish_reason", "stop") in ("stop", "length") and completion.get("tokens", 0) >= 0


def _cut_torn_line(path: Path) -> None:
    """Cuts off what a kill left of a last line."""
    if not path.exists():
        return
    with writing(path), path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)

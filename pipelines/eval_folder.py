"""The output folder of an evaluation, for the verbs that go on from its samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.benchmark import Benchmark, find_benchmark
from evals.benchmark_data import BenchmarkData, load_benchmark
from evals.page import write_pages
from evals.protocol import Protocol
from pipelines.files import Lock, write_atomic
from rollout.types import SamplingParams


@dataclass(frozen=True)
class OutputFolder:
    """What an evaluation was begun with, from ``eval.json``.

    Attributes:
        path: the folder.
        asked: what stands in ``eval.json``.
        names: the benchmarks that are meant.
        files: of those that are the user's own, where they are written.
    """

    path: Path
    asked: Mapping[str, Any]
    names: Sequence[str]
    files: Mapping[str, str]

    @staticmethod
    def read(path: Path, chosen: Sequence[str] = ()) -> OutputFolder:
        """Reads a folder; ``chosen`` are the benchmarks that are meant, by name or file, all when it is empty.

        Raises:
            ValueError: no evaluation, or not of such a benchmark.
        """
        path = path.expanduser().absolute()
        try:
            asked = json.loads((path / "eval.json").read_text("utf-8"))
            there = {str(name): dict(row) for name, row in asked["benchmarks"].items()}
            _protocol(asked)
            int(asked["seed"])
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} holds no evaluation: name the --out folder of `r1 eval`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path / 'eval.json'} is damaged ({what}): restore it from a copy") from None
        own = {find_benchmark(each).name: each for each in chosen if _is_file(each)}
        names = [*own, *(each for each in chosen if not _is_file(each))] or list(there)
        for name in names:
            if name not in there:
                raise ValueError(f"{path} holds no samples of {name}; it holds {', '.join(there)}")
        files = {name: str(row["path"]) for name, row in there.items() if row.get("path")}
        return OutputFolder(path, asked, names, {**files, **own})

    @property
    def protocol(self) -> Protocol:
        """How its samples were drawn; the number of samples is not part of it."""
        return _protocol(self.asked)

    @property
    def forced_think(self) -> bool:
        """Whether the prompts ended in ``<think>``; what an endpoint sends begins where the model begins."""
        model = self.asked.get("model")
        from_endpoint = isinstance(model, dict) and "endpoint" in model
        return bool(self.asked.get("forced_think", self.protocol.force_think and not from_endpoint))

    @property
    def search(self) -> list[str]:
        """Where graders of the user's are looked for."""
        return [os.getcwd(), *(str(Path(file).expanduser().absolute().parent) for file in self.files.values())]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to it meanwhile.

        Raises:
            RunDirError: another one does.
        """
        lock = Lock.acquire(self.path / ".lock", str(self.path))
        try:
            yield
        finally:
            lock.release()

    def now_graded_as(self, graded: Mapping[str, Mapping[str, Any]]) -> None:
        """Notes by which version, data and grader samples are graded now, so that the evaluation goes on with them.

        Args:
            graded: by benchmark ``version``, ``files`` and ``digest``.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        rows = {name: {**row, **graded.get(name, {})} for name, row in self.asked["benchmarks"].items()}
        if rows != self.asked["benchmarks"]:
            write_atomic(self.path / "eval.json", json.dumps({**self.asked, "benchmarks": rows}, indent=2) + "\n")

    def load(self, name: str, data_dir: Path | None) -> BenchmarkData:
        """The problems of one of its benchmarks, as they were asked.

        Raises:
            ValueError: the data are not there, or are others.
        """
        limit = int(self.asked["benchmarks"][name].get("limit", 0))
        return load_benchmark(
            self.benchmark(name), protocol=self.protocol, data_dir=data_dir, limit=limit, seed=int(self.asked["seed"])
        )

    def benchmark(self, name: str) -> Benchmark:
        """One of its benchmarks.

        Raises:
            ValueError: it was the user's own, and its file is not known.
        """
        try:
            return find_benchmark(self.files.get(name, name))
        except ValueError as error:
            raise ValueError(f"{error} (the folder holds its samples: name its file with --benchmark)") from None

    def summary(self) -> dict[str, Any]:
        """``summary.json``, or its beginning where the evaluation has not ended."""
        try:
            found = json.loads((self.path / "summary.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged one is written anew from the samples
            found = {}
        found = found if isinstance(found, dict) else {}
        model = self.asked.get("model")
        model = model.get("model") if isinstance(model, dict) else model
        begun = {"model": model, "protocol": self.protocol.to_json(), "seed": self.asked["seed"], "seconds": 0.0}
        rows = {key: found[key] if isinstance(found.get(key), dict) else {} for key in ("results", "files")}
        return {**begun, **found, **rows}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes ``summary.json`` and the pages.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_pages(folder)


def _protocol(asked: Mapping[str, Any]) -> Protocol:
    row = {key: value for key, value in asked["protocol"].items() if key != "samples"}
    sampling = SamplingParams(**{**row["sampling"], "stop": tuple(row["sampling"].get("stop", ()))})
    return Protocol(**{**row, "sampling": sampling, "samples": 1 if sampling.temperature == 0 else 0})


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or ".py" in name

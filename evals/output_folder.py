"""What an evaluation left in its folder, for those who only read: ``summary.json``, and the samples one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.members import SampleFileError, cut_at, members
from evals.samples import SAMPLES, Sample

_FIGURES = ("pass_at_1", "ci95", "n", "k")


def read_summary(folder: Path) -> dict[str, Any]:
    """``DIR/summary.json``, with the figures that every benchmark has.

    Raises:
        ValueError: there is none, or it is not what an evaluation writes.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "has no summary.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}: name the --out folder of an evaluation that has ended") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the same evaluation again, it writes it anew") from None
    results = summary.get("results") if isinstance(summary, dict) else None
    if not isinstance(results, dict) or not results:
        raise ValueError(f"{path} holds no results on benchmarks: name the --out folder of `r1 eval … --benchmarks …`")
    for name, row in results.items():
        absent = [key for key in _FIGURES if not isinstance(row, dict) or key not in row]
        if absent:
            raise ValueError(f"{path}: {name!r} has no {', '.join(absent)}: run the same evaluation again")
    return summary


def each_sample(folder: Path, benchmark: str) -> Iterator[Sample]:
    """The samples of a benchmark in the order they were written; one gzip member of them is in memory at a time.

    A torn end, left by a process that was killed while writing, is passed over. Nothing when there is no file.

    Raises:
        ValueError: the name leads out of the folder.
        SampleFileError: the file is damaged before its end.
    """
    if benchmark in ("", ".", "..") or "/" in benchmark or "\0" in benchmark:
        raise ValueError(f"{folder / 'summary.json'}: {benchmark!r} is no name of a benchmark")
    path = folder / benchmark / SAMPLES
    for start, _, payload in members(path):
        for line in payload.split(b"\n"):
            if line:
                try:
                    sample = Sample.from_json(json.loads(line))
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    text = f"{path}: what stands at byte {start} is no sample: {error}; {cut_at(path, start)}"
                    raise SampleFileError(text) from None
                yield sample

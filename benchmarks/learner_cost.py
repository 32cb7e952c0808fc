"""Cost against work: seconds and peak memory of a learner's step as tokens and vocabulary grow.

Tokens grow by 1, 2, 4, 8 with sequences of one length, so the work per token stays: seconds should lie on a straight
line, and memory should not grow at all once a micro-batch is full. Vocabulary grows from 32k to 129k with the tokens
fixed: seconds should lie on a straight line; memory grows with the head's own weights, never with tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learner_memory import peak_bytes
from benchmarks.learner_sides import Batch, learner
from benchmarks.measure import Comparison, Series, take_turns, timed
from benchmarks.options import Options

TOKENS, SIZES = (4096, 8192, 16384, 32768), (1, 2, 4, 8)
VOCABULARIES = (32768, 65536, 98304, 129280)
LENGTH, PROMPT = 256, 24
VOCABULARY_TOKENS = 2048
MICRO_BATCH = 4096  # tokens
PLOT = Path("docs/learner-cost.svg")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A straight line through points, by least squares.

    Attributes:
        slope, offset: y = offset + slope x.
        deviation: largest |y - line| over the largest y.
    """

    slope: float
    offset: float
    deviation: float

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        """Fits the line.

        Raises:
            ValueError: fewer than three points, which a line always meets.
        """
        if len(xs) < 3 or len(xs) != len(ys):
            raise ValueError(f"a line needs three or more points, got {len(xs)} and {len(ys)}")
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slope /= sum((x - mean_x) ** 2 for x in xs)
        offset = mean_y - slope * mean_x
        worst = max(abs(y - offset - slope * x) for x, y in zip(xs, ys, strict=True))
        return cls(slope=slope, offset=offset, deviation=worst / max(ys))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one kind of growth cost.

    Attributes:
        title: what grew.
        xs: how far.
        seconds: of a step, the median.
        peaks: of memory, bytes.
    """

    title: str
    xs: tuple[float, ...]
    seconds: tuple[float, ...]
    peaks: tuple[float, ...]


def run(options: Options) -> list[Comparison]:
    """See the module."""
    import torch

    from benchmarks.machine import usable_cores

    torch.set_num_threads(len(usable_cores()))
    scale, rounds = options.pick(1, 4), options.pick(3, 1)
    by_tokens = {size: even_batch(320, TOKENS[0] // scale * size, seed=options.seed) for size in SIZES}
    small = _model(options.scratch / "small", None)
    tokens = _curve("tokens of a batch", [(sum(b.fed), small, b) for b in by_tokens.values()], rounds)
    cells = []
    for vocabulary in VOCABULARIES:
        folder = _model(options.scratch / f"vocabulary-{vocabulary}", vocabulary)
        cells.append((vocabulary, folder, even_batch(vocabulary, VOCABULARY_TOKENS // scale, seed=options.seed)))
    words = _curve("words of the vocabulary", cells, rounds)
    plot = options.scratch / PLOT.name if options.quick else PLOT
    draw([tokens, words], plot)
    options.say(f"written: {plot}")
    return [_comparison("tokens", tokens), _comparison("vocabulary", words)]


def even_batch(vocabulary: int, tokens: int, *, seed: int) -> Batch:
    """Sequences of one length, ``tokens`` fed in all."""
    import random

    rng = random.Random(seed)
    count = tokens // LENGTH
    sequences = tuple(tuple(rng.randrange(vocabulary) for _ in range(LENGTH + 1)) for _ in range(count))
    return Batch(sequences=sequences, prompt=PROMPT, advantages=tuple(rng.gauss(0, 1) for _ in range(count)))


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One picture: seconds and memory of each curve, with the line through its seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        line = Line.through(curve.xs, curve.seconds)
        top, bottom = axes[0][column], axes[1][column]
        top.plot(curve.xs, curve.seconds, "o", color="C0")
        top.plot(curve.xs, [line.offset + line.slope * x for x in curve.xs], color="C0", alpha=0.5)
        top.set_title(f"line fits to {line.deviation:.1%}", fontsize=10)
        bottom.plot(curve.xs, [peak / 2**20 for peak in curve.peaks], "o-", color="C1")
        bottom.set_xlabel(curve.title)
        for axis in (top, bottom):
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds of a step")
    axes[1][0].set_ylabel("peak memory, MiB")
    figure.savefig(path, metadata={"Date": None})


def _model(folder: Path, vocabulary: int | None) -> Path:
    """``tiny-5m``, with another vocabulary when one is given."""
    from benchmarks.workload import PRESET
    from policy.checkpoint import save_model
    from policy.config import ModelConfig
    from policy.loading import load_policy

    overrides: dict[str, Any] = {} if vocabulary is None else {"vocab_size": vocabulary}
    model, tokenizer = load_policy(ModelConfig(preset=PRESET, overrides=overrides), 0)
    save_model(model, tokenizer, folder)
    return folder


def _curve(title: str, cells: Sequence[tuple[int, Path, Batch]], rounds: int) -> Curve:
    """Measures every cell: (how far, model, batch)."""
    import statistics

    steps = {str(x): learner(folder, batch, micro_batch_tokens=MICRO_BATCH) for x, folder, batch in cells}
    values = take_turns({x: (lambda step=step: timed(step)) for x, step in steps.items()}, rounds=rounds, warmup=1)
    peaks = [peak_bytes("learner", folder, batch, "cpu", micro_batch_tokens=MICRO_BATCH) for _, folder, batch in cells]
    return Curve(
        title=title,
        xs=tuple(float(x) for x, _, _ in cells),
        seconds=tuple(statistics.median(found) for found in values.values()),
        peaks=tuple(peaks),
    )


def _comparison(key: str, curve: Curve) -> Comparison:
    """The last point against what the line through the others says: 1 where cost is proportional to work."""
    line = Line.through(curve.xs, curve.seconds)
    memory = Line.through(curve.xs, curve.peaks)
    points = "; ".join(
        f"{x:,.0f}: {s:.2f} s, {p / 2**20:,.0f} MiB"
        for x, s, p in zip(curve.xs, curve.seconds, curve.peaks, strict=True)
    )
    return Comparison(
        key=f"learner-cost-{key}",
        title=f"Cost against the {curve.title}",
        unit="s",
        ours=Series(name=f"a step at {curve.xs[-1]:,.0f}", values=(curve.seconds[-1],)),
        peers=(Series(name=f"a step at {curve.xs[0]:,.0f}", values=(curve.seconds[0],)),),
        reading=f"times the seconds for {curve.xs[-1] / curve.xs[0]:.3g} times the {key}",
        notes={
            "points": points,
            "line": f"{line.offset:.2f} s + {line.slope * 1e3:.3g} s per thousand, "
            f"largest deviation {line.deviation:.1%}",
            "memory": f"{memory.offset / 2**20:,.0f} MiB + {memory.slope * 1e3 / 2**20:.3g} MiB per thousand, largest "
            f"deviation {memory.deviation:.1%}",
            "workload": f"sequences of {LENGTH} tokens, micro-batches of {MICRO_BATCH} tokens; plot: {PLOT.name}",
        },
    )

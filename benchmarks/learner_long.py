"""Memory of long sequences: one sequence of 12k to 32k tokens through a learner's step, and one of 131,072 tokens.

The model is the preset ``tiny`` (2 layers, 0.5 M parameters) with one head and DeepSeek-V3's YaRN, so that attention,
whose work grows with the square of the length, ends in minutes on a CPU. Its memory must not grow with the square: what
a token adds is the slope of a line through the peaks. (Of shorter sequences attention keeps its probabilities, up to
256 MiB.)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.learner_cost import Line
from benchmarks.learner_memory import Cost, cost_alone
from benchmarks.learner_sides import Batch
from benchmarks.measure import Comparison, Series
from benchmarks.options import Options

LENGTHS = (12288, 16384, 24576, 32768)
LONGEST = 131_072
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def run(options: Options) -> list[Comparison]:
    """See the module."""
    folder = _model(options.scratch / "model")
    lengths = LENGTHS[:3] if options.quick else LENGTHS
    found: dict[str, list[Cost]] = {"none": [], "layer": []}
    for length in lengths:
        for kind, costs in found.items():
            costs.append(_step(folder, length, kind, options))
    lines = {kind: Line.through(lengths, [cost.peak for cost in costs]) for kind, costs in found.items()}
    notes = {
        kind: f"{line.slope / 2**10:.1f} KiB per token + {line.offset / 2**20:,.0f} MiB, largest deviation "
        f"{line.deviation:.1%}; " + _points(lengths, found[kind])
        for kind, line in lines.items()
    }
    if not options.quick:
        longest = _step(folder, LONGEST, "layer", options)
        guess = lines["layer"].offset + lines["layer"].slope * LONGEST
        notes[f"{LONGEST:,} tokens"] = (
            f"forward, backward and update took {longest.seconds:,.0f} s and {longest.peak / 2**20:,.0f} MiB, layers "
            f"recomputed; the line says {guess / 2**20:,.0f} MiB"
        )
    return [
        Comparison(
            key="learner-long",
            title="Memory that a token of one long sequence adds",
            unit="KiB per token",
            ours=Series(name="layers recomputed", values=(lines["layer"].slope / 2**10,)),
            peers=(Series(name="all kept", values=(lines["none"].slope / 2**10,)),),
            reading="of the memory",
            notes=notes,
        )
    ]


def _points(lengths: tuple[int, ...], costs: list[Cost]) -> str:
    each = zip(lengths, costs, strict=True)
    return "; ".join(f"{n:,}: {cost.peak / 2**20:,.0f} MiB in {cost.seconds:.1f} s" for n, cost in each)


def _step(folder: Path, length: int, kind: str, options: Options) -> Cost:
    rng = random.Random(options.seed)
    tokens = tuple(rng.randrange(9, 320) for _ in range(length + 1))
    batch = Batch(sequences=(tokens,), prompt=24, advantages=(1.0,))
    cost = cost_alone("learner", folder, batch, "cpu", 1, checkpointing=kind)
    options.say(f"{length:,} tokens, {kind}: {cost.peak / 2**20:,.0f} MiB, {cost.seconds:.1f} s")
    return cost


def _model(folder: Path) -> Path:
    from policy.checkpoint import save_model
    from policy.config import ModelConfig
    from policy.loading import load_policy

    overrides = {
        "rope_parameters": YARN, "max_position_embeddings": LONGEST, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    model, tokenizer = load_policy(ModelConfig(preset="tiny", overrides=overrides), 0)
    save_model(model, tokenizer, folder)
    return folder

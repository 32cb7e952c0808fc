"""Training tokens/s and peak memory of the learner against transformers and TRL on the same ragged batch.

Only real tokens count, padding does not. What each side does in a step stands in ``benchmarks.learner_sides``. Where
there is a GPU, ``benchmarks.learner_gpu`` runs the same on it, with a larger model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import learner_sides as sides
from benchmarks.flops import training_flops
from benchmarks.learner_memory import peak_bytes
from benchmarks.learner_sides import Batch, ragged_batch
from benchmarks.machine import matmul_rate, usable_cores
from benchmarks.measure import Comparison, Series, take_turns, timed
from benchmarks.options import Options
from benchmarks.workload import write_model

_SPEED_GOAL, _SHARE_GOAL = 1.5, 0.7
_RATE = "fp32 matrix product 2048 x 2048"
# The same model twice as wide: the larger the products, the less what surrounds them takes.
WIDE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip


def run(options: Options) -> list[Comparison]:
    """See the module."""
    import torch

    torch.set_num_threads(len(usable_cores()))
    folder = options.scratch / "model"
    config = write_model(folder, seed=options.seed)
    batch = ragged_batch(config.vocab_size, options.pick(96, 32), limit=512, seed=options.seed)
    experts = sides.experts_of_choice(folder, batch)
    options.say(f"transformers: experts {experts} are the fastest")
    steps: dict[str, Callable[[], Any]] = {
        "ours": sides.learner(folder, batch),
        "by_length": sides.transformers(folder, batch, experts=experts),
        "given": sides.transformers(folder, batch, experts=experts, by_length=False),
        "trl": sides.trl(folder, batch, scratch=options.scratch, experts=experts),
    }
    values = _measure(batch, steps, rounds=options.pick(5, 2))
    found = [
        speed(values, _workload(batch), experts),
        share(values, _per_token(config, batch), goal=_SHARE_GOAL, rate=_RATE),
        _wide(options, batch, experts),
        _memory(options, folder, batch, experts),
    ]
    if torch.cuda.is_available():
        from benchmarks import learner_gpu

        found += learner_gpu.run(options)
    return found


def _measure(batch: Batch, steps: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, tuple[float, ...]]:
    """Tokens/s of each step and, next to ours, the matrix-multiply rate in GFLOP/s."""
    tokens = sum(batch.fed)
    turns: dict[str, Callable[[], float]] = {"matmul": lambda: matmul_rate(seconds=2.0) / 1e9}
    turns |= {name: (lambda step=step: tokens / timed(step)) for name, step in steps.items()}
    return take_turns(turns, rounds=rounds, warmup=1)


def _per_token(config: Any, batch: Batch) -> float:
    """Useful GFLOP of a token."""
    return training_flops(config, batch.fed, batch.under_loss) / sum(batch.fed) / 1e9


def _wide(options: Options, batch: Batch, experts: str) -> Comparison:
    """The share of the rate again, with :data:`WIDE`."""
    folder = options.scratch / "wide"
    config = write_model(folder, seed=options.seed, overrides=WIDE)
    steps = {"ours": sides.learner(folder, batch), "by_length": sides.transformers(folder, batch, experts=experts)}
    values = _measure(batch, steps, rounds=options.pick(5, 2))
    return share(values, _per_token(config, batch), goal=_SHARE_GOAL, rate=_RATE, where="twice as wide")


def speed(values: dict[str, tuple[float, ...]], workload: str, experts: str, *, where: str = "") -> Comparison:
    """Tokens/s of all sides."""
    return Comparison(
        key=f"learner{where and '-' + where.lower()}",
        title=f"Learner against transformers and TRL, training step on one ragged batch{where and ', ' + where}",
        unit="tokens/s",
        ours=Series(name="r1 learner", values=values["ours"]),
        peers=(
            Series(name="transformers, sorted by length", values=values["by_length"]),
            Series(name="transformers, as drawn", values=values["given"]),
            Series(name="TRL's GRPO loss", values=values["trl"]),
        ),
        goal=_SPEED_GOAL,
        notes={
            "workload": workload,
            "transformers": f"DeepseekV3ForCausalLM, experts {experts} (the faster of eager and grouped_mm), sdpa, "
            f"micro-batches of {sides.ROWS} padded to their longest; a supervised step, which is less work",
            "TRL": "GRPOTrainer's own loss and padding (to the longest completion of the step) on the same model and "
            f"experts, micro-batches of {sides.ROWS}, no gradient checkpointing, no reference model",
        },
    )


def share(
    values: dict[str, tuple[float, ...]], per_token: float, *, goal: float, rate: str, where: str = ""
) -> Comparison:
    """Useful operations against the measured rate. ``per_token``: GFLOP of one token."""
    theirs = Series(name="", values=values["by_length"]).median * per_token
    peak = Series(name="", values=values["matmul"]).median
    ours = Series(name="", values=values["ours"]).median * per_token
    return Comparison(
        key=f"learner-share{where and '-' + where.lower().replace(' ', '-')}",
        title=f"Learner's useful operations against the matrix-multiply rate{where and ', ' + where}",
        unit="GFLOP/s",
        ours=Series(name="r1 learner", values=tuple(v * per_token for v in values["ours"])),
        peers=(Series(name=rate, values=values["matmul"]),),
        reading="of the rate",
        goal=goal,
        notes={
            "counted": f"{per_token * 1e3:,.1f} MFLOP per token: matrix products of the active parameters, causal "
            "attention, LM head on completion tokens, forward and backward; the optimizer, padding and what is "
            "computed twice count nothing",
            "rate": "the mean over a second or more, next to each step: what the cores give as others leave them",
            "transformers": f"sorted by length reaches {theirs / peak:.0%} of the rate by the same count; the learner "
            f"is {ours / theirs:.3g} times as fast",
        },
    )


def memory(peaks: Sequence[tuple[str, float]], notes: dict[str, str], *, where: str = "") -> Comparison:
    """Peak memory of all sides, ours first; (name, bytes)."""
    first, *others = (Series(name=name, values=(peak / 2**20,)) for name, peak in peaks)
    return Comparison(
        key=f"learner-memory{where and '-' + where.lower()}",
        title=f"Peak memory of the same training step{where and ', ' + where}",
        unit="MiB",
        ours=first,
        peers=tuple(others),
        reading="times their memory",
        notes=notes,
    )


def _memory(options: Options, folder: Any, batch: Batch, experts: str) -> Comparison:
    peaks = [
        ("r1 learner", peak_bytes("learner", folder, batch, "cpu")),
        ("transformers, sorted by length", peak_bytes("transformers", folder, batch, "cpu", experts=experts)),
        ("TRL's GRPO loss", peak_bytes("trl", folder, batch, "cpu", experts=experts, scratch=options.scratch)),
        ("r1 learner, layers recomputed", peak_bytes("learner", folder, batch, "cpu", checkpointing="layer")),
    ]
    return memory(
        peaks,
        {
            "measured": "each side in a process of its own: largest resident size during two steps over that with the "
            "libraries imported and no model loaded",
            "micro-batches": f"ours of at most 8,192 tokens, theirs of {sides.ROWS} sequences",
        },
    )


def _workload(batch: Batch) -> str:
    return (
        f"{len(batch.sequences)} sequences of {batch.prompt} prompt tokens and 1 to 512 completion tokens (geometric), "
        f"{sum(batch.fed)} tokens in all, the longest {max(batch.fed)}; one optimizer step"
    )

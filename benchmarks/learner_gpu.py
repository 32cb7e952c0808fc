"""The learner's benchmark on one GPU: 3.1 B parameters of which 0.6 B are active, bf16, packs of 8,192 tokens.

Weights with gradients, masters and moments take 55 GB, so the sides cannot lie beside each other: each has the GPU for
itself, in a process of its own, and the matrix rate is measured in the same process as the learner's steps.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.flops import training_flops
from benchmarks.learner_sides import Batch, experts_of_choice, ragged_batch
from benchmarks.measure import Comparison, Series, timed
from benchmarks.options import Options
from benchmarks.paper_memory import training_memory
from benchmarks.peer import Peer, Port

SHAPE: Mapping[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 10,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""What differs from DeepSeek-V3's published shape."""

ROWS = 4  # sequences of a padded micro-batch of the peers
_PACK = 8192  # tokens
_CHECKPOINTING = "layer"
_SHARE_GOAL, _MEMORY_GOAL = 0.4, 0.9


def run(options: Options) -> list[Comparison]:
    """See the module."""
    import torch

    from benchmarks import learner

    folder = options.scratch / "gpu-model"
    config = write_gpu_model(folder, options.seed)
    batch = ragged_batch(
        config.vocab_size, options.pick(64, 16), limit=4096, seed=options.seed, mean_tokens=1500, prompt=128
    )
    experts = experts_of_choice(folder, batch, device="cuda", rows=ROWS)
    gc.collect()
    torch.cuda.empty_cache()
    peers = {"experts": experts, "rows": ROWS}
    rounds = options.pick(5, 2)
    ours, peak, matmul = _alone(
        "learner", folder, batch, rounds, checkpointing=_CHECKPOINTING, micro_batch_tokens=_PACK
    )
    sides = {
        "by_length": _alone("transformers", folder, batch, rounds, **peers),
        "given": _alone("transformers", folder, batch, rounds, by_length=False, **peers),
        "trl": _alone("trl", folder, batch, rounds, scratch=options.scratch, **peers),
    }
    values = {"ours": ours, "matmul": matmul, **{name: found[0] for name, found in sides.items()}}
    tokens = sum(batch.fed)
    per_token = training_flops(config, batch.fed, batch.under_loss) / tokens / 1e9
    device = torch.cuda.get_device_name()
    workload = (
        f"{len(batch.sequences)} sequences, {tokens} tokens, the longest {max(batch.fed)}; bf16, ours with fp32 "
        f"masters and layers recomputed, packs of {_PACK} tokens; the peers' optimizer states in bf16; on {device}"
    )
    share = min(_PACK, tokens)
    paper = training_memory(
        config, share, round(share * batch.under_loss / tokens), checkpointing=_CHECKPOINTING, chunk=2048
    )
    names = ("transformers, sorted by length", "transformers, as drawn", "TRL's GRPO loss")
    peaks = [("r1 learner", peak), *((name, found[1]) for name, found in zip(names, sides.values(), strict=True))]
    return [
        learner.speed(values, workload, experts, where="GPU"),
        learner.share(values, per_token, goal=_SHARE_GOAL, rate="bf16 matrix product 8192 x 8192", where="GPU"),
        learner.memory(peaks, {"measured": "largest sum of live allocations, each side alone"}, where="GPU"),
        Comparison(
            key="learner-paper-gpu",
            title="Peak memory counted on paper against the measured one, GPU",
            unit="GiB",
            ours=Series(name="on paper", values=(paper.total / 2**30,)),
            peers=(Series(name="measured", values=(peak / 2**30,)),),
            reading="of the measured",
            goal=_MEMORY_GOAL,
            notes={"parts": paper.words()},
        ),
    ]


def write_gpu_model(folder: Path, seed: int) -> Any:
    """Random weights, the experts' load balanced, as a Hugging Face folder in bf16; returns the config."""
    import torch

    from benchmarks.workload import balance_experts
    from policy.checkpoint import save_model
    from policy.config import ModelConfig
    from policy.loading import load_policy

    wanted = ModelConfig(preset="deepseek-v3", overrides=dict(SHAPE), dtype="bfloat16")
    model, tokenizer = load_policy(wanted, seed)
    model.to(torch.device("cuda"))  # pyright: ignore[reportArgumentType]
    balance_experts(model, seed)
    save_model(model, tokenizer, folder)
    return model.config


def bf16_rate(*, size: int = 8192, rounds: int = 20) -> float:
    """bf16 matrix-multiply rate of the GPU, floating-point operations per second; the best of single products."""
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(left, right)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * size**3 / best


def _alone(
    name: str, folder: Path, batch: Batch, rounds: int, **settings: Any
) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Tokens/s by round, peak bytes, and the matrix rate in GFLOP/s by round, of one side with the GPU for itself."""
    with Peer(f"{name} on the GPU", _serve, name, folder, batch, rounds, settings) as peer:
        return peer.ask("begin")


def _serve(port: Port, name: str, folder: Path, batch: Batch, rounds: int, settings: Mapping[str, Any]) -> None:
    import torch

    from benchmarks import learner_sides
    from benchmarks.machine import quiet_environment

    quiet_environment()
    port.receive()
    step = getattr(learner_sides, name)(folder, batch, device="cuda", **settings)

    def finished() -> None:
        step()
        torch.cuda.synchronize()

    for _ in range(2):  # kernels are chosen and compiled
        finished()
    torch.cuda.reset_peak_memory_stats()
    rates, speeds = [], []
    for _ in range(rounds):
        speeds.append(sum(batch.fed) / timed(finished))
    peak = torch.cuda.max_memory_allocated()
    for _ in range(rounds):
        rates.append(bf16_rate() / 1e9)
    port.send((tuple(speeds), float(peak), tuple(rates)))

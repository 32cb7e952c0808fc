"""Training tokens/s of the learner against transformers on the same ragged batch, and as a share of the matrix rate.

Only real tokens count, padding does not. The learner takes a whole GRPO step (log-probabilities, entropies, loss,
backward, clip, AdamW), the peer a supervised one, which is less work.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.flops import training_flops
from benchmarks.machine import matmul_rate, usable_cores
from benchmarks.measure import Comparison, Series, take_turns, timed
from benchmarks.options import Options
from benchmarks.transformers_peer import PaddedTrainer, fastest_experts, load, padded
from benchmarks.workload import ragged_lengths, write_model

_PROMPT = 24  # tokens
_ROWS = 16  # sequences of a padded micro-batch


def run(options: Options) -> list[Comparison]:
    """See the module."""
    import torch

    torch.set_num_threads(len(usable_cores()))
    folder = options.scratch / "model"
    config = write_model(folder, seed=options.seed)
    batch = ragged_batch(config.vocab_size, options.pick(96, 32), limit=512, seed=options.seed)
    fed = [len(tokens) - 1 for tokens in batch]  # the last token of a sequence is predicted, not fed
    under_loss = sum(len(tokens) - _PROMPT for tokens in batch)

    ours = _learner(folder, batch, options.seed)
    model = load(folder)
    probe = padded(batch[:_ROWS], [_PROMPT] * _ROWS)
    experts = fastest_experts(model, lambda: model(**probe, use_cache=False).loss.backward())
    options.say(f"transformers: experts {experts} are the fastest")
    given = PaddedTrainer(model, rows=_ROWS, by_length=False)
    by_length = PaddedTrainer(model, rows=_ROWS, by_length=True)
    prompts = [_PROMPT] * len(batch)

    def tokens_per_s(work: Any) -> float:
        return sum(fed) / timed(work)

    values = take_turns(
        {
            "ours": lambda: tokens_per_s(ours),
            "by_length": lambda: tokens_per_s(lambda: by_length.step(batch, prompts)),
            "given": lambda: tokens_per_s(lambda: given.step(batch, prompts)),
            "matmul": lambda: matmul_rate(seconds=1.0) / 1e9,
        },
        rounds=options.pick(5, 3),
        warmup=1,
    )
    per_token = training_flops(config, fed, under_loss) / sum(fed) / 1e9
    padding = {
        "workload": f"{len(batch)} sequences of {_PROMPT} prompt tokens and 1 to 512 completion tokens (geometric), "
        f"{sum(fed)} tokens in all, the longest {max(fed)}; one optimizer step",
        "transformers": f"DeepseekV3ForCausalLM, experts {experts} (the faster of eager and grouped_mm), sdpa, "
        f"micro-batches of {_ROWS} padded to their longest",
    }
    return [
        Comparison(
            key="learner",
            title="Learner against transformers, training step on one ragged batch",
            unit="tokens/s",
            ours=Series(name="r1 learner", values=values["ours"]),
            peers=(
                Series(name="transformers, sorted by length", values=values["by_length"]),
                Series(name="transformers, as drawn", values=values["given"]),
            ),
            notes=padding,
        ),
        Comparison(
            key="learner-share",
            title="Learner's useful operations against the machine's fp32 matrix-multiply rate",
            unit="GFLOP/s",
            ours=Series(name="r1 learner", values=tuple(v * per_token for v in values["ours"])),
            peers=(Series(name="matrix product 2048 x 2048", values=values["matmul"]),),
            reading="of the rate",
            notes={
                "counted": f"{per_token * 1e3:.1f} MFLOP per token: matrix products of the active parameters, causal "
                "attention, LM head on completion tokens, forward and backward; the optimizer counts nothing",
                "transformers": "sorted by length reaches "
                f"{_share(values['by_length'], values['matmul'], per_token):.0%} of the rate by the same count",
            },
        ),
    ]


def ragged_batch(vocabulary: int, count: int, *, limit: int, seed: int) -> list[list[int]]:
    """Random tokens: a prompt of fixed length and a completion as long as the benchmark's model would sample."""
    rng = random.Random(seed)
    lengths = ragged_lengths(count, limit=limit, seed=seed)
    return [[rng.randrange(vocabulary) for _ in range(_PROMPT + length)] for length in lengths]


def _learner(folder: Any, batch: list[list[int]], seed: int) -> Any:
    """One GRPO step of the learner on the batch."""
    import math

    from policy.batch import Sample
    from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
    from policy.learner import Learner
    from policy.loading import load_policy

    model, _ = load_policy(ModelConfig(path=str(folder)), seed)
    learner = Learner(model, optimizer=OptimizerConfig(), loss=LossConfig(), config=LearnerConfig(), total_steps=1000)
    rng = random.Random(seed)
    flat = -math.log(model.config.vocab_size)
    samples = [
        Sample(
            token_ids=tuple(tokens),
            prompt_length=_PROMPT,
            rollout_logprobs=(flat,) * (len(tokens) - _PROMPT),
            advantage=rng.gauss(0, 1),
        )
        for tokens in batch
    ]
    return lambda: learner.step(samples)


def _share(tokens_per_s: tuple[float, ...], matmul: tuple[float, ...], per_token: float) -> float:
    return Series(name="", values=tokens_per_s).median * per_token / Series(name="", values=matmul).median

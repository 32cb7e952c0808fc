"""The sides of the learner's benchmark: each is a function that makes one training step on the same ragged batch.

The learner takes a whole GRPO step (log-probabilities, entropies, loss, backward, clip, AdamW). transformers takes a
supervised one, which is less work. TRL takes a GRPO step with the loss of its trainer, on the tensors that its trainer
makes of a batch: all completions padded to the longest of the step, in the order that they were drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.transformers_peer import EXPERTS, PaddedTrainer, fastest_experts, load, padded
from benchmarks.workload import ragged_lengths

ROWS = 16  # sequences of a padded micro-batch on a CPU


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's work.

    Attributes:
        sequences: token ids, prompt first.
        prompt: tokens of every prompt.
        advantages: one per sequence.
    """

    sequences: tuple[tuple[int, ...], ...]
    prompt: int
    advantages: tuple[float, ...]

    @property
    def fed(self) -> list[int]:
        """Tokens of each sequence that go through the model: the last one is predicted, not fed."""
        return [len(tokens) - 1 for tokens in self.sequences]

    @property
    def under_loss(self) -> int:
        """Completion tokens."""
        return sum(len(tokens) - self.prompt for tokens in self.sequences)


def ragged_batch(
    vocabulary: int, count: int, *, limit: int, seed: int, mean_tokens: float = 128, prompt: int = 24
) -> Batch:
    """Random tokens: a prompt of fixed length and a completion as long as the benchmark's model would sample."""
    rng = random.Random(seed)
    lengths = ragged_lengths(count, limit=limit, mean_tokens=mean_tokens, seed=seed)
    sequences = tuple(tuple(rng.randrange(vocabulary) for _ in range(prompt + length)) for length in lengths)
    return Batch(sequences=sequences, prompt=prompt, advantages=tuple(rng.gauss(0, 1) for _ in lengths))


def samples_of(batch: Batch, vocabulary: int) -> list[Any]:
    """The batch as the learner takes it; the sampler's log-probabilities are those of a flat distribution."""
    from policy.batch import Sample

    flat = -math.log(vocabulary)
    return [
        Sample(
            token_ids=tokens,
            prompt_length=batch.prompt,
            rollout_logprobs=(flat,) * (len(tokens) - batch.prompt),
            advantage=advantage,
        )
        for tokens, advantage in zip(batch.sequences, batch.advantages, strict=True)
    ]


def learner(
    folder: Path, batch: Batch, *, checkpointing: str = "none", device: str = "cpu", micro_batch_tokens: int = 8192
) -> Callable[[], Any]:
    """One GRPO step of the learner."""
    from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig
    from policy.learner import Learner
    from policy.loading import load_policy

    dtype = "float32" if device == "cpu" else "bfloat16"
    model, _ = load_policy(ModelConfig(path=str(folder), dtype=dtype), 0)
    ours = Learner(
        model.to(device),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(),
        loss=LossConfig(),
        config=LearnerConfig(activation_checkpointing=checkpointing, micro_batch_tokens=micro_batch_tokens),
        total_steps=1000,
    )
    samples = samples_of(batch, model.config.vocab_size)
    return lambda: ours.step(samples)


def transformers(
    folder: Path,
    batch: Batch,
    *,
    by_length: bool = True,
    experts: str | None = None,
    device: str = "cpu",
    rows: int = ROWS,
) -> Callable[[], Any]:
    """One supervised step of ``DeepseekV3ForCausalLM``."""
    trainer = PaddedTrainer(load(folder, experts, device=device), rows=rows, by_length=by_length)
    prompts = [batch.prompt] * len(batch.sequences)
    return lambda: trainer.step(batch.sequences, prompts)


def experts_of_choice(folder: Path, batch: Batch, *, device: str = "cpu", rows: int = ROWS) -> str:
    """The implementation of transformers' experts that takes the least time for a micro-batch, of those it has."""
    model = load(folder, device=device)
    probe = padded(batch.sequences[:rows], [batch.prompt] * rows)
    probe = {name: tensor.to(device) for name, tensor in probe.items()}
    return fastest_experts(model, lambda: model(**probe, use_cache=False).loss.backward(), EXPERTS)


def trl(
    folder: Path,
    batch: Batch,
    *,
    scratch: Path,
    experts: str | None = None,
    device: str = "cpu",
    rows: int = ROWS,
) -> Callable[[], Any]:
    """One step of GRPOTrainer's loss (its defaults: DAPO's normalisation, entropies, the fused head), clip, AdamW."""
    import torch

    trainer = _trainer(
        load(folder, experts, device=device), folder, scratch, micro_batches=len(batch.sequences) // rows
    )
    model = trainer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device != "cpu")
    micros = [{k: v.to(device) for k, v in micro.items()} for micro in trl_micro_batches(batch, rows)]

    def step() -> None:
        for micro in micros:
            trainer._compute_loss(model, micro).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trl_micro_batches(batch: Batch, rows: int) -> list[dict[str, Any]]:
    """What GRPOTrainer makes of a step's completions: padded to the longest of the step, then cut by ``rows``."""
    import torch

    count, longest = len(batch.sequences), max(map(len, batch.sequences)) - batch.prompt
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, longest, dtype=torch.long)
    for row, tokens in enumerate(batch.sequences):
        completion = torch.tensor(tokens[batch.prompt :])
        ids[row, : len(completion)] = completion
        mask[row, : len(completion)] = 1
    prompts = torch.tensor([tokens[: batch.prompt] for tokens in batch.sequences])
    whole = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(batch.advantages),
    }
    starts = range(0, count, rows)
    total = mask.sum()
    return [
        {**{name: tensor[start : start + rows] for name, tensor in whole.items()}, "num_items_in_batch": total}
        for start in starts
    ]


def _trainer(model: Any, folder: Path, scratch: Path, *, micro_batches: int) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from benchmarks.reward import spread

    on_cpu = next(model.parameters()).device == torch.device("cpu")
    config = GRPOConfig(
        output_dir=str(scratch / "trl"),
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=micro_batches,
        num_generations=8,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=spread,  # type: ignore[arg-type]
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "?"}] * ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # its training loop says so
    model.train()
    return trainer

"""TRL's GRPOTrainer in a process of its own, stepped one GRPO step at a time.

It gets what it needs to be fast on a CPU: fp32, gradient checkpointing off, no logging, no reference model, the
faster of transformers' expert products. Its sampler is transformers' ``generate`` (TRL's vLLM mode needs CUDA).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer import Port
from benchmarks.reward import spread
from benchmarks.transformers_peer import fastest_experts, load, padded


@dataclass(frozen=True, kw_only=True)
class TrlWorkload:
    """One training of several steps.

    Attributes:
        prompts: jsonl file with a ``prompt`` column of user questions.
        problems: prompts per step.
        group_size: samples per prompt.
        max_tokens: limit of a completion.
        steps: GRPO steps.
        micro_batch: sequences of one forward pass; divides problems x group_size.
        learning_rate: of AdamW.
        seed: of sampling and order.
    """

    prompts: Path
    problems: int
    group_size: int
    max_tokens: int
    steps: int
    micro_batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrlStep:
    """What one step did.

    Attributes:
        seconds: from its begin (before sampling) to its end (after the optimizer).
        lengths: tokens of each completion.
    """

    seconds: float
    lengths: tuple[int, ...]


def serve(port: Port, folder: Path, scratch: Path, workloads: tuple[TrlWorkload, ...]) -> None:
    """Answers ``"ready"`` with the name of the expert products; each further message runs the next step, in order."""
    import torch

    from benchmarks.machine import usable_cores

    torch.set_num_threads(len(usable_cores()))
    model = load(folder)
    experts = fastest_experts(model, lambda: _probe(model))
    port.receive()
    port.send(experts)
    for workload in workloads:
        _train(port, load(folder, experts), folder, scratch, workload)


def _probe(model: Any) -> None:
    """A little of what a step does: sampling and a training pass."""
    import torch

    tokens = torch.randint(model.config.vocab_size, (64, 24))
    with torch.no_grad():
        model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=True, pad_token_id=0)
    batch = padded([row.tolist() * 2 for row in tokens[:32]], [24] * 32)
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def _train(port: Port, model: Any, folder: Path, scratch: Path, workload: TrlWorkload) -> None:
    from transformers import AutoTokenizer, PrinterCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    samples = workload.problems * workload.group_size
    assert samples % workload.micro_batch == 0, "a micro-batch must divide the samples of a step"
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [*spread(completion_ids, **columns)]

    config = GRPOConfig(
        output_dir=str(scratch / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=workload.micro_batch,
        gradient_accumulation_steps=samples // workload.micro_batch,
        num_generations=workload.group_size,
        max_completion_length=workload.max_tokens,
        max_steps=workload.steps,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        temperature=1.0,
        seed=workload.seed,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=_dataset(workload.prompts),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[_turnstile(port, lengths)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _turnstile(port: Port, lengths: list[int]) -> Any:
    """A callback that lets a step begin when it is asked for, and answers when it has ended."""
    from transformers import TrainerCallback

    class Turnstile(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            port.receive()
            lengths.clear()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            port.send(TrlStep(seconds=time.perf_counter() - self.began, lengths=tuple(lengths)))

    return Turnstile()


def _dataset(prompts: Path) -> Any:
    """Rows in the conversational form, which TRL renders with the tokenizer's chat template."""
    import json

    from datasets import Dataset

    texts = [json.loads(line)["prompt"] for line in prompts.read_text("utf-8").splitlines()]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])

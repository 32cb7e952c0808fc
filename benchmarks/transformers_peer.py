"""transformers' DeepseekV3ForCausalLM, trained as well as plain transformers can: the peer of the learner.

Each micro-batch is padded to its longest sequence. All products that the library has for experts on a CPU are tried,
and the fastest is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXPERTS = ("eager", "grouped_mm")
"""Implementations of the experts to choose from. ``batched_mm`` copies an expert's weights for every token that it
gets, gigabytes for a training batch."""


def load(folder: Path, experts: str | None = None, *, device: str = "cpu") -> Any:
    """The model of a folder in training mode, fp32 on a CPU and bf16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.train()


def fastest_experts(model: Any, work: Callable[[], Any], names: Sequence[str] = EXPERTS) -> str:
    """Sets the implementation of the experts under which ``work`` takes the least time (better of two); names it."""
    found = {}
    for name in names:
        model.set_experts_implementation(name)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            work()
            synchronise()
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds)
    best = min(found, key=lambda name: found[name])
    model.set_experts_implementation(best)
    return best


def synchronise() -> None:
    """Waits for the GPU's work, where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PaddedTrainer:
    """One optimizer step per batch of ragged sequences, padded per micro-batch.

    Args:
        model: a transformers causal LM.
        rows: sequences of a micro-batch, >= 1.
        by_length: sort the batch by length first, so that little is padded.
    """

    def __init__(self, model: Any, *, rows: int, by_length: bool) -> None:
        import torch

        self._model, self._rows, self._by_length = model, rows, by_length
        self._device = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=self._device.type != "cpu")

    def step(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        """Forward, cross-entropy of the completion tokens, backward, clip, AdamW."""
        import torch

        order = list(range(len(sequences)))
        if self._by_length:
            order.sort(key=lambda i: len(sequences[i]))
        tokens = sum(len(s) - p for s, p in zip(sequences, prompt_lengths, strict=True))
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            inputs = padded([sequences[i] for i in chosen], [prompt_lengths[i] for i in chosen])
            inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
            loss = self._model(**inputs, use_cache=False, num_items_in_batch=tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def padded(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` [rows, longest]; -100 outside the completions."""
    import torch

    shape = (len(sequences), max(map(len, sequences)))
    input_ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, (tokens, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        ids = torch.tensor(tokens)
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, prompt : len(ids)] = ids[prompt:]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

"""What is measured: a model whose completions have a known length distribution, prompts, and ragged batches.

A model with random weights ends a completion by chance alone. Here the chance is set: one column of the residual
stream is made the same for every token, and the end-of-sequence logit reads it alone. Every token then is the last one
with the same probability 1 / ``mean_tokens``, so lengths are geometric, cut at the token limit, and every engine that
samples from these weights draws them from the same distribution without being told any length. The experts' load is
balanced, as it is in a trained model.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRESET = "tiny-5m"
MEAN_TOKENS = 128
_MARK = 0  # the column of the residual stream that is the same for every token
_STRENGTH = 50  # its value, in standard deviations of the initial weights: large beside what the layers add
_CALIBRATION = (64, 32)  # sequences, tokens
_BALANCE, _BALANCE_ROUNDS = (4, 512), 24  # sequences, tokens


def write_model(
    folder: Path,
    *,
    mean_tokens: float = MEAN_TOKENS,
    seed: int = 0,
    preset: str = PRESET,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Writes the preset with random weights and geometric completion lengths as a Hugging Face folder.

    Args:
        folder: written as a whole.
        mean_tokens: mean length of a completion without a token limit, end-of-sequence included, > 1.
        overrides: fields of the preset's config that are replaced.

    Returns:
        The model's config.

    Raises:
        ValueError: ``mean_tokens`` <= 1.
    """
    from policy.checkpoint import save_model
    from policy.config import ModelConfig
    from policy.loading import load_policy
    from policy.tokenizer import EOS_ID

    if not mean_tokens > 1:
        raise ValueError(f"mean_tokens must be > 1, got {mean_tokens}")
    model, tokenizer = load_policy(ModelConfig(preset=preset, overrides=dict(overrides or {})), seed)
    mark_tokens(model)
    balance_experts(model, seed)
    set_end_probability(model, EOS_ID, 1 / mean_tokens, seed)
    save_model(model, tokenizer, folder)
    return model.config


def mark_tokens(model: Any) -> None:
    """Gives the residual stream one column that is the same for every token, large beside what the layers add."""
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, _MARK] = _STRENGTH * model.config.initializer_range
        model.lm_head.weight[:, _MARK] = 0.0


def balance_experts(model: Any, seed: int) -> None:
    """Sets the routers' correction biases so that each expert gets about as many of random tokens as the others.

    What all tokens share would otherwise send them all to the same few experts. Each round lowers the bias of an expert
    by how far its load is above the mean, as DeepSeek-V3 does in training (arXiv 2412.19437, section 2.1.2).
    """
    import torch

    rows, length = _BALANCE
    tokens = torch.randint(model.config.vocab_size, (1, rows * length), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(model.device)
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers if layer.is_moe]
    with torch.no_grad():
        for turn in range(_BALANCE_ROUNDS):
            loads = model.hidden_states(tokens, segment_lengths=[length] * rows).router_load.float()
            for bias, load in zip(biases, loads, strict=True):
                bias -= 0.03 * 0.88**turn * (load / load.mean() - 1).clamp(-1, 1)


def set_end_probability(model: Any, eos: int, probability: float, seed: int) -> None:
    """Changes the head: every marked token is followed by ``eos`` with this probability, in the mean over contexts."""
    import torch

    head = model.lm_head.weight
    with torch.no_grad():
        head[eos] = 0.0
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, _CALIBRATION, generator=generator)
        hidden = model.model(tokens).last_hidden_state
        others = torch.cat((head[:eos], head[eos + 1 :]))
        mass = (hidden @ others.T).logsumexp(-1)
        low, high = -50.0, 50.0
        for _ in range(60):  # the mean probability rises with the weight: halve until it is met
            weight = (low + high) / 2
            mean = (hidden[..., _MARK] * weight - mass).sigmoid().mean().item()
            low, high = (weight, high) if mean < probability else (low, weight)
        head[eos, _MARK] = (low + high) / 2


def mean_length(mean_tokens: float, limit: int) -> float:
    """Mean of a geometric length of this mean, cut at ``limit`` tokens."""
    return mean_tokens * (1 - (1 - 1 / mean_tokens) ** limit)


def ragged_lengths(count: int, *, limit: int, mean_tokens: float = MEAN_TOKENS, seed: int = 0) -> list[int]:
    """Lengths as the model above would draw them: geometric, cut at ``limit``, always the same for a seed."""
    rng = random.Random(seed)
    stop = math.log1p(-1 / mean_tokens)
    return [min(limit, 1 + int(math.log(1 - rng.random()) / stop)) for _ in range(count)]


def prompts(count: int, seed: int = 0) -> list[str]:
    """Sums of a few numbers; no two alike."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" + ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(3, 6)))] = None
    return [f"What is {terms}?" for terms in found]


def write_prompts(path: Path, texts: Sequence[str]) -> None:
    """One ``{"prompt", "answer"}`` row per line, the form that both sides read."""
    path.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in texts), "utf-8")

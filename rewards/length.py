"""Rewards on the length of a completion, in sampled tokens: DAPO's soft overlong penalty, and the cosine reward.

soft_overlong (DAPO, arXiv 2503.14476, equation 13), T tokens, a limit L and a margin C:

    0                 T <= L - C
    (L - C - T) / C   L - C < T <= L
    -1                L < T

cosine (Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373):

    r = end + (start - end) / 2 * (1 + cos(pi * T / L)),   T < L

from ``start`` at no tokens to ``end`` at the limit; both are one pair for right and one for wrong completions, and a
completion of L tokens or more has ``exceed``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rewards.accuracy import accuracy
from rewards.base import Score, preloads
from rollout.template import Reasoning
from rollout.types import Completion, FinishReason, Problem

FORMS = ("soft_overlong", "cosine")
PAYS: Mapping[str, Any] = {"right": (2.0, 1.0), "wrong": (-10.0, 0.0), "exceed": -10.0}


@preloads("math_verify", "rewards.symbolic", "sympy", "latex2sympy2_extended")
def length(
    completion: Completion,
    problem: Problem,
    reasoning: Reasoning,
    *,
    max_tokens: int,
    cache_tokens: int = 0,
    form: str = "soft_overlong",
    pays: Mapping[str, Any] | None = None,
) -> Score:
    """A reward on the number of sampled tokens; see the head of this file for the formulas.

    Metrics: ``over`` (share above the limit: soft_overlong, T > L; cosine, T >= L) and ``truncated``.

    Args:
        max_tokens: L, tokens, >= 1. Set it no higher than the sampler's own limit, or nothing is ever above it.
        cache_tokens: C of soft_overlong, tokens, in [0, max_tokens]; 0 is a step at L.
        form: ``soft_overlong`` or ``cosine``.
        pays: of the cosine form: ``right`` and ``wrong``, the pairs (start, end) of completions as ``accuracy`` judges
            them, and ``exceed``; what is left out is as published, see PAYS.

    Raises:
        ValueError: an unknown form, or a number out of its range. What ``accuracy`` raises passes through.
    """
    paid = _check(max_tokens, cache_tokens, form, pays or {})
    tokens = len(completion.token_ids)
    over = tokens > max_tokens if form == "soft_overlong" else tokens >= max_tokens
    metrics = {"over": float(over), "truncated": float(completion.finish_reason is FinishReason.LENGTH)}
    if form == "soft_overlong":
        return Score(value=soft_overlong(tokens, max_tokens, cache_tokens), metrics=metrics)
    if over:
        return Score(value=paid["exceed"], metrics=metrics)
    is_right = (accuracy(problem, reasoning).value or 0.0) >= 1.0
    start, end = paid["right" if is_right else "wrong"]
    return Score(value=cosine(tokens, max_tokens, start, end), metrics={**metrics, "right": float(is_right)})


def soft_overlong(tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's penalty, in [-1, 0]."""
    if tokens > max_tokens:
        return -1.0
    return min(0.0, (max_tokens - cache_tokens - tokens) / cache_tokens) if cache_tokens else 0.0


def cosine(tokens: int, max_tokens: int, start: float, end: float) -> float:
    """From ``start`` at 0 tokens to ``end`` at ``max_tokens`` along half a wave."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * tokens / max_tokens))


def _check(max_tokens: int, cache_tokens: int, form: str, pays: Mapping[str, Any]) -> Mapping[str, Any]:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
    if not 0 <= cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens must be in [0, max_tokens = {max_tokens}], got {cache_tokens}")
    unknown = sorted(pays.keys() - PAYS.keys())
    if unknown:
        raise ValueError(f"pays has no {unknown[0]!r}; it has {', '.join(PAYS)}")
    for name in ("right", "wrong"):
        if name in pays and (not isinstance(pays[name], list | tuple) or len(pays[name]) != 2):
            raise ValueError(f"pays {name} must be two numbers, at 0 tokens and at max_tokens, got {pays[name]!r}")
    return {**PAYS, **pays}

"""What the routers of a mixture of experts did with a batch: what is counted of it, and how their biases follow.

With ``bias: update`` the correction bias is moved as DeepSeek-V3 does (arXiv 2412.19437, section 2.1.2): after an
optimizer step, by a fixed rate, up for experts with fewer tokens than the mean and down for those with more.

Shapes: N tokens, L MoE layers, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policy.config import ModelConfig, RouterConfig
from policy.moe import Router, RouterReport
from policy.presets import config_of


@dataclass(frozen=True)
class RouterCounts:
    """What the routers of a model did with some tokens; counts of parts of a batch add up.

    Attributes:
        load: tokens sent to each expert of each MoE layer, whole numbers. [L, E]
        score_entropy: entropy of each token's normalised scores, summed over the tokens, nats. [L], float64
        agreed: choices of the router's own that equal the replayed ones, whole numbers; None without a replay. [L]
    """

    load: Tensor
    score_entropy: Tensor
    agreed: Tensor | None = None

    @classmethod
    def of(cls, reports: Sequence[RouterReport], loads: Sequence[Tensor]) -> RouterCounts:
        """The counts of one pass through a model, from what each of its MoE layers (one or more) reports."""
        agreed = [report.agreed for report in reports if report.agreed is not None]
        assert len(agreed) in (0, len(reports))
        entropy = torch.stack([report.score_entropy for report in reports])
        return cls(torch.stack(list(loads)), entropy, torch.stack(agreed) if agreed else None)

    def __add__(self, other: RouterCounts) -> RouterCounts:
        agreed = None
        if self.agreed is not None and other.agreed is not None:
            agreed = self.agreed + other.agreed
        return RouterCounts(self.load + other.load, self.score_entropy + other.score_entropy, agreed)

    def times(self, weight: float) -> RouterCounts:
        """The same counts ``weight`` times over (0 or 1: a micro-batch may only keep a rank in step)."""
        agreed = None if self.agreed is None else self.agreed * weight
        return RouterCounts(self.load * weight, self.score_entropy * weight, agreed)

    def total(self, over_ranks: Callable[[Tensor], Tensor]) -> RouterCounts:
        """The counts of all ranks, given how a tensor is summed over them (in float64, exact up to 2^53 tokens)."""
        agreed = None if self.agreed is None else over_ranks(self.agreed.double())
        return RouterCounts(over_ranks(self.load.double()), over_ranks(self.score_entropy), agreed)

    def metrics(self, first_layer: int, top_k: int) -> dict[str, float]:
        """Metrics by layer; names and units in ``policy.glossary.LEARNER_METRICS``.

        Args:
            first_layer: index of the first MoE layer in the model (dense layers come before it).
            top_k: experts of each token, K.
        """
        load = self.load.double()
        sent = load.sum(dim=1)
        figures = {
            "load_max_over_mean": load.amax(dim=1) / load.mean(dim=1),
            "load_entropy": torch.special.entr(load / sent[:, None]).sum(dim=1) / math.log(max(load.shape[1], 2)),
            "dead_experts": (load == 0).sum(dim=1),
            "score_entropy": self.score_entropy / (sent / top_k),
        }
        if self.agreed is not None:
            figures["replay_agreement"] = self.agreed / sent
        metrics = {
            f"router/{name}/layer_{first_layer + i}": float(value)
            for name, values in figures.items()
            for i, value in enumerate(values.tolist())
        }
        if self.agreed is not None:
            metrics["router/replay_agreement"] = float(self.agreed.sum() / sent.sum())
        return metrics


class BiasBalancer:
    """Moves the correction biases of a model's routers after an optimizer step; does nothing when they are frozen.

    The biases are buffers: part of every checkpoint and of the weights that travel. They stay in fp32.
    """

    def __init__(self, model: nn.Module, config: RouterConfig) -> None:
        moves = config.bias == "update"
        self._routers = [module for module in model.modules() if isinstance(module, Router)] if moves else []
        self._rate = config.bias_rate

    @torch.no_grad()
    def step(self, counts: RouterCounts) -> None:
        """bias += rate * sign(mean load - load), once an optimizer step was made.

        Args:
            counts: of the whole mini-batch on all ranks; the same on each of them.
        """
        for router, tokens in zip(self._routers, counts.load.double(), strict=True):
            bias = router.e_score_correction_bias
            bias.add_((tokens.mean() - tokens).sign().to(bias), alpha=self._rate)


def check_router(config: RouterConfig, model: nn.Module) -> None:
    """Whether the model has what the config asks of it.

    Raises:
        ValueError: something is asked of the routers of a model that has none (of this architecture).
    """
    asked = asked_of_router(config)
    if asked and not any(isinstance(module, Router) for module in model.modules()):
        raise ValueError(
            f"{asked} needs a DeepSeek-V3 mixture of experts, and this {type(model).__name__} has none: "
            "leave it out or train another model"
        )


def check_routing(model: ModelConfig, router: RouterConfig, place: str, *, return_experts: bool = False) -> None:
    """The same before any weights are loaded, for ``check_model``'s models.

    Args:
        model: which model it will be.
        router: what is asked of its routers.
        place: of ``router`` in the recipe, e.g. ``stages.rl``.
        return_experts: whether the engine is to return the experts of its tokens.

    Raises:
        ValueError: something is asked of the routers of a model that has none (of this architecture).
    """
    asked = asked_of_router(router)
    key = f"{place}.{asked}" if asked else "engine.return_routed_experts" if return_experts else None
    if key is None:
        return
    shapes = config_of(model)
    if shapes.model_type != "deepseek_v3" or shapes.first_k_dense_replace >= shapes.num_hidden_layers:
        name = model.path or model.preset
        raise ValueError(
            f"{key} needs a DeepSeek-V3 mixture of experts, and {name} has none: leave it out or train another model"
        )


def asked_of_router(config: RouterConfig) -> str | None:
    """The first key of ``router`` that only a mixture of experts can follow; None when there is none."""
    if config.bias == "update":
        return "router.bias update"
    if config.balance_coef > 0:
        return f"router.balance_coef {config.balance_coef}"
    return "router.replay" if config.replay else None

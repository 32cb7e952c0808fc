"""AdamW with its schedule, gradient clipping and, for bf16 weights, fp32 master copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from policy.config import OptimizerConfig

# The router's correction bias is moved by load balancing in pre-training and stays as it is in RL. It is a buffer in
# DeepSeek-V3's published code; models that make it a parameter get it frozen.
_ALWAYS_FROZEN = "e_score_correction_bias"


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The weights are those of before the optimizer step that it names."""


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based).

    Linear warm-up to ``lr`` over ``warmup_steps``, then constant, linear or cosine to ``lr * min_lr_ratio`` at the last
    of ``total_steps``; later steps stay there.

    Example:
        >>> [learning_rate(OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2), i, 5) for i in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


class PolicyOptimizer:
    """Turns accumulated gradients into one update of the model.

    Weights in bf16 have an fp32 master copy: an update of 1e-6 of a weight is below bf16's resolution (4e-3) and
    would vanish. Their gradients are summed over micro-batches in fp32 too.

    Args:
        model: its parameters that require gradients are trained; the router's correction bias never is.
        config: AdamW's numbers and the schedule.
        total_steps: optimizer steps that the schedule spans.

    Attributes:
        steps: optimizer steps taken.
        position: where the schedule stands; ahead of ``steps`` when steps were left out (:meth:`move_to`).

    Raises:
        ValueError: nothing is trainable, or ``total_steps`` < 1.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self._config, self._total_steps = config, total_steps
        self.steps = self.position = 0
        for name, parameter in model.named_parameters():
            if name.endswith(_ALWAYS_FROZEN):
                parameter.requires_grad_(False)
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._live:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        self._masters = {
            name: p.detach().float().requires_grad_()
            for name, p in self._live.items()
            if p.dtype in (torch.bfloat16, torch.float16)
        }
        self._hooks = [
            self._live[name].register_post_accumulate_grad_hook(_add_into(master))
            for name, master in self._masters.items()
        ]
        self._trained = {name: self._masters.get(name, p) for name, p in self._live.items()}
        decayed = [p for p in self._trained.values() if p.ndim >= 2]
        others = [p for p in self._trained.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step."""
        return learning_rate(self._config, self.position, self._total_steps)

    def move_to(self, position: int) -> None:
        """Moves the schedule past steps that had nothing to learn from: it spans the stage, not the steps taken."""
        self.position = position

    def release(self) -> None:
        """Lets go of the model: another optimizer may train it. This one must not be used again."""
        for hook in self._hooks:
            hook.remove()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forgets the accumulated gradients."""
        for parameter in (*self._live.values(), *self._masters.values()):
            parameter.grad = None

    def step(self) -> float:
        """Clips, updates, forgets the gradients; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; the weights are untouched.
        """
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        if not math.isfinite(value):
            culprits = [name for name, p in self._trained.items() if p.grad is not None and not _finite(p.grad)]
            self.zero_grad()
            where = f"in {culprits[0]} and {len(culprits) - 1} more" if culprits else "in their norm (overflow)"
            raise NonFiniteError(
                f"gradients are not finite {where} at optimizer step {self.steps + 1}; the weights are unchanged: "
                "lower the learning rate, or look at the last batch's rewards and log-probabilities"
            )
        if self._config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._config.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        self._adamw.step()
        self._copy_back()
        self.zero_grad()
        self.steps += 1
        self.position += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """Moments, counters and master weights."""
        return {
            "steps": self.steps,
            "position": self.position,
            "adamw": self._adamw.state_dict(),
            "masters": {name: master.detach() for name, master in self._masters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict` of an optimizer over the same model.

        Raises:
            ValueError: the state belongs to a model with other parameters.
        """
        if state["masters"].keys() != self._masters.keys():
            raise ValueError("the optimizer state belongs to a model of another dtype or with other parameters")
        self._adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state["masters"][name])
        self._copy_back()
        self.steps, self.position = state["steps"], state["position"]

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, master in self._masters.items():
            self._live[name].copy_(master)


def _add_into(master: Tensor) -> Any:
    """A hook that moves a fresh gradient into the master's, in fp32."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook


def _finite(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient).all())

"""AdamW with its schedule, gradient clipping and, for bf16 weights, fp32 master copies."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from policy.config import OptimizerConfig
from policy.errors import NonFiniteError
from policy.guards import all_finite, named, not_finite
from policy.optimizer_kinds import DeviceSums, build_adamw, master_of, update
from policy.parallel import Ranks, by_mesh, local_part, whole

# The router's correction bias is moved by load balancing in pre-training and stays as it is in RL. It is a buffer in
# DeepSeek-V3's published code; models that make it a parameter get it frozen.
_ALWAYS_FROZEN = "e_score_correction_bias"


# Above this the square of a gradient is infinite in the fp32 second moment, and its weight would never move again.
_LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


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
        ranks: over which the model is sharded; they all call every method alike.

    Attributes:
        steps: optimizer steps taken.
        position: where the schedule stands; ahead of ``steps`` when steps were left out (:meth:`move_to`).

    Raises:
        ValueError: nothing is trainable, or ``total_steps`` < 1.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int, ranks: Ranks | None = None) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self._config, self._total_steps, self._ranks = config, total_steps, ranks or Ranks.alone()
        self.steps = self.position = 0
        for name, parameter in model.named_parameters():
            if name.endswith(_ALWAYS_FROZEN):
                parameter.requires_grad_(False)
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._live:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        self._masters = {
            name: master_of(p, offload=config.offload)
            for name, p in self._live.items()
            if config.offload or p.dtype in (torch.bfloat16, torch.float16)
        }
        self._offloaded = DeviceSums() if config.offload else None
        self._hooks = [
            self._live[name].register_post_accumulate_grad_hook(
                _add_into(master) if self._offloaded is None else self._offloaded.hook(name)
            )
            for name, master in self._masters.items()
        ]
        self._trained = {name: self._masters.get(name, p) for name, p in self._live.items()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in some if (p.ndim >= 2) == decays], "weight_decay": config.weight_decay * decays}
            for some in by_mesh(self._trained.values())
            for decays in (True, False)
        ]
        self._adamw = build_adamw(config, [group for group in groups if group["params"]])

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
        if self._offloaded is not None:
            self._offloaded.sums.clear()

    def skip(self) -> None:
        """Leaves a step out: the gradients are forgotten, the schedule moves on, nothing else changes."""
        self.zero_grad()
        self.position += 1

    def step(self) -> float:
        """Clips, updates, forgets the gradients; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: ``gradient``: one is NaN, infinite, or so large that its square is; nothing is touched.
                ``weights``: the step was made and left some that are not finite.
        """
        given = self._summed()
        gradients = [local_part(gradient) for gradient in given.values()]
        value = self._norm(gradients)
        limit = self._config.max_grad_norm
        if not math.isfinite(value) or min(value, limit or math.inf) > _LARGEST_NORM:
            culprits = not_finite(given, self._ranks.largest)
            where = f"in {named(culprits)}" if culprits else f"in their norm, {value:g} (overflow)"
            raise NonFiniteError(f"gradients are not finite {where}", "gradient", parameters=culprits)
        if limit is not None:
            for gradient in gradients:
                gradient.mul_(min(limit / (value + 1e-6), 1.0))
        if self._offloaded is not None:
            self._offloaded.hand_over(self._masters)
        update(self._adamw, self.lr)
        self._copy_back()
        self.zero_grad()
        self.steps += 1
        self.position += 1
        weights = {name: p.detach() for name, p in self._live.items()}
        if not all_finite(list(weights.values()), self._ranks.largest):
            culprits = not_finite(weights, self._ranks.largest)
            text = f"the update left weights not finite in {named(culprits)}"
            raise NonFiniteError(text, "weights", parameters=culprits)
        return value

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradients by parameter name, whole, on every rank."""
        return {name: whole(gradient).detach().clone() for name, gradient in self._summed().items()}

    def _summed(self) -> dict[str, Tensor]:
        """The accumulated gradients where they are, by parameter name."""
        if self._offloaded is not None:
            return self._offloaded.sums
        return {name: p.grad for name, p in self._trained.items() if p.grad is not None}

    def _norm(self, gradients: list[Tensor]) -> float:
        """Global L2 norm of gradients of which every rank holds its part (and no part is on two of them)."""
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).double()
        return float(self._ranks.total(norms.square().sum()).sqrt())

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 copies of the weights that have one, by their names; they are the live ones."""
        return {name: master.detach() for name, master in self._masters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Moments by the names of their parameters, and counters; master weights are in :attr:`masters`."""
        moments = {name: self._adamw.state[p] for name, p in self._trained.items() if p in self._adamw.state}
        return {
            "steps": self.steps,
            "position": self.position,
            "moments": {name: dict(own) for name, own in moments.items()},
        }

    def prepare_moments(self, names: Collection[str]) -> None:
        """Makes room for the moments of these parameters and of no others, to be filled with a state's.

        The weights are to be loaded after this: it may turn the sign of a zero.

        Raises:
            ValueError: one of them is not trained.
        """
        unknown = set(names) - self._trained.keys()
        if unknown:
            raise ValueError(f"moments of {named(sorted(unknown))}, which this optimizer does not train")
        self._adamw.state.clear()
        self.zero_grad()
        for name in names:  # a step with zero gradients makes whatever this kind of optimizer keeps
            self._trained[name].grad = torch.zeros_like(self._trained[name])
        update(self._adamw, 0.0)
        self.zero_grad()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict` of an optimizer over the same model; the weights are loaded after this.

        Raises:
            ValueError: the state belongs to a model with other parameters.
        """
        moments = state["moments"]
        if moments.keys() != self.state_dict()["moments"].keys():
            self.prepare_moments(moments.keys())
        with torch.no_grad():
            for name, own in self.state_dict()["moments"].items():
                for kind, value in own.items():
                    if value is not moments[name][kind]:  # may have been filled in place
                        value.copy_(moments[name][kind])
        self.steps, self.position = state["steps"], state["position"]

    @torch.no_grad()
    def adopt_masters(self) -> None:
        """The model's weights become what their masters are, after these were loaded."""
        self._copy_back()

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

"""Activation checkpointing: what a decoder layer computes on the way is computed again in the backward pass."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: nn.Module, kind: str) -> None:
    """Has every decoder layer keep its input only (``layer``), or all that its backward needs (``none``).

    transformers' layers ask for this in training mode only, which would bring their dropout along. So only the layers'
    own flag says training; whatever is in them stays in the mode it is in.

    Raises:
        ValueError: ``layer`` of a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if kind == "layer" and not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be computed again: "
            "set learner.activation_checkpointing to none"
        )
    # Nothing in a layer is drawn at random, so no random state has to be kept and put back.
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in layers:
        layer.gradient_checkpointing = kind == "layer"
        layer._gradient_checkpointing_func = again  # pyright: ignore[reportArgumentType]
        layer.training = kind == "layer"

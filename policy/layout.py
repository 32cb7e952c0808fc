"""Which layouts over several ranks a model allows. Read from its config, before any weights are loaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from policy.config import ModelConfig, ParallelConfig
from policy.presets import config_of


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Whether the model can be sharded (FSDP2), and its routed experts shared out, as asked.

    Raises:
        ValueError: they cannot; one line that says why.
    """
    if parallel.ranks == 1:
        return
    shapes = config_of(model)
    known = AutoModelForCausalLM._model_mapping
    if model.path is not None and type(shapes) in known:
        architecture: Any = known[type(shapes)]
        if not architecture._no_split_modules:
            raise no_layers(architecture.__name__, parallel)
    if parallel.expert_parallel == 1:
        return
    ours = shapes.model_type == "deepseek_v3" and shapes.first_k_dense_replace < shapes.num_hidden_layers
    adapted = model.lora is not None and model.lora.experts
    check_split(model.path or model.preset or "", shapes.n_routed_experts if ours else 0, parallel, adapted=adapted)


def no_layers(name: str, parallel: ParallelConfig) -> ValueError:
    """What is said of a model that cannot be sharded."""
    return ValueError(f"parallel.ranks is {parallel.ranks}, but {name} names no decoder layers to shard: set it to 1")


def check_split(name: str, experts: int, parallel: ParallelConfig, *, adapted: bool) -> None:
    """See :func:`check_layout`.

    Args:
        name: of the model, for the message.
        experts: routed experts of a layer; 0 when there are none of DeepSeek-V3's kind.
        parallel: the layout.
        adapted: the experts have adapters.

    Raises:
        ValueError: the experts cannot be shared out.
    """
    asked = f"parallel.expert_parallel is {parallel.expert_parallel}"
    if parallel.expert_parallel == 1:
        return
    if not experts:
        raise ValueError(f"{asked}, but {name} has no routed experts of DeepSeek-V3's kind to share out: set it to 1")
    if experts % parallel.expert_parallel:
        raise ValueError(f"{asked}, which does not divide the {experts} routed experts of {name}: set it to a divisor")
    if adapted:
        raise ValueError(
            f"{asked}, but the routed experts have adapters, which every rank needs whole: set it to 1, or "
            "model.lora.experts to false"
        )

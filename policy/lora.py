"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT, on any policy.

An adapted matrix W [out, in] computes as W + (alpha / rank) * B A with A [rank, in], drawn at random, and B
[out, rank], zero at first. Only A and B are trained, in fp32 whatever the dtype of the model; W never changes, not by a
bit. What leaves the learner (engines, model folders) is merged on its way, matrix by matrix. Routed experts are
stacked: A [experts * rank, in] and B [out, rank * experts], in PEFT's order.

PEFT is imported when it is needed: without adapters nothing pays for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from policy.config import LoraConfig

FOLDER = "adapter"  # inside a model folder
_ADAPTER = "default"  # PEFT's name for the only one
_EXPERTS = ("gate_up_proj", "down_proj")
# Names of linear layers that PEFT takes for those of separate experts.
_REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int, base: str | None = None) -> None:
    """Puts fresh adapters in and freezes everything else. Their first values depend on ``seed`` alone.

    Args:
        model: changed in place; it stays what it is for everyone else.
        config: which adapters.
        seed: of their first values.
        base: folder or hub id of the model, for those who get the adapters alone; None for one that is on no disk.

    Raises:
        ValueError: see :func:`check_targets`.
    """
    import peft

    modules, parameters = check_targets(model, config)
    # PEFT rewrites targets for architectures whose experts were separate modules once: "gate_proj" then means the
    # routed experts, and dense and shared ones get no adapters, silently. It does so for models that have a config.
    shell = nn.Module()
    shell.policy = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config, modules, parameters), shell, _ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name) and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    published = _published(model, config, modules, parameters)
    published.base_model_name_or_path = base
    model.__dict__["peft_config"] = {_ADAPTER: published}


def _peft_config(config: LoraConfig, modules: list[str], parameters: list[str]) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # a float does as well
        target_modules=modules,
        target_parameters=parameters or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _published(model: PreTrainedModel, config: LoraConfig, modules: list[str], parameters: list[str]) -> Any:
    """The config for others, whose PEFT rewrites targets: weights of dense and shared experts named as parameters."""
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return _peft_config(config, modules, parameters)
    rewritten = [name for name in modules if name in _REWRITTEN]
    kept = [name for name in modules if name not in _REWRITTEN]
    return _peft_config(config, kept, [*parameters, *(f"{name}.weight" for name in rewritten)])


def check_targets(model: PreTrainedModel, config: LoraConfig) -> tuple[list[str], list[str]]:
    """Names of the linear layers and of the stacked parameters that get adapters.

    Raises:
        ValueError: a target that the model does not have, its head, or experts where there are none.
    """
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for name in config.targets:
        if name not in linear:
            close = difflib.get_close_matches(name, sorted(linear), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"model.lora.targets: the model has no linear layer {name!r} below its head{hint}; there are "
                f"{', '.join(sorted(linear))}"
            )
    experts = sorted(
        {f"experts.{kind}" for name, p in model.named_parameters() for kind in _EXPERTS if _is_stacked(name, p, kind)}
    )
    if config.experts and not experts:
        raise ValueError("model.lora.experts is true, but the model has no stacked experts: set it to false")
    return sorted(config.targets or linear), experts if config.experts else []


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` has been there."""
    return getattr(model, "peft_config", None) is not None


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is trained under LoRA."""
    return ".lora_A." in name or ".lora_B." in name


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """The reference policy of a model with adapters: the model itself, scored with its adapters off.

    ``Learner`` and ``TokenScorer`` know the model again and turn them off; nothing is copied.
    """
    assert has_adapters(model)
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no adapters."""
    layers = list(_layers(model))
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


def merged_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights as if there had never been adapters: their names, and W + (alpha / rank) * B A on demand.

    Args:
        model: whose weights ``state`` holds.
        state: under the names of ``model.state_dict()``; a mapping may load each when it is asked for.
    """
    return _MergedState(model, state) if has_adapters(model) else state


class _MergedState(Mapping[str, Tensor]):
    """See :func:`merged_state`. Sums are computed in fp32 at least and rounded once."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._stored = {_plain(name): name for name in state if not is_adapter(name)}
        self._adapted: dict[str, tuple[str, float]] = {}
        for name, layer in _layers(model):
            kind = getattr(layer, "parameter_name", "weight")
            self._adapted[f"{_plain(name)}.{kind}"] = (name, layer.scaling[_ADAPTER])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._state[self._stored[name]]
        if name not in self._adapted:
            return weight
        layer, scaling = self._adapted[name]
        a, b = (_whole(self._state[f"{layer}.lora_{side}.{_ADAPTER}.weight"]) for side in "AB")
        return _sum(_whole(weight), a, b, scaling)


@torch.no_grad()
def _sum(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A. [out, in] or [experts, out, in]"""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.ndim == 2:
        return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling).to(weight.dtype)
    experts = len(weight)
    left = b.to(wide).reshape(len(b), -1, experts).permute(2, 0, 1)
    right = a.to(wide).reshape(experts, -1, a.shape[1])
    return torch.baddbmm(weight.to(wide), left, right, alpha=scaling).to(weight.dtype)


def save_adapter(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapters in PEFT's form: ``PeftModel.from_pretrained(base_model, folder)`` computes what this does.

    Args:
        model: with adapters.
        folder: is made; files in it are replaced.
        state: adapters to take instead of the live ones, under the names of ``model.state_dict()``; others among them
            are passed over.

    Raises:
        OSError: the folder cannot be written.
    """
    assert has_adapters(model)
    folder.mkdir(parents=True, exist_ok=True)
    _configs(model)[_ADAPTER].save_pretrained(folder)
    state = model.state_dict() if state is None else state
    own = {name: _whole(state[name]).detach() for name in state if is_adapter(name)}
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.float().cpu().contiguous()
        for name, tensor in own.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _configs(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs by the name of the adapters."""
    configs: Any = model.peft_config
    return configs


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers and their names; of the experts' stacked parameters one each, one inside the other."""
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _is_stacked(name: str, parameter: Tensor, kind: str) -> bool:
    return name.endswith(f".experts.{kind}") and parameter.ndim == 3


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _whole(tensor: Tensor) -> Tensor:
    """The tensor behind a shard; a collective where it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()

"""Where a NaN or an infinity arises first while a model computes: for the replay of a step that went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn


class Trace:
    """Watches every module and trained parameter of a model while it is entered; costs a pass over all activations.

    Attributes:
        output: the first module whose output was not finite, in the order of computation.
        inputs_finite: what went into that module was finite: then it arose inside, else just before it.
        gradient: the first module, in the order of the backward pass, the gradient of whose output was not finite.
        parameters: the parameters whose gradient was not finite, in the order of the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.output: str | None = None
        self.inputs_finite = True
        self.gradient: str | None = None
        self.parameters: list[str] = []

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(partial(self._forward, name), with_kwargs=True))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(partial(self._of_parameter, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": self.output,
            "inputs_finite": self.inputs_finite,
            "gradient": self.gradient,
            "parameters": self.parameters,
        }

    def sentence(self) -> str:
        """What was found, in words."""
        if self.output is not None:
            where = "its inputs were finite" if self.inputs_finite else "its inputs were not: it arose just before"
            return f"the first output that is not finite is that of {self.output} ({where})"
        if self.gradient is None and not self.parameters:
            return "every module's output and every gradient was finite"
        first = [] if self.gradient is None else [f"going backward, first at the output of {self.gradient}"]
        first += [f"in the gradient of {self.parameters[0]}"] if self.parameters else []
        return f"every module's output was finite; {', '.join(first)}"

    def _forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del module
        for tensor in _floats(output):
            if self.output is None and not _finite(tensor):
                self.output = name
                self.inputs_finite = all(map(_finite, _floats((args, kwargs))))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._of_output, name))

    def _of_output(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not _finite(gradient):
            self.gradient = name

    def _of_parameter(self, name: str, gradient: Tensor) -> None:
        if name not in self.parameters and not _finite(gradient):
            self.parameters.append(name)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floats(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _floats(getattr(value, field.name))

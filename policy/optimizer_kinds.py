"""Which AdamW, and where it keeps its state.

    kind      by        bytes of state per weight (beside weight and gradient)
    adamw     PyTorch   8: two moments in fp32, one fused kernel
    adamw8bit torchao   2: two moments in 8 bits, scaled per block of 256 (Dettmers et al., arXiv 2110.02861); tensors
                        of fewer than 4,096 numbers, or not of whole blocks, keep fp32

Masters of bf16 weights take 4 more. With ``offload`` moments and masters (of all weights) lie in the CPU's memory, the
update is made there by the same AdamW, and the GPU keeps weights and gradients only. torchao's own offloading copies
each gradient away during the backward pass, before the global norm is known, so that nothing could be clipped; and its
copies have the weights' dtype, so that bf16 weights would have no masters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from policy.config import OptimizerConfig


def check_kind(config: OptimizerConfig, model: nn.Module, ranks: int) -> None:
    """Refuses what does not go together.

    Raises:
        ValueError: offloading from a CPU, or from several ranks; 8-bit moments on several ranks.
    """
    device = next(model.parameters()).device
    if config.kind == "adamw8bit" and ranks > 1:
        raise ValueError(
            f"optimizer.kind adamw8bit works with one learner rank, and there are {ranks}: where its blocks of 256 "
            "begin depends on the ranks, so that no other number of them could load its checkpoints: set it to adamw"
        )
    if config.offload and device.type == "cpu":
        raise ValueError(
            "optimizer.offload keeps state of a GPU's model in the CPU's memory, and this model is on the CPU already: "
            "set it to false"
        )
    if config.offload and ranks > 1:
        raise ValueError(
            f"optimizer.offload works with one learner rank, and there are {ranks}, which share the optimizer's state "
            "already: set it to false"
        )


def build_adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The AdamW that the config asks for, over parameter groups."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    from torchao.optim import AdamW8bit  # not needed, and slow to import, for the other kind

    return AdamW8bit(groups, **settings)


def update(adamw: torch.optim.Optimizer, lr: float) -> None:
    """One step at this learning rate."""
    for group in adamw.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: a number would be compiled into the step
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    with _compiled_on_gpus_only(adamw):
        adamw.step()


@contextmanager
def _compiled_on_gpus_only(adamw: torch.optim.Optimizer) -> Iterator[None]:
    """torchao compiles its step for every shape of a parameter: on a CPU that takes minutes and a C++ compiler."""
    if isinstance(adamw, torch.optim.AdamW) or adamw.param_groups[0]["params"][0].device.type != "cpu":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def master_of(weight: Tensor, *, offload: bool) -> Tensor:
    """An fp32 copy to be trained in the place of a weight; in the CPU's memory when offloaded."""
    if not offload:
        return weight.detach().float().requires_grad_()
    host = torch.empty(weight.shape, dtype=torch.float32, device="cpu", pin_memory=weight.is_cuda)
    return host.copy_(weight.detach()).requires_grad_()


class DeviceSums:
    """Gradients of offloaded weights: summed in fp32 on the weight's device, handed to the masters once a step.

    Attributes:
        sums: by the name of the weight; none where no gradient has come.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def hook(self, name: str) -> Any:
        """Takes a weight's fresh gradient."""

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            parameter.grad = None
            self.sums[name] = gradient if name not in self.sums else self.sums[name].add_(gradient)

        return take

    def hand_over(self, masters: dict[str, Tensor]) -> None:
        """Moves the sums to their masters' gradients."""
        for name, total in self.sums.items():
            masters[name].grad = torch.empty_like(masters[name]).copy_(total)
        self.sums.clear()

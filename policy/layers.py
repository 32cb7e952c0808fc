"""Layers without a home of their own: RMSNorm and the gated feed-forward block.

Shapes: N tokens, H = hidden_size, I = intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32 and below, fp64 for fp64: the precision of norms and of the router."""
    return torch.promote_types(dtype, torch.float32)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., H] -> [..., 1]; the vector norm reads x once and writes nothing of its size."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight. By hand because PyTorch's is a chain of some ten kernels each way on a CPU.

    With u = x / rms(x) and g the gradient: d weight = sum g u, d x = (g weight - u mean(g weight u)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        product = (grad * unit).flatten(0, -2)
        mean = torch.mv(product, weight).div_(x.shape[-1]).view(inverse.shape)
        return (grad * weight).addcmul_(unit, mean, value=-1).mul_(inverse), product.sum(dim=0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 at least (Zhang and Sennrich, arXiv 1910.07467). [..., H] -> [..., H]"""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        out = _RmsNorm.apply(x.to(wide), self.weight.to(wide), self.eps)
        assert isinstance(out, Tensor)
        return out.to(x.dtype)


class _NormedLinear(torch.autograd.Function):
    """linear(rms_norm(x)) without the normalised x: with r = 1 / rms(x), it is r * (x @ (matrix * weight).T).

    d x = r * (g @ (matrix * weight)) - x * r^2 * sum(g out) / H, and both weight gradients come from one product. Some
    ten passes over a wide x become two.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, x: Tensor, weight: Tensor, matrix: Tensor, eps: float
    ) -> Tensor:
        inverse = _inverse_rms(x, eps)
        out = torch.mm(x, (matrix * weight).T).mul_(inverse)
        ctx.save_for_backward(x, weight, matrix, inverse, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, matrix, inverse, out = ctx.saved_tensors
        pull = (grad * out).sum(dim=-1, keepdim=True).mul_(inverse).mul_(inverse).div_(x.shape[-1])
        scaled = grad * inverse
        product = torch.mm(scaled.T, x)
        grad_x = torch.mm(scaled, matrix * weight).addcmul_(x, pull, value=-1)
        return grad_x, (product * matrix).sum(dim=0), product.mul_(weight), None


def normed_linear(x: Tensor, norm: RMSNorm, linear: nn.Module) -> Tensor:
    """linear(norm(x)), fused on a CPU in fp32 and fp64 when the linear layer is a plain one. [N, H] -> [N, out]"""
    if type(linear) is not nn.Linear or linear.bias is not None or x.dtype not in (torch.float32, torch.float64):
        return linear(norm(x))
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return linear(norm(x))
    out = _NormedLinear.apply(x, norm.weight, linear.weight, norm.eps)
    assert isinstance(out, Tensor)
    return out


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer, arXiv 2002.05202). [N, H] -> [N, H]"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

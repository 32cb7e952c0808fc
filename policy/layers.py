"""Layers without a home of their own: RMSNorm and the gated feed-forward block.

Shapes: N tokens, H = hidden_size, I = intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of a block of tokens (:func:`row_blocks`).
ROWS = 1024


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32 and below, fp64 for fp64: the precision of norms and of the router."""
    return torch.promote_types(dtype, torch.float32)


def row_blocks(rows: int) -> list[slice]:
    """Cuts rows evenly into blocks whose intermediate results fit in a core's cache; never into a very small one."""
    count = max(1, -(-rows // ROWS))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


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
        grad, rows, scale = grad.flatten(0, -2), x.flatten(0, -2), inverse.flatten(0, -2)
        grad_x, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for block in row_blocks(len(rows)):
            unit = torch.mul(rows[block], scale[block], out=grad_x[block])
            product = grad[block] * unit
            grad_weight.addmv_(product.T, product.new_ones(len(product)))
            mean = torch.mv(product, weight).div_(rows.shape[-1])[:, None]
            unit.mul_(mean).neg_().addcmul_(grad[block], weight).mul_(scale[block])
        return grad_x.view(x.shape), grad_weight, None


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


class _NormedLinears(torch.autograd.Function):
    """linear(rms_norm(x)) for several matrices, the norm's weight multiplied into them.

    With u = x / rms(x) and W = matrix * weight: out = u @ W.T; for the gradients g of all outputs, p = sum g @ W,
    d x = (p - u mean(p u)) / rms(x) and d W = g.T @ u, from which both weights take theirs. Some ten passes over a wide
    x become three over a block of it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, *matrices: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inverse = _inverse_rms(x, eps)
        unit = torch.empty_like(x, memory_format=torch.contiguous_format)
        scaled = [matrix * weight for matrix in matrices]
        outs = tuple(x.new_empty(len(x), len(matrix)) for matrix in matrices)
        for block in row_blocks(len(x)):
            torch.mul(x[block], inverse[block], out=unit[block])
            for out, matrix in zip(outs, scaled, strict=True):
                torch.mm(unit[block], matrix.T, out=out[block])
        ctx.save_for_backward(unit, inverse, weight, *matrices)
        return outs

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unit, inverse, weight, *matrices = ctx.saved_tensors
        scaled = [matrix * weight for matrix in matrices]
        products = [torch.zeros_like(matrix) for matrix in matrices]
        grad_x = torch.empty_like(unit)
        for block in row_blocks(len(unit)):
            u, pull = unit[block], grad_x[block]
            for i, (grad, matrix, product) in enumerate(zip(grads, scaled, products, strict=True)):
                if ctx.needs_input_grad[3 + i]:  # not when only adapters train
                    product.addmm_(grad[block].T, u)
                pull.addmm_(grad[block], matrix, beta=float(i > 0))
            mean = (pull * u).sum(dim=-1, keepdim=True).div_(u.shape[-1])
            pull.addcmul_(u, mean, value=-1).mul_(inverse[block])
        grad_weight = torch.zeros_like(weight)
        for product, matrix in zip(products, matrices, strict=True):
            grad_weight += (product * matrix).sum(dim=0)
        return grad_x, grad_weight, None, *(product.mul_(weight) for product in products)


def by_hand(x: Tensor, *linears: nn.Module) -> bool:
    """Whether the functions of this file that replace these layers may: a CPU, fp32 or fp64, plain linear layers."""
    plain = all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return plain and exact and not torch.is_autocast_enabled("cpu")


def normed_linears(x: Tensor, norm: RMSNorm, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """norm(x) @ matrix.T for each matrix [out, H], on a CPU in fp32 or fp64. [N, H] -> [N, out] each"""
    outs = _NormedLinears.apply(x, norm.weight, norm.eps, *matrices)
    assert isinstance(outs, tuple)
    return outs


def normed_linear(x: Tensor, norm: RMSNorm, linear: nn.Module) -> Tensor:
    """linear(norm(x)), fused on a CPU in fp32 and fp64 when the linear layer is a plain one. [N, H] -> [N, out]"""
    if not by_hand(x, linear):
        return linear(norm(x))
    assert isinstance(linear, nn.Linear)
    return normed_linears(x, norm, (linear.weight,))[0]


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), a block of rows at a time: between the products nothing leaves the caches."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        both = torch.cat((gate, up))
        projected, out = x.new_empty(len(x), len(both)), x.new_empty(len(x), len(down))
        for block in row_blocks(len(x)):
            g, u = torch.mm(x[block], both.T, out=projected[block]).chunk(2, dim=-1)
            torch.mm(F.silu(g).mul_(u), down.T, out=out[block])
        ctx.save_for_backward(x, both, down, projected)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, both, down, projected = ctx.saved_tensors
        grad_x, grad_both, grad_down = torch.empty_like(x), torch.zeros_like(both), torch.zeros_like(down)
        for block in row_blocks(len(x)):
            inner, pull = gated_gradient(projected[block], torch.mm(grad[block], down))
            if ctx.needs_input_grad[3]:  # not when only adapters train
                grad_down.addmm_(grad[block].T, inner)
            torch.mm(pull, both, out=grad_x[block])
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                grad_both.addmm_(pull.T, x[block])
        grad_gate, grad_up = grad_both.chunk(2)
        return grad_x, grad_gate, grad_up, grad_down


def gated_gradient(projected: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, and the gradient of [gate, up] from that of the product. [N, 2I], [N, I] -> [N, I], [N, 2I]

    d silu = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
    """
    gate, up = projected.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    pull = torch.empty_like(projected)
    of_gate, of_up = pull.chunk(2, dim=-1)
    torch.mul(grad, silu, out=of_up)
    torch.addcmul(sigmoid, silu, 1 - sigmoid, out=of_gate).mul_(up).mul_(grad)
    return silu.mul_(up), pull


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer, arXiv 2002.05202). [N, H] -> [N, H]"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if by_hand(x, gate, up, down):
            out = _GatedMlp.apply(x, gate.weight, up.weight, down.weight)
            assert isinstance(out, Tensor)
            return out
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

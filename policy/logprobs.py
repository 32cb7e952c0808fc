"""Log-probabilities of given tokens and the entropy of their distributions, a chunk of tokens at a time.

Shapes: N tokens, H hidden width, V vocabulary. The logits of all tokens, [N, V], are the largest tensor of a
training step (8,192 tokens x 129,280 words in fp32: 4.2 GB). They never exist here: the forward pass keeps two numbers
per token, the backward pass computes the logits of each chunk again.

    logits   = (hidden @ head_weight.T + head_bias) / temperature
    logprobs = logits[target] - logsumexp(logits)
    entropy  = logsumexp(logits) - sum(softmax(logits) * logits)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    temperature: float = 1.0,
    fp32: bool = False,
    head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, differentiable; entropy of each distribution, not differentiable.

    Args:
        hidden: hidden states after the last norm. [N, H]
        head_weight: of the LM head. [V, H]
        targets: token ids. [N], int64
        chunk: tokens whose logits exist at once, >= 1.
        temperature: divides the logits, > 0, as the sampler did.
        fp32: compute the head in fp32 whatever the dtype of ``hidden``.
        head_bias: of the LM head. [V]

    Returns:
        ``(logprobs [N], entropy [N])`` in nats; fp32, or fp64 when ``hidden`` is.

    Raises:
        ValueError: ``chunk`` < 1 or ``temperature`` <= 0.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0 to compute log-probabilities, got {temperature}: greedy samples have none"
        )
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    if fp32 and hidden.dtype != torch.float64:
        hidden, head_weight = hidden.float(), head_weight.float()
        head_bias = None if head_bias is None else head_bias.float()
    return _ChunkedLogprobs.apply(hidden, head_weight, head_bias, targets, chunk, temperature)  # type: ignore[return-value]


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # as the sampler does: the head in the model's dtype, the softmax in fp32
    return logits if temperature == 1.0 else logits.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(count, dtype=dtype, device=hidden.device)
        entropy, normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits = _chunk_logits(hidden[part], weight, bias, temperature)
            lse = torch.logsumexp(logits, dim=-1)
            normaliser[part] = lse
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - lse
            entropy[part] = lse - torch.linalg.vecdot((logits - lse[:, None]).exp_(), logits)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_logprobs = grads[0]
        wide = grad_logprobs.dtype  # sums over tokens are kept in fp32 (fp64) whatever the dtype of the model
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wants_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _chunk_logits(hidden[part], weight, bias, ctx.temperature)
            # d logprob / d logit_v = (1[v = target] - softmax_v) / temperature
            scale = grad_logprobs[part, None] / ctx.temperature
            grad_logits = logits.sub_(normaliser[part, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, targets[part, None], scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if narrow.dtype == wide:
                    grad_weight.addmm_(narrow.T, hidden[part])
                else:
                    grad_weight += narrow.T @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )

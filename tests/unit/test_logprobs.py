import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from policy.logprobs import token_logprobs


def reference(hidden, weight, targets, temperature=1.0, bias=None):
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def inputs(n=7, h=5, v=11, dtype=torch.float64, bias=False):
    g = torch.Generator().manual_seed(n * 100 + v)
    hidden = torch.randn(n, h, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(v, (n,), generator=g), b


def test_by_hand() -> None:
    # logits (ln 1, ln 2, ln 5) over three words: probabilities 1/8, 2/8, 5/8
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    logprobs, entropy = token_logprobs(
        torch.ones(2, 1, dtype=torch.float64), weight, torch.tensor([2, 0]), chunk=1, temperature=1.0
    )
    assert logprobs.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)])
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropy.tolist() == pytest.approx([expected, expected])


def test_temperature_divides_the_logits() -> None:
    # at temperature 1/2 the odds are squared: 1, 4, 25 of 30
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    logprobs, _ = token_logprobs(
        torch.ones(1, 1, dtype=torch.float64), weight, torch.tensor([1]), chunk=8, temperature=0.5
    )
    assert logprobs.item() == pytest.approx(math.log(4 / 30))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_those_of_log_softmax(chunk: int, temperature: float, bias: bool) -> None:
    hidden, weight, targets, b = inputs(bias=bias)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours, entropy = token_logprobs(hidden, weight, targets, chunk=chunk, temperature=temperature, head_bias=b)
    theirs, their_entropy = reference(hidden, weight, targets, temperature, b)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, their_entropy.detach(), rtol=0, atol=1e-12)
    for a, c in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets, bias = inputs(4, 3, 5, bias=True)
    assert bias is not None
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, chunk=3, temperature=0.7, head_bias=b)[0], (hidden, weight, bias)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_the_chunk_does_not_change_the_numbers(n: int, chunk: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hidden, weight, targets, _ = inputs(n, 6, 13, dtype)
        whole = token_logprobs(hidden, weight, targets, chunk=n)[0]
        cut = token_logprobs(hidden, weight, targets, chunk=chunk)[0]
        torch.testing.assert_close(whole, cut, rtol=0, atol=tolerance)
        for a, b in zip(
            torch.autograd.grad(whole.sum(), (hidden, weight)),
            torch.autograd.grad(cut.sum(), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


def test_entropy_has_no_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    assert not token_logprobs(hidden, weight, targets, chunk=3)[1].requires_grad


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    token_logprobs(hidden, weight.detach(), targets, chunk=3)[0].sum().backward()
    assert hidden.grad is not None
    hidden.grad = None
    token_logprobs(hidden.detach(), weight, targets, chunk=3)[0].sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_bf16_softmax_is_in_fp32_and_the_head_on_request() -> None:
    hidden, weight, targets, _ = inputs(50, 16, 300, torch.bfloat16)
    exact = reference(hidden.double(), weight.double(), targets)[0].detach()
    low = token_logprobs(hidden, weight, targets, chunk=16)[0]
    high = token_logprobs(hidden, weight, targets, chunk=16, fp32=True)[0]
    assert low.dtype == high.dtype == torch.float32
    error_low, error_high = (low - exact).abs().max().item(), (high - exact).abs().max().item()
    assert error_high < 1e-5 < error_low < 0.1
    high.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "fp32"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_logits_of_all_tokens_never_exist(dtype: torch.dtype, fp32: bool, bias: bool) -> None:
    n, h, v, chunk = 512, 8, 1000, 16
    hidden, weight, targets, b = inputs(n, h, v, dtype, bias=bias)
    with LargestTensor() as seen:
        token_logprobs(hidden, weight, targets, chunk=chunk, head_bias=b, temperature=0.9, fp32=fp32)[
            0
        ].sum().backward()
    assert seen.elements == chunk * v  # forward and backward; all logits would be 32 times this
    assert hidden.grad is not None
    with LargestTensor() as seen:
        reference(hidden, weight, targets)[0].sum().backward()
    assert seen.elements == n * v  # the instrument does see them


@pytest.mark.parametrize(("bad", "message"), [({"chunk": 0}, "chunk must be >= 1"), ({"temperature": 0.0}, "greedy")])
def test_arguments_out_of_range(bad: dict, message: str) -> None:
    hidden, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, weight, targets, **{"chunk": 4, **bad})


def test_no_tokens() -> None:
    hidden, weight, targets, _ = inputs(0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=4)
    assert logprobs.shape == entropy.shape == (0,)

"""Router and experts: choices by hand, the fused experts against a plain loop, gradients by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from policy.experts import Dispatch, Experts
from policy.layers import RMSNorm, normed_linear
from policy.moe import MoE, Router
from tests.unit.model_zoo import config_of


def _router(scores: list[float], bias: list[float], **overrides: Any) -> tuple[Router, Tensor]:
    """A router and one token for which the sigmoid scores are exactly those given."""
    router = Router(config_of(n_routed_experts=len(scores), hidden_size=len(scores), **overrides))
    with torch.no_grad():
        router.weight.copy_(torch.eye(len(scores)))
        router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router, torch.tensor([scores]).logit()


def test_choice_with_groups_by_hand() -> None:
    """Groups (.9 .1) (.6 .5) (.65 .2) (.3 .3): the best two by sum are .6 + .5 and .9 + .1; .9 and .6 are chosen."""
    router, x = _router(
        [0.9, 0.1, 0.6, 0.5, 0.65, 0.2, 0.3, 0.3], [0.0] * 8, n_group=4, topk_group=2, num_experts_per_tok=2
    )
    gates, experts, _ = router(x)
    chosen = dict(zip(experts[0].tolist(), gates[0].tolist(), strict=True))
    assert chosen == pytest.approx({0: 1.7 * 0.9 / 1.5, 2: 1.7 * 0.6 / 1.5}, rel=1e-5)


def test_bias_moves_the_choice_and_never_the_gates() -> None:
    router, x = _router([0.8, 0.6, 0.4, 0.2], [-0.7, 0.0, 0.0, 0.5], num_experts_per_tok=2, norm_topk_prob=False)
    gates, experts, _ = router(x)
    chosen = dict(zip(experts[0].tolist(), gates[0].tolist(), strict=True))
    assert chosen == pytest.approx({1: 1.7 * 0.6, 3: 1.7 * 0.2}, rel=1e-5)


def test_closed_groups_lose_even_with_negative_biases() -> None:
    """A closed group is out, though the scores of the open ones are below zero (a mask of zeros would let it in)."""
    router, x = _router([0.5, 0.5, 0.1, 0.1], [0.0, 0.0, -0.9, -0.9], n_group=2, topk_group=1, num_experts_per_tok=2)
    router.e_score_correction_bias[:2] = -2.0
    assert set(router(x)[1][0].tolist()) == {2, 3}


def test_given_experts_get_their_own_gates() -> None:
    router, x = _router([0.8, 0.6, 0.4, 0.2], [0.0] * 4, num_experts_per_tok=2)
    gates, experts, _ = router(x, torch.tensor([[3, 2]]))
    assert experts.tolist() == [[3, 2]]
    assert gates[0].tolist() == pytest.approx([1.7 * 0.2 / 0.6, 1.7 * 0.4 / 0.6], rel=1e-5)


def test_router_is_wide_in_half_precision_and_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = Router(config_of()), torch.randn(50, 32)
    torch.nn.init.normal_(router.weight)
    gates, experts, _ = router(x)
    assert gates.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = router(x)
    assert torch.equal(again[0], gates) and torch.equal(again[1], experts)
    assert router.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.float32
    assert router.double()(x.double())[0].dtype == torch.float64


def _experts(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Experts:
    torch.manual_seed(seed)
    experts = Experts(config_of(hidden_size=6, moe_intermediate_size=5, n_routed_experts=4, **overrides))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.to(dtype)


def _plainly(experts: Experts, x: Tensor, gates: Tensor, choice: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for n in range(len(x)):
        row = torch.zeros_like(x[n])
        for gate, e in zip(gates[n], choice[n].tolist(), strict=True):
            up_and_gate = experts.gate_up_proj[e] @ x[n]
            row = row + gate * (experts.down_proj[e] @ (F.silu(up_and_gate[:5]) * up_and_gate[5:]))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_experts_agree_with_a_plain_loop(tokens: int) -> None:
    """Few tokens (padded products), many, and one expert without any."""
    experts = _experts()
    choice = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    ours = [torch.randn(tokens, d, dtype=torch.float64).requires_grad_() for d in (6, 2)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    out, load = experts(ours[0], ours[1], choice)
    expected = _plainly(experts, theirs[0], theirs[1], choice)
    assert torch.allclose(out, expected, atol=1e-12)
    assert load.tolist() == torch.bincount(choice.flatten(), minlength=4).tolist() and load[3] == 0
    weight = torch.randn_like(out)
    gradients = [
        torch.autograd.grad((o * weight).sum(), [*i, *experts.parameters()])
        for o, i in ((out, ours), (expected, theirs))
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_experts_by_finite_differences() -> None:
    experts = _experts()
    choice = torch.tensor([[0, 1], [1, 2], [2, 0]])
    x, gates = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)

    def run(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"gate_up_proj": gate_up, "down_proj": down}, (x, gates, choice))[0]

    parameters = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), gates.requires_grad_(), *parameters))


def test_a_token_gets_the_same_bits_whoever_shares_its_expert() -> None:
    torch.manual_seed(0)
    experts = Experts(config_of(hidden_size=32, moe_intermediate_size=32, n_routed_experts=4))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, gates = torch.randn(300, 32), torch.rand(300, 2)
    choice = torch.stack([torch.randperm(4)[:2] for _ in range(300)])
    whole = experts(x, gates, choice)[0]
    for n in (1, 2, 3, 5, 17, 120):
        assert torch.equal(experts(x[:n], gates[:n], choice[:n])[0], whole[:n]), n


def test_dispatch_by_hand() -> None:
    dispatch = Dispatch.of(torch.tensor([[2, 0], [0, 3], [2, 3]]), 4)
    assert dispatch.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert dispatch.bounds == (0, 2, 2, 4, 6)
    assert dispatch.load.tolist() == [2, 0, 2, 2]
    assert dispatch.slices() == [(0, slice(0, 2)), (2, slice(2, 4)), (3, slice(4, 6))]
    assert dispatch.combine(torch.tensor([[1.0], [10.0], [100.0], [1e3], [1e4], [1e5]])).tolist() == [
        [101],
        [10010],
        [101000],
    ]


def test_shared_experts_serve_every_token() -> None:
    torch.manual_seed(0)
    moe = MoE(config_of())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 32)
    out, choice, *_ = moe(x)
    assert torch.allclose(out - moe.experts(x, *moe.gate(x)[:2])[0], moe.shared_experts(x), atol=1e-5)
    assert choice.shape == (7, 3)


@pytest.mark.parametrize("plain", [True, False])
def test_normed_linear_is_the_norm_and_the_linear(plain: bool) -> None:
    """Fused for a plain layer; for any other (an adapter, say) the layer itself is called."""
    torch.manual_seed(0)
    norm, linear = RMSNorm(9).double(), torch.nn.Linear(9, 4, bias=False).double()
    torch.nn.init.normal_(norm.weight)
    layer = linear if plain else torch.nn.Sequential(linear)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    expected = F.linear(F.rms_norm(x, (9,), norm.weight, 1e-6), linear.weight)
    assert torch.allclose(normed_linear(x, norm, layer), expected, atol=1e-12)
    assert torch.allclose(norm(x), F.rms_norm(x, (9,), norm.weight, 1e-6), atol=1e-12)
    inputs = (x, norm.weight, linear.weight)
    assert torch.autograd.gradcheck(lambda *_: normed_linear(x, norm, layer), inputs)
    assert torch.autograd.gradcheck(lambda *_: norm(x), inputs[:2])

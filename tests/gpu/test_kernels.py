"""What a GPU computes its own way, against the CPU: attention, experts, a whole policy, optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from policy.causal import LatentHeads, causal_attention
from policy.config import LearnerConfig, LossConfig, OptimizerConfig
from policy.experts import routed_product
from policy.grouped import runs_grouped
from policy.learner import Learner
from policy.segments import Segments
from policy.varlen import runs_varlen
from tests.unit.test_learner import batch, learner, policy, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTHS = [300, 129, 64, 3, 1]
# 192 and 128: DeepSeek-V3's widths, which have values padded; 64 and 64 need nothing.
WIDTHS = [(128, 64, 128), (32, 32, 64)]


def _latent_heads(plain: int, rotated: int, value: int) -> LatentHeads:
    draw, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = ((tokens, 4, plain + rotated), (tokens, 4, plain + value), (tokens, rotated))
    query, key_value, shared = (torch.randn(s, generator=draw).bfloat16().float() for s in shapes)
    angles = torch.rand(tokens, rotated // 2, generator=draw) * 6
    return LatentHeads(query, key_value, shared, torch.polar(torch.ones_like(angles), angles))


@pytest.mark.parametrize(("plain", "rotated", "value"), WIDTHS)
def test_variable_length_attention(plain: int, rotated: int, value: int) -> None:
    found = []
    for device in ("cpu", "cuda"):
        heads = _latent_heads(plain, rotated, value)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        leaves = [x.to(device, dtype).requires_grad_() for x in (heads.query, heads.key_value, heads.shared_key)]
        there = LatentHeads(leaves[0], leaves[1], leaves[2], heads.turns.to(device))
        query, _, values = there.assembled()
        assert runs_varlen(query, values) == (device == "cuda")
        out = causal_attention(there, 0.08, Segments.plan(LENGTHS, 4, device))
        out.float().square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert _gap(theirs, ours) < 0.03


def test_a_sequence_gets_the_same_bits_whoever_shares_its_batch() -> None:
    heads = _latent_heads(*WIDTHS[0])
    parts = (heads.query.bfloat16(), heads.key_value.bfloat16(), heads.shared_key.bfloat16(), heads.turns)
    there = [x.cuda() for x in parts]
    whole = causal_attention(LatentHeads(*there), 0.08, Segments.plan(LENGTHS, 4, "cuda"))
    first = [x[: LENGTHS[0]] for x in there]
    alone = causal_attention(LatentHeads(*first), 0.08, Segments.plan(LENGTHS[:1], 4, "cuda"))
    assert torch.equal(whole[: LENGTHS[0]], alone)


def test_grouped_experts() -> None:
    draw = torch.Generator().manual_seed(0)
    x, gates = torch.randn(257, 64, generator=draw), torch.rand(257, 2, generator=draw)
    experts = torch.rand(257, 7, generator=draw).topk(2).indices  # the eighth gets no token
    gate_up, down = torch.randn(8, 64, 64, generator=draw) / 8, torch.randn(8, 64, 32, generator=draw) / 6
    inputs = [t.bfloat16().float() for t in (x, gates, gate_up, down)]
    found = []
    for device in ("cpu", "cuda"):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
        assert runs_grouped(leaves[0], leaves[2], leaves[3]) == (device == "cuda")
        out, load = routed_product(leaves[0], leaves[1], experts.to(device), leaves[2], leaves[3])
        out.float().square().sum().backward()
        found.append([out, load, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert _gap(theirs, ours) < 0.03


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_a_policy_in_bf16_learns_as_on_a_cpu(checkpointing: str) -> None:
    """Losses of five steps, and where the weights went: bf16 rounds, so the directions agree and not the bits."""
    samples, found = batch(16), []
    for device in ("cpu", "cuda"):
        model = policy(torch.bfloat16, moe_intermediate_size=32)
        before = weights(model)
        moved: Any = model
        moved.to(device)
        ours = learner(moved, lr=1e-2, activation_checkpointing=checkpointing)
        losses = [ours.step(samples)["learner/loss"] for _ in range(5)]
        after = weights(moved)
        change = torch.cat([(after[n].cpu().float() - before[n].float()).flatten() for n in before])
        found.append((losses, change))
    (cpu_losses, cpu_change), (gpu_losses, gpu_change) = found
    assert gpu_losses == pytest.approx(cpu_losses, rel=0.05, abs=0.02)
    assert torch.cosine_similarity(cpu_change, gpu_change, dim=0) > 0.8


@pytest.mark.parametrize("fields", [{"kind": "adamw8bit"}, {"offload": True}, {"kind": "adamw8bit", "offload": True}])
def test_optimizers_learn_alike(fields: dict[str, Any]) -> None:
    samples, found = batch(16), []
    for settings in ({}, fields):
        model: Any = policy(torch.bfloat16, hidden_size=64)
        model.cuda()
        ours = Learner(
            model,
            optimizer=OptimizerConfig(lr=1e-3, **settings),
            loss=LossConfig(),
            config=LearnerConfig(),
            total_steps=10,
        )
        found.append([ours.step(samples)["learner/loss"] for _ in range(5)])
        if settings.get("offload"):
            assert all(master.device.type == "cpu" for master in ours._optimizer.masters.values())
    assert found[1] == pytest.approx(found[0], rel=0.05, abs=0.01)


def test_offloading_leaves_only_weights_and_gradients_on_the_gpu() -> None:
    held = []
    for offload in (False, True):
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        model: Any = policy(torch.bfloat16, hidden_size=256, intermediate_size=2048)
        model.cuda()
        ours = Learner(
            model,
            optimizer=OptimizerConfig(offload=offload),
            loss=LossConfig(),
            config=LearnerConfig(),
            total_steps=10,
        )
        ours.step(batch(4))
        held.append((torch.cuda.memory_allocated() - start) / sum(p.numel() for p in model.parameters()))
        del ours, model
    assert held[0] == pytest.approx(14, rel=0.1)  # 2 of the weight, 4 of the master, 8 of the moments
    assert held[1] == pytest.approx(2, rel=0.2)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())

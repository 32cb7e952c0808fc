"""Activation checkpointing: the same bits, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from policy.batch import pack
from policy.config import RouterConfig
from policy.recompute import recompute_layers
from policy.scorer import TokenScorer
from tests.unit.test_learner import assert_same_bits, batch, dense, gradients, learner, policy, weights


@pytest.mark.parametrize("build", [policy, lambda: dense("qwen2"), lambda: dense("phi")])
def test_same_bits(build: Any) -> None:
    """Phi has dropout: it must stay off in layers that are asked for recomputation."""
    found = [gradients(learner(build(), activation_checkpointing=kind), batch(8)) for kind in ("none", "layer")]
    assert_same_bits(found[0][1], found[1][1])
    assert found[0][0]["learner/loss"] == found[1][0]["learner/loss"]


def test_same_bits_after_whole_steps_with_the_balance_loss() -> None:
    """The balance loss leaves a layer beside its output; the routers' counts must not count the second run."""
    router = RouterConfig(balance_coef=0.1, bias="update")
    ours = [
        learner(policy(), activation_checkpointing=kind, router=router, micro_batch_tokens=40)
        for kind in ("none", "layer")
    ]
    for step in range(2):
        metrics = [one.step(batch(8, seed=step), mini_batches=2) for one in ours]
        for found in metrics:
            del found["learner/tokens_per_s"]
        assert metrics[0] == metrics[1]
    assert_same_bits(weights(ours[0].model), weights(ours[1].model))
    buffers = [dict(one.model.named_buffers()) for one in ours]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])


def saved_bytes(model: Any, samples: list[Any], kind: str) -> int:
    """Bytes that a forward pass keeps for the backward, each storage once; parameters do not count."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    (micro,) = pack(samples, 10_000)
    scorer = TokenScorer(model, chunk=64)
    recompute_layers(model, kind)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        scorer(micro, 1.0).logprobs.sum()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("build", [lambda: policy(num_hidden_layers=8), lambda: dense("qwen2")])
def test_a_layer_keeps_its_input_only(build: Any) -> None:
    model, samples = build(), batch(40)
    found = {kind: saved_bytes(model, samples, kind) for kind in ("none", "layer")}
    tokens = sum(len(s.token_ids) - 1 for s in samples)
    inputs = model.config.num_hidden_layers * tokens * model.config.hidden_size * 4
    assert found["layer"] < found["none"] / 3
    assert found["layer"] >= inputs, "the instrument saw the layers' inputs"


def test_it_can_be_turned_off_again_and_needs_layers() -> None:
    model = policy().eval()
    recompute_layers(model, "layer")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 3 and all(
        layer.training and not layer.get_submodule("self_attn").training for layer in layers
    )
    learner(model)  # the next learner of the model asks for none
    assert not any(layer.gradient_checkpointing or layer.training for layer in layers)
    with pytest.raises(ValueError, match="Linear has no layers that can be computed again"):
        recompute_layers(nn.Linear(2, 2), "layer")
    recompute_layers(nn.Linear(2, 2), "none")

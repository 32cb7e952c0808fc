"""PolicyModel against transformers' DeepseekV3ForCausalLM, and its own promises: packing, replay, folders, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from policy.model import PolicyModel, checkpoint_tensors
from tests.unit.model_zoo import VARIANTS, make_policy, ragged, relative_gap, twin_of

TOLERANCE = 1e-4
# Longer than one block of the attention (64), much shorter, and single tokens.
LENGTHS = [70, 5, 1, 23, 66, 1]


def assert_same_gradients(model: nn.Module, twin: nn.Module) -> None:
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = expected[name].grad
        assert parameter.grad is not None and theirs is not None, name
        assert relative_gap(parameter.grad, theirs) < TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_logits_and_gradients_agree_with_transformers(variant: str, left: bool) -> None:
    model = make_policy(variant)
    twin = twin_of(model)
    ids, mask = ragged(LENGTHS, left=left)
    weight = torch.randn(*ids.shape, 53) * mask[..., None]
    ours = model(ids, attention_mask=mask).logits
    theirs = twin(ids, attention_mask=mask, use_cache=False).logits
    assert relative_gap(ours[mask.bool()], theirs[mask.bool()]) < TOLERANCE
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_agrees_with_transformers_row_by_row(variant: str) -> None:
    model = make_policy(variant)
    twin = twin_of(model)
    ids, mask = ragged(LENGTHS)
    packed = ids[mask.bool()][None]
    out = model.hidden_states(packed, segment_lengths=LENGTHS)
    ours = model.lm_head(out.hidden)
    theirs = torch.cat([twin(row[None, :n], use_cache=False).logits[0] for row, n in zip(ids, LENGTHS, strict=True)])
    assert relative_gap(ours, theirs) < TOLERANCE
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("variant", ["q_lora", "yarn"])
def test_loss_agrees_with_transformers(variant: str) -> None:
    model = make_policy(variant)
    twin = twin_of(model)
    ids, mask = ragged(LENGTHS)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :40] = -100
    for items in (None, 17, torch.tensor(5)):
        ours = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
        theirs = twin(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_packed_row_trains_on_no_token_across_a_bound() -> None:
    model = make_policy()
    ids, mask = ragged(LENGTHS)
    by_rows = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    packed = ids[mask.bool()][None]
    assert model(packed, labels=packed, segment_lengths=LENGTHS).loss.item() == pytest.approx(by_rows.item(), rel=1e-5)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    by_positions = model(packed, labels=packed, position_ids=positions)
    assert by_positions.loss.item() == pytest.approx(by_rows.item(), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=2, max_size=9),
    data=st.data(),
    variant=st.sampled_from(["plain", "groups", "all-dense"]),
)
def test_packed_sequences_never_see_each_other(lengths: list[int], data: st.DataObject, variant: str) -> None:
    """New tokens in one segment leave the hidden states of all others bit-equal, though experts get other batches."""
    model = make_policy(variant, seed=3)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    ids = torch.randint(1, 53, (1, sum(lengths)))
    start = sum(lengths[:changed])
    inside = torch.zeros(ids.shape[1], dtype=torch.bool)
    inside[start : start + lengths[changed]] = True
    other = torch.where(inside, (ids + 7) % 53, ids)
    with torch.no_grad():
        before = model.hidden_states(ids, segment_lengths=lengths).hidden
        after = model.hidden_states(other, segment_lengths=lengths).hidden
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def test_no_token_sees_the_future() -> None:
    model = make_policy()
    ids = torch.randint(1, 53, (1, 130))
    for changed in (1, 63, 64, 65, 129):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 53
        with torch.no_grad():
            before, after = (model.hidden_states(x, segment_lengths=[130]).hidden for x in (ids, other))
        assert torch.equal(before[:changed], after[:changed])
        assert not torch.equal(before[changed], after[changed])


def test_order_of_segments_does_not_matter() -> None:
    model = make_policy("groups")
    ids, _ = ragged(LENGTHS)
    rows = [row[:n] for row, n in zip(ids, LENGTHS, strict=True)]
    out = model.hidden_states(torch.cat(rows)[None], segment_lengths=LENGTHS)
    back = model.hidden_states(torch.cat(rows[::-1])[None], segment_lengths=LENGTHS[::-1])
    assert relative_gap(torch.cat(back.hidden.split(LENGTHS[::-1])[::-1]), out.hidden) < 1e-5
    for there, here in zip(back.routed_experts, out.routed_experts, strict=True):
        assert torch.equal(torch.cat(there.split(LENGTHS[::-1])[::-1]).sort().values, here.sort().values)
    assert torch.equal(back.router_load, out.router_load)


def test_same_input_same_bits() -> None:
    model = make_policy("q_lora")
    ids, mask = ragged(LENGTHS)
    packed = ids[mask.bool()][None]
    results = []
    for _ in range(2):
        model.zero_grad()
        hidden = model.hidden_states(packed, segment_lengths=LENGTHS).hidden
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_routing_is_reported_and_replayed() -> None:
    model = make_policy("groups")
    ids = torch.randint(1, 53, (1, 40))
    lengths = [9, 31]
    free = model.hidden_states(ids, segment_lengths=lengths)
    assert [tuple(choice.shape) for choice in free.routed_experts] == [(40, 4)] * 2
    counted = torch.stack([torch.bincount(choice.flatten(), minlength=8) for choice in free.routed_experts])
    assert torch.equal(free.router_load, counted)
    assert free.router_load.sum(1).tolist() == [160, 160]
    replayed = model.hidden_states(ids, segment_lengths=lengths, routed_experts=free.routed_experts)
    assert torch.equal(replayed.hidden, free.hidden)
    moved = [(choice + 1) % 8 for choice in free.routed_experts]
    other = model.hidden_states(ids, segment_lengths=lengths, routed_experts=moved)
    assert all(torch.equal(a, b) for a, b in zip(other.routed_experts, moved, strict=True))
    assert relative_gap(other.hidden, free.hidden) > 0.01
    in_rows = model(ids, routed_experts=moved, segment_lengths=lengths).logits[0]
    assert torch.equal(in_rows, model.lm_head(other.hidden))


def test_given_experts_agree_with_a_bias_that_forces_them() -> None:
    """Replaying experts 2, 5 and 7 is the same as a correction bias that leaves no other choice."""
    model = make_policy("plain")
    ids = torch.randint(1, 53, (1, 12))
    given_choice = [torch.tensor([[2, 5, 7]]).expand(12, 3)] * 2
    replayed = model(ids, routed_experts=given_choice).logits
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[:] = 0
            buffer[[2, 5, 7]] = 100.0
    assert relative_gap(replayed, model(ids).logits) < 1e-6


def test_padding_gets_zero_logits_and_no_gradient() -> None:
    model = make_policy()
    ids, mask = ragged([3, 6])
    logits = model(ids, attention_mask=mask).logits
    assert torch.equal(logits[0, 3:], torch.zeros(3, 53))
    assert relative_gap(logits[0, :3], model(ids[:1, :3]).logits[0]) < 1e-5
    assert relative_gap(model(ids, attention_mask=mask, logits_to_keep=2).logits, logits[:, -2:]) < 1e-6


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_policy().train()
    ids = torch.randint(1, 53, (2, 20))
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_stays_near_fp32() -> None:
    model = make_policy("q_lora", initializer_range=0.1)
    ids, mask = ragged([70, 9])
    wide = model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, attention_mask=mask).logits
    choice = model.hidden_states(ids[mask.bool()][None], segment_lengths=[70, 9]).routed_experts
    replay = [torch.zeros(140, 3, dtype=torch.int64).index_copy_(0, mask.flatten().nonzero()[:, 0], c) for c in choice]
    model.bfloat16()
    narrow = model(ids, attention_mask=mask, routed_experts=replay).logits
    assert narrow.dtype == torch.bfloat16
    assert relative_gap(narrow.float(), wide) < 0.05
    assert relative_gap(mixed.float(), wide) < 0.5  # its choice of experts is its own


def test_folders_pass_between_models_unchanged(tmp_path: Path) -> None:
    model = make_policy("q_lora")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    named = dict(checkpoint_tensors(model))
    assert saved.keys() == named.keys()
    assert all(torch.equal(saved[name], named[name]) for name in saved)
    assert saved["model.layers.1.mlp.experts.5.up_proj.weight"].shape == (24, 32)
    assert saved["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    fields = ("topk_method", "scoring_func", "moe_router_dtype", "num_nextn_predict_layers", "model_type")
    assert [config[f] for f in fields] == ["noaux_tc", "sigmoid", "float32", 0, "deepseek_v3"]

    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), model.state_dict().values(), strict=True)
    )
    theirs.save_pretrained(tmp_path / "again")
    ours = PolicyModel.from_pretrained(tmp_path / "again")
    ids = torch.randint(1, 53, (2, 9))
    assert torch.equal(ours(ids).logits, model(ids).logits)
    ours.save_pretrained(tmp_path / "third")
    assert load_file(tmp_path / "third" / "model.safetensors").keys() == named.keys()


def test_tied_head_is_saved_once(tmp_path: Path) -> None:
    model = make_policy("tied")
    assert "lm_head.weight" not in dict(checkpoint_tensors(model))
    model.save_pretrained(tmp_path)
    again = PolicyModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(torch.tensor([[3, 4]])).logits, model(torch.tensor([[3, 4]])).logits)


def test_checkpoint_tensors_are_views_of_the_live_weights() -> None:
    model = make_policy()
    named = dict(checkpoint_tensors(model))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3, 24:].fill_(9.0)
    assert torch.equal(named["model.layers.1.mlp.experts.3.up_proj.weight"], torch.full((24, 32), 9.0))
    assert sum(t.numel() for t in named.values()) == sum(t.numel() for t in model.state_dict().values())


def test_checkpoint_tensors_of_other_models(tmp_path: Path) -> None:
    twin = twin_of(make_policy())
    ours = dict(checkpoint_tensors(make_policy()))
    theirs = dict(checkpoint_tensors(twin))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=31)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2)
    for tied in (False, True):
        dense = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied))
        dense.save_pretrained(tmp_path / str(tied))
        assert dict(checkpoint_tensors(dense)).keys() == load_file(tmp_path / str(tied) / "model.safetensors").keys()


def test_weights_start_like_those_of_transformers() -> None:
    torch.manual_seed(0)
    model = PolicyModel(make_policy().config)
    twin = DeepseekV3ForCausalLM(model.config)
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.std(correction=0).item() == pytest.approx(expected[name].std(correction=0).item(), rel=0.15), (
            name
        )
        assert parameter.mean().item() == pytest.approx(expected[name].mean().item(), abs=0.05), name
    assert all(not buffer.any() for buffer in model.buffers())


def test_generate_continues_greedily_whatever_the_padding() -> None:
    model = make_policy("yarn").eval()
    ids, mask = ragged([4, 9], left=True)
    batch = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = model.generate(input_ids=ids[:1, 5:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(batch[0, 5:], alone[0])
    tokens = ids[:1, 5:]
    for _ in range(5):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, alone)
    assert model(ids, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="no KV cache"):
        model.generate(input_ids=ids, use_cache=True)


def test_tuple_output() -> None:
    model = make_policy()
    ids = torch.randint(1, 53, (1, 6))
    loss, logits = model(ids, labels=ids, return_dict=False)
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(use_cache=True), TypeError, "use_cache=False"),
        (dict(output_router_logits=True), TypeError, "output_router_logits"),
        (dict(inputs_embeds=torch.zeros(1)), TypeError, "inputs_embeds"),
        (dict(segment_lengths=[3, 4]), ValueError, "sum to 7, but input_ids hold 8"),
        (dict(segment_lengths=[8, 0]), ValueError, ">= 1"),
        (dict(segment_lengths=[8], attention_mask=torch.zeros(2, 4)), ValueError, "not both"),
        (dict(attention_mask=torch.ones(2, 5)), ValueError, "shape of input_ids"),
        (dict(attention_mask=torch.tensor([[1] * 4, [0] * 4])), ValueError, "row 1 of attention_mask"),
        (dict(position_ids=torch.arange(5)), ValueError, "position_ids"),
        (dict(routed_experts=[torch.zeros(8, 3)]), ValueError, "1 entries, the model has 2 MoE layers"),
        (dict(routed_experts=[torch.zeros(8, 2)] * 2), ValueError, r"expected \(8, 3\)"),
        (dict(routed_experts=[torch.full((8, 3), 8)] * 2), ValueError, r"outside 0\.\.7"),
        (
            dict(labels=torch.ones(2, 4, dtype=torch.int64), attention_mask=torch.tensor([[1] * 4, [1, 1, 0, 0]])),
            ValueError,
            "-100 on padding",
        ),
    ],
)
def test_bad_input_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_policy()(torch.ones(2, 4, dtype=torch.int64), **arguments)


def test_upload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="upload_folder"):
        make_policy().save_pretrained(tmp_path, push_to_hub=True)

"""PolicyModel under tools that know nothing of it: TRL's SFTTrainer, transformers' Trainer loop, PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3ForCausalLM, Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from policy.model import PolicyModel
from policy.presets import preset_config
from policy.tokenizer import build_tokenizer
from tests.unit.model_zoo import make_policy, ragged, relative_gap, twin_of

ROWS = [
    {"prompt": "<|bos|><|User|>1+2=?<|Assistant|><think>", "completion": "1+2=3</think><answer>3</answer><|eos|>"},
    {"prompt": "<|bos|><|User|>9-4+1=?<|Assistant|><think>", "completion": "9-4=5;5+1=6</think><answer>6</answer>"},
    {"prompt": "<|bos|><|User|>7=?<|Assistant|><think>", "completion": "</think><answer>7</answer><|eos|>"},
    {"prompt": "<|bos|><|User|>2+2=?<|Assistant|><think>", "completion": "2+2=4</think><answer>4</answer><|eos|>"},
]


def _arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    """One step over all four rows, accumulated from two batches, so that a wrong loss scale shows."""
    common = dict(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=1e9,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return {**common, **overrides}


def _start() -> tuple[PolicyModel, DeepseekV3ForCausalLM]:
    torch.manual_seed(0)
    model = PolicyModel(preset_config("tiny", initializer_range=0.1))
    return model, twin_of(model)


def _assert_same_step(model: torch.nn.Module, twin: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    moved = 0
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        step, theirs = parameter.detach() - before[name], expected[name].detach() - before[name]
        if theirs.abs().max() > 1e-4:
            moved += 1
            assert relative_gap(step, theirs) < 5e-3, name
    assert moved > 10


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_takes_the_step_it_takes_with_transformers_model(tmp_path: Path, checkpointing: bool) -> None:
    model, twin = _start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for peer in (model, twin):
        config = SFTConfig(**_arguments(tmp_path, gradient_checkpointing=checkpointing, max_length=None))
        SFTTrainer(peer, config, train_dataset=Dataset.from_list(ROWS), processing_class=build_tokenizer()).train()
    _assert_same_step(model, twin, before)


def test_trainer_takes_the_step_it_takes_with_transformers_model(tmp_path: Path) -> None:
    model, twin = _start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokenizer = build_tokenizer()
    texts = [tokenizer.encode(row["prompt"] + row["completion"]) for row in ROWS]

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [2] * (longest - len(row["input_ids"])) for row in rows])
        mask = (ids != 2).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    for peer in (model, twin):
        arguments = TrainingArguments(**_arguments(tmp_path))
        data = Dataset.from_list([{"input_ids": ids} for ids in texts])
        Trainer(peer, arguments, train_dataset=data, data_collator=collate).train()  # pyright: ignore[reportArgumentType]
    _assert_same_step(model, twin, before)


def test_sft_trainer_in_mixed_precision(tmp_path: Path) -> None:
    """bf16 is TRL's default; the step must at least be finite and near the fp32 one."""
    model, _ = _start()
    config = SFTConfig(**_arguments(tmp_path, bf16=True, max_length=None))
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(ROWS), processing_class=build_tokenizer())
    loss = trainer.train().training_loss
    assert 5.0 < loss < 8.0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_lora_trains_and_merges(tmp_path: Path) -> None:
    model = make_policy("q_lora")
    ids, mask = ragged([9, 4])
    base = model(ids, attention_mask=mask).logits.detach()
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    assert torch.allclose(adapted(input_ids=ids, attention_mask=mask).logits, base, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # the first step moves B alone: it starts at zero, and A's gradient goes through it
        loss = adapted(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * len(targets) * 2
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
    with_adapter = adapted(input_ids=ids, attention_mask=mask).logits.detach()
    assert relative_gap(with_adapter, base) > 1e-3
    merged = adapted.merge_and_unload()
    assert isinstance(merged, PolicyModel)
    assert relative_gap(merged(ids, attention_mask=mask).logits, with_adapter) < 1e-4
    merged.save_pretrained(tmp_path)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    theirs = again(ids, attention_mask=mask, use_cache=False).logits
    assert relative_gap(theirs[mask.bool()], with_adapter[mask.bool()]) < 1e-4

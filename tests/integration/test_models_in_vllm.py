"""Folders written from models that people have, loaded by vLLM as they are: the learner's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from policy.checkpoint import save_model
from policy.config import LoraConfig, ModelConfig
from policy.loading import load_policy
from policy.lora import is_adapter
from policy.scorer import TokenScorer
from policy.tokenizer import build_tokenizer
from tests.unit.released import in_fp8, raw_tensors, released_config, write_folder

# DeepSeek-V3's own YaRN numbers give logits a scale that a net this small magnifies; the others are plain.
TOLERANCE = 5e-5
SHAPE: dict[str, Any] = dict(
    vocab_size=352, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    initializer_range=0.15,
)  # fmt: skip
DENSE: dict[str, Any] = {
    "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "llama, adapters merged": LlamaConfig(**SHAPE),
}


def source_of(kind: str, folder: Path) -> ModelConfig:
    """A model's folder, and how it is loaded."""
    if kind == "released, MTP kept":
        config = released_config(max_position_embeddings=256)
        return ModelConfig(path=str(write_folder(folder, config, in_fp8(raw_tensors(config)))), mtp="keep")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(DENSE[kind]).save_pretrained(folder, max_shard_size="200KB")
    build_tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder), lora=LoraConfig(rank=4) if "adapters" in kind else None)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield


@pytest.mark.parametrize("kind", ["released, MTP kept", *DENSE])
def test_the_engine_computes_what_the_learner_computes(kind: str, tmp_path: Path, one_process: None) -> None:
    import vllm

    source = source_of(kind, tmp_path / "source")
    model, tokenizer = load_policy(source, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    save_model(model, tokenizer, tmp_path / "model", source=source)
    assert (tmp_path / "model/mtp.safetensors").exists() == ("MTP" in kind)
    engine = vllm.LLM(
        str(tmp_path / "model"), dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
    )  # fmt: skip
    try:
        prompt = torch.randint(9, 320, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        params = vllm.SamplingParams(max_tokens=24, seed=1, logprobs=0, prompt_logprobs=0, ignore_eos=True)
        [output] = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    tokens = [*prompt, *output.outputs[0].token_ids]
    assert output.prompt_logprobs and output.outputs[0].logprobs
    entries: list[Any] = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    theirs = torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens[1:], strict=True)])
    [scores] = TokenScorer(model, chunk=64).sequence_logprobs([tokens])
    ours = torch.tensor(scores)
    print(f"{kind}: max |dlogp| {(ours - theirs).abs().max():.1e}, spread {ours.std():.1f}")
    assert ours.std() > 0.3, "the logits are too flat for this test to say anything"
    assert (ours - theirs).abs().max() < TOLERANCE

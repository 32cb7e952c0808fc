"""Small checkpoints in the form in which DeepSeek and Moonshot released theirs, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from policy.fp8 import FP8, scale_shape
from policy.tokenizer import build_tokenizer

BLOCK = (128, 128)
LARGEST = 448.0  # of e4m3

# Widths as small as they go with something left over of every block: 160 = 128 + 32, kv_a_proj_with_mqa has 576 rows.
SHAPE: dict[str, Any] = dict(
    vocab_size=320, hidden_size=160, intermediate_size=192, moe_intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=144, kv_lora_rank=512, qk_nope_head_dim=32,
    qk_rope_head_dim=64, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=4,
    topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, max_position_embeddings=2048,
    rms_norm_eps=1e-6, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip

# What DeepSeek-V3's and R1's config.json say beside the shapes.
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
# What Moonlight's says instead.
MOONLIGHT: dict[str, Any] = {
    **{k: v for k, v in RELEASED.items() if k != "quantization_config"},
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}


def quantise(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """e4m3 values and fp32 scales; each block's largest value lies at e4m3's largest. [R, C] -> both"""
    scale = torch.empty(scale_shape(tuple(weight.shape), block))
    values = torch.empty(weight.shape, dtype=FP8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            largest = float(weight[part].abs().max())
            scale[i, j] = largest / LARGEST if largest else 1.0
            values[part] = (weight[part] / scale[i, j]).to(FP8)
    return values, scale


def by_hand(values: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """values * scale, element by element, as the format is defined. [R, C]"""
    rows = torch.arange(values.shape[0])[:, None] // block[0]
    columns = torch.arange(values.shape[1])[None] // block[1]
    return values.float() * scale[rows, columns]


def raw_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random bf16 tensors of a checkpoint, one per expert, with those of its MTP layer; correction biases in fp32."""
    torch.manual_seed(seed)
    known = {k: v for k, v in config.items() if k in DeepseekV3Config().to_dict() and k != "quantization_config"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**known, "num_nextn_predict_layers": 0}))
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(0, 0.1)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        prefix, _, kind = name.rpartition(".")
        for e, part in enumerate(tensor):
            for side, matrix in zip(("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",),
                                    part.chunk(2) if kind == "gate_up_proj" else (part,), strict=True):  # fmt: skip
                found[f"{prefix}.{e}.{side}.weight"] = matrix.clone()
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    for i in range(config.get("num_nextn_predict_layers", 0)):
        before, here = f"model.layers.{layers - 1}.", f"model.layers.{layers + i}."
        found |= {here + k.removeprefix(before): t + 0.01 for k, t in list(found.items()) if k.startswith(before)}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            found[f"{here}{name}.weight"] = torch.rand(width) + 0.5
        found[f"{here}eh_proj.weight"] = torch.randn(width, 2 * width) * 0.1
        found[f"{here}embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
        found[f"{here}shared_head.head.weight"] = found["lm_head.weight"].clone()
    wide = "e_score_correction_bias"
    return {name: t.float() if name.endswith(wide) else t.bfloat16() for name, t in found.items()}


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the projections in FP8 blocks; embeddings, head, norms, router and eh_proj stay, as released."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or name.endswith("_with_mqa.weight"):
            found[name], found[f"{name}_scale_inv"] = quantise(tensor.float())
        else:
            found[name] = tensor
    return found


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors mean, in fp32, without scales."""
    return {
        name: by_hand(t, tensors[f"{name}_scale_inv"]) if t.dtype == FP8 else t.float()
        for name, t in tensors.items()
        if not name.endswith("_scale_inv")
    }


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 3) -> Path:
    """A folder with its tensors dealt out over files, a weight and its scales in different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for i, name in enumerate(sorted(tensors)):
        files[i % shards][name] = tensors[name].contiguous()
    names = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    for name, part in zip(names, files, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    build_tokenizer().save_pretrained(folder)
    return folder


def released_config(**overrides: Any) -> dict[str, Any]:
    """A small config.json in the released form."""
    return {**SHAPE, **RELEASED, **overrides}

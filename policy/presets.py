"""Model shapes by name, and what a config must say so that transformers, vLLM and the policy read it alike."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DeepseekV3Config

from policy.config import ModelConfig
from policy.rope import rope_parameters
from policy.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

# What vLLM reads and transformers does not write. Without topk_method vLLM cannot load the correction bias, without
# scoring_func it routes by softmax and says nothing; num_nextn_predict_layers > 0 makes it look for missing layers.
_VLLM_FIELDS: Mapping[str, Any] = MappingProxyType(
    {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_router_dtype": "float32",
        "num_nextn_predict_layers": 0,
    }
)

_TOY_TOKENS: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
)

# vLLM's CPU kernels take this latent only (512 + 64), and expert sizes divisible by 32.
_CPU_LATENT: Mapping[str, Any] = MappingProxyType({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": None})

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # 0.5M parameters: learns one-digit sums with running sums on one core in minutes.
        "tiny": {
            **_TOY_TOKENS,
            **_CPU_LATENT,
            "hidden_size": 96,
            "intermediate_size": 192,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            # At this width three times the usual 0.02 learns several times faster; 0.1 is slower again.
            "initializer_range": 0.06,
        },
        # 5.4M parameters: large enough that matrix products dominate; what the benchmarks run.
        "tiny-5m": {
            **_TOY_TOKENS,
            **_CPU_LATENT,
            "hidden_size": 256,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        # The published model (arXiv 2412.19437, section 4.2): 671B parameters, 37B of them active.
        "deepseek-v3": {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 163840,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        # Moonlight-16B-A3B (arXiv 2502.16982): the same architecture at a fortieth of the size.
        "moonlight-16b": {
            "vocab_size": 163840,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.446,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
            "bos_token_id": 163584,
            "eos_token_id": 163585,
        },
    }
)


def preset_config(name: str, **overrides: Any) -> DeepseekV3Config:
    """The config of a preset, some of its fields replaced.

    Raises:
        ValueError: an unknown preset or field, or a shape that cannot be.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    known = set(DeepseekV3Config().to_dict()) | set(_VLLM_FIELDS)
    for field in overrides:
        if field not in known:
            raise ValueError(f"model.overrides: DeepseekV3Config has no field {field!r}{_nearest(field, known)}")
    try:
        config = with_vllm_fields(DeepseekV3Config(**{**PRESETS[name], **overrides}))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model.overrides: {' '.join(str(error).split())}") from error
    check_supported(config)
    return config


def config_of(model: ModelConfig) -> Any:
    """The transformers config of what a recipe trains, without its weights: a preset's, a folder's or a hub id's.

    Raises:
        ValueError: an unknown preset or field.
    """
    if model.preset is not None:
        return preset_config(model.preset, **model.overrides)
    assert model.path is not None
    folder = Path(model.path).expanduser()
    return AutoConfig.from_pretrained(folder if folder.is_dir() else model.path, trust_remote_code=False)


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def with_vllm_fields(config: DeepseekV3Config) -> DeepseekV3Config:
    """The same config, with the fields that vLLM reads and the published architecture name set."""
    for field, value in _VLLM_FIELDS.items():
        setattr(config, field, value)
    config.architectures = ["DeepseekV3ForCausalLM"]
    return config


def check_servable(config: Any) -> None:
    """Refuses DeepSeek-V3 configs that transformers and the policy compute, but vLLM silently computes otherwise.

    Raises:
        ValueError: names the field and the mend.
    """
    if config.model_type != "deepseek_v3":
        return
    if config.tie_word_embeddings:
        raise ValueError("vLLM's DeepSeek-V3 has a head of its own: set tie_word_embeddings to false")
    if getattr(config, "attention_bias", False):
        raise ValueError("vLLM's DeepSeek-V3 leaves biases of attention out: set attention_bias to false")


def check_supported(config: DeepseekV3Config) -> None:
    """Refuses configs whose shapes contradict each other, or that ask for what the policy does not compute.

    Raises:
        ValueError: names the field and the mend.
    """
    _check_rope(rope_parameters(config))
    experts, scaling = config.n_routed_experts, config.routed_scaling_factor
    groups, top_groups = (1 if n is None else n for n in (config.n_group, config.topk_group))
    if groups < 1:
        raise ValueError(f"n_group must be >= 1, got {groups}")
    top_k, per_group = config.num_experts_per_tok or 0, experts // groups
    rules = (
        (_positive(scaling), f"routed_scaling_factor must be a finite number > 0, got {scaling!r}"),
        (config.num_hidden_layers > 0, f"num_hidden_layers must be >= 1, got {config.num_hidden_layers}"),
        (_says(config, "scoring_func", "sigmoid"), f"scoring_func must be sigmoid, got {_of(config, 'scoring_func')}"),
        (_says(config, "topk_method", "noaux_tc"), f"topk_method must be noaux_tc, got {_of(config, 'topk_method')}"),
        (_says(config, "moe_layer_freq", 1), f"moe_layer_freq must be 1, got {_of(config, 'moe_layer_freq')}"),
        (config.hidden_act == "silu", f"hidden_act must be silu, got {config.hidden_act!r}"),
        (not config.attention_dropout, "attention_dropout is not supported: set it to 0"),
        (bool(config.rope_interleave), "rope_interleave must be true: vLLM rotates interleaved pairs whatever it says"),
        (
            config.num_key_value_heads == config.num_attention_heads,
            "num_key_value_heads must equal num_attention_heads: MLA expands keys and values for every head",
        ),
        (config.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {config.qk_rope_head_dim}"),
        (config.n_shared_experts >= 1, f"n_shared_experts must be >= 1, got {config.n_shared_experts}"),
        (experts % groups == 0, f"n_routed_experts ({experts}) must be divisible by n_group ({groups})"),
        (1 <= top_groups <= groups, f"topk_group must be in 1..n_group = {groups}, got {top_groups}"),
        (groups == 1 or per_group >= 2, f"a group needs two experts or more: {experts} experts in {groups} groups"),
        (
            1 <= top_k <= per_group * top_groups,
            f"num_experts_per_tok must be in 1..{per_group * top_groups} (experts of {top_groups} groups), got {top_k}",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def _check_rope(parameters: Mapping[str, Any]) -> None:
    """Numbers of RoPE that are none, which fail deep in the model."""
    names = ["rope_theta"] + (["factor", "original_max_position_embeddings"] if "factor" in parameters else [])
    for name in names:
        if parameters.get(name) is not None and not _positive(parameters[name]):
            raise ValueError(f"rope_parameters.{name} must be a finite number > 0, got {parameters[name]!r}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _of(config: DeepseekV3Config, field: str) -> Any:
    """A field that published configs have and transformers' class does not know; None where it is not given."""
    return getattr(config, field, None)


def _says(config: DeepseekV3Config, field: str, value: Any) -> bool:
    """Whether such a field is not given, or is what the policy computes (``with_vllm_fields`` would hide the rest)."""
    return _of(config, field) in (None, value)

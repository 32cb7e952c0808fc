"""From a preset, a Hugging Face folder or a hub id to a policy and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policy.config import ModelConfig
from policy.errors import one_line
from policy.model import PolicyModel
from policy.presets import check_servable, preset_config
from policy.tokenizer import build_tokenizer


def load_policy(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer, on the CPU, in the config's dtype.

    A preset gets random weights that depend on ``seed`` alone (the global random state is left as it is). A path is
    a folder or a hub id; DeepSeek-V3 configs become a ``PolicyModel``, anything else transformers' causal LM.

    Raises:
        ValueError: the preset, folder or hub id is not there or incomplete, or does not fit its tokenizer.
    """
    dtype = getattr(torch, config.dtype)
    if config.preset is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = PolicyModel(preset_config(config.preset, **config.overrides))
        model = _cast(model, dtype)
        tokenizer = build_tokenizer() if config.tokenizer is None else _load_tokenizer(config.tokenizer, "tokenizer")
    else:
        assert config.path is not None
        model = _load_model(_model_source(config), dtype)
        tokenizer = _load_tokenizer(config.tokenizer or config.path, "tokenizer" if config.tokenizer else "path")
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.get_text_config().vocab_size}: "
            "set model.tokenizer to the one that the model was trained with"
        )
    return model, tokenizer


def check_model(config: ModelConfig) -> None:
    """Finds out early and without loading weights whether :func:`load_policy` would find the model.

    Raises:
        ValueError: no such preset, shapes that cannot be, a folder or hub id whose config or tokenizer cannot be read
            or whose weight files are cut off, or a model that vLLM cannot serve.
    """
    if config.preset is not None:
        shapes = preset_config(config.preset, **config.overrides)
        check_servable(shapes)
        try:
            with torch.device("meta"):
                PolicyModel(shapes)
        except Exception as error:  # torch's many ways to say that there is no such layer
            raise ValueError(f"model.overrides: no model has these shapes: {one_line(error)}") from error
        if config.tokenizer is not None:
            _load_tokenizer(config.tokenizer, "tokenizer")
        return
    source = _model_source(config)
    check_servable(_read_config(source))
    _check_files(Path(source))
    assert config.path is not None
    _load_tokenizer(config.tokenizer or config.path, "tokenizer" if config.tokenizer else "path")


def _check_files(folder: Path) -> None:
    """Raises ValueError when a folder has no weights or a file of them is shorter than its header says."""
    if not folder.is_dir():
        return  # a hub id
    files = sorted(folder.glob("*.safetensors"))
    if not files and not list(folder.glob("*.bin")):
        raise ValueError(f"model.path: {folder} has no weights (*.safetensors); is the folder whole?")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model.path: cannot read {file} ({one_line(error)}); is the folder whole?") from error


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = model.to(dtype)  # type: ignore[arg-type]
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # decides near-ties between experts: always fp32
            buffer.data = buffer.data.float()
    return model


def _source(name: str, field: str) -> str:
    """A folder that exists, or what may be a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "tokenizer_config.json")):
            raise ValueError(f"model.{field}: {name} has no config.json, so it is not a Hugging Face folder")
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists():
        raise ValueError(f"model.{field}: there is no folder {name}; give a Hugging Face folder or a hub id")
    return name


def _model_source(config: ModelConfig) -> str:
    assert config.path is not None
    if config.overrides:
        raise ValueError("model.overrides change a preset: leave them out with model.path, whose shapes are given")
    return _source(config.path, "path")


def _read_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        mend = "is the folder whole?" if Path(source).is_dir() else "is the name right, and can the hub be reached?"
        raise ValueError(f"model.path: cannot load {source} ({one_line(error)}); {mend}") from error


def _load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    loader = PolicyModel if _read_config(source).model_type == "deepseek_v3" else AutoModelForCausalLM
    try:
        loaded: Any = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model.path: cannot load {source} ({one_line(error)}); is the folder whole?") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"model.path: {source} lacks {len(missing)} weights, e.g. {missing[0]}, which would be random: the "
            "folder is incomplete or belongs to another architecture"
        )
    return model


def _load_tokenizer(name: str, field: str) -> PreTrainedTokenizerBase:
    source = _source(name, field)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.{field}: cannot load a tokenizer from {source} ({one_line(error)}); set model.tokenizer"
        ) from error

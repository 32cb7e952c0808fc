"""From a preset, a Hugging Face folder or a hub id to a policy and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policy.config import ModelConfig
from policy.errors import one_line
from policy.lora import add_adapters, check_targets
from policy.model import PolicyModel
from policy.mtp import copy_mtp, mtp_report
from policy.presets import check_servable, preset_config
from policy.shards import INDEX, Shards
from policy.streaming import Streaming, build, check_weights, streams
from policy.tokenizer import build_tokenizer

_WEIGHT_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


class OpenPolicy(NamedTuple):
    """A policy whose weights may still lie on the disk.

    Attributes:
        model: on the CPU, in the config's dtype.
        tokenizer: its tokenizer.
        source: folder or hub id of the weights, for messages.
        streaming: reads the weights; None where they are all there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    streaming: Streaming | None

    def fill(self, part: nn.Module) -> None:
        """Reads the weights of a part of the model that are not there yet.

        Raises:
            ValueError: they cannot be read.
        """
        if self.streaming is not None:
            with _readable(self.source):
                self.streaming.fill(part)

    def close(self) -> None:
        """Ends the reading, when every part has been filled."""
        if self.streaming is not None:
            self.streaming.close()


def load_policy(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer, on the CPU, in the config's dtype; see :func:`open_policy`.

    Raises:
        ValueError: see :func:`open_policy`.
    """
    policy = open_policy(config, seed)
    policy.fill(policy.model)
    policy.close()
    return policy.model, policy.tokenizer


def open_policy(config: ModelConfig, seed: int) -> OpenPolicy:
    """The policy, whose weights are read when they are asked for.

    A preset gets random weights that depend on ``seed`` alone (the global random state is left as it is). A path is
    a folder or a hub id; DeepSeek-V3 configs become a ``PolicyModel``, anything else transformers' causal LM. Weights
    are read tensor by tensor, so that they are never in memory twice, and FP8 blocks are dequantised. No code that
    comes with a model is ever run. With ``lora``, adapters are put in; their first values depend on ``seed`` alone.

    Raises:
        ValueError: the preset, folder or hub id is not there or incomplete, holds tensors that nothing is known of, or
            does not fit its tokenizer; adapters for layers that are not there.
    """
    dtype = getattr(torch, config.dtype)
    streaming: Streaming | None = None
    if config.preset is not None:
        check_mtp(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = PolicyModel(preset_config(config.preset, **config.overrides))
        model = _cast(model, dtype)
        tokenizer = build_tokenizer() if config.tokenizer is None else _load_tokenizer(config.tokenizer, "tokenizer")
    else:
        assert config.path is not None
        model, streaming = _open_model(_model_source(config), dtype)
        tokenizer = _load_tokenizer(config.tokenizer or config.path, "tokenizer" if config.tokenizer else "path")
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.get_text_config().vocab_size}: "
            "set model.tokenizer to the one that the model was trained with"
        )
    if config.lora is not None:
        add_adapters(model, config.lora, seed, config.path)
    return OpenPolicy(model, tokenizer, config.path or str(config.preset), streaming)


def check_model(config: ModelConfig) -> dict[str, Any] | None:
    """Finds out early and without loading weights whether :func:`load_policy` would find the model.

    Returns:
        What becomes of its multi-token-prediction weights (:func:`check_mtp`).

    Raises:
        ValueError: no such preset, shapes that cannot be, a folder or hub id whose config or tokenizer cannot be read,
            whose weight files are cut off or whose tensors do not fit its config, adapters for layers that are not
            there, or a model that vLLM cannot serve.
    """
    if config.preset is not None:
        shapes = preset_config(config.preset, **config.overrides)
        check_servable(shapes)
        try:
            with torch.device("meta"):
                model = PolicyModel(shapes)
        except Exception as error:  # torch's many ways to say that there is no such layer
            raise ValueError(f"model.overrides: no model has these shapes: {one_line(error)}") from error
        if config.tokenizer is not None:
            _load_tokenizer(config.tokenizer, "tokenizer")
        if config.lora is not None:
            check_targets(model, config.lora)
        return check_mtp(config)
    source = _model_source(config)
    found = _read_config(source)
    check_servable(found)
    _check_files(Path(source), found)
    _generation_config(Path(source))
    assert config.path is not None
    _load_tokenizer(config.tokenizer or config.path, "tokenizer" if config.tokenizer else "path")
    report = check_mtp(config) if Path(source).is_dir() else None  # of a hub id only when it is loaded
    if config.lora is not None:
        with torch.device("meta"):
            check_targets(build(found, torch.float32), config.lora)
    return report


def check_mtp(config: ModelConfig) -> dict[str, Any] | None:
    """What becomes of the model's multi-token-prediction weights, for the run's events; None when it has none.

    Raises:
        ValueError: they are to be kept and there are none.
    """
    if config.path is None:
        if config.mtp == "keep":
            raise ValueError("model.mtp is keep, but a preset has no multi-token-prediction weights: set it to drop")
        return None
    folder = _folder(_model_source(config))
    if not list(folder.glob("*.safetensors")):
        return None
    with _shards(folder) as shards:
        return mtp_report(shards, _read_config(str(folder)), config.mtp)


def keep_mtp(config: ModelConfig, folder: Path) -> None:
    """Copies the model's multi-token-prediction weights into a model folder, if the config says so (``copy_mtp``)."""
    if config.mtp == "keep":
        copy_mtp(_folder(_model_source(config)), folder)


def _check_files(folder: Path, config: Any) -> None:
    """Raises ValueError when a folder's weights are missing, cut off, or not those of its config."""
    if not folder.is_dir():
        return  # a hub id
    if streams(config):
        with _shards(folder) as shards:
            check_weights(shards, _read_config(str(folder)))
        return
    _refuse_quantised(str(folder), config)
    if (folder / INDEX).is_file():
        _shards(folder)  # for what it refuses
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
        if field == "path" and (path / "adapter_config.json").is_file():
            raise ValueError(
                f"model.{field}: {name} holds adapters (adapter_config.json), which would be left out: merge them into "
                "their base with PEFT (merge_and_unload, save_pretrained), or give the base alone"
            )
        if not any((path / file).is_file() for file in ("config.json", "tokenizer_config.json")):
            inside = sorted(path.glob("model/config.json")) or sorted(path.glob("[0-9][0-9]-*/model/config.json"))
            hint = f"; the last model of this run is {inside[-1].parent}" if inside else ""
            raise ValueError(f"model.{field}: {name} has no config.json, so it is not a Hugging Face folder{hint}")
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists():
        raise ValueError(f"model.{field}: there is no folder {name}; give a Hugging Face folder or a hub id")
    return name


def _model_source(config: ModelConfig) -> str:
    assert config.path is not None
    if config.overrides:
        raise ValueError("model.overrides change a preset: leave them out with model.path, whose shapes are given")
    return _source(config.path, "path")


def _folder(source: str) -> Path:
    """The folder of a model; weights and config of a hub id are fetched."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(_WEIGHT_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: cannot load {source} ({one_line(error)}); is the name right, and can the hub be reached?"
        ) from error


def _shards(folder: Path) -> Shards:
    try:
        return Shards(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: cannot load {folder} ({one_line(error)}); is the folder whole?") from error


def _read_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what transformers raises depends on what is wrong
        mend = "is the folder whole?" if Path(source).is_dir() else "is the name right, and can the hub be reached?"
        raise ValueError(f"model.path: cannot load {source} ({_said(error)}); {mend}") from error


def _said(error: Exception) -> str:
    """What an error says; of a field of the wrong type transformers tells the name and the reason on two lines."""
    return " ".join(str(error).split())[:300] if isinstance(error, StrictDataclassError) else one_line(error)


def _open_model(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Streaming | None]:
    config = _read_config(source)
    if not streams(config):
        _refuse_quantised(source, config)
        if (Path(source) / INDEX).is_file():
            _shards(Path(source))  # for what it refuses
        return _load_by_transformers(source, dtype), None
    folder = _folder(source)
    with _readable(source):
        streaming = Streaming(_shards(folder), config, dtype)
    defaults = _generation_config(folder)
    if defaults is not None:
        streaming.model.generation_config = defaults
    return streaming.model, streaming


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"model.path: cannot load {source} ({one_line(error)}); is the folder whole?") from error


def _generation_config(folder: Path) -> GenerationConfig | None:
    """A folder's sampling defaults; None where it has none."""
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # what transformers raises depends on what is wrong
        raise ValueError(f"model.path: {folder}: generation_config.json cannot be read ({one_line(error)})") from error


def _refuse_quantised(source: str, config: Any) -> None:
    """transformers would compute with the quantised weights, which nobody can train, or change them in its own way."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"model.path: {source}: quantised weights of {config.model_type} cannot be read: take the checkpoint in "
            "bfloat16"
        )


def _load_by_transformers(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """For architectures whose tensors transformers renames or converts while it loads them."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model.path: cannot load {source} ({one_line(error)}); is the folder whole?") from error
    model, report = loaded
    for kind, verb, what in (("missing", "lacks", "random"), ("unexpected", "has, beyond its config,", "lost")):
        if names := sorted(report[f"{kind}_keys"]):
            raise ValueError(
                f"model.path: {source} {verb} {len(names)} weights, e.g. {names[0]}, which would be {what}: the folder "
                "is incomplete or belongs to another architecture"
            )
    return model


def _load_tokenizer(name: str, field: str) -> PreTrainedTokenizerBase:
    source = _source(name, field)
    code = ValueError(
        f"model.{field}: the tokenizer of {source} is code of its own, which is never run here: set model.tokenizer to "
        "a folder with the same vocabulary as tokenizer.json"
    )
    try:
        if _is_code(Path(source)):
            raise code
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise depends on what is wrong
        if error is code or "trust_remote_code" in str(error):  # what transformers says of a hub id
            raise code from error
        raise ValueError(
            f"model.{field}: cannot load a tokenizer from {source} ({one_line(error)}); set model.tokenizer"
        ) from error


def _is_code(folder: Path) -> bool:
    """Whether a folder's tokenizer is a class in a file of its own; transformers would try others in its place."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return False
    given = json.loads(path.read_text())
    return "AutoTokenizer" in (given.get("auto_map") or {})

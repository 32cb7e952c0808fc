"""Policies from presets and folders; checkpoints that are complete or not there at all.

A checkpoint folder::

    step-000120/
        model/          a Hugging Face folder (config, safetensors, tokenizer), which vLLM serves as it is
        learner.pt      the learner's state (moments, schedule, counters, random numbers)
        extra.json      what the caller wants back (cursor, step, ...)
        complete.json   name and size of every file above; written last

It is written beside its place under a hidden name, flushed to the disk, and renamed: a kill or a full disk leaves the
earlier checkpoints as they were, and at most a hidden leftover, which the next prune removes.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policy.config import ModelConfig
from policy.model import PolicyModel
from policy.presets import check_servable, preset_config
from policy.tokenizer import build_tokenizer

_STEP = re.compile(r"(?:\.replaced-)?step-(\d{6,})")
_PARTIAL, _REPLACED = ".partial-", ".replaced-"
_MANIFEST = "complete.json"
# config, tokenizer and file-system blocks beside the tensors
_OVERHEAD_BYTES = 1 << 20


class CheckpointError(OSError):
    """A checkpoint or model folder cannot be written or read; earlier ones are intact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where it lies.
        model_folder: its Hugging Face folder, for ``ModelConfig(path=...)``.
        learner_state: for ``Learner.load_state_dict``; tensors on the CPU.
        extra: what was saved with it.
    """

    folder: Path
    model_folder: Path
    learner_state: dict[str, Any]
    extra: dict[str, Any]


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
            raise ValueError(f"model.overrides: no model has these shapes: {_one_line(error)}") from error
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
            raise ValueError(f"model.path: cannot read {file} ({_one_line(error)}); is the folder whole?") from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a Hugging Face folder that vLLM and transformers load unchanged; an existing one is replaced as a whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    with _whole_folder(Path(folder), _tensor_bytes(model.state_dict())) as partial:
        _write_model(model, tokenizer, partial)


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learner_state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Writes a complete checkpoint or none.

    Args:
        folder: named ``step-NNNNNN``; an existing one of this name is replaced as a whole.
        model, tokenizer: go to ``folder/model``.
        learner_state: ``Learner.state_dict()``.
        extra: JSON-serialisable.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
        ValueError: the folder has another name.
    """
    folder = Path(folder)
    if not _STEP.fullmatch(folder.name) or folder.name.startswith("."):
        raise ValueError(f"a checkpoint folder is named step-NNNNNN, got {folder.name!r}")
    text = json.dumps(dict(extra), indent=1, sort_keys=True)
    needed = _tensor_bytes(model.state_dict()) + _tensor_bytes(learner_state)
    with _whole_folder(folder, needed) as partial:
        _write_model(model, tokenizer, partial / "model")
        # through a file object: torch's own writer hides the reason of a failure
        with (partial / "learner.pt").open("wb") as file:
            torch.save(dict(learner_state), file)
        (partial / "extra.json").write_text(text)
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads what :func:`save_checkpoint` wrote; the model itself is left to ``load_policy(path=...)``.

    Raises:
        CheckpointError: the checkpoint is not there, incomplete or unreadable.
    """
    folder = Path(folder)
    problem = _incomplete(folder)
    if problem:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({problem}): resume from an earlier one")
    try:
        state = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True)
        extra = json.loads((folder / "extra.json").read_text())
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read ({_one_line(error)}): resume from an earlier one") from error
    return Checkpoint(folder=folder, model_folder=folder / "model", learner_state=state, extra=extra)


def latest_checkpoint(parent: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``parent``; None when there is none. Torn ones do not count."""
    return max(_complete(Path(parent)), key=_age, default=None)


def prune(parent: Path, keep: int) -> list[Path]:
    """Removes all but the ``keep`` newest complete checkpoints, and everything torn. Returns what was removed.

    Raises:
        ValueError: ``keep`` < 1.
        CheckpointError: a folder cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    parent = Path(parent)
    kept = sorted(_complete(parent), key=_age)[-keep:]
    doomed = [p for p in _entries(parent) if p not in kept and (_STEP.fullmatch(p.name) or _is_leftover(p))]
    for path in doomed:
        _remove(path)
    return doomed


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _generation_config(model, tokenizer).save_pretrained(folder)


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's, with the tokenizer's end-of-sequence among those that end a completion (vLLM reads it here)."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    ends = config.eos_token_id
    known = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    config.eos_token_id = known[0] if len(known) == 1 else known or None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    return config


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
        raise ValueError(f"model.path: cannot load {source} ({_one_line(error)}); {mend}") from error


def _load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    loader = PolicyModel if _read_config(source).model_type == "deepseek_v3" else AutoModelForCausalLM
    try:
        loaded: Any = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model.path: cannot load {source} ({_one_line(error)}); is the folder whole?") from error
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
            f"model.{field}: cannot load a tokenizer from {source} ({_one_line(error)}); set model.tokenizer"
        ) from error


def _one_line(error: BaseException) -> str:
    first = str(error).strip().split("\n", 1)[0].strip()
    return first[:200] or type(error).__name__


@contextmanager
def _whole_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yields a folder to write into; it takes the place of ``folder`` when everything is on the disk.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind and ``folder`` is as it was.
    """
    needed += _OVERHEAD_BYTES
    partial = folder.with_name(_PARTIAL + folder.name)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        if shutil.disk_usage(partial.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        yield partial
        _flush(partial)
        _take_place(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _disk_full(error):
            raise CheckpointError(_disk_full_line(folder, needed)) from error
        if isinstance(error, RuntimeError):
            raise
        raise CheckpointError(f"cannot write {folder}: {_one_line(error)}") from error


def _disk_full_line(folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder.parent).free
    return (
        f"disk full: {folder} needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; earlier "
        "checkpoints are intact: free space, or keep fewer checkpoints, and run again"
    )


def _disk_full(error: BaseException | None) -> bool:
    """Whether the disk (or quota) is the reason; writers in C++ and Rust wrap or rename the system's error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"os error (28|122)\b", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(partial: Path, folder: Path) -> None:
    """Renames; a folder that is there already stays readable under a hidden name until the new one is in place."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Out of sight first, so that a kill in the middle does not leave a torn checkpoint under a good name."""
    hidden = path if path.name.startswith(_PARTIAL) else path.with_name(_PARTIAL + path.name.lstrip("."))
    try:
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise CheckpointError(f"cannot remove {path}: {_one_line(error)}") from error


def _entries(parent: Path) -> list[Path]:
    return [p for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _complete(parent: Path) -> list[Path]:
    return [p for p in _entries(parent) if _STEP.fullmatch(p.name) and not _incomplete(p)]


def _age(folder: Path) -> tuple[int, bool]:
    match = _STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), not folder.name.startswith(".")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith((_PARTIAL + "step-", _REPLACED + "step-", _PARTIAL + "replaced-step-"))


def _incomplete(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when it is complete."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {_MANIFEST}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(v) for v in value)
    return 0

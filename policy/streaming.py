"""A model from the safetensors files of a folder, tensor by tensor: never twice in memory.

The model is built empty (its memory is promised, not used), then every tensor is read into its place: experts, which
are stored one by one, into their rows of the stacked parameters; FP8 blocks dequantised on the way. Names are compared
both ways before anything is read: nothing stays random, and nothing that was stored is left out unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from policy.errors import one_line
from policy.fp8 import Block, block_of, check_scales, dequantise_into, scale_of
from policy.model import PolicyModel, stored_form
from policy.mtp import mtp_names
from policy.shards import Shards

# Tables of rotary angles, which old checkpoints hold and every model computes for itself.
_NOT_NEEDED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor of a folder and where it goes.

    Attributes:
        name: in the folder.
        place: what it fills.
        scale: name of its FP8 scales; None for a tensor that is stored plainly.
    """

    name: str
    place: Tensor
    scale: str | None = None


def streams(config: Any) -> bool:
    """Whether models of this config are read here: what is stored is what is computed with, but for stacked experts.

    transformers' own loader reads the others; it holds the weights twice where it converts them.
    """
    if config.model_type == "deepseek_v3":
        return True
    mapping = get_checkpoint_conversion_mapping(config.model_type)
    if mapping and repr(mapping) != repr(get_checkpoint_conversion_mapping("deepseek_v3")):
        return False
    if config.sub_configs or type(config) not in AutoModelForCausalLM._model_mapping:
        return False
    architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return not (architecture._keep_in_fp32_modules or architecture._keep_in_fp32_modules_strict)


def stream_model(shards: Shards, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, on the CPU, in ``dtype``, in eval mode.

    Args:
        shards: the folder's tensors.
        config: its config; changed: it says afterwards what is in memory.
        dtype: of the model; the router's correction bias stays fp32.

    Raises:
        ValueError: see :func:`plan`.
        OSError: a file cannot be read.
    """
    block = _block(shards, config)
    mtp = mtp_names(shards, config)
    with init.no_init_weights():
        model = _build(shards, config, dtype)
    moves = {move.name: move for move in plan(model, shards, block, mtp)}
    with torch.no_grad():
        for name in shards.in_file_order(moves):
            move = moves[name]
            if move.scale is None:
                shards.read_into(name, move.place)
            else:
                assert block is not None
                weight, scale = shards.read(name), shards.read(move.scale)
                _check_scales(shards, move.scale, scale, weight, block)
                dequantise_into(move.place, weight, scale, block)
    return model.eval()


def check_weights(shards: Shards, config: Any) -> None:
    """Finds out whether :func:`stream_model` would fill the model; reads no tensor but FP8 scales. Changes ``config``.

    Raises:
        ValueError: see :func:`plan`.
    """
    block = _block(shards, config)
    mtp = mtp_names(shards, config)
    with torch.device("meta"):
        moves = plan(_build(shards, config, torch.float32), shards, block, mtp)
    scaled = {move.scale: move.name for move in moves if move.scale is not None}
    for name in shards.in_file_order(scaled):
        scale = shards.read(name)
        if not bool(((scale.float() > 0) & scale.float().isfinite()).all()):  # only then are weights read
            assert block is not None
            _check_scales(shards, name, scale, shards.read(scaled[name]), block)


def _build(shards: Shards, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return build(config, dtype)
    except ValueError:
        raise
    except Exception as error:  # torch's many ways to say that there is no such layer, or no room for it
        raise ValueError(
            f"model.path: {shards.folder}: no model has the shapes of its config.json ({one_line(error)})"
        ) from error


def _check_scales(shards: Shards, name: str, scale: Tensor, weight: Tensor, block: Block) -> None:
    try:
        check_scales(name, scale, weight, block)
    except ValueError as error:
        raise ValueError(f"model.path: {shards.folder}: {error}") from error


def build(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, with the weights that the caller's context gives it: random, none, or on ``meta``."""
    _as_computed(config)
    config.dtype = dtype
    with _default_dtype(dtype):
        if config.model_type == "deepseek_v3":
            model: PreTrainedModel = PolicyModel(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def _as_computed(config: Any) -> None:
    """Takes out of a config what holds for the stored form only: a folder written from it holds plain weights."""
    for field in ("quantization_config", "auto_map"):
        if hasattr(config, field):
            delattr(config, field)
    rope = getattr(config, "rope_parameters", None) or {}
    rope.pop("type", None)  # the old name of rope_type, beside it
    for field in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if getattr(config, field, None):  # multi-token prediction; ``copy_mtp`` declares it where it is kept
            setattr(config, field, 0)


def places(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer that is stored, under its name in a folder: views of the live tensors.

    Stacked experts, gate and up [E, 2I, H] and down [E, H, I], are one entry an expert; tied tensors are one entry.
    """
    tied = _tied(model)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield from stored_form(name, tensor)


def plan(model: PreTrainedModel, shards: Shards, block: Block | None, left_out: Iterable[str]) -> list[Move]:
    """What goes where.

    Args:
        model: with all its parameters, of whatever device.
        shards: the folder's tensors.
        block: of its FP8 weights.
        left_out: names that are left out on purpose.

    Raises:
        ValueError: weights are missing, left over, of another shape or no numbers; FP8 weights and their scales do not
            fit together.
    """
    wanted = dict(places(model))
    missing = sorted(wanted.keys() - shards.keys())
    if missing:
        raise ValueError(
            f"model.path: {shards.folder} lacks {len(missing)} weights, e.g. {missing[0]}, which would be random: the "
            "folder is incomplete or belongs to another architecture"
        )
    moves = [_move(name, place, shards, block) for name, place in wanted.items()]
    if block is not None and all(move.scale is None for move in moves):
        raise ValueError(
            f"model.path: {shards.folder}: its config.json speaks of FP8 weights and none of them is: take "
            "quantization_config out of it, if the weights are plain ones"
        )
    used = wanted.keys() | {move.scale for move in moves} | set(left_out)
    tied = _tied(model)
    surplus = sorted(name for name in shards.keys() - used if not _NOT_NEEDED.search(name) and name not in tied)
    if surplus:
        raise ValueError(
            f"model.path: {shards.folder} has {len(surplus)} tensors that its config knows nothing of, e.g. "
            f"{surplus[0]}: they would be lost; mend config.json, or take them out of the folder"
        )
    for name in sorted(tied.keys() & shards.keys()):
        if not torch.equal(shards.read(name), shards.read(tied[name])):
            raise ValueError(
                f"model.path: {shards.folder} ties {name} to {tied[name]}, but holds different values for them: set "
                "tie_word_embeddings to false in its config.json"
            )
    return moves


def _block(shards: Shards, config: Any) -> Block | None:
    try:
        return block_of(getattr(config, "quantization_config", None))
    except ValueError as error:
        raise ValueError(f"model.path: {shards.folder}: {error}") from error


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Names that are stored under another one, and that one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(getattr(model, "all_tied_weights_keys", {}))


def _move(name: str, place: Tensor, shards: Shards, block: Block | None) -> Move:
    stored = shards[name]
    where = f"model.path: {shards.folder}"
    if stored.shape != tuple(place.shape):
        raise ValueError(f"{where}: {name} has shape {list(stored.shape)}, config.json asks for {list(place.shape)}")
    try:
        return Move(name, place, scale_of(name, shards, block))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

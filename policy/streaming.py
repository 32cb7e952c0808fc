"""A model from the safetensors files of a folder, tensor by tensor: never twice in memory.

The model is built without weights, then every tensor is read into its place: experts, which are stored one by one, into
their rows of the stacked parameters; FP8 blocks dequantised on the way. Names are compared both ways before anything is
read: nothing stays random, and nothing that was stored is left out unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
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


class Streaming:
    """A model whose weights are read from a folder part by part, when they are asked for.

    Until then they take no memory: who cuts each part up and lets go of it before the next is read never holds the
    whole model.

    Args:
        shards: the folder's tensors.
        config: its config; changed: it says afterwards what is in memory.
        dtype: of the model; the router's correction bias stays fp32.

    Attributes:
        model: on the CPU, in eval mode; its parameters have one element in memory each until they are read.

    Raises:
        ValueError: see :func:`plan`.
    """

    def __init__(self, shards: Shards, config: Any, dtype: torch.dtype) -> None:
        self._shards, self._block = shards, _block(shards, config)
        mtp = mtp_names(shards, config)
        with init.no_init_weights(), init_empty_weights(include_buffers=False), _untouched():
            self.model = _build(shards, config, dtype).eval()
        self.model.tie_weights()  # while it was built, each registration of a shared parameter made another
        self._stand_ins = _stand_in(self.model)
        self._scales = plan(self.model, shards, self._block, mtp)
        # Tensors themselves, because adapters, which may come in between, change the names of what they surround.
        state = self.model.state_dict(keep_vars=True)
        tied = _tied(self.model)
        self._unread = {id(tensor): (name, tensor) for name, tensor in state.items() if name not in tied}

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        """Reads the weights and buffers of a part of the model, or of all of it, that were not read yet.

        Raises:
            ValueError: FP8 scales that cannot be.
            OSError: a file cannot be read.
        """
        places: dict[str, Tensor] = {}
        made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # one for all modules that share it
        for module in part.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                stored, _ = self._unread.pop(id(tensor), (None, None))
                if stored is not None and not isinstance(tensor, nn.Parameter):
                    places |= stored_form(stored, tensor)
                elif stored is not None:
                    with _untouched():
                        memory = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = tensor, nn.Parameter(memory, tensor.requires_grad)
                    places |= stored_form(stored, memory)
                if id(tensor) in made:
                    setattr(module, name, made[id(tensor)][1])
        for name in self._shards.in_file_order(places):
            self._read(name, places[name])

    def close(self) -> None:
        """Lets go of the files, when everything has been read."""
        left = [name for name, _ in self._unread.values()]
        left += [name for name, parameter in self.model.named_parameters() if id(parameter) in self._stand_ins]
        assert not left, f"{len(left)} tensors were never read, e.g. {left[0]}"
        self._shards.close()

    def _read(self, name: str, place: Tensor) -> None:
        scale_name = self._scales[name]
        if scale_name is None:
            return self._shards.read_into(name, place)
        assert self._block is not None
        weight, scale = self._shards.read(name), self._shards.read(scale_name)
        _check_scales(self._shards, scale_name, scale, weight, self._block)
        dequantise_into(place, weight, scale, self._block)


def _stand_in(model: nn.Module) -> dict[int, nn.Parameter]:
    """Parameters of the ``meta`` device become one element each, seen in their shape; these, by their ids.

    On a real device, because PEFT moves adapters to that of what they adapt, and from ``meta`` there is no way back.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in made:
                one = torch.zeros((), dtype=empty.dtype).expand(empty.shape)
                made[empty] = nn.Parameter(one, empty.requires_grad)
            setattr(module, name, made[empty])
    return {id(parameter): parameter for parameter in made.values()}


def stream_model(shards: Shards, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, on the CPU, in ``dtype``, in eval mode; see :class:`Streaming`.

    Raises:
        ValueError: see :func:`plan`.
        OSError: a file cannot be read.
    """
    streaming = Streaming(shards, config, dtype)
    streaming.fill(streaming.model)
    streaming.close()
    return streaming.model


def check_weights(shards: Shards, config: Any) -> None:
    """Finds out whether :func:`stream_model` would fill the model; reads no tensor but FP8 scales. Changes ``config``.

    Raises:
        ValueError: see :func:`plan`.
    """
    block = _block(shards, config)
    mtp = mtp_names(shards, config)
    with torch.device("meta"):
        scales = plan(_build(shards, config, torch.float32), shards, block, mtp)
    scaled = {scale: name for name, scale in scales.items() if scale is not None}
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


def plan(model: PreTrainedModel, shards: Shards, block: Block | None, left_out: Iterable[str]) -> dict[str, str | None]:
    """What is read: the folder's names of the model's tensors, each with that of its FP8 scales.

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
    scales = {name: _scale(name, place, shards, block) for name, place in wanted.items()}
    if block is not None and not any(scales.values()):
        raise ValueError(
            f"model.path: {shards.folder}: its config.json speaks of FP8 weights and none of them is: take "
            "quantization_config out of it, if the weights are plain ones"
        )
    used = wanted.keys() | set(scales.values()) | set(left_out)
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
    return scales


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


def _scale(name: str, place: Tensor, shards: Shards, block: Block | None) -> str | None:
    stored = shards[name]
    where = f"model.path: {shards.folder}"
    if stored.shape != tuple(place.shape):
        raise ValueError(f"{where}: {name} has shape {list(stored.shape)}, config.json asks for {list(place.shape)}")
    try:
        return scale_of(name, shards, block)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def _untouched() -> Iterator[None]:
    """New memory is not filled with NaN, which deterministic algorithms bring along: it would all be taken at once."""
    switch: Any = torch.utils.deterministic  # a module that is an object: its one attribute is a property
    before, switch.fill_uninitialized_memory = switch.fill_uninitialized_memory, False
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = before


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

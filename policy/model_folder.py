"""Writes a model as a Hugging Face folder, tensor by tensor; vLLM and transformers load it as it is."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from policy import lora
from policy.config import ModelConfig
from policy.loading import keep_mtp
from policy.model import PolicyModel, checkpoint_tensors
from policy.parallel import Outlines, WholeTensors, sharded, whole
from policy.shards import INDEX, WEIGHTS, write_tensors

FILE_BYTES = 4 << 30
"""A model that is larger is written into several files of about this size."""

Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name in the checkpoint, dtype and shape of every tensor, in the order in which they are written."""


class ModelWriter:
    """What a model's folder will hold; everything but the weights is taken from the model now.

    Args:
        model: whole or sharded.
        tokenizer: its tokenizer.
        source: what the model was loaded from: its MTP weights are copied along if it says so, and adapters name it as
            their base. None: from nowhere.

    Attributes:
        layout: the tensors of the folder; adapters merged.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelConfig | None = None
    ) -> None:
        self._model, self._tokenizer, self._source = model, tokenizer, source
        outlines = Outlines(model)
        self._dtypes = {name: outlines[name].dtype for name in outlines}
        self.layout: Layout = [(n, t.dtype, tuple(t.shape)) for n, t in checkpoint_tensors(model, outlines)]
        root = sharded(model)
        self._config: Any = copy.deepcopy(model.config)
        self._config.dtype = model.dtype if root is None else root.dtype
        self._config.architectures = [
            "DeepseekV3ForCausalLM" if isinstance(model, PolicyModel) else type(model).__name__.removeprefix("FSDP")
        ]
        self._generation = generation_config(model, tokenizer)

    @property
    def bytes(self) -> int:
        """Bytes of all weights on the disk."""
        return sum(_bytes(dtype, shape) for _, dtype, shape in self.layout)

    def live(self) -> Mapping[str, Tensor]:
        """The model's own tensors, for :meth:`tensors` and :meth:`adapters`; of a sharded model each is gathered."""
        return self._model.state_dict() if sharded(self._model) is None else WholeTensors(self._model)

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors under the names of ``model.state_dict()``, masters among them, in the dtypes of the model."""
        return _InDtypes(state, self._dtypes)

    def tensors(self, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """What ``layout`` says, from a mapping that may load or gather each tensor when it is asked for."""
        return (tensor for _, tensor in checkpoint_tensors(self._model, state))

    def adapters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapters among ``state``, whole; none of a model without."""
        return {name: whole(state[name]) for name in state if lora.is_adapter(name)}

    def write(
        self, folder: Path, tensors: Iterable[Tensor], adapters: Mapping[str, Tensor], file_bytes: int | None = None
    ) -> None:
        """Writes the folder; one tensor at a time is in memory beside what ``tensors`` holds.

        Args:
            folder: made when it is not there.
            tensors: what ``layout`` says.
            adapters: see :meth:`adapters`; they go to ``adapter/`` in PEFT's form, beside the merged weights.
            file_bytes: above this a file is full; None: ``FILE_BYTES``.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(exist_ok=True)
        self._config.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self._generation.save_pretrained(folder)
        write_files(folder, self.layout, tensors, file_bytes or FILE_BYTES)
        if self._source is not None:
            keep_mtp(self._source, folder)
        if adapters:
            lora.save_adapter(self._model, folder / lora.FOLDER, adapters)


def write_files(folder: Path, layout: Layout, tensors: Iterable[Tensor], file_bytes: int) -> None:
    """Writes safetensors files, with an index when there are several.

    Raises:
        OSError: they cannot be written.
    """
    files = _share_out(layout, file_bytes)
    names = [WEIGHTS]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    source = (tensor.detach().to("cpu") for tensor in tensors)
    for name, part in zip(names, files, strict=True):
        write_tensors(folder / name, part, islice(source, len(part)))
    assert next(source, None) is None, "more tensors than laid out"
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(dtype, shape) for _, dtype, shape in layout)},
            "weight_map": {each[0]: name for name, part in zip(names, files, strict=True) for each in part},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
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


class _InDtypes(Mapping[str, Tensor]):
    """Tensors cast, when they are asked for, to the dtypes in which the model computes."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors, self._dtypes = tensors, {name: dtypes[name] for name in dtypes if name in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def _share_out(layout: Layout, file_bytes: int) -> list[Layout]:
    """Consecutive tensors that share a file."""
    files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dtype, shape in layout:
        more = _bytes(dtype, shape)
        if files[-1] and size + more > file_bytes:
            files.append([])
            size = 0
        files[-1].append((name, dtype, shape))
        size += more
    return [*files]


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize

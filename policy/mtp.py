"""Multi-token-prediction layers (MTP; arXiv 2412.19437, section 2.2): known by their names, copied or left out, told.

They lie behind the last decoder layer (``model.layers.61.…`` of DeepSeek-V3's 61) or under ``mtp.``. The policy does
not compute them and training does not move them: a copy goes with the weights that it was published with, and drafts
worse the further the policy moves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from policy.fp8 import FP8, SCALE_SUFFIX, block_of, check_scales, dequantise, scale_of
from policy.shards import INDEX, WEIGHTS, Shards, write_tensors

FILE = "mtp.safetensors"
_OWN_PREFIX = re.compile(r"^(?:model\.)?mtp\.")
_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_JOINTS = ("eh_proj", "enorm", "hnorm")
_KEPT_WIDE = "e_score_correction_bias"


def is_mtp(name: str, config: Any) -> bool:
    """Whether a tensor of a checkpoint belongs to an MTP layer that its config (as it was read) declares."""
    if _OWN_PREFIX.match(name):
        return True
    text = config.get_text_config()
    declared = getattr(text, "num_nextn_predict_layers", None) or 0
    layer = _LAYER.match(name)
    return layer is not None and 0 <= int(layer[1]) - text.num_hidden_layers < declared


def mtp_names(shards: Shards, config: Any) -> list[str]:
    """Names of a folder's MTP tensors.

    A number of layers that is too small would turn trained decoder layers into MTP layers; these are told apart by what
    joins the hidden state to the next token's embedding (``eh_proj``, ``enorm``, ``hnorm``).

    Raises:
        ValueError: a layer behind the last one lacks these.
    """
    names = [name for name in shards if is_mtp(name, config)]
    prefixes = {match[0] for match in map(_LAYER.match, names) if match}
    for prefix in sorted(prefixes):
        lacking = [part for part in _JOINTS if f"{prefix}{part}.weight" not in shards]
        if lacking:
            layers = config.get_text_config().num_hidden_layers
            raise ValueError(
                f"model.path: {shards.folder}: {prefix.rstrip('.')} is taken for multi-token prediction but has no "
                f"{', '.join(lacking)}: layers from {layers} on are ordinary decoder layers; set num_hidden_layers in "
                "config.json"
            )
    return names


def mtp_report(shards: Shards, config: Any, choice: str) -> dict[str, Any] | None:
    """What becomes of a folder's MTP weights, in numbers, for the run's events; None when there are none.

    Args:
        shards: the folder's tensors.
        config: its config as it was read.
        choice: ``ModelConfig.mtp``.

    Raises:
        ValueError: they are to be kept and there are none.
    """
    names = mtp_names(shards, config)
    if not names and choice == "keep":
        raise ValueError(
            f"model.mtp is keep, but {shards.folder} has no multi-token-prediction weights: set it to drop"
        )
    if not names:
        return None
    return {
        "event": "mtp_kept" if choice == "keep" else "mtp_left_out",
        "folder": str(shards.folder),
        "tensors": len(names),
        "bytes": shards.bytes(names),
    }


def describe(report: dict[str, Any]) -> str:
    """One line about :func:`mtp_report`."""
    what = f"{report['tensors']} multi-token-prediction tensors ({report['bytes'] / 1e6:.1f} MB) of {report['folder']}"
    if report["event"] == "mtp_kept":
        return f"{what} are copied, untrained, into every model folder (model.mtp=drop leaves them out)"
    return f"{what} are left out of every model folder (model.mtp=keep copies them)"


def copy_mtp(source: Path, folder: Path) -> int:
    """Adds the MTP weights of one folder to another, tensor by tensor; returns how many tensors.

    They go into a file of their own, which the index names; ``config.json`` declares their layers, so that vLLM and
    transformers know what they are. Weights in FP8 are dequantised; all get the dtype of the folder.

    Args:
        source: the folder that they were published in.
        folder: a model folder, complete but for them, in safetensors files.

    Raises:
        ValueError: the source has none, or cannot be read.
        OSError: no room on the disk.
    """
    origin = AutoConfig.from_pretrained(source, trust_remote_code=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    dtype = getattr(torch, config["dtype"])
    with Shards(source) as shards:
        names = mtp_names(shards, origin)
        if not names:
            raise ValueError(f"{source} has no multi-token-prediction weights to keep: set model.mtp to drop")
        block = block_of(getattr(origin, "quantization_config", None))
        scales = {name: scale_of(name, shards, block) for name in names if not _is_scale(name, shards)}
        # The widest first: a tensor must begin at a multiple of its item's size, or readers refuse the file.
        kept = sorted(shards.in_file_order(scales), key=lambda name: -_dtype_of(name, dtype).itemsize)

        def tensors() -> Iterator[Tensor]:
            for name in kept:
                tensor, scale = shards.read(name), scales[name]
                if scale is not None:
                    assert block is not None
                    factors = shards.read(scale)
                    check_scales(scale, factors, tensor, block)
                    tensor = dequantise(tensor, factors, block, dtype)
                yield tensor.to(_dtype_of(name, dtype))

        layout = [(name, _dtype_of(name, dtype), shards[name].shape) for name in kept]
        write_tensors(folder / FILE, layout, tensors())
    _add_to_index(folder, kept)
    layers = {match[1] for match in map(_LAYER.match, kept) if match}
    if layers:
        config["num_nextn_predict_layers"] = len(layers)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return len(kept)


def _is_scale(name: str, shards: Shards) -> bool:
    """Whether a tensor is the scales of an FP8 weight."""
    weight = name.removesuffix(SCALE_SUFFIX)
    return weight != name and weight in shards and shards[weight].dtype == FP8


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(_KEPT_WIDE) else dtype


def _add_to_index(folder: Path, names: Iterable[str]) -> None:
    """The folder's index with these names in the MTP file; made where the model is one file."""
    path = folder / INDEX
    places = json.loads(path.read_text())["weight_map"] if path.is_file() else dict.fromkeys(Shards(folder), WEIGHTS)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {**places, **dict.fromkeys(names, FILE)}}
    path.write_text(json.dumps(index))
    whole = Shards(folder)
    index["metadata"]["total_size"] = whole.bytes(whole)
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

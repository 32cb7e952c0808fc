"""A checksum of tensors that a GPU computes where they lie: for weights that travel between GPUs.

Per tensor two sums over its 32-bit (16-, 8-bit) words w_i, modulo 2^64: sum w_i and sum i * w_i, so that a changed
word and two exchanged ones both show; over the tensors a hash of names, dtypes, shapes and sums. Not meant against an
adversary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 22  # words in 64 bits at once: 32 MB, whatever the size of the tensor


class Fingerprint:
    """Of tensors in the order in which they are added; equal on every device."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes in one tensor of any dtype and shape."""
        low, high = word_sums(tensor)
        kind = str(tensor.dtype).removeprefix("torch.")
        self._hash.update(f"{name} {kind} {list(tensor.shape)} {low} {high}\n".encode())

    def hexdigest(self) -> str:
        """32 hex digits over everything added so far."""
        return self._hash.hexdigest()


def word_sums(tensor: Tensor) -> tuple[int, int]:
    """(sum w_i, sum i * w_i), i from 1, both modulo 2^64 as signed numbers."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    width = next(w for w in (torch.int32, torch.int16, torch.uint8) if flat.numel() % w.itemsize == 0)
    words = flat.view(width)
    low = torch.zeros((), dtype=torch.int64, device=words.device)
    high = torch.zeros_like(low)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        low += part.sum()
        high += (part * torch.arange(start + 1, start + 1 + len(part), device=part.device)).sum()
    return int(low), int(high)


@contextlib.contextmanager
def fingerprint_of_loads(model: Any, found: Fingerprint) -> Iterator[None]:
    """While it is open, everything that ``model.load_weights`` loads is taken into ``found`` first."""
    load = model.load_weights

    def noted(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            found.add(name, tensor)
            yield name, tensor

    model.load_weights = lambda weights: load(noted(weights))
    try:
        yield
    finally:
        del model.load_weights  # the method of the class shows again

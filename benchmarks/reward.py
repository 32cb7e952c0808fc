"""The reward that both sides of the GRPO benchmark use. Standard library only: it is imported in reward processes."""

from __future__ import annotations

import hashlib


def spread(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A number in [0, 1) from a hash of the completion's tokens, in TRL's calling convention.

    No two completions score alike, so no group is left out for lack of variance: every side trains on every sample.
    """
    digests = (hashlib.blake2b(repr(list(ids)).encode(), digest_size=4).digest() for ids in completion_ids)
    return [int.from_bytes(digest, "big") / 2**32 for digest in digests]

"""Rows of multiple-choice benchmarks: options in a shuffled order, and the letter of the right one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from random import Random
from typing import Any

LETTERS = "ABCDEFGHIJ"


def gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """GPQA's four options in an order that the problem's id alone decides, so that every run asks the same.

    Raises:
        KeyError: a column is missing.
    """
    id_ = str(row.get("Record ID") or hashlib.blake2b(str(row["Question"]).encode(), digest_size=8).hexdigest())
    right = str(row["Correct Answer"]).strip()
    options = [right, *(str(row[f"Incorrect Answer {number}"]).strip() for number in (1, 2, 3))]
    order = shuffled(len(options), id_)
    return {
        "id": id_,
        "question": str(row["Question"]).strip(),
        "choices": [options[index] for index in order],
        "answer": LETTERS[order.index(0)],
        "domain": row.get("High-level domain") or "unknown",
        "subdomain": row.get("Subdomain") or "unknown",
    }


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of 0 to count - 1 that ``key`` decides, the same on every machine."""
    order = list(range(count))
    Random(f"options/{key}").shuffle(order)
    return order

"""Errors in one line. Standard library only."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; its type's name where it says nothing."""
    first = str(error).strip().split("\n", 1)[0].strip()
    return first[:200] or type(error).__name__

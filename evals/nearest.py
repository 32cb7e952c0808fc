"""The nearest of several names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str], *, shown: int = 20) -> str:
    """``; did you mean 'x'?`` for the closest choice, else a list of the choices (at most ``shown`` of them)."""
    names = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    if close:
        best = next(name for name in names if name.lower() == close[0])
        return f"; did you mean {best!r}?"
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"; there are {', '.join(names[:shown])}{more}"

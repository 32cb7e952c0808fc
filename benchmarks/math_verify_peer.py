"""math-verify as it comes, in one process: the peer of the verifier pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from benchmarks.peer import Port


def serve(port: Port) -> None:
    """Answers each list of (gold, text) with the seconds that parsing and verifying them takes."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    verify(parse("\\boxed{x+1}"), parse("\\boxed{1+x}"))  # imports
    while True:
        pairs: Sequence[tuple[str, str]] = port.receive()
        began = time.perf_counter()
        for gold, text in pairs:
            verify(parse(f"\\boxed{{{gold}}}"), parse(text))
        port.send(time.perf_counter() - began)

"""One benchmark in a process of its own: its threads and its Ray end with it.

Not in ``__main__``: a spawned process does not import the ``__main__`` of a package, and would not find what to run.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from benchmarks.measure import Comparison
from benchmarks.options import Options
from benchmarks.peer import Peer, Port


def run_apart(name: str, *, quick: bool, seed: int) -> tuple[Comparison, ...]:
    """Runs a benchmark by its name.

    Raises:
        PeerFailed: it failed; the message holds the traceback.
    """
    with Peer(f"the benchmark {name}", _serve, name, quick, seed) as peer:
        return peer.ask("begin")


def _serve(port: Port, name: str, quick: bool, seed: int) -> None:
    port.receive()
    with tempfile.TemporaryDirectory(prefix="r1-benchmark-") as scratch:
        options = Options(scratch=Path(scratch), quick=quick, seed=seed, say=_say)
        module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        port.send(tuple(module.run(options)))


def _say(text: str) -> None:
    print(f"  {text}", flush=True)

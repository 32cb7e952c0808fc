"""A peer in a process of its own: its threads, memory and patches stay there, and what it started ends with it.

``Peer`` starts ``serve(connection, *arguments)`` of a module in a fresh process; both then exchange messages in
turns.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from pipelines.cli import quiet_libraries

_POLL_S = 1.0
_PR_SET_PDEATHSIG = 1


class PeerFailed(RuntimeError):
    """The peer's process ended or raised; the message holds its traceback."""


class Peer:
    """A child process that answers messages.

    Args:
        name: for error messages.
        serve: runs in the child: ``serve(connection, *arguments)``. Must be a module's function (the child imports it).
        arguments: picklable.
    """

    def __init__(self, name: str, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_guarded, args=(serve, theirs, arguments), daemon=False)
        self._process.start()
        theirs.close()

    def ask(self, message: Any) -> Any:
        """Sends a message and waits for the answer.

        Raises:
            PeerFailed: the peer raised, or its process is gone.
        """
        self.send(message)
        return self.answer()

    def send(self, message: Any) -> None:
        """Sends a message; :meth:`answer` waits for what comes back."""
        try:
            self._connection.send(message)
        except OSError:
            self.answer()  # raises what the peer had to say
            raise PeerFailed(f"{self._name}: its process is gone") from None

    def answer(self) -> Any:
        """The next message of the peer.

        Raises:
            PeerFailed: see :meth:`ask`.
        """
        while not self._connection.poll(_POLL_S):
            if not self._process.is_alive() and not self._connection.poll(0):
                raise PeerFailed(f"{self._name}: its process ended with exit code {self._process.exitcode}")
        try:
            kind, content = self._connection.recv()
        except EOFError:
            self._process.join()
            raise PeerFailed(f"{self._name}: its process ended with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise PeerFailed(f"{self._name} failed:\n{content}")
        return content

    def close(self) -> None:
        """Ends the process and all that it started; safe to call twice."""
        self._connection.close()
        left = _descendants(self._process.pid) if self._process.is_alive() else []
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        _kill(left)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Port:
    """The peer's end: receives messages, sends answers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side is done.
        """
        return self._connection.recv()

    def send(self, content: Any) -> None:
        """Answers."""
        self._connection.send(("ok", content))


def _guarded(serve: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        serve(Port(connection), *arguments)
    except (EOFError, BrokenPipeError):  # nobody asks any more: the normal end
        pass
    except Exception:  # the process boundary: handed to the one who asked, with its traceback
        connection.send(("error", traceback.format_exc()))
    finally:
        connection.close()
        _kill(_descendants(None))  # vLLM's processes, for one, live on without their parent


def _descendants(pid: int | None) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()

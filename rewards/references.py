"""Objects inside the sandbox as the tests see them, and the candidate's exceptions."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

from rewards.code_tasks import BadTests
from rewards.sandbox import CandidateError, Handle, Sandbox

# Raised inside a test, these end loops of the tests early instead of failing them: all(map(…)) would be true.
_NEVER_RAISED = (StopIteration, StopAsyncIteration)


class WrongAnswer(Exception):
    """What came back is not what was expected."""


class Reference:
    """An object inside the sandbox, or a function of the candidate. It can be used, but it equals nothing.

    Its ``==`` would be the candidate's own, and says what the candidate likes; so may its truth value, its length and
    its text, but these come back as plain values that the tests then judge.
    """

    __slots__ = ("_handle", "_sandbox")

    def __init__(self, sandbox: Sandbox, handle: Handle) -> None:
        object.__setattr__(self, "_sandbox", sandbox)
        object.__setattr__(self, "_handle", handle)

    def _ask(self, operation: str, *details: Any) -> Any:
        try:
            return _incoming(self._sandbox, self._sandbox.ask(operation, self._handle.index, *details))
        except CandidateError as error:
            raise _as_builtin(error) from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", _outgoing(args), _outgoing(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("assign", name, _outgoing(value))

    def __iter__(self) -> Iterator[Any]:
        found = self._ask("items")
        if type(found) is not list:
            raise WrongAnswer(f"the items of the candidate's {self._handle.kind} are no plain values")
        return iter(found)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", _outgoing(key))

    def __len__(self) -> int:
        return self._plain("len", int)

    def __bool__(self) -> bool:
        return self._plain("bool", bool)

    def __str__(self) -> str:
        return self._plain("str", str)

    def __repr__(self) -> str:
        return self._plain("repr", str)

    def _plain(self, operation: str, kind: type) -> Any:
        value = self._ask(operation)
        if type(value) is not kind:
            raise WrongAnswer(f"{operation} of the candidate's {self._handle.kind} is no {kind.__name__}")
        return value

    def __eq__(self, other: object) -> bool:
        raise WrongAnswer(f"the candidate returned an object ({self._handle.kind}), not a plain value")

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = None  # type: ignore[assignment]


class FromCandidate(Exception):
    """Raised by the candidate, of a class that only the candidate knows."""

    def __init__(self, error: CandidateError) -> None:
        super().__init__(str(error))
        self.names = error.names


def _as_builtin(error: CandidateError) -> Exception:
    """The candidate's exception as the nearest builtin one, for tests that expect it."""
    for name in error.names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            if issubclass(kind, _NEVER_RAISED):
                break
            try:
                made = kind(str(error))
            except Exception:  # a class that takes other arguments
                continue
            made.__dict__["candidate_names"] = error.names
            return made
    return FromCandidate(error)


def _incoming(sandbox: Sandbox, value: Any) -> Any:
    """References for the handles in a value."""
    if type(value) is Handle:
        return Reference(sandbox, value)
    return value


def _outgoing(value: Any) -> Any:
    """Arguments as they are sent: references by their number.

    Raises:
        BadTests: the tests pass something that cannot leave this process.
    """
    if isinstance(value, Reference):
        return ("\0reference", object.__getattribute__(value, "_handle").index)
    kind = type(value)
    if kind in (list, tuple):
        return kind(_outgoing(each) for each in value)
    if kind is dict:
        return {key: _outgoing(each) for key, each in value.items()}
    if value is None or kind in (bool, int, float, complex, str, bytes, set, frozenset):
        return value
    if kind is type and getattr(builtins, value.__name__, None) is value:
        return ("\0builtin", value.__name__)
    if hasattr(value, "tolist") and type(value).__module__ == "numpy":
        return value.tolist()
    raise BadTests(f"the tests pass a {kind.__name__} to the candidate; only plain values can be sent")


def lookup(sandbox: Sandbox, name: str) -> Any:
    """A function, class or value of the candidate."""
    try:
        if name not in sandbox.known:
            sandbox.known[name] = sandbox.ask("get", name)
        return _incoming(sandbox, sandbox.known[name])
    except CandidateError:
        raise FromCandidate(CandidateError(("NameError",), f"the program defines no {name!r}")) from None

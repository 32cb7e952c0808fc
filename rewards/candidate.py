"""What runs inside the sandbox, beside the candidate: it answers requests with plain values. Trusted by nobody.

Sent as compiled code over standard input, so nothing of the project has to be visible inside. Once a candidate runs
here it may change every function of this file; all that it can gain is to send other plain values, and that is what it
may do anyway. Only modules written in C are imported: a sandbox is started per program, and an import costs its time.

Frames in both directions: four bytes of length, then the body. Requests are marshalled (the parent is trusted), answers
are JSON text, which the parent can read without running or trusting anything.
"""

from __future__ import annotations

import builtins as _builtins
import marshal
import os
import sys
from _json import encode_basestring_ascii as _quote  # the package json would cost milliseconds
from typing import Any

MAX_DEPTH = 100
_MAX_OBJECTS = 10_000
_MAX_TEXT = 500


class NotPlain(Exception):
    """A value that is not made of plain ones."""


class _Guest:
    """The program under test: its module, and the objects that the tests hold references to."""

    def __init__(self, longest: int) -> None:
        self.module = type(sys)("solution")
        self.objects: list[Any] = []
        self.longest = longest  # bytes of one answer

    def load(self, program: str, helpers: str) -> None:
        sys.modules["solution"] = self.module
        names = self.module.__dict__
        if helpers:
            exec(compile(helpers, "<helpers>", "exec"), names)
        exec(compile(program, "<candidate>", "exec"), names)

    def answer(self, request: tuple[Any, ...]) -> str:
        operation, *details = request
        if operation == "load":
            self.load(*details)
            return "[null]"
        if operation == "case":
            return _run_case(*details)
        return '["v",' + self.encoded(self.looked_up(operation, details)) + "]"

    def looked_up(self, operation: str, details: list[Any]) -> Any:
        if operation == "get":
            return self.module.__dict__[details[0]]
        target = self.objects[details[0]]
        if operation == "call":
            return target(*self.decoded(details[1]), **self.decoded(details[2]))
        if operation == "attribute":
            return getattr(target, details[1])
        if operation == "assign":
            return setattr(target, details[1], self.decoded(details[2]))
        if operation == "items":
            return list(target)
        if operation == "item":
            return target[self.decoded(details[1])]
        return {"len": len, "bool": bool, "str": str, "repr": repr}[operation](target)

    def decoded(self, value: Any) -> Any:
        """Arguments: references among them (``("\\0reference", index)``) are replaced by the objects."""
        if type(value) in (list, tuple):
            if len(value) == 2 and value[0] == "\0reference":
                return self.objects[value[1]]
            if len(value) == 2 and value[0] == "\0builtin":
                return getattr(_builtins, value[1])
            return type(value)(self.decoded(each) for each in value)
        if type(value) is dict:
            return {key: self.decoded(each) for key, each in value.items()}
        return value

    def encoded(self, value: Any) -> str:
        """JSON; what JSON lacks is ``{"kind": …}``. An object that is not plain stays here, a reference is sent."""
        parts: list[str] = []
        try:
            _encode(value, parts, 0)
        except NotPlain:
            if len(self.objects) >= _MAX_OBJECTS:
                raise
            self.objects.append(value)
            kind = _quote(str(type(value).__name__)[:80])
            parts = ['{"reference":[', str(len(self.objects) - 1), ",", kind, "]}"]
        text = "".join(parts)
        if len(text) > self.longest:
            raise OverflowError(f"the result takes more than {self.longest} bytes")
        return text


def _encode(value: Any, out: list[str], depth: int) -> None:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise RecursionError("the result is nested too deeply")
    if value is None or kind is bool:
        out.append({None: "null", True: "true", False: "false"}[value])
    elif kind is int:
        out.append(str(value) if -(1 << 53) < value < 1 << 53 else f'{{"int":"{value:x}"}}')
    elif kind is float:
        out.append({"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(repr(value), repr(value)))
    elif kind is str:
        out.append(_quote(value))
    elif kind is list:
        _encode_all(value, out, depth)
    elif kind in (tuple, set, frozenset):
        out.append(f'{{"{kind.__name__}":')
        _encode_all(value, out, depth)
        out.append("}")
    elif kind is bytes:
        out.append(f'{{"bytes":"{value.hex()}"}}')
    elif kind is complex:
        out.append('{"complex":')
        _encode_all([value.real, value.imag], out, depth)
        out.append("}")
    elif kind is dict or kind in _dictionaries():
        out.append('{"dict":[')
        for position, item in enumerate(value.items()):
            out.append("," if position else "")
            _encode_all(item, out, depth)
        out.append("]}")
    else:
        _encode_numbers(value, out, depth)


def _encode_all(values: Any, out: list[str], depth: int) -> None:
    out.append("[")
    for position, each in enumerate(values):
        if position:
            out.append(",")
        _encode(each, out, depth + 1)
    out.append("]")


def _dictionaries() -> tuple[type, ...]:
    """Kinds of dict that are compared as one."""
    collections: Any = sys.modules.get("collections")
    return (collections.Counter, collections.defaultdict, collections.OrderedDict) if collections else ()


def _encode_numbers(value: Any, out: list[str], depth: int) -> None:
    """numpy's own scalars and arrays of numbers."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.generic, numpy.ndarray)) or value.dtype.kind not in "biufcU":
        raise NotPlain
    if isinstance(value, numpy.generic):
        _encode(value.item(), out, depth)
        return
    out.append('{"array":')
    _encode_all([value.dtype.str, list(value.shape), value.ravel().tolist()], out, depth)
    out.append("}")


def _run_case(program: str, given: bytes, seconds: float, longest: int) -> str:
    """One run of a whole program: standard input given, standard output and exit status back."""
    import select
    import signal
    import time

    given_read, given_write = os.pipe()
    out_read, out_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for source, target in ((given_read, 0), (out_write, 1)):
            os.dup2(source, target)
        os.closerange(3, 64)
        _as_program(program)
    os.close(given_read)
    os.close(out_write)
    os.set_blocking(given_write, False)
    output, sent, end = bytearray(), 0, time.monotonic() + seconds
    writing = [given_write]
    while len(output) <= longest and time.monotonic() < end:
        readable, writable, _ = select.select([out_read], writing, [], max(0.0, end - time.monotonic()))
        if writable:
            try:
                sent += os.write(given_write, given[sent : sent + 65536])
            except BlockingIOError:
                pass
            except OSError:
                sent = len(given)
            if sent >= len(given):
                os.close(given_write)
                writing = []
        if readable:
            chunk = os.read(out_read, 65536)
            if not chunk:
                break
            output += chunk
    if len(output) > longest:
        os.kill(pid, signal.SIGKILL)
        raise OverflowError(f"more than {longest} bytes of output")
    status = os.waitpid(pid, 0)[1]  # output closed; a program that goes on is the parent's to end
    for fd in (out_read, *writing):
        os.close(fd)
    return f'["v",{{"tuple":[{os.waitstatus_to_exitcode(status)},{{"bytes":"{output.hex()}"}}]}}]'


def _as_program(program: str) -> None:
    """Runs a program as Python would run a file, then ends the process."""
    status = 1
    try:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays open)
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        try:
            exec(compile(program, "<candidate>", "exec"), main.__dict__)
            status = 0
        except SystemExit as stop:
            status = stop.code if type(stop.code) is int else int(stop.code is not None)
        except MemoryError:
            status = 77
        except SyntaxError:
            status = 78
        threading: Any = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()
        sys.stdout.flush()
    finally:
        os._exit(status & 255)


def _report(error: BaseException) -> str:
    """The exception's class names, most special first, and its message."""
    try:
        message = str(error)[:_MAX_TEXT]
    except BaseException:
        message = ""
    names = [_quote(str(kind.__name__)[:80]) for kind in type(error).__mro__[:20]]
    return f'["e",[{",".join(names)}],{_quote(str(message))}]'


def _read_frame(fd: int) -> bytes:
    """One frame; an end of the pipe is the end of this process."""
    body, wanted = b"", 4
    while len(body) < wanted:
        chunk = os.read(fd, wanted - len(body))
        if not chunk:
            os._exit(0)
        body += chunk
        if wanted == 4 and len(body) == 4:
            body, wanted = b"", int.from_bytes(body, "big")
    return body


def _limit(limits: dict[str, int]) -> None:
    import resource

    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _filter(program: bytes) -> None:
    """Installs a seccomp filter for good; bubblewrap does this itself, the levels below it do not."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    loaded = Program(len(program) // 8, program)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(loaded), 0, 0):
        raise OSError(ctypes.get_errno(), "the seccomp filter was refused")


def _fork_under_watch(requests: int, answers: int) -> None:
    """This process stays behind and ends all others when the parent is gone or the candidate ends."""
    import select
    import signal

    pid = os.fork()
    if pid == 0:
        return
    os.close(answers)
    poll = select.poll()
    poll.register(requests, 0)  # only the hang-up
    status = 0
    while not poll.poll(50):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
    if os.getpid() != 1:  # without a process namespace: the group is all there is to kill
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGKILL)
    os._exit(min(255, abs(os.waitstatus_to_exitcode(status))))


def main() -> None:
    setup = marshal.loads(_read_frame(0))
    requests, answers = os.dup(0), setup["answers"]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.path[len(sys.path) :] = setup["path"]
    sys.dont_write_bytecode = True
    if setup["watched"]:
        _fork_under_watch(requests, answers)
    _limit(setup["limits"])
    if setup["filter"]:
        _filter(setup["filter"])
    os.set_inheritable(answers, False)
    guest, owner = _Guest(setup["longest"]), os.getpid()
    while True:
        request = marshal.loads(_read_frame(requests))
        try:
            text = guest.answer(request)
        except BaseException as error:
            text = _report(error)
        if os.getpid() != owner:  # forked by the candidate: only one process answers
            os._exit(1)
        body = text.encode()
        body = len(body).to_bytes(4, "big") + body
        while body:
            body = body[os.write(answers, body) :]


if __name__ == "__main__":
    main()

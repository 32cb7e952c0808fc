"""How strongly this machine can lock a candidate in: the levels, their command lines, and the probe that names them.

``bubblewrap``  user, process, network, IPC and mount namespaces; only the system's libraries, the interpreter and the
                named packages are visible, read-only; one small writable file system in memory.
``namespaces``  the same namespaces (util-linux ``unshare``), but the machine's files are visible as to any other user.
``rlimits``     resource limits and the system call filter alone: the network and other processes are reachable.

On each level: resource limits, a filter of system calls, no new privileges, a clean environment, no inherited
descriptors, and, started by root, a user id of its own for each program.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.seccomp import NoSeccomp, seccomp_filter

LEVELS = ("rlimits", "namespaces", "bubblewrap")
"""Weakest first."""
WORK = "/tmp"
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/alternatives")
_EMPTY_FOLDERS = ("/mnt", "/media", "/srv")
_CLONE_NEWNS, _MS_BIND, _MS_REC_PRIVATE = 0x20000, 0x1000, 0x44000
_FIRST_UID, _UIDS = 1_000_000, 500_000_000
_numbers = itertools.count()

# Read this file's frame of code, then run it: nothing of the project has to be visible inside.
_BOOT = """
import marshal, os
def read(n):
    b = b""
    while len(b) < n:
        c = os.read(0, n - len(b))
        if not c: os._exit(0)
        b += c
    return b
exec(marshal.loads(read(int.from_bytes(read(4), "big"))))
"""


class TooWeak(ValueError):
    """The machine does not reach the level that was asked for; the message says how to get there."""


@dataclass(frozen=True)
class Launch:
    """How one program is started.

    Attributes:
        command: argument list; the interpreter waits for its code on standard input.
        folder: a folder of the machine to remove afterwards; None where the file system lies in memory.
        uid: of the program; None when it runs as the user that started it.
        path: where the named packages are importable from, inside.
        new_session: the program leads a process group of its own.
    """

    command: list[str]
    folder: str | None = None
    uid: int | None = None
    path: tuple[str, ...] = ()
    new_session: bool = False


@dataclass(frozen=True)
class Isolation:
    """A level with what it needs on this machine; made by :func:`isolate`.

    Attributes:
        level: one of LEVELS.
        packages: names that are importable inside, those that are installed.
        shown: folder of the machine -> where other users find it (root's own files are out of their reach).
    """

    level: str
    packages: tuple[str, ...] = ()
    shown: dict[str, str] = field(default_factory=dict)

    def launch(self, disk: int, filter_fd: int, answers_fd: int) -> Launch:
        """The command for one more program.

        Args:
            disk: bytes of the writable file system.
            filter_fd: descriptor from which bubblewrap reads the filter.
            answers_fd: descriptor that the program keeps.
        """
        uid = _next_uid()
        python = [*_interpreter(self), "-I", "-S", "-B", "-c", _BOOT]
        if self.level == "bubblewrap":
            command = [*_bubblewrap(self, disk), "--seccomp", str(filter_fd), "--", *python]
            return Launch(command, None, uid, ("/packages",) if self.packages else ())
        folder = tempfile.mkdtemp(prefix="r1-sandbox-")
        os.chmod(folder, 0o700)
        if uid is not None:
            os.chown(folder, uid, uid)
        path = tuple(sorted({str(Path(_seen(self, place)).parent) for place in _package_folders(self.packages)}))
        return Launch([*(_UNSHARE if self.level == "namespaces" else ()), *python], folder, uid, path, True)


_UNSHARE = [
    "unshare",
    "--user",
    "--map-user=65534",
    "--map-group=65534",
    "--pid",
    "--fork",
    "--mount",
    "--mount-proc",
    "--net",
    "--ipc",
    "--uts",
    "--cgroup",
]


def at_least(level: str, wanted: str) -> bool:
    """Whether a level is as strong as another one."""
    return LEVELS.index(level) >= LEVELS.index(wanted)


def isolate(level: str, packages: Sequence[str] = ()) -> Isolation:
    """Prepares a level in this process; started by root it may get a view of the file system of its own for that.

    Raises:
        TooWeak: the level needs something that is not here. (:func:`probe` also runs a program.)
    """
    if sys.platform != "linux":
        raise TooWeak("code is run on Linux alone")
    try:
        seccomp_filter(keep_group=level != "bubblewrap")
    except NoSeccomp as error:
        raise TooWeak(str(error)) from None
    tool = {"bubblewrap": "bwrap", "namespaces": "unshare"}.get(level)
    if tool is not None and shutil.which(tool) is None:
        package = {"bwrap": "bubblewrap", "unshare": "util-linux"}[tool]
        raise TooWeak(f"{tool} is missing (Debian: apt install {package})")
    found = tuple(name for name in packages if _package_folders((name,)))
    needed = (sys.base_prefix, *_package_folders(found))
    return Isolation(level, found, _show(tuple(needed)) if _root_with_others() else {})


@functools.cache
def _show(folders: tuple[str, ...]) -> dict[str, str]:
    """Makes folders reachable for other users, in this process alone, where they are not."""
    hidden = [folder for folder in folders if not _reachable(folder)]
    if not hidden:
        return {}
    place = next((each for each in _EMPTY_FOLDERS if os.path.isdir(each) and not os.listdir(each)), None)
    libc = ctypes.CDLL(None, use_errno=True)

    def demand(result: int, what: str) -> None:
        if result:
            reason = os.strerror(ctypes.get_errno())
            raise TooWeak(f"other users cannot read {hidden[0]}, and {what} is refused here ({reason}): chmod o+rx it")

    if place is None:
        raise TooWeak(f"other users cannot read {hidden[0]}, and none of {', '.join(_EMPTY_FOLDERS)} is empty")
    demand(libc.unshare(_CLONE_NEWNS), "a mount namespace")
    demand(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None), "mounting")
    demand(libc.mount(b"tmpfs", place.encode(), b"tmpfs", 0, b"size=1m,mode=755"), "mounting")
    shown = {}
    for number, folder in enumerate(hidden):
        target = f"{place}/{number}/{Path(folder).name}"
        os.makedirs(target)
        demand(libc.mount(folder.encode(), target.encode(), None, _MS_BIND, None), "mounting")
        shown[folder] = target
    return shown


def _reachable(folder: str) -> bool:
    """Other users may go through every folder above, and read this one."""
    path = Path(folder).resolve()
    through = all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))
    return bool(through and path.stat().st_mode & stat.S_IROTH)


def _seen(isolation: Isolation, path: str) -> str:
    """Where a path of this machine lies for other users."""
    for folder, target in isolation.shown.items():
        if path == folder or path.startswith(folder + "/"):
            return target + path[len(folder) :]
    return path


def _interpreter(isolation: Isolation) -> list[str]:
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [base if isolation.level == "bubblewrap" else _seen(isolation, base)]


def _bubblewrap(isolation: Isolation, disk: int) -> list[str]:
    command = ["bwrap", *["--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc"]]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--hostname", "sandbox"]
    for place in _SYSTEM:
        if os.path.islink(place):
            command += ["--symlink", os.readlink(place), place]
        elif os.path.exists(place):
            command += ["--ro-bind", place, place]
    base = os.path.realpath(sys.base_prefix)
    if not base.startswith("/usr/") and base != "/usr":
        command += ["--ro-bind", _seen(isolation, base), base]
    for folder in _package_folders(isolation.packages):
        command += ["--ro-bind", _seen(isolation, folder), f"/packages/{Path(folder).name}"]
    size = ["--size", str(disk)]
    command += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm", *size, "--tmpfs", WORK]
    # What bubblewrap itself lays out lies in memory too, and without a size.
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]


def _package_folders(packages: Sequence[str]) -> tuple[str, ...]:
    """Folders of the packages and of the libraries that wheels put beside them; none for what is not installed."""
    folders: list[str] = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            folders += [each for each in (os.path.realpath(place), f"{place}.libs") if os.path.isdir(each)]
    return tuple(folders)


def _root_with_others() -> bool:
    return os.geteuid() == 0 and _uid_range() is not None


def _next_uid() -> int | None:
    """A user id that no other program has; None when this process may not give one."""
    span = _uid_range() if os.geteuid() == 0 else None
    if span is None:
        return None
    first, count = span
    return first + (os.getpid() * 64 + next(_numbers) % 64) % count


@functools.cache
def _uid_range() -> tuple[int, int] | None:
    """(first, count) of the user ids above all usual ones that exist here."""
    with open("/proc/self/uid_map") as file:
        spans = [tuple(map(int, line.split())) for line in file]
    inside, _, length = max(spans, key=lambda span: span[2])
    for first in (_FIRST_UID, 20_000):
        if inside <= first and inside + length - first >= 10_000:
            return first, min(_UIDS, inside + length - first - 1)
    return None


def clean_environment(folder: str | None) -> dict[str, str]:
    """What a candidate that works in ``folder`` sees of an environment.

    One thread of arithmetic, or few processes would be too few.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    home = folder or WORK
    return {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


def why_not(process: subprocess.Popen[Any], said: str) -> str:
    """One line about a sandbox that did not start, with what usually mends it."""
    text = " ".join(said.split())[-300:] or f"it ended with status {process.returncode}"
    if any(word in text for word in ("ermission", "not permitted", "user namespace", "uid map")):
        text += (
            "; user namespaces are refused here: sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces"
            " > 0, kernel.apparmor_restrict_unprivileged_userns=0; a container: --security-opt seccomp=unconfined"
        )
    return text

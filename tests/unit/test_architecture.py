"""Who may import whom, how large things may be, and what must stay light. Read from the source, not from a diagram."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("policy", "rollout", "rewards", "evals", "pipelines")
SHARED = {"rollout", "rollout.types", "rollout.template"}  # the vocabulary, open to everyone
MAY_IMPORT = {  # beside itself and SHARED
    "policy": set(),
    "rollout": set(),
    "rewards": set(),
    "evals": {"rollout", "rewards"},
    "pipelines": {"policy", "rollout", "rewards", "evals"},
}
ONLY_IN = {  # how the names of the modules begin that may import these
    "ray": ("pipelines.",),
    "vllm": (
        "rollout.vllm_",
        "rollout.weight_receiver",
        "rollout.gpu_receivers",
        "pipelines.weight_sync",
        "pipelines.gpu_",
    ),
}
NEVER_IN = {("rewards", "torch"), ("policy", "vllm"), ("policy", "ray")}


@cache
def sources() -> dict[str, ast.Module]:
    """``{module name: syntax tree}`` of the five packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Every module that is imported; without ``lazy`` only what runs when the module itself is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"line {node.lineno}: write the import from the package's name"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in submodules if name in sources()] or [node.module]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not lazy:
            continue
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, lazy=lazy)


def complaints(modules: dict[str, list[str]]) -> list[str]:
    """The imports that the rule forbids, of ``{module: what it imports}``."""
    wrong = []
    for module, targets in modules.items():
        package = module.partition(".")[0]
        for target in targets:
            top = target.partition(".")[0]
            foreign = top in PACKAGES and top != package and top not in MAY_IMPORT[package] and target not in SHARED
            misplaced = top in ONLY_IN and not module.startswith(ONLY_IN[top])
            if foreign or misplaced or (package, top) in NEVER_IN:
                wrong.append(f"{module} imports {target}")
    return wrong


def test_nobody_imports_what_is_not_theirs() -> None:
    assert complaints({name: list(imports(tree)) for name, tree in sources().items()}) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("policy.loss", "rollout.engine"),
        ("rollout.prompts", "policy.batch"),
        ("rewards.base", "evals.metrics"),
        ("rewards.base", "torch.nn"),
        ("evals.run", "pipelines.cli"),
        ("evals.run", "ray"),
        ("rollout.prompts", "vllm"),
    ],
)
def test_the_rule_bites(module: str, target: str) -> None:
    assert complaints({module: [target]}) == [f"{module} imports {target}"]


def test_vocabulary_is_open_to_everyone() -> None:
    assert complaints({name: ["rollout.types", "rollout.template"] for name in ("policy.batch", "rewards.base")}) == []


def test_no_import_cycle() -> None:
    graph = {name: set(imports(tree, lazy=False)) & set(sources()) - {name} for name, tree in sources().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_types_use_the_standard_library_only() -> None:
    tops = {name.partition(".")[0] for name in imports(sources()["rollout.types"])}
    assert tops <= sys.stdlib_module_names


def test_nothing_is_too_large() -> None:
    too_large = []
    for name, tree in sources().items():
        if (last := max((node.end_lineno or 0 for node in tree.body), default=0)) > 500:
            too_large.append(f"{name}: {last} lines (at most 500)")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                names = [arg.arg for arg in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                if length > 100 or count > 8:
                    too_large.append(
                        f"{name}.{node.name}: {length} lines (at most 100), {count} parameters (at most 8)"
                    )
    assert too_large == []


def test_no_drawer_for_everything() -> None:
    assert [name for name in sources() if name.rpartition(".")[2] in ("utils", "helpers", "common", "misc")] == []


@pytest.mark.parametrize(
    ("modules", "call", "forbidden"),
    [
        ("rollout rollout.types rollout.template rollout.prompts rollout.engine", "", "vllm torch ray transformers"),
        ("rewards rewards.base rewards.rubric", "", "torch vllm ray transformers"),
        ("evals evals.metrics", "", "torch vllm ray transformers"),
        ("pipelines pipelines.config", "", "torch vllm ray transformers"),
        ("pipelines.cli", "pipelines.cli.main(['--help'])", "torch vllm ray transformers datasets wandb matplotlib"),
    ],
)
def test_stays_light(modules: str, call: str, forbidden: str) -> None:
    if absent := set(modules.split()) - set(sources()):
        pytest.skip(f"not there yet: {absent}")
    program = (
        f"import sys, {', '.join(modules.split())}\n"
        f"try:\n    {call or 'pass'}\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {forbidden.split()} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")

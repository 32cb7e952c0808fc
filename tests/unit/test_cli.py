"""The console script: verbs, exit status, one-line errors, one JSON object."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines import cli
from rollout.engine import EngineDied

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: small
model: {preset: tiny}
stages:
  - kind: eval
    sets: [{name: hard, data: {source: "jsonl:h"}, rewards: {functions: [{path: accuracy}]}}]
"""
SUMMARY = {"name": "small", "seed": 0, "stages": [{"name": "eval", "kind": "eval", "status": "done"}]}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


@pytest.fixture
def run_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[dict[str, Any]]]:
    """Puts something in the place of the pipeline: an exception to raise, or what to do with the loaded recipe."""

    def install(behaviour: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run(loaded: Any, **options: Any) -> dict[str, Any]:
            calls.append({"loaded": loaded, **options})
            if isinstance(behaviour, BaseException):
                raise behaviour
            behaviour(Path(loaded.recipe.run.dir) / loaded.recipe.name)
            return SUMMARY

        module: Any = ModuleType("pipelines.run")
        module.run_recipe = run
        monkeypatch.setitem(sys.modules, "pipelines.run", module)
        return calls

    return install


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def r1(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment)


# -- usage -----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.process_time(); from pipelines.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'numpy', 'yaml', 'rich', 'matplotlib'} & set(sys.modules);"
        "print('RESULT', status, sorted(heavy), time.process_time() - began)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *shown, result = found.stdout.splitlines()
    _, status, heavy, seconds = result.split(maxsplit=3)
    assert (status, heavy) == ("0", "[]") and float(seconds) < 0.5
    text = "\n".join(shown)
    assert all(f"  {verb}" in text for verb in ("run", "show", "eval", "reward test", "reward sandbox"))


def test_showing_a_recipe_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.cli import main; main(['show', 'r1-tiny', '--docs']);"
        "print('HEAVY', sorted({'torch', 'vllm', 'ray', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "HEAVY []", found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "r1: there is no verb 'rnu'; there are run, show, eval, eval compare, eval"),
        (["run"], "r1 run: the following arguments are required: RECIPE"),
        (["run", "r1-tiny", "steps"], "r1 run: an override is written a.b=value, got 'steps'"),
        (["run", "r1-tiny", "--frehs"], "r1 run: unrecognized arguments: --frehs"),
        (["--jsno"], "r1: unrecognized arguments: --jsno"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""


def test_no_verb_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().err
    assert cli.main(["show", "--help"]) == 0
    assert "--docs" in capsys.readouterr().out


# -- show ------------------------------------------------------------------------------------------------------------


def test_show(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", recipe, "--docs", "stages.eval.sets.hard.samples=3"]) == 0, "options between overrides"
    text = capsys.readouterr().out
    assert "samples: 3" in text and "# command line" in text and "# completions per problem" in text
    assert cli.main(["show", "--json", recipe, "seed=4"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["recipe"]["seed"] == 4 and row["origins"]["seed"] == "command line"


def test_a_typo_in_a_recipe_is_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", recipe, "sede=4"]) == 1
    assert capsys.readouterr().err == "r1: command line: unknown key sede; did you mean 'seed'?\n"
    assert cli.main(["show", recipe, "sede=4", "--json"]) == 1
    shown = capsys.readouterr()
    answer = {"error": "command line: unknown key sede; did you mean 'seed'?", "type": "RecipeError"}
    assert json.loads(shown.out) == answer and shown.err.startswith("r1: ")


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m pipelines.cli show r1-tiny | head -n 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stderr) == (0, "") and found.stdout.startswith("name: r1-tiny")


# -- run -------------------------------------------------------------------------------------------------------------


def test_run(recipe: str, run_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = run_recipe(make_folder)
    assert cli.main(["run", recipe, "seed=3", "--fresh", "run.dir=out"]) == 0
    assert calls[0]["loaded"].recipe.seed == 3 and calls[0]["fresh"] is True and calls[0]["dry_run"] is False
    assert "run folder: out/small" in capsys.readouterr().out
    assert Path("out/small/learning_curve.png").exists()


def test_dry_run_starts_nothing(recipe: str, run_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = run_recipe(lambda path: None)
    assert cli.main(["run", recipe, "--dry-run"]) == 0
    assert calls[0]["dry_run"] is True and not Path("runs").exists()
    assert capsys.readouterr().out == "small.yaml: everything is in order; nothing was started\n"


def test_json_is_one_object_whatever_is_printed(recipe: str) -> None:
    script = f"""
import os, subprocess, sys
from types import ModuleType
from pathlib import Path
module = ModuleType("pipelines.run")
def run_recipe(loaded, fresh, dry_run):
    print("from Python")
    subprocess.run(["echo", "from a child"])
    os.write(1, b"from C\\n")
    Path("runs/small").mkdir(parents=True)
    return {SUMMARY!r}
module.run_recipe = run_recipe
sys.modules["pipelines.run"] = module
from pipelines.cli import main
sys.exit(main(["run", "small.yaml", "--json"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == SUMMARY and len(found.stdout.splitlines()) == 1
    assert all(text in found.stderr for text in ("from Python", "from a child", "from C", "run folder: runs/small"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("group_size\n  is 1"), "r1: group_size is 1"),
        (OSError("the disk is full"), "r1: the disk is full"),
        (EngineDied("worker 0 is gone"), "r1: worker 0 is gone"),
        (KeyboardInterrupt(), "r1: interrupted; the same command goes on from here"),
        (RuntimeError("odd"), "r1: RuntimeError: odd; run with --debug for the traceback"),
        (KeyError(), "r1: KeyError: no message; run with --debug for the traceback"),
    ],
)
def test_failures_are_one_line(
    error: BaseException, line: str, recipe: str, run_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(error)
    assert cli.main(["run", recipe]) == 1
    assert capsys.readouterr().err == f"{line}\n"
    assert cli.main(["run", recipe, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["type"] == type(error).__name__


def test_every_foreseen_failure_exists() -> None:
    import importlib

    for module, name in cli._FORESEEN.items():
        assert issubclass(getattr(importlib.import_module(module), name), Exception)


def test_debug_shows_the_traceback(recipe: str, run_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(ValueError("wrong"))
    assert cli.main(["run", recipe, "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "raise behaviour" in shown and shown.endswith("r1: wrong\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_one_line(recipe: str, number: signal.Signals) -> None:
    script = """
import sys, time
from types import ModuleType
module = ModuleType("pipelines.run")
def run_recipe(loaded, fresh, dry_run):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
module.run_recipe = run_recipe
sys.modules["pipelines.run"] = module
from pipelines.cli import main
sys.exit(main(["run", "small.yaml"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored in the background
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and out == "cleaned up\n"
    assert err == "r1: interrupted; the same command goes on from here\n"


# -- eval ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate_model(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    import pipelines.evaluate

    calls: list[tuple[Any, ...]] = []
    row = {
        "name": "hard", "judge": "accuracy", "pass_at_1": 0.5, "ci95": [0.4, 0.6], "n": 100, "k": 8, "greedy": 0.75,
        "greedy_ci95": [0.7, 0.8], "by_problem": {"p": 0.5}, "greedy_by_problem": {"p": 1.0},
    }  # fmt: skip

    def evaluate(model: str, loaded: Any, *, out: Path | None = None, trained_by: Any = None) -> dict[str, Any]:
        calls.append((model, loaded, out, trained_by))
        return {"model": model, "results": {"hard": row}}

    monkeypatch.setattr(pipelines.evaluate, "evaluate_model", evaluate, raising=False)
    return calls


def test_eval(recipe: str, evaluate_model: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "03-grpo" / "model").mkdir(parents=True)
    (tmp_path / "run" / "03-grpo" / "model" / "config.json").write_text("{}")
    assert cli.main(["eval", "run", "--recipe", recipe, "seed=2", "--out", "there"]) == 0
    model, loaded, out, trained_by = evaluate_model[0]
    assert (model, loaded.recipe.seed, out, trained_by) == ("run/03-grpo/model", 2, Path("there"), None)
    shown = capsys.readouterr().out
    assert "50.0 [40.0, 60.0]" in shown and "75.0 [70.0, 80.0]" in shown
    assert cli.main(["eval", "org/name", "--recipe", recipe, "--json"]) == 0
    assert evaluate_model[1][0] == "org/name", "a hub id is handed on"
    row = json.loads(capsys.readouterr().out)
    assert row["results"]["hard"]["pass_at_1"] == 0.5 and "by_problem" not in row["results"]["hard"]


def test_a_run_folder_brings_its_own_recipe(
    recipe: str, evaluate_model: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text(RECIPE)
    assert cli.main(["eval", "run"]) == 1
    assert "run holds no model" in capsys.readouterr().err
    (tmp_path / "run" / "config.json").write_text("{}")
    assert cli.main(["eval", "run", "seed=7"]) == 0
    _, loaded, _, trained_by = evaluate_model[0]
    assert (loaded.recipe.name, loaded.recipe.seed, trained_by.recipe.seed) == ("small", 7, 0), "trained as it was"
    assert cli.main(["eval", "elsewhere"]) == 1
    assert "there is no elsewhere here; a model of the hub needs --recipe" in capsys.readouterr().err
    (tmp_path / "run" / "recipe.resolved.yaml").unlink()
    assert cli.main(["eval", "run"]) == 1
    assert "--recipe is missing" in capsys.readouterr().err


def test_the_installed_script() -> None:
    found = r1("--help")
    assert found.returncode == 0 and "verbs:" in found.stdout and found.stderr == ""

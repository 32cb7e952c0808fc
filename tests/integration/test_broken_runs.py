"""What a user can get wrong, for real: `r1 run` ends in one clear line before or at the step, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]


def recipe(**engine: Any) -> dict[str, Any]:
    content = yaml.safe_load((SUPPORT / "mini.yaml").read_text())
    content["engine"].update(engine)
    return content


def r1(folder: Path, content: dict[str, Any], *more: str, path: Sequence[Path] = ()) -> tuple[int, str, str]:
    """``r1 run`` on a recipe in ``folder``: exit status, the last line of standard error, all of it.

    Python looks for modules in ``path`` first.
    """
    file = folder / "mini.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(file), f"run.dir={folder}", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250
    )
    lines = done.stderr.strip().splitlines()
    return done.returncode, lines[-1] if lines else "", done.stderr


def no_model(content: dict[str, Any]) -> None:
    content["model"] = {"path": "/no/such/model"}


def no_data(content: dict[str, Any]) -> None:
    content["stages"][0]["data"] = {"source": "jsonl:/no/such/rows.jsonl"}


def no_generator(content: dict[str, Any]) -> None:
    content["stages"][2]["data"] = {"source": "reasoning_gym:chain_sun", "size": 9}


def typo(content: dict[str, Any]) -> None:
    content["stages"][2]["problem_per_step"] = 5


def alone(content: dict[str, Any]) -> None:
    content["stages"][2]["group_size"] = 1


def nothing_to_train_on(content: dict[str, Any]) -> None:
    content["stages"][2]["data"] = {"source": "jsonl:empty.jsonl"}


def no_reward(content: dict[str, Any]) -> None:
    content["stages"][2]["rewards"] = {"functions": [{"path": "my_rewards:concise"}]}


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (no_model, ["model.path", "/no/such/model"]),
        (no_data, ["/no/such/rows.jsonl"]),
        (no_generator, ["chain_sun", "chain_sum"]),
        (typo, ["problem_per_step", "problems_per_step"]),
        (alone, ["group_size must be >= 2, got 1"]),
        (nothing_to_train_on, ["empty.jsonl"]),
        (no_reward, ["my_rewards:concise"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_run_is_refused_before_anything_starts(
    breaks: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    content = recipe()
    breaks(content)
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["run", "mini.yaml", f"run.dir={tmp_path / 'runs'}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("r1: ") and told.count("\n") == 1, told
    assert all(word in told for word in words), told
    assert not (tmp_path / "runs").exists()


def test_a_prompt_longer_than_the_context_names_problem_and_lengths(tmp_path: Path) -> None:
    content = recipe()
    content["stages"] = [{**content["stages"][2], "template": "r1-zero"}]
    status, line, everything = r1(tmp_path, content)
    assert status == 1 and everything == line + "\n", everything
    assert re.search(r"problem \S+: its prompt takes \d+ tokens .* context of 128 .*engine.max_model_len", line)


RAISES = """
def picky(completion, problem):
    raise KeyError("no such thing")
"""


def test_a_reward_that_raises_stops_at_the_step_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(RAISES)
    content = recipe(workers=1)
    content["stages"] = [content["stages"][2]]
    content["stages"][0]["rewards"] = {"functions": [{"path": f"{tmp_path / 'my_rewards.py'}:picky"}]}
    status, line, everything = r1(tmp_path, content)
    assert status == 1 and everything == line + "\n", everything
    assert "picky" in line and "KeyError" in line and "no such thing" in line
    events = (tmp_path / "mini/events.jsonl").read_text()
    assert "Traceback" in events and "line 3, in picky" in events
    drawn = list((tmp_path / "mini/01-grpo/rollouts").glob("*.jsonl"))
    assert len(drawn) == 1 and len(drawn[0].read_text().splitlines()) > 0, "what was drawn is kept"

    (tmp_path / "my_rewards.py").write_text("def picky(completion, problem):\n    return len(completion.text) % 2\n")
    assert r1(tmp_path, content) == (0, "", ""), "mended, the same command goes on"
    steps = [json.loads(line)["step"] for line in (tmp_path / "mini/01-grpo/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


WITHOUT_REPACK = """
import rollout.vllm_start as start

complete = start.process_environment

def process_environment(*args, **kwargs):
    return {**complete(*args, **kwargs), start.MENDS_VARIABLE: "batch,rotary"}

start.process_environment = process_environment
"""


def test_without_the_expert_mend_the_run_stops_at_its_first_sync(tmp_path: Path) -> None:
    """Every process of the run loses the mend as it starts, as if it had never been written."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_REPACK)
    content = recipe(workers=1)
    content["stages"] = [content["stages"][2]]
    status, line, everything = r1(tmp_path, content, path=[tmp_path])
    assert status == 1 and everything == line + "\n", everything
    assert re.search(r"version \d+ of the weights in rollout worker \d .*; worst: .+ at \d+ \(engine -", line), line
    assert not list((tmp_path / "mini/01-grpo/rollouts").glob("*")), "nothing was drawn with what is not attested"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_when_there_is_room(small_disk: Path) -> None:
    content = recipe()
    content["stages"] = [content["stages"][0]]
    status, line, everything = r1(small_disk, content)
    assert status == 1 and everything == line + "\n", everything
    assert "disk full" in line and "free space" in line and str(small_disk) in line
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert r1(small_disk, content) == (0, "", "")
    summary = json.loads((small_disk / "mini/summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["done"]
    assert "resumed" in (small_disk / "mini/events.jsonl").read_text()

"""The run folder: atomic files, journals that survive a kill, the lock, resuming, a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import LoadedRecipe, load_recipe
from pipelines.files import Lock, append_line, read_lines, write_atomic, writing
from pipelines.run_dir import (
    Journal,
    RunConfig,
    RunDir,
    RunDirError,
    StageDir,
    brief,
    read_json,
    step_name,
)
from pipelines.run_models import model_folder
from policy.manifest import write_manifest
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

ROOT = Path(__file__).parents[2]

RECIPE = """\
name: small
model: {preset: tiny}
stages:
  - kind: sft
    data: {source: "jsonl:train.jsonl"}
    steps: 3
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    return load(tmp_path)


def load(tmp_path: Path, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides)


def group(problem: str, text: str = "3+5=8", advantage: float | None = None) -> RolloutGroup:
    completion = Completion(
        prompt_token_ids=(1, 2), token_ids=(3, 4), text=text, rollout_logprobs=(-0.1, -1 / 3),
        finish_reason=FinishReason.LENGTH, policy_version=4, sample_index=1, seed=2**62 + 1,
    )  # fmt: skip
    rollout = Rollout(completion=completion, scores={"a": 1.0}, reward=0.1 + 0.2, advantage=advantage)
    return RolloutGroup(problem=Problem(id=problem, prompt="3+5", metadata={"k": [1]}), rollouts=(rollout,) * 2)


# -- files -----------------------------------------------------------------------------------------------------------


def test_lines_come_back_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, "one")
    append_line(path, "zwei — ✓", fsync=True)
    with path.open("ab") as file:
        file.write(b"torn \xe2\x80")  # killed in the middle of a character
    assert list(read_lines(path)) == [(1, "one"), (2, "zwei — ✓")]
    append_line(path, "three")
    assert path.read_text() == "one\nzwei — ✓\nthree\n"


def test_a_file_that_is_one_torn_line_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 200_000)  # longer than the block in which the last newline is looked for
    assert list(read_lines(path)) == []
    append_line(path, "one")
    assert path.read_text() == "one\n"


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n")), max_size=4), torn=st.binary())
def test_any_torn_tail_is_ignored(tmp_path_factory: Any, lines: list[str], torn: bytes) -> None:
    path = tmp_path_factory.mktemp("lines") / "a"
    for line in lines:
        append_line(path, line)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    assert [line for _, line in read_lines(path)] == lines
    append_line(path, "end")
    assert [line for _, line in read_lines(path)] == [*lines, "end"]


def test_lines_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "none")) == []
    (tmp_path / "bad").write_bytes(b"\xff\n")
    with pytest.raises(RunDirError, match="is damaged"):
        list(read_lines(tmp_path / "bad"))
    with pytest.raises(RunDirError, match="cannot be read"):
        list(read_lines(tmp_path))


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunDirError, match=r"the disk is full while writing .*: free some space") as error:
        write_atomic(path, "new")
    assert error.value.errno == errno.ENOSPC and isinstance(error.value, OSError)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_append_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    append_line(path, "one")
    real = os.pwrite

    def half(handle: int, data: bytes, offset: int) -> int:
        if len(data) < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:5], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(RunDirError, match="disk is full"):
        append_line(path, "two and more")
    assert path.read_text() == "one\n"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:3], offset))
    append_line(tmp_path / "a", "a long line")
    assert (tmp_path / "a").read_text() == "a long line\n"


def test_what_a_library_raises_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="other"), writing(tmp_path / "x", RuntimeError):
        raise RuntimeError("other")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(RunDirError, match="disk is full"), writing(tmp_path / "not" / "there", RuntimeError):
        raise RuntimeError("write failed")
    with pytest.raises(RunDirError, match="cannot be written: Permission denied"), writing(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")


# -- journals --------------------------------------------------------------------------------------------------------


def test_groups_come_back_without_loss(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.finished() == {}
    first, second = group("p1", text='quote " \n ✓ \ud800'), group("p2")
    journal.append(first)
    journal.append(second)
    assert journal.finished() == {"p1": first, "p2": second}
    assert len(journal.path.read_text().splitlines()) == 2, "one line for each group"


def test_a_complete_step_is_rewritten_in_order(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "01-grpo", "rl", "grpo", lambda row: None)
    stage.journal(step_name(7)).append(group("b"))
    stage.journal(step_name(7)).append(group("a"))
    stage.complete_step(7, [group("a", advantage=1.0), group("b", advantage=-1.0)])
    rows = [json.loads(line) for line in (stage.rollouts / "step-000007.jsonl").read_text().splitlines()]
    assert [(row["problem"]["id"], row["rollouts"][0]["advantage"]) for row in rows] == [("a", 1.0), ("b", -1.0)]
    completion = rows[0]["rollouts"][0]["completion"]
    assert completion["text"] == "3+5=8" and completion["finish_reason"] == "length"
    assert completion["policy_version"] == 4
    assert stage.journal(step_name(7)).finished()["a"].rollouts[0].advantage == 1.0
    assert stage.journal(step_name(8)).finished() == {}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(group("a"))
    append_line(journal.path, '{"problem": 1}')
    journal.append(group("b"))
    with pytest.raises(RunDirError, match=r"j\.jsonl:2: this line is damaged"):
        journal.finished()


WRITER = """
import sys
from pathlib import Path
from pipelines.run_dir import Journal
from tests.unit.test_run_dir import group
journal = Journal(Path(sys.argv[1]))
for number in range(10**6):
    journal.append(group(f"p{number}"))
    print(number, flush=True)
"""


def test_kill_9_loses_no_finished_group(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout is not None
    for _ in range(40):
        last = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.communicate()[0].split()
    last = int(rest[-1]) if rest else last
    with path.open("ab") as file:
        file.write(b'{"problem": {"id": "torn')  # the worst moment for a kill
    finished = Journal(path).finished()
    assert {f"p{number}" for number in range(last + 1)} <= set(finished)
    assert all(value == group(key) for key, value in finished.items())


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_new_folder(tmp_path: Path, loaded: LoadedRecipe) -> None:
    with RunDir.open(tmp_path / "runs", loaded) as run:
        assert run.path == tmp_path / "runs" / "small" and not run.resumed
        assert (run.path / "recipe.yaml").read_text() == RECIPE
        assert load_recipe(run.path / "recipe.resolved.yaml").recipe == loaded.recipe
        stage = run.stage(0, "sft", "sft")
        assert stage.path.name == "01-sft" and stage.checkpoints.is_dir() and stage.rollouts.is_dir()
        assert stage.done is None and run.summary is None
        stage.mark_done({})
        assert stage.done == {}
        stage.note({"event": "hello", "path": Path("x")})
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "hello"]
    assert events[1]["stage"] == "sft" and events[0]["pid"] == os.getpid() and events[0]["time"].endswith("+00:00")


def test_the_summary_leaves_out_what_there_is_per_problem(tmp_path: Path, loaded: LoadedRecipe) -> None:
    figures = {"results": {"hard": {"pass_at_1": 0.5, "by_problem": {"p": 1.0}, "greedy_by_problem": {}}}, "seconds": 2}
    assert brief(figures) == {"results": {"hard": {"pass_at_1": 0.5}}, "seconds": 2}
    assert brief({"steps": 3}) == {"steps": 3}
    with RunDir.open(tmp_path, loaded) as run:
        run.write_summary({"name": "small", "seed": 0, "stages": [{"name": "sft", "status": "done", **figures}]})
        assert run.summary is not None
        assert run.summary["stages"][0]["results"] == {"hard": {"pass_at_1": 0.5}}


def test_resuming(tmp_path: Path, loaded: LoadedRecipe) -> None:
    with RunDir.open(tmp_path, loaded) as run:
        run.stage(0, "sft", "sft").mark_done({"loss": 1.0})
    again = load(tmp_path, "run.keep_checkpoints=5", "tracking.console=false")
    with RunDir.open(tmp_path, again) as run:
        assert run.resumed and run.stage(0, "sft", "sft").done == {"loss": 1.0}
        assert load_recipe(run.path / "recipe.resolved.yaml").recipe.run.keep_checkpoints == 5


def test_a_changed_recipe_is_refused_and_its_keys_named(tmp_path: Path, loaded: LoadedRecipe) -> None:
    RunDir.open(tmp_path, loaded).close()
    changed = load(tmp_path, "stages.sft.steps=9", "seed=2", "model.overrides={num_hidden_layers: 3}", "run.cpus=1")
    with pytest.raises(ValueError, match="differs") as error:
        RunDir.open(tmp_path, changed)
    text = str(error.value)
    for part in ("stages.0.steps: 3 -> 9", "seed: 0 -> 2", "overrides.num_hidden_layers: (absent) -> 3", "--fresh"):
        assert part in text
    assert "cpus" not in text and "\n" not in text
    RunDir.open(tmp_path, loaded).close()  # the refusal let go of the lock


def test_fresh_moves_the_old_folder_aside(tmp_path: Path, loaded: LoadedRecipe) -> None:
    for number in range(3):
        changed = load(tmp_path, f"seed={number}")
        with RunDir.open(tmp_path, changed, fresh=True) as run:
            assert not run.resumed
            (run.path / "mark").write_text(str(number))
    kept = {name: (tmp_path / name / "mark").read_text() for name in ("small", "small.1", "small.2")}
    assert kept == {"small": "2", "small.1": "0", "small.2": "1"}


def test_folders_that_are_no_run_folders(tmp_path: Path, loaded: LoadedRecipe) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("dear to someone")
    with pytest.raises(RunDirError, match=r"has files but no recipe\.resolved\.yaml"):
        RunDir.open(tmp_path, loaded)
    (tmp_path / "other").write_text("")
    with pytest.raises(RunDirError, match="is a file, not a run folder"):
        RunDir.open(tmp_path, replace(loaded, recipe=replace(loaded.recipe, name="other")))
    with pytest.raises(RunDirError, match="cannot be written"):
        RunDir.open(tmp_path / "other", loaded)


def test_a_folder_killed_before_its_recipe_was_whole_is_begun_again(tmp_path: Path, loaded: LoadedRecipe) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "small" / ".recipe.resolved.yaml.tmp").write_text("na")
    with RunDir.open(tmp_path, loaded) as run:
        assert not run.resumed


def test_damaged_files_are_named(tmp_path: Path, loaded: LoadedRecipe) -> None:
    with RunDir.open(tmp_path, loaded) as run:
        (run.stage(0, "sft", "sft").path / "done").write_text("{")
        with pytest.raises(RunDirError, match="01-sft/done is damaged: delete it"):
            _ = run.stage(0, "sft", "sft").done
    (tmp_path / "small" / "recipe.resolved.yaml").write_text("a: [")
    with pytest.raises(RunDirError, match=r"recipe\.resolved\.yaml is damaged"):
        RunDir.open(tmp_path, loaded)
    assert read_json(tmp_path / "none") is None


@pytest.mark.parametrize(("error", "event"), [(RuntimeError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_what_ended_the_run_is_kept(tmp_path: Path, loaded: LoadedRecipe, error: BaseException, event: str) -> None:
    error.add_note("a note")
    with pytest.raises(type(error)), RunDir.open(tmp_path, loaded) as run:
        raise error
    last = json.loads((run.path / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == event and "raise error" in last["traceback"] and "a note" in last["traceback"]
    RunDir.open(tmp_path, loaded).close()


# -- the lock --------------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from pipelines.files import Lock
lock = Lock.acquire(Path(sys.argv[1]), "run folder x")
if os.fork() == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_processes_never_share_a_folder_and_a_killed_one_frees_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(RunDirError, match=f"run folder x is in use by process {holder.pid}: wait for it"):
        Lock.acquire(tmp_path / "lock", "run folder x")
    os.kill(holder.pid, signal.SIGKILL)  # its forked child lives on and must not keep the lock
    for _ in range(100):
        try:
            Lock.acquire(tmp_path / "lock", "run folder x").release()
            return
        except RunDirError:
            time.sleep(0.05)
    pytest.fail("the lock outlived its process")


def test_one_process_opens_a_folder_once(tmp_path: Path, loaded: LoadedRecipe) -> None:
    with RunDir.open(tmp_path, loaded) as run:
        with pytest.raises(RunDirError, match="is open in this process already"):
            RunDir.open(tmp_path, loaded, fresh=True)
        run.close()
        run.close()
    RunDir.open(tmp_path, loaded).close()


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_with_one_line_and_an_intact_folder(small_disk: Path, loaded: LoadedRecipe) -> None:
    written = 0
    with (
        pytest.raises(RunDirError, match=r"the disk is full while writing .*free some space") as error,
        RunDir.open(small_disk, loaded) as run,
    ):
        stage = run.stage(0, "sft", "sft")
        stage.mark_done({"loss": 1.0})
        while True:
            stage.journal(step_name(1)).append(group(f"p{written}", text="x" * 5000))
            written += 1
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value) and written > 5

    with pytest.raises(RunDirError, match="disk is full"):  # still full: refused, nothing harmed
        for number in range(1000):
            append_line(small_disk / "small" / "filler", str(number) * 1000)
    (small_disk / "small" / "filler").unlink()
    (small_disk / "room").write_bytes(b"")
    stage = StageDir(small_disk / "small" / "01-sft", "sft", "sft", lambda row: None)
    assert list(stage.journal(step_name(1)).finished()) == [f"p{number}" for number in range(written)], (
        "every finished group is there"
    )
    with pytest.raises(RunDirError, match="disk is full"):
        stage.complete_step(
            1, list(stage.journal(step_name(1)).finished().values())
        )  # needs the space of a second copy
    assert len(stage.journal(step_name(1)).finished()) == written and stage.done == {"loss": 1.0}
    (stage.rollouts / f"{step_name(1)}.jsonl").unlink()
    with RunDir.open(small_disk, loaded) as run:  # room again: it goes on
        assert run.resumed


# -- small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be >= 1, got 0"),
        ({"cpus": -1}, "cpus must be >= 0"),
        ({"dir": ""}, "dir must name a folder"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)


def test_which_model_a_path_means(tmp_path: Path) -> None:
    for folder in ("plain", "run/01-sft/model", "run/03-grpo/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "run" / "04-eval").mkdir()
    assert model_folder(tmp_path / "plain") == tmp_path / "plain"
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "03-grpo" / "model"
    assert model_folder(tmp_path / "run" / "01-sft") == tmp_path / "run" / "01-sft" / "model"
    with pytest.raises(ValueError, match="holds no model"):
        model_folder(tmp_path / "run" / "04-eval")


def test_the_best_checkpoint_is_the_one_whose_evaluation_was_best(tmp_path: Path) -> None:
    stage = tmp_path / "03-grpo"
    for step in (10, 20, 30):
        folder = stage / "checkpoints" / f"step-{step:06d}"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        write_manifest(folder, {}, None)
    (stage / "checkpoints" / ".partial-step-000040").mkdir()
    with pytest.raises(ValueError, match=r"none of the kept checkpoints \(10, 20, 30\) was evaluated"):
        model_folder(tmp_path, "best")
    # Means .5, .6, .55 and, not kept any more, .9. A line is logged by the step that the evaluation followed.
    shares = {9: (0.4, 0.6), 19: (0.9, 0.3), 29: (0.5, 0.6), 4: (0.9, 0.9)}
    rows = [{"step": s, "results": {"a": {"pass_at_1": a}, "b": {"pass_at_1": b}}} for s, (a, b) in shares.items()]
    (stage / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert model_folder(tmp_path, "best") == stage / "checkpoints/step-000020/model" == model_folder(stage, "best")
    assert model_folder(tmp_path, "30") == stage / "checkpoints/step-000030/model"
    (stage / "checkpoints/step-000010/model/config.json").write_text("[]")
    with pytest.raises(OSError, match=r"step-000010/model/config\.json is damaged \(it is not what was written\)"):
        model_folder(tmp_path, "10")
    with pytest.raises(ValueError, match="no checkpoint '40': take last, best or one of 10, 20, 30"):
        model_folder(tmp_path, "40")
    with pytest.raises(ValueError, match="holds no checkpoints"):
        model_folder(stage / "checkpoints", "best")

"""A run goes on, and is replayed, only with the model that it was begun with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import first_model
from pipelines.cli import main
from pipelines.first_model import check_same_model, record_model
from pipelines.run_dir import RunDirError
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import load_policy
from tests.unit.local_runs import Local, run_local
from tests.unit.test_learner_service import SMALL


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / "model" / name).write_text(f"this is {name}")
    (tmp_path / "run").mkdir()
    assert record_model(tmp_path / "run", ModelConfig(path=str(tmp_path / "model")))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: (m / "config.json").write_text("this is config,json"), "changed: config.json"),
        (lambda m: (m / "model.safetensors").write_text("longer than it was"), "changed: model.safetensors"),
        (lambda m: (m / "tokenizer.json").unlink(), "gone: tokenizer.json"),
        (lambda m: (m / "more.safetensors").write_text(""), "new: more.safetensors"),
    ],
)
def test_what_changed_is_named(run: Path, change: Callable[[Path], Any], told: str) -> None:
    model = ModelConfig(path=str(run.parent / "model"))
    (run.parent / "model/README.md").write_text("says nothing about the weights")
    assert check_same_model(run, model, "")
    change(run.parent / "model")
    with pytest.raises(ValueError, match=rf"model\.path: .*\({told}\): put that back, or else") as caught:
        check_same_model(run, model, ", or else")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_gone_and_a_record_that_is_damaged_are_told(run: Path) -> None:
    model = ModelConfig(path=str(run.parent / "model"))
    shutil.rmtree(run.parent / "model")
    with pytest.raises(ValueError, match="is gone: put it back"):
        check_same_model(run, model, "")
    for text in ("{", "[]", "null", '{"files": null}', '{"files": {"a": 1}}'):
        (run / "model.fingerprint.json").write_text(text)
        with pytest.raises(RunDirError, match=r"model\.fingerprint\.json is damaged"):
            check_same_model(run, model, "")


def test_presets_and_models_of_the_hub_have_no_folder(tmp_path: Path) -> None:
    for model in (ModelConfig(preset="tiny"), ModelConfig(path="someone/something")):
        assert not record_model(tmp_path, model) and not check_same_model(tmp_path, model, "")
    assert not list(tmp_path.iterdir())


def test_of_a_large_file_both_ends_and_blocks_between_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_WHOLE", 100), ("_BLOCK", 8), ("_BLOCKS", 5)):
        monkeypatch.setattr(first_model, name, value)
    model, file = ModelConfig(path=str(run.parent / "model")), run.parent / "model/model.safetensors"
    data = bytes(200)
    file.write_bytes(data)
    record_model(run, model)
    for place in (0, 7, 48, 96, 144, 192, 199):
        file.write_bytes(data[:place] + b"x" + data[place + 1 :])
        with pytest.raises(ValueError, match=r"changed: model\.safetensors"):
            check_same_model(run, model, "")
    file.write_bytes(data)
    assert check_same_model(run, model, "")


def test_a_run_neither_goes_on_nor_is_replayed_with_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_model(*load_policy(ModelConfig(preset="tiny", overrides=SMALL), seed=1), tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    top = {"model": {"path": "model"}}
    with monkeypatch.context() as patch:

        def stop(workers: Local, step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

        patch.setattr(Local, "before_step", staticmethod(stop))
        with pytest.raises(KeyboardInterrupt):
            run_local(tmp_path, patch, top=top)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "routed_scaling_factor": 5.0}))
    refusal = r"not the model that .* was begun with \(changed: config\.json\): put that back"
    with pytest.raises(ValueError, match=f"{refusal}, give the run another name, or begin anew with --fresh"):
        run_local(tmp_path, monkeypatch, top=top)
    assert main(["replay", "runs/local", "1", "--stage", "sft"]) == 1
    assert "changed: config.json" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "kept").rename(tmp_path / "model")
    assert main(["replay", "runs/local", "1", "--stage", "sft"]) == 0
    (tmp_path / "runs/local/model.fingerprint.json").unlink()
    monkeypatch.setattr(Local, "before_step", staticmethod(stop))
    with pytest.raises(KeyboardInterrupt):
        run_local(tmp_path, monkeypatch, top=top)
    events = [json.loads(line)["event"] for line in (tmp_path / "runs/local/events.jsonl").read_text().splitlines()]
    assert "model_recorded_late" in events and (tmp_path / "runs/local/model.fingerprint.json").is_file()

"""What a careless or hostile user hands in ends in one line and a failure, before anything starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cli
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import check_model, load_policy
from rollout.prompts import DataConfig, load_problems

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/integration/support/mini.yaml"


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The line of a refusal."""
    assert cli.main(["run", str(MINI), "--dry-run", *overrides]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("r1: ") and told.err.count("\n") == 1, told.err
    return told.err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("class Odd(BaseException): pass\nraise Odd('x')", "Odd: x"),
        ("import os; os._exit(0)", "does not end, or ends the process"),
        ("import os; os.kill(os.getpid(), 9)", "does not end, or ends the process"),
        ("while True: pass", "no result within 2 s"),
        ("def f(completion): return", "no 'g'"),
    ],
)
def test_a_reward_module_cannot_end_or_hold_up_the_program(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.run._LOADING_S", 2.0)
    (tmp_path / "mine.py").write_text(code)
    line = dry_run(capsys, f"stages.grpo.rewards={{functions: [{{path: '{tmp_path}/mine.py:g'}}]}}")
    assert "stages.grpo.rewards" in line and words in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("return 3", "it returned 3"),
        ("return problem.prompt", "must return a Problem"),
    ],
)
def test_a_rewrite_that_fails_names_itself_and_the_row(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"rewrite_{abs(hash(body))}.py").write_text(f"def f(problem):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2", "id": "row-1"}\n')
    config = DataConfig(source=f"jsonl:{tmp_path}/rows.jsonl", rewrite=f"rewrite_{abs(hash(body))}:f", id_field="id")
    with pytest.raises(ValueError, match=r"data\.rewrite") as caught:
        load_problems(config)
    assert words in str(caught.value) and "row-1" in str(caught.value)


def test_aliases_that_explode_and_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, words in (("laughs.yaml", "with its aliases spelled out"), ("pipe.yaml", "no regular file")):
        assert cli.main(["show", str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirection", "words"), [(">&-", "standard output is closed"), (">/dev/full", "cannot be written")]
)
def test_an_output_that_cannot_be_written_is_a_failure(redirection: str, words: str) -> None:
    command = f"{sys.executable} -m pipelines.cli show {MINI} --json {redirection}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_overrides_that_make_no_model_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for override, words in (
        ("{num_hidden_layers: -1}", "num_hidden_layers must be >= 1"),
        ("{num_hidden_layers: x}", "num_hidden_layers"),
        ("{num_hiden_layers: 1}", "did you mean 'num_hidden_layers'"),
    ):
        line = dry_run(capsys, f"model.overrides={override}")
        assert words in line and "--debug" not in line


def test_a_model_folder_that_is_not_whole_is_found_before_the_start(tmp_path: Path) -> None:
    model, tokenizer = load_policy(ModelConfig(preset="tiny"), seed=0)
    folder = tmp_path / "model"
    save_model(model, tokenizer, folder)
    check_model(ModelConfig(path=str(folder)))
    [weights] = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot load .*safetensors is cut off or damaged.*is the folder whole"):
        check_model(ModelConfig(path=str(folder)))
    weights.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        check_model(ModelConfig(path=str(folder)))
    weights.write_bytes(content)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        check_model(ModelConfig(path=str(folder)))


def test_json_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(tmp_path / "none.yaml"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"error", "type"} and "none.yaml" in answer["error"]


def test_what_this_machine_cannot_carry_is_refused_by_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    line = dry_run(capsys, "stages.grpo.optimizer.offload=true")
    assert "stages.grpo.optimizer.offload" in line and "there is no GPU here" in line
    for key in ("parallel.ranks", "engine.workers"):
        line = dry_run(capsys, f"{key}=100000")
        assert f"{key} is 100000" in line and "at most" in line
    assert "run.cpus is 999" in dry_run(capsys, "run.cpus=999", "run.ray_address=auto")
    assert "does not divide the model's 4 attention heads" in dry_run(capsys, "engine.tensor_parallel=3")


@pytest.mark.parametrize("address", ["", "garbage", "host:", "host:port"])
def test_an_address_that_is_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ray_address must be auto or host:port" in dry_run(capsys, f"run.ray_address={address!r}")


def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        began = time.monotonic()
        assert cli.main(["run", str(MINI), f"run.dir={tmp_path}", f"run.ray_address={address}"]) == 1
    assert f"r1: run.ray_address {address}: nobody answers there" in capsys.readouterr().err
    assert time.monotonic() - began < 60


def test_a_run_folder_as_a_model_is_told_where_its_model_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("01-sft", "02-grpo"):
        (tmp_path / "mine" / stage / "model").mkdir(parents=True)
        (tmp_path / "mine" / stage / "model/config.json").write_text("{}")
    line = dry_run(capsys, "model.preset=null", f"model.path={tmp_path}/mine", "model.overrides={}")
    assert f"the last model of this run is {tmp_path}/mine/02-grpo/model" in line


def test_verify_blames_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(MINI), "--model", str(tmp_path / "none")]) == 1
    assert f"--model: there is no folder {tmp_path}/none" in capsys.readouterr().err

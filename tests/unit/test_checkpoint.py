import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from policy import model_folder, state, whole_folder
from policy.checkpoint import (
    CheckpointError,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    save_model,
)
from policy.config import ModelConfig
from policy.loading import check_model, load_policy
from policy.model import PolicyModel
from policy.tokenizer import build_tokenizer
from tests.unit.plain_learner import TINY, Plain

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return load_policy(TINY, seed=1)


def qwen(**fields: Any) -> Qwen2ForCausalLM:
    shape = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**{**shape, "num_attention_heads": 2, "num_key_value_heads": 1, **fields}))


def save(parent: Path, step: int, tiny: Policy, **extra: Any) -> Path:
    folder = parent / f"step-{step:06d}"
    learner = Plain(tiny[0], step)
    save_checkpoint(folder, learner=learner, tokenizer=tiny[1], extra={"step": step, **extra})
    return folder


def load(folder: Path) -> dict[str, Any]:
    """What a fresh learner of the same shapes finds: ``extra``."""
    return load_checkpoint(folder, Plain(load_policy(TINY, seed=5)[0]))


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- loading a policy -----------------------------------------------------------------------------------------------


def test_a_preset_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, tokenizer = load_policy(TINY, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    torch.manual_seed(6)
    assert same(one, load_policy(TINY, seed=1)[0])
    assert not same(one, load_policy(TINY, seed=2)[0])
    assert isinstance(one, PolicyModel)
    assert len(tokenizer) == one.config.vocab_size


def test_bf16_keeps_the_router_bias_in_fp32() -> None:
    model, _ = load_policy(ModelConfig(preset="tiny", overrides=TINY.overrides, dtype="bfloat16"), seed=0)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("correction_bias")} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_folder_round_trips_and_transformers_reads_it(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = load_policy(ModelConfig(preset="tiny", overrides=TINY.overrides, dtype=dtype), seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.linspace(0, 1, 8) / 3)
    save_model(model, tokenizer, tmp_path / "model")
    again, again_tokenizer = load_policy(ModelConfig(path=str(tmp_path / "model"), dtype=dtype), seed=9)
    assert isinstance(again, PolicyModel)
    assert same(model, again)
    text = "<think>12+3=15</think><answer>15</answer>"
    assert again_tokenizer.encode(text) == tokenizer.encode(text)
    assert again_tokenizer.chat_template == tokenizer.chat_template
    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.arange(9, 40)[None]
    with torch.no_grad():
        ours, peers = again.float()(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, peers, rtol=0, atol=1e-4)


def test_the_folder_says_what_vllm_needs(tmp_path: Path, tiny: Policy) -> None:
    save_model(*tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == 1
    names = load_file(tmp_path / "model/model.safetensors").keys()
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert not list(tmp_path.glob(".*"))


def test_end_tokens_of_model_and_tokenizer_are_both_kept(tmp_path: Path) -> None:
    model = qwen()
    model.generation_config = GenerationConfig(eos_token_id=[7, 8], pad_token_id=7)
    save_model(model, build_tokenizer(), tmp_path / "model")
    saved = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["pad_token_id"], saved["bos_token_id"]) == ([7, 8, 1], 7, 0)
    assert model.generation_config.eos_token_id == [7, 8]  # the caller's is left as it is


def test_a_dense_folder_becomes_transformers_own_model(tmp_path: Path) -> None:
    model = qwen(tie_word_embeddings=True)
    save_model(model, build_tokenizer(), tmp_path / "model")
    again, tokenizer = load_policy(ModelConfig(path=str(tmp_path / "model")), seed=0)
    assert isinstance(again, Qwen2ForCausalLM)
    assert same(model, again)
    assert tokenizer.eos_token == "<|eos|>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.tie_word_embeddings


def test_saving_again_replaces_the_folder(tmp_path: Path, tiny: Policy) -> None:
    save_model(*tiny, tmp_path / "model")
    (tmp_path / "model/stale.txt").write_text("x")
    other, _ = load_policy(TINY, seed=2)
    save_model(other, tiny[1], tmp_path / "model")
    assert not (tmp_path / "model/stale.txt").exists()
    assert same(other, load_policy(ModelConfig(path=str(tmp_path / "model")), seed=0)[0])
    assert not list(tmp_path.glob(".*"))


def refusal(config: ModelConfig, *, early: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        load_policy(config, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    if early:  # seen before anything is started, too
        with pytest.raises(ValueError, match=re.escape(message)):
            check_model(config)
    return message


def test_what_is_not_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "nowhere")
    assert refusal(ModelConfig(path=missing)).startswith(f"model.path: there is no folder {missing}")
    assert "model.tokenizer: there is no folder" in refusal(ModelConfig(preset="tiny", tokenizer=missing), early=False)
    assert "did you mean 'tiny'" in refusal(ModelConfig(preset="tinny"))
    (tmp_path / "empty").mkdir()
    assert "not a Hugging Face folder" in refusal(ModelConfig(path=str(tmp_path / "empty")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(ModelConfig(path="some-organisation/some-model-that-is-nowhere")).startswith(
        "model.path: cannot load some-organisation/some-model-that-is-nowhere"
    )


def test_overrides_do_not_change_given_weights(tmp_path: Path) -> None:
    assert "leave them out" in refusal(ModelConfig(path=str(tmp_path), overrides={"hidden_size": 8}))


def test_missing_weights_are_not_made_up(tmp_path: Path, tiny: Policy) -> None:
    save_model(*tiny, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lacks 1 weights, e.g. model.norm.weight" in refusal(ModelConfig(path=str(tmp_path / "model")), early=False)
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot load" in refusal(ModelConfig(path=str(tmp_path / "model")), early=False)
    path.unlink()
    assert "cannot load" in refusal(ModelConfig(path=str(tmp_path / "model")), early=False)


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    save_model(qwen(vocab_size=300), build_tokenizer(), tmp_path / "model")
    assert re.search(
        r"the tokenizer has 32\d tokens, the model only 300: set model.tokenizer",
        refusal(ModelConfig(path=str(tmp_path / "model")), early=False),
    )


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path, tiny: Policy) -> None:
    folder = save(tmp_path, 7, tiny, cursor={"epoch": 1, "at": 3})
    fresh = Plain(load_policy(TINY, seed=5)[0], moments=torch.zeros(5))
    assert not same(tiny[0], fresh.model)
    assert load_checkpoint(folder, fresh) == {"step": 7, "cursor": {"epoch": 1, "at": 3}}
    assert fresh.steps == 7
    assert torch.equal(fresh.moments, torch.arange(5.0))
    assert same(tiny[0], fresh.model)
    assert same(tiny[0], load_policy(ModelConfig(path=str(folder / "model")), seed=0)[0])
    assert (folder / "model/tokenizer.json").is_file()
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 1


def test_latest_is_by_number_and_ignores_what_is_torn(tmp_path: Path, tiny: Policy) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        save(tmp_path, step, tiny)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000010"
    (tmp_path / "step-000010/complete.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000009"
    with (tmp_path / "step-000009/state/__0_0.distcp").open("ab") as file:
        file.truncate(10)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    (tmp_path / "step-000002/model/model.safetensors").unlink()
    (tmp_path / "step-000011").mkdir()
    (tmp_path / "step-000099.txt").write_text("x")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no readable complete.json"),
        (lambda f: (f / "model/config.json").unlink(), "model/config.json is missing"),
        (lambda f: (f / "extra.json").write_text("{"), "extra.json has 1 bytes instead of"),
        (lambda f: (f / "state/.metadata").unlink(), "state/.metadata is missing"),
        (lambda f: overwrite(f / "state/.metadata"), "state/.metadata is damaged .*: resume from an earlier"),
        (lambda f: overwrite(f / "state/__0_0.distcp"), "state/__0_0.distcp is damaged .*: resume from an earlier"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, tiny: Policy, damage, message: str) -> None:
    folder = save(tmp_path, 1, tiny)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def overwrite(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


def test_a_checkpoint_of_another_model_or_version_is_refused(tmp_path: Path, tiny: Policy) -> None:
    folder = save(tmp_path, 1, tiny)
    other = load_policy(ModelConfig(preset="tiny", overrides={**TINY.overrides, "n_routed_experts": 4}), seed=1)[0]
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"its model\.\S+ is torch.float32 \[8, .* learner has .* \[4, .*another model"
    ):
        load_checkpoint(folder, Plain(other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    longer = Plain(tiny[0])
    longer.state_dict = lambda: {**Plain(tiny[0]).state_dict(), "news": 1}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="it holds no news: it belongs to another model, optimizer or version"):
        load_checkpoint(folder, longer)
    shutil.rmtree(folder / "state")
    (folder / "learner.pt").write_text("")
    (folder / "complete.json").write_text('{"files": {"learner.pt": 0}}')
    with pytest.raises(CheckpointError, match=r"written by an earlier version .*: begin anew from .*step-000001/model"):
        load(folder)


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path: Path, tiny: Policy) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tiny)
    (tmp_path / "step-000003/extra.json").unlink()
    for name in (".partial-step-000004", ".replaced-step-000002", "step-000000", "keep-me"):
        (tmp_path / name).mkdir()
    removed = prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep-me", "step-000002"]
    assert len(removed) == 5
    assert prune(tmp_path, 5) == []
    assert checkpoints(tmp_path) == {2: tmp_path / "step-000002"}
    with pytest.raises(ValueError, match="keep must be >= 1"):
        prune(tmp_path, 0)


def test_a_checkpoint_can_be_written_again(tmp_path: Path, tiny: Policy) -> None:
    save(tmp_path, 1, tiny, run="first")
    folder = save(tmp_path, 1, tiny, run="second")
    assert load(folder)["run"] == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_kill_between_the_two_renames_loses_nothing(
    tmp_path: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, tiny, run="first")
    rename, calls = os.rename, []

    def killed(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, tiny, run="second")
    monkeypatch.undo()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load(latest)["run"] == "first"
    save(tmp_path, 2, tiny)
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


KILLED = """
import os, signal, sys
from pathlib import Path
from policy import checkpoint, model_folder, saver, whole_folder
from policy.loading import load_policy
from tests.unit.plain_learner import TINY, Plain

model, tokenizer = load_policy(TINY, seed=1)
for moment in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        module, name = moment.split(".")
        setattr(globals()[module], name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        folder = Path(sys.argv[1]) / moment / "step-000002"
        writing = saver.Saver()
        writing.save(folder, learner=Plain(model), tokenizer=tokenizer, extra={}, background=moment == sys.argv[-1])
        writing.wait()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
"""


def test_kill_9_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path, tiny: Policy) -> None:
    moments = ("checkpoint.write_state", "model_folder.write_files", "whole_folder._flush", "whole_folder._take_place")
    for moment in moments:
        save(tmp_path / moment, 1, tiny)
    command = [sys.executable, "-c", KILLED, str(tmp_path), *moments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    for moment in moments:
        parent = tmp_path / moment
        assert sorted(p.name for p in parent.iterdir()) == [".partial-step-000002", "step-000001"]
        assert latest_checkpoint(parent) == parent / "step-000001"
        save(parent, 2, tiny)  # the leftover is in nobody's way
        assert latest_checkpoint(parent) == parent / "step-000002"
        assert sorted(p.name for p in parent.iterdir()) == ["step-000001", "step-000002"]


def test_everything_is_flushed_before_the_rename(tmp_path: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = whole_folder._fsync, os.rename
    monkeypatch.setattr(whole_folder, "_fsync", lambda p: (events.append(p.name), fsync(p)))
    # torch renames something inside, too
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename to {Path(b).name}"), rename(a, b)))
    folder = save(tmp_path, 1, tiny)
    at = events.index("rename to step-000001")
    files = {p.name for p in folder.rglob("*")} | {".partial-step-000001"}
    assert {event for event in events[:at] if not event.startswith("rename")} == files
    assert events[at + 1 :] == [tmp_path.name]


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MiB, with one checkpoint on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("told", [True, False], ids=["seen before writing", "seen while writing"])
def test_a_full_disk_is_one_clear_line_and_leaves_the_rest(
    small_disk: Path, tiny: Policy, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(small_disk, 1, tiny)
    if not told:  # quotas, and other writers, are not seen beforehand: let the write itself fail
        monkeypatch.setattr(whole_folder, "_OVERHEAD_BYTES", -(1 << 30))
    big = Plain(tiny[0], moments=torch.zeros(1 << 20))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(small_disk / "step-000002", learner=big, tokenizer=tiny[1], extra={})
    message = str(caught.value)
    assert message.startswith(f"disk full: {small_disk / 'step-000002'} needs")
    assert "\n" not in message
    assert isinstance(caught.value, OSError)
    assert [p.name for p in small_disk.iterdir()] == ["step-000001"]
    assert latest_checkpoint(small_disk) == first
    assert load(first) == {"step": 1}


@pytest.mark.parametrize("part", ["state", "model"])
def test_a_full_disk_without_root(tmp_path: Path, tiny: Policy, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the checkpoint goes to a device that is always full."""
    first = save(tmp_path, 1, tiny)
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        full = path.suffix == {"state": ".distcp", "model": ".safetensors"}[part] and ".partial" in str(path)
        return real(Path("/dev/full") if full else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match=r"disk full: .*step-000002 needs \d\.\d MiB and .* MiB are free"):
        save(tmp_path, 2, tiny)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load(first) == {"step": 1}


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"needs .* MiB and 1\.0 MiB are free"):
        save_model(*tiny, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_other_failures_keep_their_reason(tmp_path: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def raising(*_: Any) -> None:
            raise error

        monkeypatch.setattr(model_folder, "write_files", raising)

    fail(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002: .*Permission denied"):
        save(tmp_path, 2, tiny)
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        save(tmp_path, 2, tiny)
    monkeypatch.setattr(state._Writer, "finish", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("torch's bug")))
    with pytest.raises(RuntimeError, match="torch's bug"):
        save(tmp_path, 2, tiny)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_name_is_checked(tmp_path: Path, tiny: Policy) -> None:
    with pytest.raises(ValueError, match="named step-NNNNNN"):
        save_checkpoint(tmp_path / "last", learner=Plain(tiny[0]), tokenizer=tiny[1], extra={})

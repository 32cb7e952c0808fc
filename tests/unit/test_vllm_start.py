"""What an engine is started with: vLLM's arguments, the environment of its process, refusals. No vLLM."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rollout import vllm_start
from rollout.engine import EngineConfig
from rollout.vllm_engine import VllmEngine
from rollout.vllm_start import MENDS, StartOptions, engine_arguments, parse_cores, process_environment

OPTIONS = StartOptions(dtype="float32", seed=3, cores="0", load_format="auto", worker=0, mends=MENDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"kv_lora_rank": 512, "qk_rope_head_dim": 64}))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "cores"), [("0", [0]), ("0,2", [0, 2]), ("1-3", [1, 2, 3]), (" 0 , 4 - 5 ", [0, 4, 5]), ("2-2", [2])]
)
def test_cores_are_lists_and_ranges(text: str, cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0,,1", "3-1"])
def test_what_names_no_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cores"):
        parse_cores(text)


def test_a_core_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(ValueError, match="cores '1-2': this process may use 0,1"):
        parse_cores("1-2")


def test_a_cpu_engine_is_one_eager_process_with_the_native_rotary_embedding(folder: Path) -> None:
    arguments = engine_arguments(folder, EngineConfig(kv_cache_gib=0.5), OPTIONS, cpu=True)
    assert arguments["enforce_eager"] is True
    assert arguments["distributed_executor_backend"].endswith("UniProcExecutor")
    assert arguments["compilation_config"] == {"custom_ops": ["all", "-rotary_embedding"]}
    assert arguments["kv_cache_memory_bytes"] == 2**29
    assert arguments["logprobs_mode"] == "processed_logprobs" and arguments["enable_prefix_caching"] is False
    assert arguments["weight_transfer_config"] == {"backend": "shm"}


def test_a_gpu_engine_is_compiled_and_takes_its_share_of_the_gpu(folder: Path) -> None:
    config = EngineConfig(weight_backend="nccl", tensor_parallel=2, gpu_memory_utilization=0.5)
    arguments = engine_arguments(folder, config, OPTIONS, cpu=False)
    assert arguments["enforce_eager"] is False and arguments["gpu_memory_utilization"] == 0.5
    assert arguments["tensor_parallel_size"] == 2 and arguments["weight_transfer_config"] == {"backend": "r1_nccl"}
    assert "kv_cache_memory_bytes" not in arguments and "compilation_config" not in arguments


@pytest.mark.parametrize(("wish", "cpu", "eager"), [(None, True, True), (None, False, False), (False, True, False)])
def test_compilation_by_choice(folder: Path, wish: bool | None, cpu: bool, eager: bool) -> None:
    assert engine_arguments(folder, EngineConfig(enforce_eager=wish), OPTIONS, cpu=cpu)["enforce_eager"] is eager


def test_a_mend_can_be_left_out(folder: Path) -> None:
    options = replace(OPTIONS, mends=MENDS - {"rotary"})
    assert "compilation_config" not in engine_arguments(folder, EngineConfig(), options, cpu=True)
    assert process_environment(options)["R1_ENGINE_MENDS"] == "batch,repack"


def test_gpu_backends_are_refused_on_a_cpu(folder: Path) -> None:
    with pytest.raises(ValueError, match="weight_backend ipc needs GPUs; use shm"):
        engine_arguments(folder, EngineConfig(weight_backend="ipc"), OPTIONS, cpu=True)


def test_a_latent_that_the_cpu_kernel_does_not_take_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"kv_lora_rank": 128, "qk_rope_head_dim": 32}))
    with pytest.raises(ValueError, match=r"= 576 \(512 \+ 64\); .* has 128 \+ 32"):
        engine_arguments(folder, EngineConfig(), OPTIONS, cpu=True)
    engine_arguments(folder, EngineConfig(), OPTIONS, cpu=False)


def test_the_engine_process_gets_its_cores_and_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    values = process_environment(replace(OPTIONS, cores="1,3"))
    assert values["OMP_NUM_THREADS"] == "2" and values["GOMP_CPU_AFFINITY"] == "1,3"
    assert values["R1_ENGINE_PARENT_PID"] == str(os.getpid())
    assert values["VLLM_LOGGING_LEVEL"] == "ERROR" and "VLLM_ALLOW_INSECURE_SERIALIZATION" not in values
    assert process_environment(replace(OPTIONS, cores=None))["GOMP_CPU_AFFINITY"] == "0,1,2,3"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    assert process_environment(OPTIONS)["VLLM_LOGGING_LEVEL"] == "INFO"
    assert process_environment(OPTIONS, "ipc")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_the_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    before = dict(os.environ)
    with vllm_start._environment({"KEPT": "meanwhile", "NEW": "1"}):
        assert os.environ["KEPT"] == "meanwhile" and os.environ["NEW"] == "1"
        os.environ["LEFT_BEHIND"] = "by someone"
    assert dict(os.environ) == before


def test_a_folder_without_a_model_is_refused_before_vllm_is_imported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config\.json"):
        asyncio.run(VllmEngine.create(tmp_path, EngineConfig()))


def test_a_broken_installation_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_start, "entry_points", lambda **kw: ())
    with pytest.raises(ValueError, match="r1_weight_receiver, by which weights arrive: install this project"):
        asyncio.run(VllmEngine.create(folder, EngineConfig()))


def test_the_cause_is_one_line_of_a_validation_error() -> None:
    text = """1 validation error for ModelConfig
  Value error, max_model_len (4096) is greater than 512 [type=value_error, input_value=...]
    For further information visit a page"""
    assert vllm_start._cause(ValueError(text)) == "max_model_len (4096) is greater than 512"
    assert vllm_start._cause(ValueError("plain")) == "plain"

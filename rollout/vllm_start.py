"""How an engine process is started: arguments for vLLM, and the environment that the process inherits."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rollout.engine import EngineConfig, EngineDied
from rollout.parent_watch import PARENT_PID_VARIABLE

MENDS = frozenset({"rotary", "repack", "batch"})
"""What is mended in vLLM; see ``rollout.vllm_mends``."""
MENDS_VARIABLE = "R1_ENGINE_MENDS"
"""Environment variable by which the engine process learns which mends to apply, comma separated."""

_PLUGIN = "r1_weight_receiver"
_UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_RECEIVERS = {"shm": "shm", "nccl": "r1_nccl", "ipc": "r1_ipc"}  # see rollout.weight_receiver.register
_CPU_LATENT = 576  # kv_lora_rank + qk_rope_head_dim that vLLM's CPU kernel of MLA is compiled for


# The environment belongs to the whole process: engines of one process start one after the other.
_starting = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class StartOptions:
    """What differs between the engines of a run, beside :class:`EngineConfig`; see ``VllmEngine.create``."""

    dtype: str
    seed: int
    cores: str | None
    load_format: str
    worker: int
    mends: frozenset[str]


def start_llm(folder: Path, config: EngineConfig, options: StartOptions) -> Any:
    """Starts vLLM's ``AsyncLLM`` and returns it when its process is ready.

    Raises:
        ValueError: no model folder there, a model or an option that vLLM cannot run here, a broken installation.
        EngineDied: the engine process ended while it started.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    if not entry_points(group="vllm.general_plugins", name=_PLUGIN):
        raise ValueError(
            f"vLLM does not find {_PLUGIN}, by which weights arrive: install this project (pip install -e .)"
        )
    with _starting, _environment(process_environment(options, config.weight_backend)), _quiet():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = current_platform.is_cpu()
        arguments = engine_arguments(folder, config, options, cpu=cpu)
        if cpu and arguments["enforce_eager"]:
            # A few small functions of vLLM would still be compiled, 1.5 s at the first token and 18 s without a cache.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
        except ValueError as error:
            raise ValueError(f"vLLM cannot run {folder} so: {_cause(error)}") from error
        try:
            return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True)
        except RuntimeError as error:
            raise EngineDied(f"the vLLM process ended while it loaded {folder}; its log above says why") from error


def engine_arguments(folder: Path, config: EngineConfig, options: StartOptions, *, cpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs``.

    Raises:
        ValueError: a model, a backend for weights, or an option that vLLM does not run on this kind of device.
    """
    if cpu and config.weight_backend != "shm":
        raise ValueError(f"engine.weight_backend {config.weight_backend} needs GPUs; use shm on a CPU")
    arguments: dict[str, Any] = dict(
        model=str(folder),
        dtype=options.dtype,
        seed=options.seed,
        load_format=options.load_format,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=cpu if config.enforce_eager is None else config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel,
        enable_prefix_caching=False,  # vLLM's MLA on CPU has none, and a cache would have to be dropped at each update
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config={"backend": _RECEIVERS[config.weight_backend]},
        worker_extension_cls="rollout.weight_receiver.WorkerExtension",
    )
    if not cpu:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        if config.return_routed_experts:  # vLLM keeps them beside its prefix cache, and refuses them without one
            arguments.update(enable_return_routed_experts=True, enable_prefix_caching=True)
        return arguments
    if config.return_routed_experts and config.enforce_eager is False:
        raise ValueError("routed experts are captured from eager code on a CPU: leave engine.enforce_eager at null")
    check_latent(folder)
    arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    if "rotary" in options.mends:
        arguments["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    if config.tensor_parallel == 1:
        arguments["distributed_executor_backend"] = _UNIPROC
    return arguments


def check_latent(folder: Path) -> None:
    """Refuses a model folder whose MLA vLLM's CPU kernel does not run.

    Raises:
        ValueError: names the sizes.
    """
    fields = json.loads((folder / "config.json").read_text())
    rank, rope = fields.get("kv_lora_rank"), fields.get("qk_rope_head_dim")
    if rank and rope and rank + rope != _CPU_LATENT:
        raise ValueError(
            f"vLLM runs MLA on a CPU only with kv_lora_rank + qk_rope_head_dim = {_CPU_LATENT} (512 + 64); "
            f"{folder} has {rank} + {rope}"
        )


def process_environment(options: StartOptions, backend: str = "shm") -> dict[str, str]:
    """What the engine process finds in its environment beside what this process has."""
    cores = parse_cores(options.cores) if options.cores else sorted(os.sched_getaffinity(0))
    listed = ",".join(map(str, cores))
    return {
        "VLLM_PLUGINS": _PLUGIN,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_CPU_OMP_THREADS_BIND": listed,
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": listed,
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # Handles of GPU memory travel in vLLM's pickled form; they come from our own learner.
        **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {}),
        PARENT_PID_VARIABLE: str(os.getpid()),
        MENDS_VARIABLE: ",".join(sorted(options.mends)),
    }


def parse_cores(cores: str) -> list[int]:
    """``"0,2-3"`` -> [0, 2, 3].

    Raises:
        ValueError: not a list of numbers and ranges, or a core that this process may not use.
    """
    numbers: list[int] = []
    for part in cores.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f'cores must look like "0" or "0,2-3", got {cores!r}')
        numbers += range(int(first), int(last or first) + 1)
    allowed = os.sched_getaffinity(0)
    if not numbers or not allowed.issuperset(numbers):
        raise ValueError(f"cores {cores!r}: this process may use {','.join(map(str, sorted(allowed)))}")
    return numbers


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the process that is started meanwhile; takes back what vLLM adds as well."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the warnings of vLLM's import to itself, unless its log was asked for."""
    if "VLLM_LOGGING_LEVEL" in os.environ and os.environ["VLLM_LOGGING_LEVEL"] != "ERROR":
        yield
        return
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cause(error: ValueError) -> str:
    """The one line of a validation error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("Value error, ")]
    return (told or lines or ["no reason given"])[0].removeprefix("Value error, ").partition(" [type=")[0]

"""What the machine or the cluster gives, and how Ray is started on it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

from policy.errors import one_line
from rollout.engine import EngineConfig

# Learner ranks, or rollout workers, that one CPU core may be asked to carry: each is a process with all libraries in
# memory.
PER_CORE = 4
# Whoever does not answer within this is not there; Ray would go on trying without a word.
_ANSWER_S = 10.0


def own_cores(limit: int) -> list[int]:
    """The first ``limit`` (0: all) of the CPU cores that this process may use: learner and engines share them.

    Raises:
        ValueError: there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if limit > len(cores):
        raise ValueError(f"run.cpus is {limit}, but only {len(cores)} cores may be used here: lower it, or 0 for all")
    return cores[: limit or None]


def check_here(engine: EngineConfig, *, cores: int, learners: int, offloading: str | None) -> None:
    """Sees that this machine can carry what a recipe asks for that joins no cluster, before anything is started.

    Args:
        engine: of the rollout workers.
        cores: CPU cores that the run may use.
        learners: ranks of the learner.
        offloading: the key of the recipe that offloads an optimizer, if one does.

    Raises:
        ValueError: there are too few GPUs or cores, or no GPU to offload from.
    """
    import torch

    gpus = torch.cuda.device_count()
    check_gpus(engine, gpus, learners)
    if gpus == 0 and offloading is not None:
        raise ValueError(
            f"{offloading} keeps the state of a GPU's model in the CPU's memory, and there is no GPU here: set it to "
            "false, or name a cluster in run.ray_address"
        )
    have = f"{cores} CPU {'core' if cores == 1 else 'cores'} and no GPU may be used here"
    for key, count in (("parallel.ranks", learners), ("engine.workers", engine.workers)):
        if gpus == 0 and count > PER_CORE * cores:
            raise ValueError(
                f"{key} is {count}, and {have}: at most {PER_CORE * cores} (each is a process of its own), or name a "
                "cluster in run.ray_address"
            )


def count_gpus() -> int:
    """GPUs of the whole cluster; the learner takes one, the rollout workers share the others."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def actor(service: type, **options: Any) -> Any:
    """A Ray actor class of a plain class; ``.remote(...)`` starts one. Ray never restarts it by itself."""
    import ray

    return ray.remote(service).options(max_restarts=0, **options)


def start_ray(address: str | None, cores: int) -> None:
    """Joins the cluster at ``address``, or starts Ray on this machine, unless this process has one already.

    Raises:
        ValueError: there is no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        return
    if address is not None:
        _check_answers(address)
    # A thread that spins for long while it waits takes the core from whoever it waits for: on a busy machine a
    # learner's step was seen to take ten times as long. One that sleeps at once costs half the speed of an idle
    # machine, whose waits are short. Inherited by every actor; read when OpenMP (GNU's) is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    local: dict[str, Any] = {} if address else {
        "num_cpus": cores + 8, "include_dashboard": False, "object_store_memory": 256 * 2**20,
    }  # fmt: skip
    asked_to_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="r1", **local)
    except (ConnectionError, ValueError) as error:
        if address is None:
            raise
        raise ValueError(f"run.ray_address {address}: no cluster can be joined there ({one_line(error)})") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends a driver with a stack trace; a run ends in one line and lets go of its folder.
        signal.signal(signal.SIGTERM, asked_to_end)


def _check_answers(address: str) -> None:
    """Sees that somebody listens at a host and port; ``auto`` and ``local`` are Ray's to find."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ValueError(
            f"run.ray_address {address}: nobody answers there ({one_line(error)}); is the cluster up (ray status)?"
        ) from error


def gpus_of_one(gpus: int) -> float:
    """GPUs of the learner, and of each rank of an engine: one each; where there is one GPU they share it."""
    return 0.5 if gpus == 1 else min(gpus, 1)


def check_gpus(engine: EngineConfig, gpus: int, learners: int = 1) -> None:
    """Sees that the learner's ranks and the engines fit on the GPUs, which Ray would wait for without a word.

    Raises:
        ValueError: they do not.
    """
    ranks = max(1, engine.workers) * engine.tensor_parallel
    shared = gpus == learners == 1
    if gpus and ranks > (1 if shared else gpus - learners):
        raise ValueError(
            f"engine.workers x engine.tensor_parallel asks for {ranks} GPUs beside the learner's {learners} "
            f"(parallel.ranks), and there are {gpus} in all (a single one is shared by learner and engine): lower "
            "them, or add GPUs"
        )

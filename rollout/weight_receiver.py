"""The receiving end of weight sync: what vLLM loads into each process of an engine.

``register`` is found by vLLM through the entry-point group ``vllm.general_plugins``. It adds the weight-transfer
backends, applies the mends of ``rollout.vllm_mends`` and ties the life of an engine process to that of the process
that started it.

Backend ``shm``: the learner writes a segment (``rollout.shared_memory``), the engine maps it, hashes the mapped bytes
and loads the tensors as views of the mapping. Nothing is pickled and nothing is copied on the way. ``nccl`` and
``ipc`` are vLLM's own, with the fingerprint of ``rollout.fingerprint`` taken of what arrives.

Imported by vLLM's processes alone (it imports vLLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rollout.parent_watch import watch_parent, watched_parent
from rollout.shared_memory import Segment
from rollout.vllm_mends import active_mends, make_batch_invariant, repack_experts
from rollout.vllm_routing import RoutingCapture


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One version: where the segment lies and which tensor lies where in it (bytes from its start)."""

    path: str
    size: int
    algorithm: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryReceiver(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """vLLM's worker-side engine of the backend ``shm``."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    digest = ""

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """No rendezvous: the path comes with each update."""

    def start_weight_update(self) -> None:
        """Readies the model for tensors in checkpoint form."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives one version. Unlike the base class, waits for an accelerator only where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Maps, hashes and loads the segment.

        Raises:
            ValueError: the segment is gone, or has another size.
        """
        segment = Segment.open(update_info.path, update_info.size)
        self.digest = segment.digest(update_info.algorithm)
        info = update_info
        tensors = segment.tensors(info.names, info.dtypes, info.shapes, info.offsets)
        self.model.load_weights(tensors)  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        """Puts what was loaded into the layout of the kernels."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu" and "repack" in active_mends():
            repack_experts(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """Methods that vLLM adds to its workers (``worker_extension_cls``), for ``collective_rpc``."""

    weight_transfer_engine: Any
    model_runner: Any
    routing_capture: RoutingCapture | None = None

    def capture_routing(self) -> str:
        """Begins to keep the experts of requests that ask for them; returns why it cannot, or nothing."""
        try:
            self.routing_capture = RoutingCapture.of(self.model_runner)
        except ValueError as error:
            return str(error)
        return ""

    def take_routing(self, asked: Sequence[tuple[str, int]]) -> list[str | None]:
        """See :meth:`RoutingCapture.take`."""
        assert self.routing_capture is not None
        return self.routing_capture.take(asked)

    def drop_routing(self, names: Sequence[str]) -> int:
        """See :meth:`RoutingCapture.drop`."""
        assert self.routing_capture is not None
        return self.routing_capture.drop(names)

    def received_digest(self) -> str:
        """Checksum of what the last update brought."""
        return self.weight_transfer_engine.digest


def register() -> None:
    """Entry point ``vllm.general_plugins``: called in every process of vLLM, perhaps more than once."""
    if "shm" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("shm", SharedMemoryReceiver)
        WeightTransferEngineFactory.register_engine("r1_nccl", "rollout.gpu_receivers", "FingerprintedNccl")
        WeightTransferEngineFactory.register_engine("r1_ipc", "rollout.gpu_receivers", "FingerprintedIpc")
    if watched_parent() is None:
        return  # the process that holds the engine's front: nothing is computed here
    watch_parent()
    if "batch" in active_mends() and not torch.cuda.is_available():
        make_batch_invariant()

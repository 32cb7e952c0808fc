"""The learner's side of ``nccl`` and ``ipc``: vLLM's trainer engines, for a driver that updates the workers itself.

vLLM's trainer engine wants to drive the workers through a client while it sends. Here the driver does: ``publish``
returns what a worker needs at once, the driver hands it to the workers, and a thread of the learner's process sends
meanwhile.

    thread     consumes: the model's tensors; produces: the broadcast (nccl) or the handles (ipc)
               waits for: the workers to take part (nccl); the next publish (ipc: its tensors must stay put)
    publish    waits for: the handles (ipc); the thread of the version before
"""

from __future__ import annotations

import base64
import pickle
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from rollout.engine import WeightUpdate
from rollout.fingerprint import Fingerprint

_HANDLES_TIMEOUT_S = 120.0

Tensors = Callable[[], Iterable[tuple[str, Tensor]]]


class HandOver:
    """vLLM's ``VLLMWeightSyncClient`` that only keeps what the workers need: the driver talks to them."""

    def __init__(self) -> None:
        self.payloads: queue.Queue[dict[str, Any]] = queue.Queue()
        self.taken_over = threading.Event()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The workers get it with their first update."""

    def start_weight_update(self) -> None:
        """The workers start by themselves."""

    def update_weights(self, update_info: Any) -> None:
        """Keeps the payload for ``publish``."""
        self.payloads.put(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Returns when the tensors may change again."""
        self.taken_over.wait()


class GpuTransport:
    """Sends versions over ``nccl`` or ``ipc``.

    Args:
        backend: which.
        tensors: (name, tensor) pairs in checkpoint form, anew at each call.
        receivers: GPUs that receive: workers times tensor_parallel.
        connect: builds vLLM's trainer engine; for tests.
    """

    def __init__(
        self, backend: str, tensors: Tensors, receivers: int, connect: Callable[..., Any] | None = None
    ) -> None:
        self._backend, self._tensors, self._receivers = backend, tensors, receivers
        self._connect = connect or connect_trainer
        self._client = HandOver()
        self._thread: threading.Thread | None = None
        self._failure: list[Exception] = []
        self._trainer: Any = None
        self._init = _rendezvous(receivers) if backend == "nccl" else {}

    def publish(self, version: int) -> WeightUpdate:
        """Begins to send one version; returns what each worker needs to receive it.

        Raises:
            RuntimeError: the version before, or this one, could not be sent.
        """
        self._finish()
        found, names, dtypes, shapes = Fingerprint(), [], [], []
        for name, tensor in self._tensors():
            found.add(name, tensor)
            names.append(name)
            dtypes.append(str(tensor.dtype).removeprefix("torch."))
            shapes.append(tuple(tensor.shape))
        self._thread = threading.Thread(target=self._send, name=f"r1-weights-v{version}", daemon=True)
        self._thread.start()
        payload: dict[str, Any] = {"init": self._init}
        if self._backend == "nccl":
            payload.update(names=names, dtype_names=dtypes, shapes=[list(shape) for shape in shapes])
        else:
            payload.update(self._handles())
        return WeightUpdate(
            version=version, backend=self._backend, names=tuple(names), dtypes=tuple(dtypes), shapes=tuple(shapes),
            checksum=found.hexdigest(), payload=payload,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the connection; safe to call twice."""
        self._client.taken_over.set()
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None

    def _send(self) -> None:
        try:
            if self._trainer is None:
                self._trainer = self._connect(self._backend, self._client, self._tensors, self._init)
            self._trainer.send_weights()
        except Exception as error:  # a thread's boundary: publish raises it again
            self._failure.append(error)
            self._client.payloads.put({})

    def _handles(self) -> dict[str, Any]:
        try:
            info = self._client.payloads.get(timeout=_HANDLES_TIMEOUT_S)
        except queue.Empty:
            raise RuntimeError(f"no IPC handles after {_HANDLES_TIMEOUT_S:.0f} s") from None
        self._raise_failure()
        handles = base64.b64encode(pickle.dumps(info["ipc_handles"])).decode()  # tuples with classes: vLLM's own form
        return {key: info[key] for key in ("names", "dtype_names", "shapes")} | {"ipc_handles_pickled": handles}

    def _finish(self) -> None:
        if self._thread is None:
            return
        self._client.taken_over.set()
        self._thread.join()
        self._thread = None
        self._client.taken_over.clear()
        while not self._client.payloads.empty():  # nccl's, which publish builds itself
            self._client.payloads.get()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            error = self._failure.pop()
            raise RuntimeError(f"weights could not be sent over {self._backend}: {error}") from error


def _rendezvous(receivers: int) -> dict[str, Any]:
    """Where learner (rank 0) and receivers (ranks from 1) meet; each engine adds its place to ``rank_offset``."""
    host = socket.gethostbyname(socket.gethostname())
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return {
        "master_address": host, "master_port": port, "rank_offset": 1, "world_size": receivers + 1, "packed": True,
    }  # fmt: skip


def connect_trainer(backend: str, client: HandOver, tensors: Tensors, init: dict[str, Any]) -> Any:
    """vLLM's trainer engine for a backend. With nccl it returns when every receiver has joined."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class CheckpointSource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            outlines = getattr(tensors, "outlines", tensors)  # gathers nothing where the model is sharded
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in outlines()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(tensors())

    if backend == "ipc":
        info: Any = IPCTrainerInitInfo(rank=0)
    else:
        info = NCCLTrainerInitInfo(
            rank=0, master_address=init["master_address"], master_port=init["master_port"],
            world_size=init["world_size"], packed=init["packed"],
        )  # fmt: skip
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=CheckpointSource())

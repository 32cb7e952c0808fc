"""Weights from the learner to the engines, and the proof that they arrived.

Every sync is attested twice before the first rollout that uses it: the engine's checksum of the bytes that it received
must be the learner's (``attest_bytes``), and the engine's log-probabilities of a canary text must be the learner's
within a tolerance (``attest_meaning``). The bytes prove the transport, the meaning proves everything behind it:
kernels, layouts, routing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.engine import WeightUpdate
from rollout.shared_memory import ALIGNMENT, DIRECTORY, Segment, remove_stale

BACKENDS = ("shm", "nccl", "ipc")
_ALGORITHM = "xxh3_128"
_KEPT = 2  # segments: the current version, and the one before for an engine that is still mapping it


Tensors = Callable[[], Iterable[tuple[str, Any]]]


class AttestationError(RuntimeError):
    """An engine does not hold the learner's weights. The run must stop: every rollout from here on would be wrong."""


def sender(model: Any, *, backend: str, dtype: str, run_id: str, receivers: int) -> WeightSender | Onlooker:
    """What a learner's process publishes its weights with; of a sharded model the first rank alone sends.

    Raises:
        ValueError: see :class:`WeightSender`.
    """
    tensors = SentTensors(model, dtype)
    if tensors.rank > 0:
        return Onlooker(tensors, passes=1 if backend == "shm" else 2)
    return WeightSender(model, backend=backend, dtype=dtype, run_id=run_id, receivers=receivers)


class WeightSender:
    """Publishes the weights of a model, in the learner's process.

    Args:
        model: a transformers causal LM; its tensors are read anew at each ``publish``.
        backend: ``shm`` (one host), or ``nccl`` / ``ipc`` (GPUs).
        dtype: of the engines' parameters; tensors that the model keeps in another dtype than its own are sent as they
            are.
        run_id: part of the names of shm segments.
        receivers: GPUs that receive over nccl: workers times tensor_parallel.

    Raises:
        ValueError: an unknown backend, or one that needs GPUs where there is none.
    """

    def __init__(
        self, model: Any, *, backend: str = "shm", dtype: str = "float32", run_id: str = "run", receivers: int = 1
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"engine.weight_backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        tensors = SentTensors(model, dtype)
        assert tensors.rank == 0, "the other ranks look on"
        self._transport: Any
        if backend == "shm":
            self._transport = SharedMemoryTransport(tensors, run_id)
            return
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"engine.weight_backend {backend} needs GPUs; use shm on a CPU")
        if backend == "ipc" and tensors.ranks > 1:
            raise ValueError(
                "engine.weight_backend ipc hands over the memory of one process, and the learner has "
                f"{tensors.ranks} (parallel.ranks): use nccl or shm"
            )
        from pipelines.gpu_transfer import GpuTransport

        self._transport = GpuTransport(backend, tensors, receivers)

    def publish(self, version: int) -> WeightUpdate:
        """Makes one version of the weights available and returns what an engine needs to take it over.

        The tensors must not change until the engines have taken it over (``nccl``, ``ipc``; ``shm`` is a copy).

        Raises:
            OSError: no room under /dev/shm.
            RuntimeError: a GPU transfer failed.
        """
        return self._transport.publish(version)

    def close(self) -> None:
        """Takes back what was published; safe to call twice."""
        self._transport.close()


class SharedMemoryTransport:
    """Writes each version into a segment of shared memory; keeps this version and the one before.

    Args:
        tensors: (name, tensor) pairs in checkpoint form, anew at each call; one is dropped before the next is taken.
        run_id: part of the segments' names.
        directory: where they lie; what dead processes left there is removed.
    """

    def __init__(self, tensors: Tensors, run_id: str, directory: Path = DIRECTORY) -> None:
        self._tensors, self._run_id, self._directory = tensors, run_id, directory
        self._segments: list[Segment] = []
        remove_stale(directory)

    def publish(self, version: int) -> WeightUpdate:
        """See :meth:`WeightSender.publish`."""
        import torch

        outlines = outlined(self._tensors)
        offsets, size = layout([t.numel() * t.element_size() for _, t in outlines])
        while len(self._segments) >= _KEPT:
            self._segments.pop(0).unlink()
        segment = Segment.create(self._run_id, version, size, self._directory)
        self._segments.append(segment)
        for (name, tensor), (expected, outline), offset in zip(self._tensors(), outlines, offsets, strict=True):
            assert (name, tensor.dtype, tensor.shape) == (expected, outline.dtype, outline.shape)
            if tensor.numel():
                place = torch.frombuffer(segment.buffer, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                place.view(tensor.shape).copy_(tensor)
        return WeightUpdate(
            version=version,
            backend="shm",
            names=tuple(name for name, _ in outlines),
            dtypes=tuple(str(t.dtype).removeprefix("torch.") for _, t in outlines),
            shapes=tuple(tuple(t.shape) for _, t in outlines),
            checksum=segment.digest(_ALGORITHM),
            payload={"path": str(segment.path), "size": size, "algorithm": _ALGORITHM, "offsets": offsets},
        )

    def close(self) -> None:
        """Unlinks what was published; safe to call twice."""
        while self._segments:
            self._segments.pop().unlink()


class Onlooker:
    """The side of a sharded learner's other ranks: they gather with the first one, which sends, and keep nothing.

    Args:
        tensors: as the first rank's.
        passes: how often that one goes through them for each version. The last of two happens in a thread, as there.
    """

    def __init__(self, tensors: Tensors, passes: int) -> None:
        self._tensors, self._passes = tensors, passes
        self._thread: threading.Thread | None = None

    def publish(self, version: int) -> None:
        """See :meth:`WeightSender.publish`."""
        self.close()
        self._look_on()
        if self._passes > 1:
            self._thread = threading.Thread(target=self._look_on, name=f"r1-weights-v{version}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Returns when the version before is gathered; safe to call twice."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _look_on(self) -> None:
        for _ in self._tensors():
            pass


class SentTensors:
    """The weights of a model as they are sent, anew at each call; see :func:`sent_tensors`.

    Attributes:
        rank, ranks: this process among those over which the model is sharded; 0 of 1 when it is whole.
    """

    def __init__(self, model: Any, dtype: str) -> None:
        from policy.parallel import sharded

        self._model, self._dtype = model, dtype
        root = sharded(model)
        self.rank, self.ranks = (0, 1) if root is None else (root.ranks.rank, root.ranks.size)

    def __call__(self) -> Iterator[tuple[str, Any]]:
        return sent_tensors(self._model, self._dtype)

    def outlines(self) -> list[tuple[str, Any]]:
        """The same on the ``meta`` device: names, dtypes and shapes, without gathering or merging anything."""
        from policy.parallel import Outlines

        return list(sent_tensors(self._model, self._dtype, Outlines(self._model)))


def outlined(tensors: Tensors) -> list[tuple[str, Any]]:
    """Names, dtypes and shapes of what will be sent, as tensors."""
    return list(getattr(tensors, "outlines", tensors)())


def sent_tensors(model: Any, dtype: str, state: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, tensor) in checkpoint form: parameters and buffers, whole, in the dtype in which they are sent.

    Those of a sharded model are gathered one at a time, by all ranks together. ``state`` replaces the live weights.
    """
    import torch

    from policy.model import checkpoint_tensors
    from policy.parallel import sharded

    root, target = sharded(model), getattr(torch, dtype)
    own = model.dtype if root is None else root.dtype
    for name, tensor in checkpoint_tensors(model, state):
        keep = tensor.dtype != own or name.endswith("e_score_correction_bias")
        yield name, tensor.detach() if keep else tensor.detach().to(target)


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of blocks of these sizes, each on its cache line, and the total. Bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += math.ceil(size / ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


def attest_bytes(update: WeightUpdate, received_digest: str) -> None:
    """Compares the digest of the received bytes with the published one.

    Raises:
        AttestationError: they differ.
    """
    if received_digest != update.checksum:
        raise AttestationError(
            f"weights of version {update.version} arrived with other bytes: published {update.checksum}, received "
            f"{received_digest or 'nothing'} ({len(update.names)} tensors over {update.backend}); see the engine's log"
        )


def default_tolerance(dtype: str) -> tuple[float, float]:
    """(largest, mean) |Δlogp| in nats that an attestation by meaning accepts.

    float32: 5e-4 and 5e-5. A correct engine shows up to 5e-5 on single tokens that a trained policy finds very unlikely
        and 1e-6 in the mean; the upstream bugs that this is to catch show 4e-3 and more in the mean. bfloat16: 0.5 and
        0.05, where a correct engine shows 0.2 and 6e-3.
    """
    return (5e-4, 5e-5) if dtype == "float32" else (0.5, 0.05)


def before_ties(margins: Sequence[Sequence[float]], dtype: str) -> list[int]:
    """How many tokens of each sequence come before the first whose routing is as good as a tie.

    Where two experts score alike up to rounding, engine and learner may choose differently, and everything from that
    token on differs by much more than rounding although both hold the same weights.
    """
    tie = tie_margin(dtype)
    return [next((i for i, margin in enumerate(row) if margin < tie), len(row)) for row in margins]


def tie_margin(dtype: str) -> float:
    """Scores of experts that are nearer than this may change places by rounding."""
    return 2e-5 if dtype == "float32" else 2e-2


def attest_meaning(
    engine: Sequence[float],
    learner: Sequence[float],
    tokens: Sequence[str],
    *,
    tolerance: float | None = None,
    dtype: str = "float32",
    worker: int | None = None,
    version: int | None = None,
) -> tuple[float, float]:
    """Compares log-probabilities (nats) of the same tokens by the engine and by the learner. All [N]

    Args:
        engine, learner: the two sides.
        tokens: how each token reads, for the message.
        tolerance: largest |Δlogp|; None takes the dtype's default, which bounds the mean too.
        dtype: of the engine.
        worker, version: named in the message.

    Returns:
        (mean, max) of |Δlogp|.

    Raises:
        AttestationError: they differ by more, are not finite, or there is nothing to compare; names the worst tokens.
    """
    where = "" if worker is None else f" in rollout worker {worker}"
    what = "the weights" if version is None else f"version {version} of the weights"
    if not len(engine) == len(learner) == len(tokens) or not engine:
        raise AttestationError(
            f"{what}{where} cannot be attested: {len(engine)} log-probabilities by the engine, "
            f"{len(learner)} by the learner, {len(tokens)} tokens"
        )
    gaps = [_gap(a, b) for a, b in zip(engine, learner, strict=True)]
    mean, largest = sum(gaps) / len(gaps), max(gaps)
    most, most_mean = (tolerance, math.inf) if tolerance is not None else default_tolerance(dtype)
    if largest <= most and mean <= most_mean:
        return mean, largest
    worst = sorted(range(len(gaps)), key=lambda i: -gaps[i])[:5]
    named = ", ".join(f"{tokens[i]!r} at {i} (engine {engine[i]:.4f}, learner {learner[i]:.4f})" for i in worst)
    bound = f"{most:g}" + ("" if math.isinf(most_mean) else f", mean {most_mean:g}")
    raise AttestationError(
        f"{what}{where} mean something else to the engine than to the learner: |Δlogp| max {largest:.2e}, mean "
        f"{mean:.2e} over {len(gaps)} tokens (accepted: max {bound}); worst: {named}"
    )


def _gap(a: float, b: float) -> float:
    gap = abs(a - b)
    return gap if math.isfinite(gap) else math.inf

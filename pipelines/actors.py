"""The processes of a run: one learner, several rollout workers, and how the driver reaches them.

``LearnerService`` and ``RolloutService`` are plain classes. ``LocalHandle`` runs one of them in this process
(tests), ``RayHandle`` in a Ray actor of its own; both answer ``submit(method, ...)`` with a future, so the
driver's code does not know which it holds.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from rollout.engine import Engine, EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Completion, SamplingParams


class Handle(Protocol):
    """A service somewhere: in this process or in an actor."""

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Calls a method there; the future carries its result or its exception."""
        ...

    def kill(self) -> None:
        """Ends the service at once, whatever it is doing."""
        ...


class RolloutService:
    """One engine and the weights it holds."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.engine: Engine | None = None

    async def ready(self) -> int:
        """Starts the engine (once) and returns its policy_version."""
        if self.engine is None:
            engine = self._start()
            self.engine = await engine if inspect.isawaitable(engine) else engine
        assert self.engine is not None
        return self.engine.policy_version

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        """One completion per request, in request order."""
        return await self._engine().generate(requests, params)

    async def update_weights(self, update: WeightUpdate) -> str:
        """Takes over the weights; returns the digest of the received bytes."""
        return await self._engine().update_weights(update)

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Greedy continuations with the engine's own log-probabilities of every token after the first."""
        return await self._engine().canary(prompts, new_tokens)

    async def close(self) -> None:
        """Frees the engine."""
        if self.engine is not None:
            await self.engine.close()

    def _engine(self) -> Engine:
        if self.engine is None:
            raise EngineDied("the engine has not been started")
        return self.engine


class LocalHandle:
    """Runs a service on an event loop in a thread of this process."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._dead = False
        self._service = asyncio.run_coroutine_threadsafe(self._call(build), self._loop).result()

    @staticmethod
    async def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`Handle`."""
        if self._dead:
            failed: Future[Any] = Future()
            failed.set_exception(EngineDied("the service was killed"))
            return failed
        bound = getattr(self._service, method)
        return asyncio.run_coroutine_threadsafe(self._call(bound, *args, **kwargs), self._loop)

    def kill(self) -> None:
        """See :class:`Handle`; what is running is abandoned."""
        self._dead = True
        self._loop.call_soon_threadsafe(self._loop.stop)


class RayHandle:
    """Runs a service in a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`Handle`."""
        return getattr(self.actor, method).remote(*args, **kwargs).future()

    def kill(self) -> None:
        """See :class:`Handle`."""
        import ray

        ray.kill(self.actor)


def settle(future: Future[Any], timeout: float | None = None) -> Any:
    """The result of a future, with Ray's wrappers taken off its exception.

    Raises:
        EngineDied: the actor or its engine is gone.
        TimeoutError: no result within ``timeout`` seconds.
        Exception: whatever the service raised, as it raised it.
    """
    try:
        return future.result(timeout)
    except Exception as error:  # the Ray actor boundary: unwrapped and raised again
        if not any(base.__module__.startswith("ray.") for base in type(error).__mro__):
            raise
        import ray.exceptions as rx

        if isinstance(error, rx.RayTaskError):  # Ray makes it an instance of its cause's class too
            raise error.cause from None
        if isinstance(error, (rx.RayActorError, rx.WorkerCrashedError, rx.NodeDiedError)):
            raise EngineDied("its process is gone (killed, or the machine is out of memory)") from None
        raise


def start_vllm(
    folder: str, config: EngineConfig, dtype: str, seed: int, cores: str | None, worker: int
) -> Awaitable[Engine]:
    """Starts a vLLM engine over a model folder; what ``RolloutService`` calls inside its actor."""
    from rollout.vllm_engine import VllmEngine

    return VllmEngine.create(folder, config, dtype=dtype, seed=seed, cores=cores, worker=worker)

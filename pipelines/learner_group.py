"""Many ranks of one learner behind one handle: each call goes to all of them, the first one's answer comes back.

    submit     produces: the call's arguments, once, for all ranks
               waits for: nothing; the future waits for every rank
    watcher    consumes: the ranks' answers, in a thread for each call

Ranks compute in step: one that fails leaves the others waiting in a collective. So a rank that dies ends the group at
once, and one that raises ends it after a moment in which the others may raise the same. What is left is killed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from pipelines.actors import Handle, RayHandle, settle
from pipelines.learner_service import LearnerService
from pipelines.resources import actor, count_gpus, gpus_of_one
from policy.config import ModelConfig, ParallelConfig
from rollout.engine import EngineDied

# After an error the other ranks have this long to end too: by the same error, or to be found dead (whose neighbours
# lose their connection first, and say so).
GRACE_S = 5.0


def start_learner(
    model: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    cores: int,
    service: type[LearnerService] = LearnerService,
) -> Handle:
    """Starts the learner's processes, which share the cores (each has one at least) and take a GPU each, if there are.

    ``service`` is what runs in them.

    Raises:
        EngineDied: a rank was lost before all had met.
    """
    options = {"max_concurrency": 1, "num_gpus": gpus_of_one(count_gpus())}
    threads = max(1, cores // parallel.ranks)
    ranks = [
        RayHandle(actor(service, **options).remote(model, seed, threads, parallel, rank))
        for rank in range(parallel.ranks)
    ]
    if len(ranks) == 1:
        return ranks[0]
    group = LearnerGroup(ranks)
    settle(group.submit("join", *settle(ranks[0].submit("rendezvous"))))
    return group


class LearnerGroup:
    """See :class:`pipelines.actors.Handle`.

    Args:
        ranks: handles of ``LearnerService``, of rank 0 first.
        grace_s: how long the others are waited for after one has failed.
    """

    def __init__(self, ranks: Sequence[Handle], grace_s: float = GRACE_S) -> None:
        assert ranks
        self._ranks, self._grace_s = list(ranks), grace_s
        self._lost: EngineDied | None = None

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Calls a method on every rank; the future carries rank 0's result, or the first failure there was.

        Once a rank is lost every future carries that.
        """
        answer: Future[Any] = Future()
        if self._lost is not None:
            answer.set_exception(self._lost)
            return answer
        args, kwargs = shared(self._ranks, args, kwargs)
        calls = [rank.submit(method, *args, **kwargs) for rank in self._ranks]
        threading.Thread(target=self._watch, args=(calls, answer), name=f"learner-{method}", daemon=True).start()
        return answer

    def kill(self) -> None:
        """Ends every rank at once."""
        self._lost = self._lost or EngineDied("it was ended")
        for rank in self._ranks:
            rank.kill()

    def _watch(self, calls: list[Future[Any]], answer: Future[Any]) -> None:
        found = self._failure(calls)
        if found is None:
            answer.set_result(settle(calls[0]))
            return
        rank, error = found
        if isinstance(error, EngineDied) or not all(call.done() for call in calls):
            self._lost = (
                error if isinstance(error, EngineDied) else EngineDied(f"rank {rank} of {len(calls)} failed: {error}")
            )
            for other in self._ranks:
                other.kill()
        answer.set_exception(error)

    def _failure(self, calls: list[Future[Any]]) -> tuple[int, Exception] | None:
        """Which rank failed, and how: a lost rank rather than what its loss did to the others."""
        waiting, failed = set(calls), {}
        grace: float | None = None
        while waiting:
            done, waiting = wait(waiting, grace, return_when=FIRST_COMPLETED)
            for call in done:
                try:
                    settle(call)
                except Exception as error:  # the ranks' boundary: handed to whoever asked
                    failed[calls.index(call)] = error
            lost = [rank for rank, error in failed.items() if isinstance(error, EngineDied)]
            if lost:
                rank = min(lost)
                return rank, EngineDied(f"rank {rank} of {len(calls)}: {failed[rank]}")
            if failed:
                grace = self._grace_s
            if not done:  # the moment is over
                break
        return min(failed.items(), default=None)


def shared(
    ranks: Sequence[Handle], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, put once where all actors read them (Ray hands them over as values); as they are for one rank."""
    if len(ranks) == 1 or not isinstance(ranks[0], RayHandle):
        return args, kwargs
    import ray

    return tuple(ray.put(value) for value in args), {name: ray.put(value) for name, value in kwargs.items()}

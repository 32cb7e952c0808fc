"""The rubric: several reward functions, weighted into one reward, with a strict account of what failed.

    reward = sum over the functions that apply of weight x score

A function that returns None does not apply and adds nothing. A function that raises, returns something that is no
finite number, or overruns its deadline leaves the rollout without a reward (None, never 0.0): the rollout does not
train. When more than ``max_error_rate`` of the calls of one function fail, the run stops with the traceback.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any, Self

from rewards.base import RewardConfig, Score
from rewards.pool import RewardPool
from rewards.worker import Call, Failure, Outcome
from rollout.types import Rollout, RolloutGroup

Event = Callable[[dict[str, Any]], None]
# A function that fails on each of its first so many completions is not tried on the rest.
HOPELESS_AFTER = 32

REWARD_METRICS = {
    "reward/mean": "Mean reward (weighted sum of the scores) over the completions that have one.",
    "reward/std": "Standard deviation of the reward over the completions that have one.",
    "reward/pass_rate": "Share of completions that pass: the judge's score is >= 1; a failed call does not pass.",
    "reward/unscored": "Completions without a reward (a function failed, or none applied); they do not train.",
    "reward/{function}/mean": "Mean score of one reward function over the completions that it applied to.",
    "reward/{function}/applied": "Share of completions that the function gave a score.",
    "reward/{function}/errors": "Completions on which the function failed otherwise than by its deadline.",
    "reward/{function}/invalid": "Those among the errors on which it returned no finite number.",
    "reward/{function}/crashes": "Those among the errors on which it took its process down.",
    "reward/{function}/out_of_memory": "Those among the errors on which its process took too much memory.",
    "reward/{function}/timeouts": "Completions on which the function overran its deadline.",
    "reward/{function}/{metric}": "Mean of a further number that the function reports.",
}


class RewardFailure(RuntimeError):
    """A reward function failed too often to go on.

    Attributes:
        traceback: that of the first failure (also a note of the exception); for a timeout, where the call stood.
    """

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback
        if traceback:
            self.add_note(traceback)


@dataclass(frozen=True, kw_only=True)
class RubricConfig:
    """The reward functions of a stage.

    Attributes:
        functions: at least one; names are unique.
        judge: name of the function whose score >= 1 means that a completion passes; the first one when left out.
        max_error_rate: share of failed calls of one function within a step above which the run stops, [0, 1].
        processes: worker processes, >= 1.
        memory_gib: GiB that one worker process and all that it started may hold beyond the imported functions, > 0; a
            call that takes more is killed.
    """

    functions: tuple[RewardConfig, ...]
    judge: str = ""
    max_error_rate: float = 0.1
    processes: int = 2
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("a rubric needs at least one reward function")
        names = [function.name for function in self.functions]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two reward functions are called {twice!r}: give one of them another name")
        if self.judge and self.judge not in names:
            raise ValueError(f"judge must be one of {', '.join(names)}, got {self.judge!r}")
        if not self.judge:
            object.__setattr__(self, "judge", names[0])
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate must be in [0, 1], got {self.max_error_rate}")
        if self.processes < 1:
            raise ValueError(f"processes must be >= 1, got {self.processes}")
        if not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be > 0, got {self.memory_gib}")


class Rubric:
    """Scores groups of rollouts in worker processes.

    Args:
        config: functions and limits.
        forced_think: the prompts end in ``<think>`` (rollout.template.forces_thinking).
        on_event: receives one dict per failed call: ``event`` (reward_error | reward_invalid | reward_timeout |
            reward_crash | reward_memory), ``function``, ``problem``, ``sample_index`` (None: all siblings), ``error``,
            ``traceback``.
        search: folders in which ``module:function`` and ``file.py:function`` are looked for, after the import path.

    Example:
        >>> config = RubricConfig(functions=(RewardConfig(path="reasoning_gym", params={"strict": True}),))
        >>> with Rubric(config) as rubric:
        ...     scored = list(rubric.score(groups))
    """

    def __init__(
        self,
        config: RubricConfig,
        *,
        forced_think: bool = True,
        on_event: Event | None = None,
        search: Sequence[str] = (),
    ) -> None:
        self.config = config
        self._on_event = on_event
        self._pool = RewardPool(
            config.functions,
            processes=config.processes,
            forced_think=forced_think,
            search=search,
            memory_gib=config.memory_gib,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self, timeout_s: float | None = None) -> None:
        """Waits until all functions are imported and checked (they are loaded in the background from the start).

        Raises:
            ValueError: a function is not there, asks for what nobody gives, or its module cannot be imported.
            PoolBroken: the processes died, or are not ready in time.
        """
        self._pool.ready(timeout_s)

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """Yields each group with scores, errors, metrics and rewards filled in, in order.

        Overlaps with an upstream iterator: a group is being scored while the next one is still generated, and it is
        yielded at the latest when nothing is left to pull.

        Raises:
            RewardFailure: more than ``max_error_rate`` of the completions failed in one function (all groups that could
                be scored have been yielded by then), or all of its first ones did (at once).
            ValueError, PoolBroken: see :meth:`ready`.
        """
        account = _Account(self.config)
        pending: deque[tuple[RolloutGroup, Future[list[tuple[Call, Outcome]]]]] = deque()
        for group in groups:
            pending.append((group, self._pool.submit(group)))
            while pending and pending[0][1].done():
                yield self._finish(*pending.popleft(), account)
        while pending:
            yield self._finish(*pending.popleft(), account)
        account.check()

    def close(self) -> None:
        """Ends the worker processes; safe to call twice."""
        self._pool.close()

    def _finish(
        self, group: RolloutGroup, future: Future[list[tuple[Call, Outcome]]], account: _Account
    ) -> RolloutGroup:
        rows: list[dict[str, Score | Failure]] = [{} for _ in group.rollouts]
        for call, outcome in future.result():
            name = self.config.functions[call.function].name
            indices = range(len(rows)) if call.rollout is None else [call.rollout]
            for index, result in zip(indices, outcome, strict=True):
                rows[index][name] = result
            self._report(group, call, name, outcome)
            account.add(name, outcome)
        account.stop_if_hopeless()
        return replace(group, rollouts=tuple(map(self._filled, group.rollouts, rows)))

    def _report(self, group: RolloutGroup, call: Call, name: str, outcome: Outcome) -> None:
        failures = [(index, each) for index, each in enumerate(outcome) if isinstance(each, Failure)]
        if self._on_event is None or not failures:
            return
        shared = call.rollout is None and all(failure == failures[0][1] for _, failure in failures)
        for index, failure in failures[:1] if shared and len(failures) == len(outcome) else failures:
            position = None if shared else index if call.rollout is None else call.rollout
            self._on_event(
                {
                    "event": f"reward_{failure.kind}",
                    "function": name,
                    "problem": group.problem.id,
                    "sample_index": None if position is None else group.rollouts[position].completion.sample_index,
                    "error": failure.error,
                    "traceback": failure.traceback,
                }
            )

    def _filled(self, rollout: Rollout, row: dict[str, Score | Failure]) -> Rollout:
        scores, errors, metrics = {}, {}, {}
        for name, result in row.items():
            if isinstance(result, Failure):
                errors[name] = result.error
                continue
            if result.value is not None:
                scores[name] = result.value
            metrics.update({f"{name}/{metric}": value for metric, value in result.metrics.items()})
        scored = replace(rollout, scores=scores, errors=errors, metrics=metrics)
        return replace(scored, reward=weighted_reward(scored, self.config))


class _Account:
    """Counts completions and failures by function, over one call of ``Rubric.score``."""

    def __init__(self, config: RubricConfig) -> None:
        self._limit = config.max_error_rate
        self._judged: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._first: dict[str, Failure] = {}

    def add(self, name: str, outcome: Outcome) -> None:
        for result in outcome:
            self._judged[name] += 1
            if isinstance(result, Failure):
                self._failed[name] += 1
                self._first.setdefault(name, result)

    def stop_if_hopeless(self) -> None:
        """Raises RewardFailure when a function failed on everything so far, and on enough to be sure."""
        for name, failed in self._failed.items():
            if failed == self._judged[name] >= HOPELESS_AFTER and self._limit < 1:
                self._stop(name)

    def check(self) -> None:
        """Raises RewardFailure when a function failed on more than the limit."""
        for name, failed in self._failed.items():
            if failed > self._limit * self._judged[name]:
                self._stop(name)

    def _stop(self, name: str) -> None:
        failed, judged, first = self._failed[name], self._judged[name], self._first[name]
        raise RewardFailure(
            f"reward function {name!r} failed on {failed} of {judged} completions ({failed / judged:.0%}, "
            f"max_error_rate {self._limit:.0%}); the first failure: {first.error}",
            first.traceback,
        )


def weighted_reward(rollout: Rollout, config: RubricConfig) -> float | None:
    """The reward that follows from a rollout's scores; None when a function failed or none applied."""
    if rollout.errors or not rollout.scores:
        return None
    weights = {function.name: function.weight for function in config.functions}
    return sum(weights[name] * value for name, value in rollout.scores.items())


def passed(rollout: Rollout, judge: str) -> bool:
    """Whether a rollout passes: the judge's score is >= 1. A failed or unapplied judge does not pass."""
    return rollout.scores.get(judge, 0.0) >= 1.0


def reward_metrics(groups: Sequence[RolloutGroup], config: RubricConfig) -> dict[str, float]:
    """The numbers of ``REWARD_METRICS`` over scored groups; a mean over nothing is left out."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    out = {
        "reward/pass_rate": fmean(passed(rollout, config.judge) for rollout in rollouts),
        "reward/unscored": float(len(rollouts) - len(rewards)),
    }
    if rewards:
        out |= {"reward/mean": fmean(rewards), "reward/std": pstdev(rewards)}
    for name in (function.name for function in config.functions):
        scores = [rollout.scores[name] for rollout in rollouts if name in rollout.scores]
        errors = [rollout.errors[name] for rollout in rollouts if name in rollout.errors]
        kinds = Counter(error.partition(":")[0] for error in errors)
        out |= {
            f"reward/{name}/applied": len(scores) / len(rollouts),
            f"reward/{name}/errors": float(len(errors) - kinds["timeout"]),
            f"reward/{name}/invalid": float(kinds["invalid"]),
            f"reward/{name}/crashes": float(kinds["crash"]),
            f"reward/{name}/out_of_memory": float(kinds["memory"]),
            f"reward/{name}/timeouts": float(kinds["timeout"]),
        }
        if scores:
            out[f"reward/{name}/mean"] = fmean(scores)
    reported: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.metrics.items():
            reported.setdefault(f"reward/{name}", []).append(value)
    return out | {name: fmean(values) for name, values in reported.items()}

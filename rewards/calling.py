"""Calling conventions: from a group of rollouts to the arguments of one reward function, and back to scores.

``bind`` checks once, before the first call, that a function can be given everything that it asks for.
A *call* is the unit that is run under one deadline: one completion for a sync ``plain`` or ``verl`` function, the whole
group for styles that take lists and for async functions (their calls overlap).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardConfig, RewardFn, Score, check_machine, resolve
from rollout.template import split_reasoning
from rollout.types import Problem, RolloutGroup

INJECTED = ("completion", "problem", "rollout", "group", "reasoning", "forced_think")
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_VERL_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
_TRL = ("prompts", "completions", "completion_ids")
_LISTS = ("trl", "trl_chat", "verl_batch")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# A whole-group call of an async function is killed this many seconds after its own timeouts should have ended it.
ASYNC_GRACE_S = 5.0


class CallTimeout(Exception):
    """An async reward function did not finish in time; its process goes on."""


class NotAScore(TypeError, ValueError):
    """What a reward function returned is no finite number (nor a Score, a dict with ``score``, or None)."""


@dataclass(frozen=True)
class BoundReward:
    """A reward function with everything that is needed to call it.

    Attributes:
        config: as written in the recipe.
        whole_group: one call scores all siblings.
        deadline_s: seconds after which the process that runs a call is killed.
    """

    config: RewardConfig
    function: RewardFn
    accepted: frozenset[str]
    takes_all: bool
    whole_group: bool
    is_async: bool

    @property
    def deadline_s(self) -> float:
        return self.config.timeout_s + (ASYNC_GRACE_S if self.is_async else 0.0)

    def call(self, group: RolloutGroup, index: int | None, forced_think: bool) -> list[Score | BaseException]:
        """Runs one call: for rollout ``index``, or for all siblings when None.

        Returns one Score, or one exception of an async call, per rollout. What a sync function raises passes through.
        """
        indices = range(len(group.rollouts)) if index is None else [index]
        if self.config.style in _LISTS:
            return self._call_with_lists(group)
        arguments = self._verl_arguments if self.config.style == "verl" else self._plain_arguments
        prepared = [arguments(group, i, forced_think) for i in indices]
        if self.is_async:
            return _event_loop().run(self._gather(prepared))
        return [as_score(self._settled(self.function(**each))) for each in prepared]

    async def _gather(self, prepared: Sequence[dict[str, Any]]) -> list[Score | BaseException]:
        async def one(arguments: dict[str, Any]) -> Score | BaseException:
            try:
                return as_score(await _in_time(self.function(**arguments), self.config.timeout_s))
            except BaseException as error:  # the boundary of a reward call: recorded, never a score
                return error

        return await asyncio.gather(*(one(arguments) for arguments in prepared))

    def _settled(self, value: Any) -> Any:
        """What a sync function returned; an awaitable is waited for."""
        return _event_loop().run(_in_time(value, self.config.timeout_s)) if inspect.isawaitable(value) else value

    def _call_with_lists(self, group: RolloutGroup) -> list[Score | BaseException]:
        logged: dict[str, list[float]] = {}
        if self.config.style == "verl_batch":
            arguments = self._verl_batch_arguments(group)
        else:
            arguments = self._trl_arguments(group, logged)
        values = self._settled(self.function(**arguments))
        scores = _score_list(values, len(group.rollouts), self.config.style)
        metrics = {name: sum(numbers_) / len(numbers_) for name, numbers_ in logged.items()}
        return [Score(value=each.value, metrics={**metrics, **each.metrics}) for each in scores]

    def _plain_arguments(self, group: RolloutGroup, index: int, forced_think: bool) -> dict[str, Any]:
        rollout = group.rollouts[index]
        available: dict[str, Callable[[], Any]] = {
            "completion": lambda: rollout.completion,
            "problem": lambda: group.problem,
            "rollout": lambda: rollout,
            "group": lambda: group,
            "reasoning": lambda: split_reasoning(rollout.completion.text, forced_think=forced_think),
            "forced_think": lambda: forced_think,
        }
        return {name: available[name]() for name in INJECTED if name in self.accepted} | self.config.params

    def _verl_arguments(self, group: RolloutGroup, index: int, forced_think: bool) -> dict[str, Any]:
        problem, metadata = group.problem, group.problem.metadata
        values = {
            "data_source": metadata.get("data_source", problem.source),
            "solution_str": group.rollouts[index].completion.text,
            "ground_truth": _ground_truth(problem),
            "extra_info": metadata.get("extra_info", dict(metadata)),
        }
        return {name: value for name, value in values.items() if self._takes(name)} | self.config.params

    def _verl_batch_arguments(self, group: RolloutGroup) -> dict[str, Any]:
        problem, n = group.problem, len(group.rollouts)
        extra = problem.metadata.get("extra_info", problem.metadata)
        values: dict[str, Any] = {
            "data_sources": [problem.metadata.get("data_source", problem.source)] * n,
            "solution_strs": [rollout.completion.text for rollout in group.rollouts],
            "ground_truths": [_ground_truth(problem)] * n,
            "extra_infos": [dict(extra) for _ in range(n)],
        }
        return {name: value for name, value in values.items() if self._takes(name)} | self.config.params

    def _trl_arguments(self, group: RolloutGroup, logged: dict[str, list[float]]) -> dict[str, Any]:
        problem, n = group.problem, len(group.rollouts)
        texts = [rollout.completion.text for rollout in group.rollouts]
        chat = self.config.style == "trl_chat"
        # TRL's own functions look for the gold answer under "solution"; a column of that name comes first.
        columns = {"answer": problem.answer, "solution": problem.answer, **problem.metadata}
        values: dict[str, Any] = {name: [value] * n for name, value in columns.items()}
        values["prompts"] = [[{"role": "user", "content": problem.prompt}] if chat else problem.prompt] * n
        values["completions"] = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        values["completion_ids"] = [list(rollout.completion.token_ids) for rollout in group.rollouts]
        values["log_metric"] = lambda name, value: logged.setdefault(str(name), []).append(_finite(value, str(name)))
        values["log_extra"] = lambda column, rows: None  # columns of TRL's own table of completions
        return {name: value for name, value in values.items() if self._takes(name)} | self.config.params

    def _takes(self, name: str) -> bool:
        return self.takes_all or name in self.accepted


def bind(config: RewardConfig, search: Sequence[str] = ()) -> BoundReward:
    """Finds the function and checks that every argument can be filled; imports nothing that only a call needs.

    Raises:
        ValueError: it is not there, asks for something that nobody gives, or does not take one of ``params``.
    """
    function = resolve(config.path, search, config.factory)
    parameters = inspect.signature(function).parameters
    named = {name: p for name, p in parameters.items() if p.kind not in _VARIADIC}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    label = f"reward {config.name!r} ({config.path})"
    offered = {"plain": INJECTED, "verl": _VERL, "verl_batch": _VERL_BATCH}.get(config.style, ())
    for name, parameter in named.items():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(f"{label}: argument {name!r} is positional-only; arguments are given by name")
        # The columns of a TRL function are known only with the problem; Python itself names a missing one.
        known = not offered or name in offered or name in config.params
        if parameter.default is inspect.Parameter.empty and not known:
            raise ValueError(
                f"{label} asks for {name!r}: name one of {', '.join(offered)}, or set it in params"
                f"{_hint(named, config)}"
            )
    if config.style in ("trl", "trl_chat") and not takes_all and not named.keys() & {*_TRL}:
        raise ValueError(
            f"{label} takes none of {', '.join(_TRL)}; if it is a factory, give its arguments under factory"
        )
    unknown = [name for name in config.params if name not in named]
    if unknown and not takes_all:
        raise ValueError(f"{label} takes no parameter {unknown[0]!r}; it has {', '.join(named) or 'none'}")
    check_machine(function, config.params)
    is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    return BoundReward(
        config=config,
        function=function,
        accepted=frozenset(named) - set(config.params),
        takes_all=takes_all,
        whole_group=is_async or config.style in _LISTS,
        is_async=is_async,
    )


def _hint(named: Mapping[str, Any], config: RewardConfig) -> str:
    """The style whose argument names a function has, where it is another one than was set."""
    styles = (("verl", "solution_str"), ("verl_batch", "solution_strs"), ("trl", "completions"))
    fitting = [style for style, argument in styles if argument in named and style != config.style]
    return f"; or is it style: {fitting[0]}?" if fitting else ""


def _ground_truth(problem: Problem) -> Any:
    """The gold answer; of verl's own data sets the one inside the column ``reward_model``."""
    column = problem.metadata.get("reward_model")
    return column.get("ground_truth") if problem.answer is None and isinstance(column, Mapping) else problem.answer


def _score_list(values: Any, n: int, style: str) -> list[Score]:
    """``n`` scores from what a function returned for a whole group: any iterable but a text or a mapping."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise NotAScore(f"a {style} reward must return a list of {n} numbers, got {type(values).__name__}")
    found = list(values)
    if len(found) != n:
        raise NotAScore(f"a {style} reward must return a list of {n} numbers, got {len(found)} values")
    return [as_score(value) for value in found]


def as_score(value: Any) -> Score:
    """What a function returned, as a Score of finite floats.

    A dict (verl) has its value under ``score``; its other numbers become metrics and everything else is left out.

    Raises:
        NotAScore: neither a finite number, nor a Score, a dict with ``score``, or None.
        ValueError: a further number has the name of one that is logged of every function.
    """
    if isinstance(value, Score):
        metrics = {str(name): _finite(number, str(name)) for name, number in value.metrics.items()}
        return Score(value=None if value.value is None else _finite(value.value, "score"), metrics=metrics)
    if isinstance(value, Mapping):
        if "score" not in value:
            raise NotAScore(f"a dict of a reward must hold 'score', got the keys {', '.join(map(str, value))}")
        others = {str(k): _finite(v, str(k)) for k, v in value.items() if k != "score" and isinstance(v, numbers.Real)}
        return Score(value=None if value["score"] is None else _finite(value["score"], "score"), metrics=others)
    return Score(value=None if value is None else _finite(value, "score"))


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a single number of an array library
    if not isinstance(value, numbers.Real):
        raise NotAScore(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise NotAScore(f"{name} must be finite, got {number}")
    return number


async def _in_time(awaitable: Any, timeout_s: float) -> Any:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise CallTimeout(f"no result after {timeout_s:g} s") from error
        raise  # the function's own


@functools.cache
def _event_loop() -> asyncio.Runner:
    """One loop per process, so that clients which a function keeps open stay usable from call to call."""
    return asyncio.Runner()

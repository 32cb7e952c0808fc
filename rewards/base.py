"""What a reward function is, how it is found, and how its arguments are filled in. Standard library only.

A plain reward function receives what it names:

    def concise(completion: Completion, problem: Problem) -> float | Score | None:
        return 1.0 if len(completion.token_ids) < 200 else 0.0

``None`` means "does not apply". Whatever it raises is recorded as an error and never becomes a score.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.types import Completion, Problem

RewardFn = Callable[..., Any]  # float | Score | None, or an awaitable of one; other styles return lists or dicts
Check = Callable[[Problem], None]
RESERVED_METRICS = {"mean", "applied", "errors", "invalid", "crashes", "out_of_memory", "timeouts"}
STYLES = ("plain", "trl", "trl_chat", "verl", "verl_batch")

BUILT_IN = {
    "accuracy": "rewards.accuracy:accuracy",
    "choice": "rewards.choice:choice",
    "code_tests": "rewards.code_tests:code_tests",
    "judge": "rewards.model_judge:judge",
    "language_consistency": "rewards.language:language_consistency",
    "length": "rewards.length:length",
    "random": "rewards.base:random_coin",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym",
    "repetition": "rewards.repetition:repetition",
    "thinking_format": "rewards.thinking_format:thinking_format",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A score with further numbers to log.

    Attributes:
        value: the score itself; None when the function does not apply.
        metrics: logged as the mean over completions, under ``reward/<function>/<metric>``.

    Raises:
        ValueError: a metric has the name of one that is logged of every function.
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = RESERVED_METRICS & self.metrics.keys()
        if taken:
            raise ValueError(f"a reward function may not call a number of its own {min(taken)!r}: rename it")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward function of a rubric.

    Attributes:
        path: name of a built-in (accuracy, choice, code_tests, judge, language_consistency, length, random,
            reasoning_gym, repetition, thinking_format), ``module:function`` or ``file.py:function``.
        name: what it is called in scores and metrics; the function's own name when left out.
        weight: factor of its score in the reward; 0 only logs it.
        style: calling convention: ``plain``, ``trl`` (prompts and completions as texts), ``trl_chat`` (as messages),
            ``verl`` (compute_score of one completion), ``verl_batch`` (compute_score of lists).
        timeout_s: deadline of one call, seconds, > 0; the process that overruns it is killed.
        retries: further attempts after a failure, >= 0.
        params: further keyword arguments of the function.
        factory: arguments with which ``path`` is called once, to make the function; null when it is the function
            itself. A class is a factory too: its instances are called.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    style: str = "plain"
    timeout_s: float = 10.0
    retries: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    factory: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("path", str), ("name", str), ("style", str), ("params", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} of a reward must be a {kind.__name__.lower()}, got {getattr(self, name)!r}")
        for name in ("weight", "timeout_s"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} of reward {self.path!r} must be a number, got {getattr(self, name)!r}")
        if self.path not in BUILT_IN and not all(self.path.rpartition(":")):
            known = ", ".join(BUILT_IN)
            raise ValueError(f"reward path must be {known}, module:function or file.py:function, got {self.path!r}")
        if self.style not in STYLES:
            raise ValueError(f"reward style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if "/" in self.name:
            raise ValueError(
                f"the name of a reward stands in metrics between slashes, got {self.name!r}: leave them out"
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.path!r} must be finite, got {self.weight}")
        if not self.timeout_s > 0:
            raise ValueError(f"the timeout_s of reward {self.path!r} must be > 0, got {self.timeout_s}")
        if self.retries < 0:
            raise ValueError(f"the retries of reward {self.path!r} must be >= 0, got {self.retries}")
        if not self.name:
            object.__setattr__(self, "name", self.path.rpartition(":")[2])


def resolve(path: str, search: Sequence[str] = (), factory: Mapping[str, Any] | None = None) -> RewardFn:
    """The function behind a built-in name, ``module:function`` or ``file.py:function``.

    Args:
        search: folders where modules and files are looked for, after the import path.
        factory: what stands there makes the function when it is called with these arguments; None: it is the function.

    Raises:
        ValueError: no such module, file or function, it is not callable, or the factory does not take the arguments. An
            exception that the module raises while it is imported, or the factory in its work, passes through.
    """
    module_name, _, attribute = BUILT_IN.get(path, path).rpartition(":")
    module = _load_file(module_name, search) if module_name.endswith(".py") else _load_module(module_name, path, search)
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
        if target is None:
            raise ValueError(f"reward {path!r}: {module_name} has no {attribute!r}")
    if factory is None and inspect.isclass(target):
        raise ValueError(f"reward {path!r} is a type, not a function: give its arguments under factory, {{}} for none")
    if not callable(target):
        raise ValueError(f"reward {path!r} is a {type(target).__name__}, not a function")
    return target if factory is None else _made(target, path, factory)


def _made(maker: Callable[..., Any], path: str, arguments: Mapping[str, Any]) -> RewardFn:
    try:
        inspect.signature(maker).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"reward {path!r} cannot be made from factory {dict(arguments)!r}: {error}") from error
    function = maker(**arguments)
    if not callable(function):
        raise ValueError(f"reward {path!r}: the factory made a {type(function).__name__}, not a function")
    return function


def _load_module(name: str, path: str, search: Sequence[str]) -> Any:
    sys.path.extend(folder for folder in search if folder not in sys.path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the module is there, something that it imports is not
        known = ", ".join(sorted(BUILT_IN))
        raise ValueError(f"reward {path!r}: no module {error.name!r}; built in are {known}") from error


def _load_file(name: str, search: Sequence[str]) -> Any:
    candidates = [Path(name).expanduser(), *(Path(folder) / name for folder in (*search, *sys.path))]
    file = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(
            f"the reward file {name} is not there (looked in the working directory, beside the recipe, and wherever "
            "Python looks for modules)"
        )
    module_name = f"_reward_file_{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look modules up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def preloads(*modules: str) -> Callable[[RewardFn], RewardFn]:
    """Names heavy modules that a reward function imports when it is called.

    They are imported once, before the processes that call it are made, and so never count against a deadline.
    """

    def mark(function: RewardFn) -> RewardFn:
        function.__dict__["preloads"] = modules
        return function

    return mark


def preload(function: RewardFn) -> None:
    """Imports what :func:`preloads` names.

    Raises:
        ImportError: one of the modules is not there.
    """
    for module in getattr(function, "preloads", ()):
        importlib.import_module(module)


def requires(check: Callable[..., None]) -> Callable[[RewardFn], RewardFn]:
    """Names what a reward function demands of the machine.

    ``check`` is called with the function's ``params`` before anything starts, and raises ValueError when the machine
    does not have it.
    """

    def mark(function: RewardFn) -> RewardFn:
        function.__dict__["requires"] = check
        return function

    return mark


def check_machine(function: RewardFn, params: Mapping[str, Any]) -> None:
    """Calls what :func:`requires` names, if anything.

    Raises:
        ValueError: the machine does not have what the function needs.
    """
    check = getattr(function, "requires", None)
    if check is not None:
        check(**params)


def checks(check: Check, *, by_answer: bool = False) -> Callable[[RewardFn], RewardFn]:
    """Names what a reward function demands of a problem.

    A run calls ``check(problem)`` for every problem that it will train on or evaluate, before anything starts; the
    check raises ValueError for one that the function could never judge. It runs in the run's own process: make it
    cheap.

    Args:
        by_answer: the check looks at nothing but the answer, so that problems with the same one need one call.

    Example:
        >>> def has_answer(problem):
        ...     if problem.answer is None:
        ...         raise ValueError("there is no gold answer")
        >>> @checks(has_answer, by_answer=True)
        ... def exact(completion, problem):
        ...     return float(completion.text == problem.answer)
    """

    def mark(function: RewardFn) -> RewardFn:
        function.__dict__["checks"] = (check, by_answer)
        return function

    return mark


def check_problems(function: RewardFn, problems: Iterable[Problem]) -> None:
    """Calls what :func:`checks` names, if anything.

    Raises:
        ValueError: names the first problem that the function could never judge, and how many more there are.
    """
    check, by_answer = getattr(function, "checks", (None, False))
    if check is None:
        return
    refused: list[str] = []
    seen: dict[str, bool] = {}
    for problem in problems:
        key = f"{type(problem.answer).__name__} {problem.answer!r}" if by_answer else None
        if key is not None and seen.get(key):
            continue
        try:
            check(problem)
        except Exception as error:  # a check is a user's code: the reward boundary
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            origin = f" ({problem.source})" if problem.source else ""
            refused.append(f"problem {problem.id!r}{origin}: {kind}{text}")
        else:
            if key is not None:
                seen[key] = True
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(f"{refused[0]}{more}: mend these rows, or drop them by a rewrite that returns None")


def random_coin(completion: Completion, *, seed: int = 0, probability: float = 0.5) -> float:
    """A coin that knows nothing of the answer: the control that no recipe may learn from.

    The same completion drawn with the same sampling seed always gets the same side; the sampling seed takes part so
    that no text is favoured for good.
    """
    key = f"{seed}/{completion.seed}/{completion.prompt_token_ids}/{completion.token_ids}".encode()
    draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return 1.0 if draw < probability else 0.0

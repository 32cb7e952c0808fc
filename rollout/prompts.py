"""Problems: where they come from, which are held out, and in which order they are asked.

``load_problems`` reads reasoning-gym generators, jsonl / jsonl.gz, parquet and Hugging Face data sets into ``Problem``.
``PromptStream`` hands them out epoch by epoch with a cursor that resumes exactly. Held-out problems are kept out of the
training set by the fingerprint of their prompt (``exclude``), and ``check_disjoint`` proves it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from rollout.sources import read_rows, reasoning_gym_entries
from rollout.types import Problem

Rewrite = Callable[[Problem], Problem | None]
ORIGINAL_PROMPT = "original_prompt"
"""Where the metadata of a rewritten problem keeps what its source said: held-out problems are told by both."""
SOURCE_KINDS = ("reasoning_gym", "jsonl", "parquet", "hf")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which problems are asked: one ``source``, or a ``mixture`` of several.

    Example:
        >>> short = DataConfig(source="reasoning_gym:chain_sum", params={"max_terms": 5}, weight=0.97)
        >>> long = DataConfig(source="reasoning_gym:chain_sum", params={"min_terms": 6, "max_terms": 8}, weight=0.03)
        >>> train = DataConfig(mixture=(short, long), size=20_000, rewrite="pipelines.recipes.chain_sum:compact")

    Attributes:
        source: ``reasoning_gym:NAME`` | ``jsonl:PATH`` (also .jsonl.gz) | ``parquet:PATH`` | ``hf:NAME[:SPLIT]``
            (hub name or local folder; SPLIT is ``train`` when left out).
        params: arguments of the reasoning-gym generator (``min_terms``, …) or of ``datasets.load_dataset``.
        size: number of problems; 0 takes every row of a file (a generator needs a number).
        seed: seed of the generator, and of the choice of rows when ``size`` is smaller than the file.
        prompt_field: column of the prompt. The other columns go to the problem's metadata, as far as JSON can hold
            them (images and dates are left out).
        answer_field: column of the gold answer; null when the reward needs none.
        id_field: column of the problem's id; null numbers the rows.
        rewrite: ``module:function`` that takes a Problem and returns it re-templated, or None to drop it.
        distinct: keep each prompt once (by fingerprint); for held-out sets.
        mixture: parts that make up ``size`` problems by their ``weight``; a part's own ``size`` is not read, its
            ``seed`` and ``rewrite`` default to the whole's.
        weight: share of this part in the mixture it stands in, > 0; only there.
    """

    source: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    seed: int = 0
    prompt_field: str = "prompt"
    answer_field: str | None = "answer"
    id_field: str | None = None
    rewrite: str | None = None
    distinct: bool = False
    mixture: tuple[DataConfig, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.mixture):
            raise ValueError("set exactly one of data.source and data.mixture")
        if self.source and self.source.partition(":")[0] not in SOURCE_KINDS:
            kinds = ", ".join(f"{kind}:…" for kind in SOURCE_KINDS)
            raise ValueError(f"data.source must be one of {kinds}, got {self.source!r}")
        if self.source and not self.source.partition(":")[2]:
            raise ValueError(f"data.source {self.source!r} names nothing after the colon")
        if self.size < 0:
            raise ValueError(f"data.size must be >= 0 (0 takes every row), got {self.size}")
        if not self.weight > 0:
            raise ValueError(f"data.weight must be > 0, got {self.weight}")
        if any(part.mixture for part in self.mixture):
            raise ValueError("a part of data.mixture cannot be a mixture itself")
        if any(part.distinct for part in self.mixture):
            raise ValueError("distinct holds for a whole mixture: set it there, not in a part")
        ignored = [name for name in ("params", "id_field") if self.mixture and getattr(self, name)]
        if self.params and self.source.partition(":")[0] in ("jsonl", "parquet"):
            ignored = ["params"]
        if ignored:
            place = "a mixture: set it in its parts" if self.mixture else f"{self.source}: leave it out"
            raise ValueError(f"data.{ignored[0]} means nothing for {place}")


def fingerprint(text: str) -> str:
    """Hash of a normalised prompt: two that read the same share it (32 hex digits).

    Normalised: Unicode compatibility form (NFKC), case folded, runs of white space as one blank.
    """
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).hexdigest()


def fingerprints(problem: Problem) -> set[str]:
    """Fingerprints of a problem's prompt and, where a rewrite changed it, of what the source said."""
    return {fingerprint(problem.prompt), fingerprint(problem.metadata.get(ORIGINAL_PROMPT, problem.prompt))}


def check_disjoint(
    train: Iterable[Problem],
    heldout: Iterable[Problem],
    *,
    train_name: str = "training",
    heldout_name: str = "held-out",
) -> None:
    """Proves that no held-out problem is trained on.

    Raises:
        ValueError: names the first shared problem on both sides.
    """
    held = {print_: problem for problem in heldout for print_ in fingerprints(problem)}
    for problem in train:
        for other in {held[print_].id: held[print_] for print_ in fingerprints(problem) & held.keys()}.values():
            raise ValueError(
                f"{train_name} problem {problem.id!r} is also {heldout_name} problem {other.id!r} "
                f"({_short(problem.prompt)}): exclude the held-out fingerprints when the training set is loaded"
            )


def load_problems(config: DataConfig, *, exclude: Collection[str] = ()) -> list[Problem]:
    """Reads the problems that ``config`` names; the same config gives the same list.

    Args:
        exclude: fingerprints that must not occur (those of the held-out sets). A generator goes on until ``size``
            problems are found; a file simply has fewer.

    Raises:
        ValueError: a source that is not there or cannot be read, an empty data set, a row without prompt or answer, ids
            that occur twice, or a generator that does not have so many (distinct) problems.
    """
    if config.size == 0 and (config.mixture or config.source.startswith("reasoning_gym:")):
        raise ValueError(f"data.size must be > 0 for {config.source or 'a mixture'}: it has no end")
    parts = _parts(config)
    seen = _Seen(excluded=frozenset(exclude), distinct=config.distinct)
    problems = [problem for part in parts for problem in _load_part(part, seen)]
    if not problems:
        reason = f" ({seen.dropped} rows were held out, repeated or dropped by the rewrite)" if seen.dropped else ""
        raise ValueError(f"the data set {_describe(config)} is empty{reason}")
    _check_ids(problems, config)
    return problems


class PromptStream:
    """Hands out problems epoch by epoch; each epoch is a fresh permutation under the seed.

    Within one call of ``next`` no problem comes twice: the rest of an epoch that is too short for a whole call is left
    out of that epoch. The cursor is a small JSON-serialisable dict.

    Raises:
        ValueError: no problems at all.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, *, shuffle: bool = True) -> None:
        if not problems:
            raise ValueError("the data set is empty: there is nothing to ask")
        self._problems = tuple(problems)
        self._seed = seed
        self._shuffle = shuffle
        self._digest = _ids_digest(self._problems)
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    def __len__(self) -> int:
        return len(self._problems)

    @property
    def epoch(self) -> int:
        """Epoch that the next problem belongs to, 0-based (the one after a full epoch starts with the next call)."""
        return self._epoch

    def next(self, n: int) -> list[Problem]:
        """The next ``n`` problems, all different.

        Raises:
            ValueError: the data set has fewer than n problems.
        """
        if not 1 <= n <= len(self._problems):
            raise ValueError(
                f"a step asks for {n} problems and the data set has {len(self._problems)}: "
                "lower the problems per step or raise data.size"
            )
        if self._position + n > len(self._problems):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        chosen = self._order[self._position : self._position + n]
        self._position += n
        return [self._problems[index] for index in chosen]

    def state(self) -> dict[str, Any]:
        """The cursor, JSON-serialisable; ``restore`` continues exactly here."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "problems": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved cursor.

        Raises:
            ValueError: the cursor belongs to other problems or another seed.
        """
        if (state["problems"], state["seed"]) != (self._digest, self._seed):
            raise ValueError("the saved cursor belongs to another data set or seed: start over with a fresh run")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(len(self._problems)))
        if self._shuffle:
            Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


@dataclass
class _Seen:
    """What may not come (again) while a data set is read."""

    excluded: frozenset[str]
    distinct: bool
    prints: set[str] = field(default_factory=set)
    dropped: int = 0

    def admits(self, problem: Problem | None) -> bool:
        ok = problem is not None and not self.excluded & fingerprints(problem)
        if problem is not None and self.distinct:
            print_ = fingerprint(problem.prompt)
            ok = ok and print_ not in self.prints
            self.prints.add(print_)
        self.dropped += not ok
        return ok


def _parts(config: DataConfig) -> list[DataConfig]:
    """The single sources with their sizes: shares of the whole by weight, rounded so that they sum to ``size``."""
    if not config.mixture:
        return [config]
    total = sum(part.weight for part in config.mixture)
    bounds, cumulated = [0], 0.0
    for part in config.mixture:
        cumulated += part.weight
        bounds.append(round(config.size * cumulated / total))
    parts = []
    for index, part in enumerate(config.mixture):
        size = bounds[index + 1] - bounds[index]
        # An own seed per part: two parts of one generator never draw the same entries.
        seed = part.seed or config.seed + 7919 * (index + 1)
        if size:
            parts.append(replace(part, size=size, seed=seed, rewrite=part.rewrite or config.rewrite))
    return parts


def _load_part(config: DataConfig, seen: _Seen) -> Iterator[Problem]:
    rewrite = _resolve_rewrite(config.rewrite)
    if config.source.startswith("reasoning_gym:"):
        yield from _generated(config, seen, rewrite)
        return
    problems = []
    for row_id, row in read_rows(config.source, config.params):
        problem = rewrite(_problem_of_row(config, row_id, row))
        if seen.admits(problem):
            assert problem is not None
            _check_answer(problem, config)
            problems.append(problem)
    if config.size and config.size < len(problems):
        chosen = sorted(Random(f"{config.seed}/rows").sample(range(len(problems)), config.size))
        problems = [problems[index] for index in chosen]
    elif config.size > len(problems):
        raise ValueError(f"data.size is {config.size}, but {config.source} has {len(problems)} usable rows")
    yield from problems


def _generated(config: DataConfig, seen: _Seen, rewrite: Rewrite) -> Iterator[Problem]:
    name = config.source.partition(":")[2]
    found = drawn = 0
    for index, seed, entry in reasoning_gym_entries(name, config.params, config.seed, config.size):
        drawn += 1
        problem = rewrite(
            Problem(
                id=f"{name}-{seed:x}-{index}",
                prompt=entry["question"],
                answer=entry["answer"],
                source=config.source,
                metadata={"dataset": name, "params": dict(config.params), "entry": entry},
            )
        )
        if seen.admits(problem):
            assert problem is not None
            found += 1
            yield problem
            if found == config.size:
                return
    raise ValueError(
        f"{config.source} gave {found} usable problems in {drawn} draws and data.size asks for {config.size}: "
        "lower data.size or widen its params (the rest was held out, repeated or dropped by the rewrite)"
    )


def _problem_of_row(config: DataConfig, row_id: str, row: Mapping[str, Any]) -> Problem:
    fields = [name for name in (config.prompt_field, config.answer_field, config.id_field) if name is not None]
    for name in fields:
        if name not in row:
            raise ValueError(f"{config.source}, {row_id}: no column {name!r}; it has {', '.join(map(str, row))}")
    prompt = row[config.prompt_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{config.source}, {row_id}: {config.prompt_field} must be a text, got {_short(prompt)}")
    return Problem(
        id=row_id if config.id_field is None else str(row[config.id_field]),
        prompt=prompt,
        answer=None if config.answer_field is None else row[config.answer_field],
        source=config.source,
        # The answer stays under its own column name too: TRL-style reward functions ask for columns by name.
        metadata={
            name: value
            for name, value in row.items()
            if name not in (config.prompt_field, config.id_field) and _is_json(value)
        },
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_answer(problem: Problem, config: DataConfig) -> None:
    if problem.answer is None and config.answer_field is not None:
        raise ValueError(
            f"{config.source}: problem {problem.id!r} has no answer in {config.answer_field!r}: remove the row, drop "
            "it by a rewrite that returns None, or set answer_field to null when the reward needs no answer"
        )


def _check_ids(problems: Sequence[Problem], config: DataConfig) -> None:
    ids: set[str] = set()
    for problem in problems:
        if problem.id in ids:
            raise ValueError(f"{_describe(config)}: the id {problem.id!r} occurs twice: name another id_field, or none")
        ids.add(problem.id)


def _resolve_rewrite(path: str | None) -> Rewrite:
    if path is None:
        return lambda problem: problem
    rewrite = _find_rewrite(path)

    def remembered(problem: Problem) -> Problem | None:
        try:
            written = rewrite(problem)
        except Exception as error:  # a user's function: the boundary
            raise ValueError(
                f"data.rewrite {path!r} failed on {problem.id!r}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(written, Problem | None):
            raise ValueError(
                f"data.rewrite {path!r} must return a Problem, or None to drop the row; on {problem.id!r} it returned "
                f"{_short(written)}"
            )
        if written is None or written.prompt == problem.prompt:
            return written
        return replace(written, metadata={**written.metadata, ORIGINAL_PROMPT: problem.prompt})

    return remembered


def _find_rewrite(path: str) -> Rewrite:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"data.rewrite must be module:function, got {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.rewrite {path!r} cannot be found: {error}") from error


def _describe(config: DataConfig) -> str:
    return config.source or " + ".join(part.source for part in config.mixture)


def _ids_digest(problems: Sequence[Problem]) -> str:
    text = json.dumps([(problem.id, problem.prompt) for problem in problems])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

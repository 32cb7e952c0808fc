"""From completions to graded samples: the verdict, why, and what was taken for the answer.

The grader of a benchmark is a reward function; it runs in worker processes under a deadline (``rewards.rubric``), while
further completions are drawn. The same function grades in training and here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

from evals.benchmark import Benchmark
from evals.samples import Sample, Status
from rewards.accuracy import bare_answer
from rewards.answers import final_answer
from rewards.base import RewardConfig, check_problems, resolve
from rewards.choice import claim, letter_of
from rewards.code_tests import last_program
from rewards.rubric import Rubric, RubricConfig
from rollout.template import Reasoning, answer_in_tags, split_reasoning
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

AsAnswer = Callable[[Problem, str], str]
"""(problem, completion) -> the completion in the form that the grader reads."""

RIGHT_FROM = 1.0
"""A sample is right when its score reaches this."""

# Metrics of the reward functions that say why an answer is not right, in the order in which they are looked at.
_REASONS = {
    "refused": Status.REFUSED,
    "gave_up": Status.TIMEOUT,
    "timeout": Status.TIMEOUT,
    "raised": Status.UNPARSED,
    "unparsed": Status.UNPARSED,
    "unreadable": Status.UNPARSED,
}
_KINDS_OF_WRONG = ("wrong_answer", "runtime_error", "syntax_error", "memory_limit", "output_limit", "killed")
_ASKS_OTHERS = ("judge",)  # graders whose deadline may pass without the completion's doing


class Grader:
    """Grades the samples of one benchmark.

    Args:
        benchmark: whose ``grader`` it is.
        forced_think: the prompts ended in ``<think>``.
        processes: worker processes, >= 1.
        search: folders in which a grader of the user's is looked for, after the import path.
        as_answer: applied to every completion before it is graded; None grades them as they are.

    Raises:
        ValueError: ``processes`` < 1.

    Example:
        >>> with Grader(find_benchmark("gsm8k"), forced_think=True) as grader:
        ...     for samples in grader.grade(groups):
        ...         store.append(samples)
    """

    def __init__(
        self,
        benchmark: Benchmark,
        *,
        forced_think: bool,
        processes: int = 2,
        search: Sequence[str] = (),
        as_answer: AsAnswer | None = None,
    ) -> None:
        self._benchmark, self._config = benchmark, benchmark.grader
        self._forced_think, self._search, self._as_answer = forced_think, tuple(search), as_answer
        # Failures are counted, never the end of an evaluation: what was drawn is kept and can be graded again.
        rubric = RubricConfig(functions=(benchmark.grader,), max_error_rate=1.0, processes=processes)
        self._rubric = Rubric(rubric, forced_think=forced_think, search=search)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self, timeout_s: float | None = None) -> None:
        """Waits until the grader is imported and the machine has what it needs.

        Raises:
            ValueError: it is not there, or the machine lacks something (a sandbox, a package).
            PoolBroken: its processes died, or are not ready in time.
        """
        self._rubric.ready(timeout_s)

    def check(self, problems: Iterable[Problem]) -> None:
        """Looks for problems that nobody could solve: no gold answer, no tests.

        Raises:
            ValueError: names the first, and how many more there are.
        """
        check_problems(resolve(self._config.path, self._search, self._config.factory), problems)

    def grade(self, groups: Iterable[RolloutGroup]) -> Iterator[list[Sample]]:
        """Yields the samples of each group, in order; a group may hold any of a problem's samples.

        Overlaps with the iterator that it is given: a group is graded while the next one is still drawn.

        Raises:
            ValueError, PoolBroken: see :meth:`ready`.
        """
        drawn: deque[RolloutGroup] = deque()

        def prepared() -> Iterator[RolloutGroup]:
            for group in groups:
                drawn.append(group)
                yield replace(group, rollouts=tuple(self._prepared(group.problem, each) for each in group.rollouts))

        for graded in self._rubric.score(prepared()):
            original = drawn.popleft()
            pairs = zip(original.rollouts, graded.rollouts, strict=True)
            yield [self._sample(original.problem, was.completion, now) for was, now in pairs]

    def close(self) -> None:
        """Ends the worker processes; safe to call twice."""
        self._rubric.close()

    def _prepared(self, problem: Problem, rollout: Rollout) -> Rollout:
        if self._as_answer is None:
            return rollout
        text = self._as_answer(problem, rollout.completion.text)
        return replace(rollout, completion=replace(rollout.completion, text=text))

    def _sample(self, problem: Problem, completion: Completion, graded: Rollout) -> Sample:
        status, detail = verdict(graded, self._config)
        answer = None
        if self._config.name not in graded.errors:  # a text that a grader choked on is not read again here
            reasoning = split_reasoning(graded.completion.text, forced_think=self._forced_think)
            answer = extracted(reasoning, self._config)
        groups = problem.metadata.get("groups") or {}
        return Sample(
            benchmark=self._benchmark.name,
            problem=problem.id,
            doc_id=int(problem.metadata.get("doc_id", 0)),
            index=completion.sample_index,
            prompt_hash=prompt_hash(problem),
            text=completion.text,
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason.value,
            seed=completion.seed,
            answer=answer,
            gold=problem.answer,
            status=status,
            score=graded.scores.get(self._config.name),
            detail=detail,
            groups={str(column): str(value) for column, value in groups.items()},
        )


def verdict(rollout: Rollout, config: RewardConfig) -> tuple[Status, str]:
    """Status of a scored rollout, and why in a line.

    A deadline that passed is the completion's own doing, or could be made so by it, and counts as not right; only a
    grader that asks others may be late by itself. Any other failure of the grader, and a grader that gave no score, is
    an ERROR: no verdict at all.
    """
    name = config.name
    if (error := rollout.errors.get(name)) is not None:
        late = error.partition(":")[0] == "timeout" and config.path not in _ASKS_OTHERS
        return (Status.TIMEOUT if late else Status.ERROR), error
    if (score := rollout.scores.get(name)) is None:
        return Status.ERROR, f"{name} gave no score: it does not apply to this sample"
    if score >= RIGHT_FROM:
        return Status.RIGHT, ""
    said = {metric.partition("/")[2]: value for metric, value in rollout.metrics.items()}
    if said.get("answered", 1.0) == 0.0:
        return Status.UNANSWERED, ""
    for metric, status in _REASONS.items():
        if said.get(metric):
            return status, metric
    return Status.WRONG, _why_wrong(said, score)


def _why_wrong(said: Mapping[str, float], score: float) -> str:
    kind = next((kind for kind in _KINDS_OF_WRONG if said.get(kind)), "")
    if kind and "tests_passed" in said:
        return f"{kind}, {said['tests_passed']:.0%} of the tests passed before it"
    return kind or (f"score {score:.4g}" if score else "")


def extracted(reasoning: Reasoning, config: RewardConfig) -> str | None:
    """What a grader takes for the answer of a completion; None where there is none.

    The content of the last box or the answer tags, a program, a letter; for a grader of the user's the box or the tags.
    """
    if config.path == "code_tests":
        return last_program(reasoning)
    if config.path == "choice":
        claimed = claim(reasoning)
        return claimed and (letter_of(claimed) or claimed)
    if config.path == "reasoning_gym":
        tagged = answer_in_tags(reasoning.answer)
        text = reasoning.answer if tagged is None else tagged
        return text.strip() or None if reasoning.closed else None
    answer = final_answer(reasoning)
    if not answer and config.path == "accuracy" and config.params.get("bare"):
        answer = bare_answer(reasoning)
    return answer or None


def prompt_hash(problem: Problem) -> str:
    """SHA-256, in hex, of what the user asks, before any template."""
    return hashlib.sha256(problem.prompt.encode("utf-8", "surrogatepass")).hexdigest()


def regraded(grader: Grader, problems: Mapping[str, Problem], samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with the verdicts of this grader, in the same order.

    Raises:
        ValueError: the problem of a sample is not there, or was asked in other words; see also :meth:`Grader.ready`.
    """
    together: dict[str, list[Sample]] = {}
    for sample in samples:
        problem = problems.get(sample.problem)
        if problem is None:
            raise ValueError(f"{sample.benchmark} has no problem {sample.problem!r} in the data that are found here")
        if prompt_hash(problem) != sample.prompt_hash:
            raise ValueError(
                f"{sample.benchmark}: problem {sample.problem!r} reads otherwise than when its samples were drawn: "
                "give the data and the benchmark file of that time"
            )
        together.setdefault(sample.problem, []).append(sample)
    groups = (ungraded(problems[name], each) for name, each in together.items())
    found = {sample.key: sample for graded in grader.grade(groups) for sample in graded}
    return [found[sample.key] for sample in samples]


def ungraded(problem: Problem, samples: Iterable[Sample]) -> RolloutGroup:
    """Samples of one problem as they were before they were graded.

    Token ids and log-probabilities are not kept on disk: a grader sees the text, the number of tokens (as zeros), why
    the completion ended, and its seed.
    """
    return RolloutGroup(problem=problem, rollouts=tuple(Rollout(completion=_completion(each)) for each in samples))


def _completion(sample: Sample) -> Completion:
    return Completion(
        prompt_token_ids=(),
        token_ids=(0,) * sample.tokens,
        text=sample.text,
        rollout_logprobs=(),
        finish_reason=FinishReason(sample.finish_reason),
        policy_version=0,
        sample_index=sample.index,
        seed=sample.seed,
    )

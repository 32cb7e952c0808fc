"""Benchmarks, problems and samples for the tests of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.benchmark import Benchmark
from evals.samples import Sample, Status
from rewards.base import RewardConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup


def benchmark(grader: RewardConfig | str = "accuracy", **options: Any) -> Benchmark:
    if isinstance(grader, str):
        grader = RewardConfig(path=grader)
    given = {"name": "sums", "version": "1", "dataset_path": "x/sums", "doc_to_text": "question"}
    return Benchmark(**{**given, "doc_to_target": "answer", "grader": grader, **options})


def problem(number: int, answer: Any = "", **columns: Any) -> Problem:
    question = f"What is {number} + 1?"
    return Problem(
        id=f"p{number}", prompt=f"{question}\nBox it.", answer=answer or str(number + 1), source="sums",
        metadata={"question": question, "doc_id": number, "groups": {"level": str(number % 2)}, **columns},
    )  # fmt: skip


def sample(number: int = 0, index: int = 0, status: Status | str = "right", **changed: Any) -> Sample:
    """Sample ``index`` of problem ``p{number}``, answered with 1 unless said otherwise."""
    row: dict[str, Any] = {
        "benchmark": "sums", "problem": f"p{number}", "doc_id": number, "index": index, "prompt_hash": "f0",
        "tokens": 3, "text": "so \\boxed{1}", "finish_reason": "stop", "seed": 7, "answer": "1", "gold": "1",
        "status": Status(status), "score": float(status == "right"), "groups": {"level": str(number % 2)},
    }  # fmt: skip
    return Sample(**{**row, **changed})


def samples(statuses: Sequence[str], number: int = 0, answers: Sequence[str | None] = ()) -> list[Sample]:
    """All samples of a problem, by status: r(ight) w(rong) e(rror) u(nanswered) p(arse) t(imeout) refused(x)."""
    names = {
        "r": "right",
        "w": "wrong",
        "e": "error",
        "u": "unanswered",
        "p": "unparsed",
        "t": "timeout",
        "x": "refused",
    }
    found = [sample(number, index, names[status]) for index, status in enumerate(statuses)]
    if not answers:
        return found
    return [sample(number, each.index, each.status, answer=a) for each, a in zip(found, answers, strict=True)]


def group(of: Problem, texts: Sequence[str], *, cut: bool = False) -> RolloutGroup:
    """Completions of a problem, not graded yet; as many tokens as characters."""
    return RolloutGroup(
        problem=of,
        rollouts=tuple(
            Rollout(
                completion=Completion(
                    prompt_token_ids=(), token_ids=(0,) * len(text), text=text, rollout_logprobs=(), policy_version=0,
                    finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP, sample_index=i, seed=100 + i,
                )
            )
            for i, text in enumerate(texts)
        ),
    )  # fmt: skip

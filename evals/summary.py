"""The figures of one benchmark from its graded samples. Values in, values out.

Every figure is a mean over problems, and its interval is over problems: how far it would move had other problems of the
same kind been asked. It is mean ± t(n-1) x s / sqrt(n) (``evals.metrics.mean_interval``), the closed form of resampling
the problems: with few problems (AIME has 30) the percentiles of a bootstrap are too narrow by sqrt((n-1)/n) and by the
difference between t and the normal distribution, they hang on a seed, and they shrink to a point where every problem
came out alike. What more samples of the same problems would remove is ``sampling_se``, and stands apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evals.benchmark import Benchmark
from evals.metrics import Estimate, maj_at_k, mean_interval, pass_at_1, pass_at_k, standard_error, t_quantile
from evals.samples import Sample, Status
from rewards.normalise import compact, normalised, rational, without_text_commands

_LONGEST_VOTE = 2_000  # characters; a longer answer votes as it is written
_NO_VOTE = (Status.UNANSWERED, Status.UNPARSED, Status.REFUSED, Status.ERROR)
_SHARES = (Status.UNANSWERED, Status.UNPARSED, Status.REFUSED, Status.TIMEOUT, Status.ERROR)
_EXAMPLES = 5


def summarise(benchmark: Benchmark, samples: Sequence[Sample], *, problems: int, k: int = 0) -> dict[str, Any]:
    """The figures of a benchmark as JSON values.

    A sample on which the grader failed (ERROR) is in no figure; its share is shown. pass@j and maj@k are over the
    problems that have j (k) judged samples; their ``n`` says how many these are.

    Args:
        benchmark: whose samples they are.
        samples: any of them, in any order.
        problems: how many the benchmark has.
        k: samples per problem that were asked for; 0 takes the most that a problem has.

    Returns:
        ``pass_at_1``, ``ci95`` (both None when nothing was judged), ``se``, ``sampling_se`` (None for k = 1), ``n``
        (problems that were judged), ``k``, ``pass_at`` (for 2, 4, 8, … and k), ``maj`` (where k > 1 and answers can be
        told to be equal), ``samples``, ``missing`` (not drawn yet), ``left_out`` (problems without one judged sample),
        ``shares`` of all samples with ``shares_ci95``, ``tokens``, ``by`` column and value, ``by_problem``, ``errors``
        (what the grader failed with, of the first few), ``version``.
    """
    ordered = _by_problem(samples)
    k = k or max(map(len, ordered.values()), default=0)
    judged = {name: kept for name, each in ordered.items() if (kept := [s for s in each if s.status != Status.ERROR])}
    return {
        **_first_figures(list(judged.values())),
        "n": len(judged),
        "k": k,
        "pass_at": _pass_at(judged, k),
        **({"maj": maj} if (maj := _majority(benchmark, judged, k)) else {}),
        "samples": len(samples),
        "missing": max(0, problems * k - len(samples)),
        "left_out": len(ordered) - len(judged),
        **_shares(ordered),
        "tokens": _tokens(ordered),
        "by": {column: _by_value(judged, column) for column in _columns(benchmark, samples)},
        "by_problem": {name: fmean(map(float, _flags(each))) for name, each in judged.items()},
        "errors": dict(
            [(f"{s.problem}, sample {s.index}", s.detail) for s in samples if s.status == Status.ERROR][:_EXAMPLES]
        ),
        "version": benchmark.version,
    }


def vote(sample: Sample) -> str | None:
    """What a sample votes for: its answer in the plainest spelling, numbers by their value; None when it has none.

    ``1/2``, ``\\frac12`` and ``0.5`` are one vote. Expressions vote by how they are written.
    """
    if sample.answer is None or sample.status in _NO_VOTE:
        return None
    if len(sample.answer) > _LONGEST_VOTE:
        return sample.answer.strip()
    plain = compact(without_text_commands(normalised(sample.answer)))
    number = rational(plain)
    return f"= {number[0]}" if number else plain or None


def _by_problem(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by problem, both in the order of the data, whatever the order in which they were finished."""
    found: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda each: (each.doc_id, each.problem, each.index)):
        found.setdefault(sample.problem, []).append(sample)
    return found


def _flags(samples: Sequence[Sample]) -> list[bool]:
    return [sample.status == Status.RIGHT for sample in samples]


def _first_figures(judged: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    if not judged:
        return {"pass_at_1": None, "ci95": None, "se": None, "sampling_se": None}
    flags = [_flags(each) for each in judged]
    estimate = pass_at_1(flags)
    return {
        "pass_at_1": estimate.value,
        "ci95": list(estimate.ci95),
        "se": standard_error([fmean(map(float, each)) for each in flags]),
        "sampling_se": estimate.sampling_se,
    }


def _figure(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": list(estimate.ci95), "n": estimate.n}


def _pass_at(judged: Mapping[str, Sequence[Sample]], k: int) -> dict[str, Any]:
    sizes = sorted({*(2**power for power in range(1, k.bit_length())), k} - {0, 1})
    found = {}
    for size in sizes:
        if enough := [_flags(each) for each in judged.values() if len(each) >= size]:
            found[str(size)] = _figure(pass_at_k(enough, size))
    return found


def _majority(benchmark: Benchmark, judged: Mapping[str, Sequence[Sample]], k: int) -> dict[str, Any] | None:
    """None where a vote means nothing: one sample, programs, answers that are not shown, no problem with k of them."""
    enough = [each[:k] for each in judged.values() if len(each) >= k]
    hidden = any(sample.answer is None and sample.status == Status.RIGHT for each in enough for sample in each)
    if k < 2 or not enough or hidden or benchmark.grader.path == "code_tests":
        return None
    return _figure(maj_at_k([[vote(sample) for sample in each] for each in enough], [_flags(each) for each in enough]))


def _shares(ordered: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Shares of what is not a plain answer, means over problems as all figures are, and their intervals."""
    shares, intervals = {}, {}
    for name in ("truncated", *(status.value for status in _SHARES)):
        values = [fmean(float(_is(each, name)) for each in of_one) for of_one in ordered.values()]
        shares[name] = fmean(values) if values else 0.0
        intervals[name] = list(mean_interval(values)) if values else None
    return {"shares": shares, "shares_ci95": intervals}


def _is(sample: Sample, name: str) -> bool:
    return sample.finish_reason == "length" if name == "truncated" else sample.status == name


def _tokens(ordered: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Length of a sample. The mean is over problems too; it has no interval where there are fewer than two."""
    counted = [kept for each in ordered.values() if (kept := [s.tokens for s in each if s.tokens or not s.text])]
    lengths = [tokens for each in counted for tokens in each]
    means = [fmean(each) for each in counted]
    mean, error = fmean(means) if means else 0.0, standard_error(means)
    half = None if error is None else t_quantile(0.975, len(means) - 1) * error
    return {
        "mean": mean,
        "mean_ci95": None if half is None else [max(0.0, mean - half), mean + half],
        "max": max(lengths, default=0),
        "total": sum(lengths),
        "uncounted": sum(map(len, ordered.values())) - len(lengths),  # an endpoint need not say how long a text is
    }


def _columns(benchmark: Benchmark, samples: Sequence[Sample]) -> list[str]:
    there = {column for sample in samples for column in sample.groups}
    return [column for column in benchmark.group_by if column in there]


def _by_value(judged: Mapping[str, Sequence[Sample]], column: str) -> dict[str, Any]:
    parts: dict[str, list[list[bool]]] = {}
    for each in judged.values():
        if (value := each[0].groups.get(column)) is not None:
            parts.setdefault(value, []).append(_flags(each))
    found = {}
    for value in sorted(parts):
        estimate = pass_at_1(parts[value])
        found[value] = {"pass_at_1": estimate.value, "ci95": list(estimate.ci95), "n": estimate.n}
    return found

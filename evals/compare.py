"""Two evaluations side by side, paired by problem: is the second better, by how much, and on which problems.

Pairing takes out how hard each problem is, which is most of the spread of pass@1. For problem i, d_i is the share of
its samples that are right in the second evaluation less that share in the first. The difference is the mean of d_i.

Its interval is Student's over the d_i (:func:`evals.metrics.paired_difference`). The p-value is that of the paired
sign-flip test (Fisher, The Design of Experiments, 1935, section 21): were the two equally good, each d_i would have had
the other sign just as likely. p is the share of all 2^n sign patterns whose sum is at least as far from 0 as the one
seen. It needs no normal distribution, which the 30 problems of AIME do not give, and with one sample a problem it is
McNemar's exact test. The sums are whole multiples of 1/(common multiple of the ks), so that all patterns are counted
exactly by convolution, however many problems there are; only where the ks differ so much that there are too many sums,
100,000 patterns are drawn from a fixed seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from evals.metrics import mean_interval, paired_difference
from evals.output_folder import each_sample, read_summary
from evals.page_blocks import Block, Code, Heading, Line, Paragraph, Plot, Table, percent
from evals.plots import Point, accuracy_plot
from evals.samples import Sample

_MOST_K = 1 << 14  # shares are fractions with at most this denominator
_MOST_STEPS = 400_000_000  # additions of the exact count: about half a second
_FEW = 16  # changed problems whose sign patterns are written out where the sums have no common grid
_DRAWN = 100_000
_SEED = 0
_FLIPS_SHOWN = 200


def compare_folders(a: Path, b: Path, *, anyway: bool = False) -> dict[str, Any]:
    """Compares the output folders of two evaluations, b against a.

    Args:
        a, b: what ``r1 eval … --out`` wrote.
        anyway: compare also what was not evaluated in the same way; what differs is then said in ``notes``.

    Returns:
        What :func:`compare` returns.

    Raises:
        ValueError: as :func:`compare`, or a folder holds no evaluation.
        SampleFileError: a file of samples is damaged.
    """
    first, second = read_summary(a), read_summary(b)
    shared = [name for name in first["results"] if name in second["results"]]
    samples = [{name: each_sample(folder, name) for name in shared} for folder in (a, b)]
    return compare(first, second, samples[0], samples[1], anyway=anyway)


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any],
    samples_a: Mapping[str, Iterable[Sample]] | None = None, samples_b: Mapping[str, Iterable[Sample]] | None = None,
    *, anyway: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compares two evaluations, b against a, over the problems that both have.

    Args:
        a, b: ``summary.json`` of each.
        samples_a, samples_b: by benchmark, to check that the same problems were asked in the same words; read once, one
            at a time.
        anyway: see :func:`compare_folders`.

    Returns:
        ``{"a", "b": models, "notes": [...], "benchmarks": {name: {"a", "b": {"pass_at_1", "ci95", "k"}, "difference",
        "ci95", "p_value", "p_holm" (of several benchmarks), "test", "n", "sampling_se", "flipped": {"gained",
        "lost"}}}}``. Differences are b - a, in [-1, 1]. A problem is solved when more than half of its samples are
        right; gained ones are solved in b alone, lost ones in a alone.

    Raises:
        ValueError: no benchmark or no problem in common, or the two were not made in the same way.
    """
    shared = [name for name in a["results"] if name in b["results"]]
    if not shared:
        names = [", ".join(sorted(map(repr, side["results"]))) for side in (a, b)]
        raise ValueError(f"the two evaluations have no benchmark in common: {names[0]} against {names[1]}")
    differing = differences(a, b)
    for name in shared:
        differing += _asked_otherwise(name, (samples_a or {}).get(name, ()), (samples_b or {}).get(name, ()))
    if differing and not anyway:
        raise ValueError(
            f"the two were not evaluated in the same way: {'; '.join(differing)}. Evaluate one of them again, or "
            "compare them all the same with --anyway"
        )
    notes = [f"compared all the same: {what}" for what in differing]
    for which, one, other in (("first", a, b), ("second", b, a)):
        if alone := [name for name in one["results"] if name not in other["results"]]:
            notes.append(f"only the {which} has {', '.join(map(repr, alone))}: left out")
    benchmarks: dict[str, dict[str, Any]] = {}
    for name in shared:
        benchmarks[name], more = _compare_one(name, a["results"][name], b["results"][name])
        notes += more
    if len(shared) > 1:
        corrected = holm([row["p_value"] for row in benchmarks.values()])
        for row, p in zip(benchmarks.values(), corrected, strict=True):
            row["p_holm"] = p
    return {"a": str(a.get("model", "?")), "b": str(b.get("model", "?")), "notes": notes, "benchmarks": benchmarks}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What was not the same in two evaluations, one clause each: protocol, and per benchmark version, k and data files.

    The model and the seed may differ; benchmarks that only one has are no matter of this function.
    """
    found = []
    left, right = (dict(_flat(side.get("protocol", {}), "protocol")) for side in (a, b))
    for path in sorted(left.keys() | right.keys()):
        one, other = (json.dumps(side[path]) if path in side else "nothing" for side in (left, right))
        if one != other:
            found.append(f"{path} is {one} against {other}")
    thinks = [side.get("forced_think") for side in (a, b)]
    if None not in thinks and thinks[0] != thinks[1]:
        found.append(f"completions that begin inside a thinking: {thinks[0]} against {thinks[1]}")
    for name in a["results"]:
        if name in b["results"]:
            for key in ("version", "k"):
                one, other = a["results"][name].get(key), b["results"][name].get(key)
                if one != other:
                    found.append(f"{name}: {key} is {one} against {other}")
            found += _files_differ(name, *((side.get("files") or {}).get(name) or [] for side in (a, b)))
    return found


def _files_differ(name: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[str]:
    """A clause when the contents of the data differ; a file may have another name on another machine."""
    sums = [sorted(str(file.get("sha256", "")) for file in side) for side in (a, b)]
    if sums[0] == sums[1]:
        return []
    shown = [
        ", ".join(f"{f.get('file', '?')} {str(f.get('sha256', '?'))[:12]}" for f in side) or "none" for side in (a, b)
    ]
    return [f"{name}: data files are {shown[0]} against {shown[1]}"]


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    else:
        yield path, value


def _asked_otherwise(name: str, a: Iterable[Sample], b: Iterable[Sample]) -> list[str]:
    """A clause when problems of the same id were asked in other words."""
    asked = {sample.problem: sample.prompt_hash for sample in a}
    other = {s.problem for s in b if s.problem in asked and s.prompt_hash != asked[s.problem]}
    return [f"{name}: problems asked in other words: {len(other)}, the first {min(other)!r}"] if other else []


def _compare_one(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    shares = [_shares(name, row) for row in (a, b)]
    ids = [problem for problem in shares[0] if problem in shares[1]]
    if not ids:
        raise ValueError(f"{name}: the two evaluations have no problem in common, so that nothing can be paired")
    notes = [
        f"{name}: left out what only the {which} has: {len(side) - len(ids)} of its {len(side)} problems"
        for which, side in zip(("first", "second"), shares, strict=True) if len(side) > len(ids)
    ]  # fmt: skip
    notes += [
        f"{name}: samples of the {which} that are not drawn yet: {int(row['missing'])}"
        for which, row in (("first", a), ("second", b)) if row.get("missing")
    ]  # fmt: skip
    notes += [
        f"{name}: the grader failed on {row['shares']['error']:.1%} of the samples of the {which}; they are left out"
        for which, row in (("first", a), ("second", b)) if (row.get("shares") or {}).get("error")
    ]  # fmt: skip
    old, new = ([side[problem] for problem in ids] for side in shares)
    changes = [y - x for x, y in zip(old, new, strict=True)]
    p_value, test = sign_flip_test(changes)
    found = {
        "a": _side(old, a), "b": _side(new, b), "difference": float(sum(changes) / len(ids)),
        "ci95": list(_interval(changes)), "p_value": p_value, "test": test, "n": len(ids),
        "sampling_se": _noise(a, b),
        "flipped": {
            "gained": [i for i, x, y in zip(ids, old, new, strict=True) if x <= Fraction(1, 2) < y],
            "lost": [i for i, x, y in zip(ids, old, new, strict=True) if y <= Fraction(1, 2) < x],
        },
    }  # fmt: skip
    return found, notes


def _shares(name: str, row: Mapping[str, Any]) -> dict[str, Fraction]:
    by_problem = row.get("by_problem")
    if not isinstance(by_problem, dict):
        raise ValueError(f"{name}: summary.json has no shares by problem (by_problem): run the evaluation again")
    try:
        return {problem: _fraction(share) for problem, share in by_problem.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: by_problem in summary.json holds what is no share in [0, 1] ({error})") from None


def _fraction(share: Any) -> Fraction:
    """The fraction that a share was computed from: right samples of k."""
    exact = Fraction(float(share)).limit_denominator(_MOST_K)
    if not 0 <= exact <= 1:
        raise ValueError(f"got {share!r}")
    return exact


def _side(shares: Sequence[Fraction], row: Mapping[str, Any]) -> dict[str, Any]:
    values = [float(share) for share in shares]
    return {"pass_at_1": math.fsum(values) / len(values), "ci95": list(mean_interval(values)), "k": row.get("k")}


def _noise(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    """Standard error of the difference from sampling alone; None where a side has none (k = 1)."""
    one, other = a.get("sampling_se"), b.get("sampling_se")
    return None if one is None or other is None else math.hypot(one, other)


def _interval(changes: Sequence[Fraction]) -> tuple[float, float]:
    """95 % interval of the mean change.

    Where all changes are equal their spread says nothing. As in :func:`evals.metrics.mean_interval`, up to
    1 - 0.025^(1/n) of other problems may then still change otherwise, and by as much as a share can.
    """
    values = {str(i): float(change) for i, change in enumerate(changes)}
    if len(set(changes)) == 1 and len(changes) > 1:
        change, rate = float(changes[0]), 1 - 0.025 ** (1 / len(changes))
        return change - rate * (1 + change), change + rate * (1 - change)
    return paired_difference(dict.fromkeys(values, 0.0), values).ci95


def sign_flip_test(changes: Sequence[Fraction]) -> tuple[float, str]:
    """Two-sided p-value of paired changes under random signs, and how it was found: ``exact`` or ``sampled``.

    It is exact but where the changes have no common grid and more than 16 are not 0; then 100,000 sign patterns are
    drawn, always the same ones, and p is (1 + those as far out) / (1 + all) (Phipson and Smyth, 2010): never 0.

    Args:
        changes: at least one; zeros count for nothing.
    """
    import numpy as np

    moved = [abs(change) for change in changes if change]
    if not moved:
        return 1.0, "exact"
    grid = math.lcm(*(change.denominator for change in moved))
    steps = [int(change * grid) for change in moved]
    seen = abs(sum(int(change * grid) for change in changes))
    if sum(steps) * len(steps) <= _MOST_STEPS:
        # chance[s]: of the sum s - sum(steps); a step moves half of the chance up and half of it down
        total = sum(steps)
        chance = np.zeros(2 * total + 1)
        chance[total] = 1.0
        reach = 0
        for step in steps:
            low, high = total - reach, total + reach + 1
            part = chance[low:high] / 2
            chance[low:high] = 0
            chance[low + step : high + step] += part
            chance[low - step : high - step] += part
            reach += step
        tail = math.fsum(chance[total + seen :]) + math.fsum(chance[: total - seen + 1])
        return (min(1.0, tail) if seen else 1.0), "exact"
    if len(steps) <= _FEW:
        sums = [0]
        for step in steps:
            sums = [one + step for one in sums] + [one - step for one in sums]
        return sum(abs(one) >= seen for one in sums) / len(sums), "exact"
    sizes = np.array([float(change) for change in moved])
    generator = np.random.default_rng(_SEED)
    border = seen / grid * (1 - 1e-12)  # rounding must not lose the sums that are equal to the one seen
    far = sum(
        int(np.count_nonzero(abs((2 * generator.integers(0, 2, (1000, len(sizes))) - 1) @ sizes) >= border))
        for _ in range(_DRAWN // 1000)
    )
    return (1 + far) / (1 + _DRAWN), "sampled"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values that may each be held against the same level, in the given order.

    The i-th smallest of m (i from 0) is multiplied by m - i, never falls below the ones before it, and is at most 1.
    """
    corrected = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def p_text(p: float) -> str:
    """``0.034``, ``2e-07``: a p-value with two digits."""
    return f"{p:.2g}" if p < 0.001 else f"{p:.3f}"


def comparison_blocks(found: Mapping[str, Any]) -> list[Block]:
    """A page of what :func:`compare` returned; see :mod:`evals.page_blocks`."""
    rows = found["benchmarks"]
    several = len(rows) > 1
    blocks: list[Block] = [
        Paragraph(text=("A is ", Code(found["a"], 300), ".")), Paragraph(text=("B is ", Code(found["b"], 300), ".")),
    ]  # fmt: skip
    blocks += [Paragraph(text=("Note: ", Code(note, 1000)), warning=True) for note in found["notes"]]
    cells: list[tuple[Line, ...]] = []
    for name, row in rows.items():
        flipped = row["flipped"]
        cells.append((
            Code(name), percent(row["difference"], row["ci95"], sign=True), p_text(row["p_value"]),
            *((p_text(row["p_holm"]),) if several else ()),
            *(percent(row[side]["pass_at_1"], row[side]["ci95"]) for side in "ab"), f"{row['n']:,}",
            f"{len(flipped['gained'])} / {len(flipped['lost'])}",
        ))  # fmt: skip
    columns = ("Benchmark", "B - A", "p", *(("p (Holm)",) if several else ()), "A", "B", "n", "gained / lost")
    points = [Point(name=name, value=row["difference"], ci95=tuple(row["ci95"]), note=f"n = {row['n']:,}")
              for name, row in rows.items()]  # fmt: skip
    blocks += [
        Table(caption="pass@1 in per cent, differences in points, with 95 % intervals.", columns=columns, rows=cells),
        Plot(svg=accuracy_plot(points, title="Difference of pass@1, B - A", key="d", difference=True),
             caption="Difference of pass@1 with its 95 % interval; right of 0, B is better."),
        Paragraph(
            text="Paired by problem over the n problems that both have. p is two-sided, from the sign-flip test over "
            "problems" + (" (Holm: corrected for looking at several benchmarks)." if several else ".")
            + " Gained problems are solved, by more than half of their samples, in B alone; lost ones in A alone."
        ),
    ]  # fmt: skip
    for name, row in rows.items():
        for kind, ids in row["flipped"].items():
            if ids:
                blocks.append(Heading(text=(Code(name), f": {len(ids)} {kind}"), level=3))
                pieces = [piece for problem in ids[:_FLIPS_SHOWN] for piece in (Code(problem), " ")]
                more = [f"and {len(ids) - _FLIPS_SHOWN} more"] if len(ids) > _FLIPS_SHOWN else []
                blocks.append(Paragraph(text=(*pieces, *more)))
    return blocks

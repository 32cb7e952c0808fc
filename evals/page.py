"""``report.md`` and ``report.html``: an evaluation for people, from ``summary.json`` and the samples.

Every figure stands with its interval. Samples are read one by one and a fixed number of them is shown, so that a folder
of 100,000 makes a page of the same size as one of 100.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.output_folder import each_sample, read_summary
from evals.page_blocks import (
    Block,
    Code,
    Heading,
    Inline,
    Line,
    Paragraph,
    Plot,
    Quote,
    Table,
    percent,
    replace_file,
    to_html,
    to_markdown,
)
from evals.page_digest import LONGEST, PICKS, Digest
from evals.plots import Point, accuracy_plot, length_plot, pass_at_k_plot
from evals.samples import Sample

_SAMPLES_SHOWN = 120  # on the whole page
_GROUPS_SHOWN = 30
_MANY_TRUNCATED = 0.05
_STANDARD = {"results", "files", "model", "protocol", "seed", "seconds"}

_SHARES = {
    "truncated": "cut at the token limit", "unanswered": "no answer found", "unparsed": "answer could not be read",
    "refused": "refused", "timeout": "grading timed out", "error": "grader failed (left out of every figure)",
}  # fmt: skip


def write_pages(folder: Path) -> list[Path]:
    """Writes ``report.md`` and ``report.html`` into the folder of an evaluation; returns their paths.

    Both are replaced as a whole. The HTML file holds its plots, needs no network and runs no script.

    Raises:
        ValueError: ``summary.json`` is missing or damaged.
        OSError: a file of samples is damaged, or a page cannot be written.
    """
    summary = read_summary(folder)
    title = ("Evaluation of ", Code(str(summary.get("model", "?")), 200))
    try:
        asked = {name: int(row["k"]) for name, row in summary["results"].items()}
        # a folder may hold more samples than were asked for last; the figures are of the first k
        digests = {n: Digest.of(s for s in each_sample(folder, n) if s.index < k) for n, k in asked.items()}
        blocks = list(_blocks(summary, digests))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}/summary.json is not as an evaluation writes it ({what}): run it again") from error
    paths = [folder / "report.md", folder / "report.html"]
    for path, text in zip(paths, (to_markdown(title, blocks), to_html(title, blocks)), strict=True):
        replace_file(path, text)
    return paths


def _blocks(summary: Mapping[str, Any], digests: Mapping[str, Digest]) -> Iterator[Block]:
    results = summary["results"]
    yield Paragraph(text=_asked(summary))
    yield from _warnings(results, digests)
    yield Heading(text="Results", anchor="results")
    yield _headline(results)
    if points := [_point(name, row) for name, row in results.items() if row["ci95"]]:
        svg = accuracy_plot(points, title="pass@1", key="all")
        yield Plot(svg=svg, caption="pass@1 of every benchmark with its 95 % interval.")
    yield Paragraph(
        text="pass@1 is the mean over problems of the share of their k samples that are right. Its interval says how "
        "far it would move on other problems of the same kind. Sampling noise is one standard error of drawing k "
        "samples, the part that more samples would remove. pass@k is the chance that one of k samples is right "
        "(unbiased), maj@k the share of problems whose most frequent answer is right."
    )
    yield from _origin(summary)
    each = max(1, _SAMPLES_SHOWN // len(results))
    for index, (name, row) in enumerate(results.items()):
        yield from _benchmark(name, row, digests[name], key=f"b{index}", limit=_limit(summary), samples=each)


def _asked(summary: Mapping[str, Any]) -> Line:
    protocol = summary.get("protocol")
    name = protocol.get("name", "?") if isinstance(protocol, dict) else protocol
    count = len(summary["results"])
    return (
        Code(str(summary.get("model", "?"))), f" on {count} benchmark{'s' if count > 1 else ''}, protocol ",
        Code(str(name)), ", seed ", Code(str(summary.get("seed", "?"))),
        ". Shares are in per cent, intervals are 95 %.",
    )  # fmt: skip


def _warnings(results: Mapping[str, Any], digests: Mapping[str, Digest]) -> Iterator[Block]:
    """What a reader must know before the figures."""
    for name, row in results.items():
        shares = row.get("shares") or {}
        error, truncated = (float(shares.get(key, 0)) for key in ("error", "truncated"))
        missing, left_out = int(row.get("missing", 0)), int(row.get("left_out", 0))
        for holds, text in (
            (missing, f"samples not drawn yet: {missing:,}. The figures are of what is there."),
            (error, f"the grader failed on {_percent(error)} of the samples. They are neither right nor wrong, "
             "and left out."),
            (left_out, f"problems without a sample that the grader could judge: {left_out:,}. "
             "They are not among the n."),
            (truncated >= _MANY_TRUNCATED, f"{_percent(truncated)} of the samples were cut at the token limit; "
             "with a higher limit the figures may rise."),
            (not digests[name].samples, "its samples are not in the folder, so that none is shown here."),
        ):  # fmt: skip
            if holds:
                yield Paragraph(text=(Code(name), f": {text}"), warning=True)


def _headline(results: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in results.items():
        best = max(row.get("pass_at") or {}, key=int, default="")
        noise = row.get("sampling_se")
        rows.append((
            Code(name), _pair({"value": row["pass_at_1"], "ci95": row["ci95"]}), f"{int(row['n']):,}",
            f"{int(row['k']):,}", "-" if noise is None else f"± {percent(noise)}", _pair(row.get("maj")),
            f"{_pair(row['pass_at'][best])} (k = {int(best)})" if best else "-", _pair(_greedy(row)),
        ))  # fmt: skip
    columns = ["Benchmark", "pass@1", "n", "k", "sampling noise", "maj@k", "pass@k", "greedy"]
    dropped = [i for i in (5, 6, 7) if all(row[i] == "-" for row in rows)]
    keep = [i for i in range(len(columns)) if i not in dropped]
    return Table(
        caption="Per cent with 95 % interval; n problems, k samples of each.",
        columns=[columns[i] for i in keep], rows=[[row[i] for i in keep] for row in rows],
    )  # fmt: skip


def _origin(summary: Mapping[str, Any]) -> Iterator[Block]:
    """Everything that was asked, and of what data."""
    yield Heading(text="Model, protocol and data", anchor="origin")
    values: list[tuple[Line, Line]] = [(Code("model"), Code(str(summary.get("model", "?")), 400))]
    values += _flat(summary.get("protocol", {}), "protocol")
    values += [(Code("seed"), Code(str(summary.get("seed", "?"))))]
    if "seconds" in summary:
        values += [(Code("seconds"), f"{float(summary['seconds']):,.0f}")]
    for name in summary:
        if name not in _STANDARD:
            values += _flat(summary[name], name)
    yield Table(
        caption="What was asked, with every value of the protocol.",
        columns=("Setting", "value"),
        rows=values,
        left=(1,),
    )
    files = summary.get("files") or {}
    rows: list[tuple[Line, ...]] = []
    for name, row in summary["results"].items():
        version = Code(str(row.get("version", "?")))
        found = files.get(name) or [{}]
        rows += [
            (Code(name), version, Code(str(f.get("file", "-"))), f"{int(f['rows']):,}" if "rows" in f else "-",
             Code(str(f.get("sha256", "-"))))
            for f in found
        ]  # fmt: skip
    columns = ("Benchmark", "version", "file", "rows", "sha256")
    yield Table(caption="Data files and their checksums.", columns=columns, rows=rows, left=(2, 4))


def _flat(value: Any, path: str) -> Iterator[tuple[Line, Line]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    else:
        text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        yield Code(path), Code(text, 400)


def _benchmark(
    name: str, row: Mapping[str, Any], digest: Digest, *, key: str, limit: int, samples: int
) -> Iterator[Block]:
    yield Heading(text=Code(name), anchor=key)
    if row["ci95"]:
        yield from _figures(name, row, key)
    else:
        yield Paragraph(text="No sample was judged: there is no figure.")
    yield from _quality(row, digest)
    for number, (column, groups) in enumerate((row.get("by") or {}).items()):
        yield from _groups(name, column, groups, key=f"{key}-g{number}")
    if digest.right or digest.wrong:
        yield Heading(text="Lengths", level=3)
        yield Plot(
            svg=length_plot(digest.right, digest.wrong, limit=limit, title=f"Lengths of {name}", key=f"{key}-l"),
            caption="How long right and wrong samples are: each curve is 100 % of its own.",
        )
    yield from _quotes(digest.picks, samples)


def _figures(name: str, row: Mapping[str, Any], key: str) -> Iterator[Block]:
    """pass@1, pass@k, maj@k and greedy; the curve of pass@k."""
    k, n = int(row["k"]), int(row["n"])
    found = {"pass@1": {"value": row["pass_at_1"], "ci95": row["ci95"]}}
    found |= {f"pass@{int(size)}": row["pass_at"][size] for size in sorted(row.get("pass_at") or {}, key=int)}
    curve = {int(title.removeprefix("pass@")): _point(title, figure, "value") for title, figure in found.items()}
    majority: dict[int, Point] = {}
    if row.get("maj"):
        found[f"maj@{k}"] = row["maj"]
        majority[k] = _point(f"maj@{k}", row["maj"], "value")
    if greedy := _greedy(row):
        found["greedy"] = greedy
    rows: list[tuple[Line, ...]] = [(t, _pair(figure), f"{int(figure.get('n', n)):,}") for t, figure in found.items()]
    caption = f"Per cent with 95 % interval; {k} samples of each of n problems."
    yield Table(caption=caption, columns=("Figure", "value", "n"), rows=rows)
    if len(curve) > 1:
        yield Plot(
            svg=pass_at_k_plot(curve, majority=majority, title=f"pass@k of {name}", key=f"{key}-k"),
            caption="pass@k over the samples that one may draw, with 95 % intervals.",
        )


def _quality(row: Mapping[str, Any], digest: Digest) -> Iterator[Block]:
    """What became of the samples, and how long they are."""
    shares, intervals = row.get("shares") or {}, row.get("shares_ci95") or {}
    rows: list[tuple[Line, ...]] = []
    for key, about in _SHARES.items():
        if key in shares:
            count = f"{digest.counts[key]:,} of {digest.samples:,}" if digest.samples else "-"
            rows.append((about, _pair({"value": shares[key], "ci95": intervals.get(key)}), count))
    if rows:
        caption = "What became of the samples: per cent with 95 % interval over problems."
        yield Table(caption=caption, columns=("Share", "value", "samples"), rows=rows)
    if errors := row.get("errors"):
        caption = "What the grader failed with, the first few."
        cells = [(Code(str(where)), Code(str(what), 400)) for where, what in errors.items()]
        yield Table(caption=caption, columns=("Sample", "error"), rows=cells, left=(1,))
    if tokens := row.get("tokens"):
        low, high = map(float, tokens.get("mean_ci95") or (math.nan, math.nan))
        mean = f"{float(tokens['mean']):,.1f} [{low:,.1f}, {high:,.1f}]" if low == low else "?"
        count, most, total = (f"{int(n):,}" for n in (row["samples"], tokens["max"], tokens["total"]))
        yield Paragraph(text=f"{count} samples of {mean} tokens on average, {most} at most, {total} in all.")


def _groups(name: str, column: str, groups: Mapping[str, Any], *, key: str) -> Iterator[Block]:
    largest = sorted(groups, key=lambda value: -int(groups[value]["n"]))[:_GROUPS_SHOWN]
    shown = sorted(largest, key=_natural)
    if not shown:
        return
    yield Heading(text=("By ", Code(column)), level=3)
    yield Table(
        caption="pass@1 in per cent with 95 % interval; n problems.", columns=("Group", "pass@1", "n"),
        rows=[(Code(v), percent(groups[v]["pass_at_1"], groups[v]["ci95"]), f"{int(groups[v]['n']):,}") for v in shown],
    )  # fmt: skip
    if len(groups) > len(shown):
        yield Paragraph(text=f"The {len(shown)} largest of {len(groups):,}; all of them stand in summary.json.")
    if len(shown) > 1:
        points = [_point(v, groups[v], note=f"n = {int(groups[v]['n']):,}") for v in shown]
        yield Plot(
            svg=accuracy_plot(points, title=f"pass@1 of {name} by {column}", key=key),
            caption="pass@1 by group with 95 % intervals. Groups of few problems have wide ones.",
        )


def _quotes(picks: Mapping[str, Sample], most: int) -> Iterator[Block]:
    """At most so many samples; one that is shown for several reasons is shown once."""
    titles: dict[tuple[str, int], list[str]] = {}
    for title in [*PICKS, LONGEST]:
        if title in picks:
            titles.setdefault(picks[title].key, []).append(title)
    if titles:
        yield Heading(text="Samples to look at", level=3)
    for first, *more in list(titles.values())[:most]:
        sample = picks[first]
        yield Quote(title=", ".join([first, *map(str.lower, more)]), about=_about(sample), text=sample.text)


def _about(sample: Sample) -> list[Line]:
    lines: list[Line] = [
        ("problem ", Code(sample.problem), f", sample {sample.index}, {sample.tokens:,} tokens"),
        ("status ", Code(sample.status), ", ended by ", Code(sample.finish_reason), f", seed {sample.seed}"),
        ("answer ", *_maybe(sample.answer), ", gold ", *_maybe(sample.gold)),
    ]
    if sample.detail:
        lines.append(("detail ", Code(str(sample.detail), 400)))
    return lines


def _maybe(value: Any) -> tuple[Inline, ...]:
    if value is None:
        return ("none",)
    return (Code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),)


def _point(name: str, figure: Mapping[str, Any], key: str = "pass_at_1", *, note: str | None = None) -> Point:
    low, high = map(float, figure["ci95"])
    if note is None:
        note = f"n = {int(figure['n']):,}, k = {int(figure['k']):,}" if "k" in figure else ""
    return Point(name=name, value=float(figure[key]), ci95=(low, high), note=note)


def _pair(figure: Any) -> str:
    """``41.2 [38.5, 43.9]``; a dash where there is no figure."""
    return "-" if figure is None or figure["ci95"] is None else percent(figure["value"], figure["ci95"])


def _greedy(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The greedy figure, which stands in one entry or in two (as an eval stage writes it)."""
    greedy = row.get("greedy")
    if greedy is None or isinstance(greedy, dict):
        return greedy
    return {"value": greedy, "ci95": row["greedy_ci95"]}


def _percent(share: float) -> str:
    return "less than 0.1 %" if 0 < share < 0.001 else f"{percent(share)} %"


def _limit(summary: Mapping[str, Any]) -> int:
    protocol = summary.get("protocol")
    sampling = protocol.get("sampling") if isinstance(protocol, dict) else None
    return int(sampling.get("max_tokens", 0)) if isinstance(sampling, dict) else 0


def _natural(text: str) -> list[Any]:
    """``Level 10`` after ``Level 9``."""
    parts = re.split(r"([0-9]{1,18})", text)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]

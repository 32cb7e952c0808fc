"""The pages of an evaluation: what stands on them, and that no text of a model becomes anything but text."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.output_folder import each_sample, read_summary
from evals.page import write_pages
from evals.page_blocks import Code, Heading, Paragraph, Quote, Table, percent, to_html, to_markdown, visible
from evals.page_digest import Digest
from evals.samples import Sample, Status
from tests.unit.eval_folders import evaluation, results, sample, summary, write_folder
from tests.unit.hostile_pages import HOSTILE, Structure, markdown_tokens


def small(text: str = "plain") -> dict[str, list[Sample]]:
    """Two benchmarks in which every text that is not ours is the same."""
    name = text.replace("/", "∕").replace("\0", "")[:80].encode("utf-8", "replace").decode() or "empty"
    name = "dots" if name in (".", "..") else name
    more: dict[str, Any] = {"answer": text, "gold": text, "detail": f"d{text}", "text": text}
    groups = {text: text}
    statuses = [Status.RIGHT, Status.WRONG, Status.UNANSWERED, Status.ERROR]
    hostile = [
        sample(f"{text}{i // 4}", i % 4, status, doc_id=i // 4, groups=groups, **more)
        for i, status in enumerate(statuses * 2)
    ]
    groups = {text: text + "2"}
    hostile += [sample("c", i, Status.WRONG, doc_id=9, finish_reason="length", groups=groups) for i in range(4)]
    return {name: hostile, "sums": [sample(str(i), j, Status.RIGHT) for i in range(3) for j in range(2)]}


def pages(folder: Path, text: str = "plain") -> tuple[str, str]:
    protocol = {"name": text, text or "e": text, "sampling": {"stop": [text], "max_tokens": 64}}
    benchmarks = small(text)
    name = next(iter(benchmarks))
    found = {n: results(s) for n, s in benchmarks.items()}
    found[name] |= {"errors": {text: text}, "version": text}
    files = {name: [{"file": text, "rows": 3, "sha256": text}]}
    content = summary(found, model=text, protocol=protocol, files=files, seed=text, versions={text or "e": text})
    write_folder(folder, content, benchmarks)
    return tuple(path.read_text("utf-8") for path in write_pages(folder))  # type: ignore[return-value]


# --- hostile texts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return pages(tmp_path_factory.mktemp("plain"))


def kinds(markdown: str) -> list[str]:
    return [token.type for token in markdown_tokens(markdown) if token.type not in ("text", "softbreak")]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots have tests of their own, and take their time."""
    for plot in ("accuracy_plot", "pass_at_k_plot", "length_plot"):
        monkeypatch.setattr(f"evals.page.{plot}", lambda *args, **more: "<svg></svg>")


@pytest.mark.usefixtures("no_plots")
def test_hostile_text_changes_nothing_but_text(tmp_path: Path) -> None:
    plain = pages(tmp_path / "plain")
    for index, text in enumerate(HOSTILE):
        markdown, html = pages(tmp_path / str(index), text)
        found = Structure(html)
        assert found.tags == Structure(plain[1]).tags and found.others == [], text
        assert kinds(markdown) == kinds(plain[0]), text
        shown = visible(text, keep="\n\t")
        assert shown in "".join(found.text)
        fences = [token.content for token in markdown_tokens(markdown) if token.type == "fence"]
        assert any(fence == shown + "\n" for fence in fences), "every letter is shown"


def test_hostile_text_in_plots_changes_nothing_but_text(plain: tuple[str, str], tmp_path: Path) -> None:
    _, html = pages(tmp_path, " ".join(HOSTILE))
    before, after = Structure(plain[1]), Structure(html)
    assert [tag for tag, _ in after.tags] == [tag for tag, _ in before.tags] and after.others == []
    assert not any(name.startswith("on") for name, _ in after.attributes)


def test_a_page_runs_nothing_and_asks_nobody(plain: tuple[str, str]) -> None:
    found = Structure(plain[1])
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "base", "form", "audio", "video", "image"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name != "src" and "url(http" not in value
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", plain[1])
    assert "default-src 'none'" in plain[1]


@pytest.mark.usefixtures("no_plots")
def test_a_markdown_page_has_no_link_image_or_html(tmp_path: Path) -> None:
    markdown, _ = pages(tmp_path, HOSTILE[7] + HOSTILE[0] + HOSTILE[8])
    assert not {t.type for t in markdown_tokens(markdown)} & {"link_open", "image", "html_inline", "html_block"}


@given(st.text(max_size=60))
def test_any_text_is_one_cell_one_span_one_block(text: str) -> None:
    blocks = [
        Heading(text=Code(text)),
        Paragraph(text=("a ", Code(text), " b")),
        Table(caption="t", columns=("x", "y"), rows=[(Code(text), "1"), ("z", Code(text))]),
        Quote(title="q", about=[("about ", Code(text))], text=text),
    ]
    types = [t.type for t in markdown_tokens(to_markdown(Code(text), blocks)) if t.type != "text"]
    assert types.count("td_open") == 4 and types.count("th_open") == 2 and types.count("fence") == 1
    assert types.count("code_inline") == 6 and types.count("heading_open") == 2
    tags = [tag for tag, _ in Structure(to_html(Code(text), blocks)).tags]
    assert tags.count("code") == 6 and tags.count("pre") == 1 and tags.count("td") == 2 and tags.count("th") == 4


@given(st.text(max_size=40))
def test_what_is_shown_can_be_written_and_moves_no_cursor(text: str) -> None:
    shown = visible(text, keep="\n")
    assert shown.encode("utf-8").decode() == shown
    assert all(c.isprintable() or c == "\n" or c.isspace() for c in shown)


# --- what stands there -----------------------------------------------------------------------------------------------


def graded() -> list[Sample]:
    """Problem 0: 4 of 4 right, 1: 2 of 4, 2: none; the last one was cut."""
    rights = {0: 4, 1: 2, 2: 0}
    found = [
        sample(str(p), i, Status.RIGHT if i < n else Status.WRONG, groups={"level": str(p % 2)})
        for p, n in rights.items() for i in range(4)
    ]  # fmt: skip
    found[-1] = sample("2", 3, Status.UNANSWERED, tokens=512, finish_reason="length", answer=None,
                       groups={"level": "0"}, text="and so on")  # fmt: skip
    return found


def test_figures_stand_with_their_intervals(tmp_path: Path) -> None:
    markdown, html = (p.read_text("utf-8") for p in write_pages(evaluation(tmp_path, {"sums": graded()})))
    row = json.loads((tmp_path / "summary.json").read_text())["results"]["sums"]
    low, high = (f"{100 * end:.1f}" for end in row["ci95"])
    assert (low, high) == ("0.0", "100.0")  # three problems say little
    # mean of 1, 1/2, 0; noise: sqrt(.25 / 3) / 3 = .0962
    assert "| `sums` | 50.0 [0.0, 100.0] | 3 | 4 | ± 9.6 | 66.7 [0.0, 100.0] | 66.7" in markdown
    assert "50.0 [0.0, 100.0]" in html
    for text in ("protocol.sampling.temperature", "`0.6`", "`models/tiny`", "`sums/test.jsonl`", "`" + "ab" * 32 + "`"):
        assert text in markdown
    assert "| cut at the token limit | 8.3 [0.0, 50.0] | 1 of 12 |" in markdown
    assert "By `level`" in markdown and "| `1` | 50.0 [0.0, 100.0] | 1 |" in markdown
    assert re.search(r"12 samples of 80\.6 \[.*\] tokens on average, 512 at most, 967 in all", markdown)
    assert "First wrong" in markdown and "and so on" in markdown


def test_a_point_never_stands_without_its_error(tmp_path: Path) -> None:
    """Every share of the tables that is no count is followed by its interval, or says ±."""
    markdown, html = (p.read_text("utf-8") for p in write_pages(evaluation(tmp_path, {"sums": graded()})))
    for line in (line for line in markdown.splitlines() if line.startswith("|") and "`protocol" not in line):
        for cell in line.split("|"):
            if re.fullmatch(r" ?-?\d+\.\d+.*", cell):
                assert re.search(r"\[.*\]", cell), line
    labels = [value for value in re.findall(r'<svg[^>]* aria-label="([^"]*)"', html) if "pass@1" in value]
    assert len(labels) == 3 and all(re.search(r"\d \[\d", label) for label in labels)


@pytest.mark.usefixtures("no_plots")
def test_greedy_stands_there_when_it_was_drawn(tmp_path: Path) -> None:
    for index, more in enumerate(
        ({"greedy": {"value": 0.25, "ci95": [0.1, 0.4]}}, {"greedy": 0.25, "greedy_ci95": [0.1, 0.4]})
    ):
        folder = evaluation(tmp_path / str(index), {"sums": graded()})
        content = read_summary(folder)
        content["results"]["sums"] |= more
        (folder / "summary.json").write_text(json.dumps(content))
        assert "| greedy | 25.0 [10.0, 40.0] | 3 |" in write_pages(folder)[0].read_text("utf-8")


@pytest.mark.usefixtures("no_plots")
def test_warnings_come_first(tmp_path: Path) -> None:
    samples = [*graded(), sample("3", 0, Status.ERROR, detail="KeyError: 'x'")]
    folder = evaluation(tmp_path, {"sums": samples})
    content = read_summary(folder)
    content["results"]["sums"] |= {"missing": 7, "left_out": 1, "errors": {"3, sample 0": "KeyError: 'x'"}}
    (folder / "summary.json").write_text(json.dumps(content))
    text = write_pages(folder)[0].read_text("utf-8")
    before = text.split("## Results")[0]
    for wanted in (
        "samples not drawn yet: 7",
        "grader failed on 7.7 %",
        "7.7 % of the samples were cut",
        "could judge: 1.",
    ):
        assert wanted in before
    assert "| `3, sample 0` | `KeyError: 'x'` |" in text


@pytest.mark.usefixtures("no_plots")
def test_samples_that_were_not_asked_for_are_no_part_of_the_page(tmp_path: Path) -> None:
    """A folder keeps all samples; an evaluation with a smaller k is of the first k."""
    samples = [*graded(), sample("0", 4, Status.REFUSED, text="not asked for")]
    folder = write_folder(tmp_path, summary({"sums": results(graded())}), {"sums": samples})
    text = write_pages(folder)[0].read_text("utf-8")
    assert "not asked for" not in text and "1 of 12 |" in text and "of 13" not in text


def test_nothing_judged_is_said(tmp_path: Path) -> None:
    row = results(graded(), pass_at_1=None, ci95=None, sampling_se=None, n=0, pass_at={}, by={})
    del row["maj"]
    failed = [sample("0", i, Status.ERROR) for i in range(2)]
    folder = write_folder(tmp_path, summary({"sums": row}), {"sums": failed})
    markdown, html = (p.read_text("utf-8") for p in write_pages(folder))
    assert "No sample was judged" in markdown and "| `sums` | - | 0 |" in markdown and "<svg" not in html


def test_samples_are_picked_in_the_order_of_the_data() -> None:
    rows = [
        sample("9", 0, Status.WRONG), sample("4", 1, Status.WRONG), sample("4", 0, Status.WRONG, tokens=99),
        sample("1", 0, Status.RIGHT), sample("2", 0, Status.TIMEOUT), sample("3", 0, Status.ERROR, tokens=99),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        digest = Digest.of(order)
        assert {reason: s.key for reason, s in digest.picks.items()} == {
            "First wrong": ("4", 0), "First right": ("1", 0), "First timed out": ("2", 0),
            "First that the grader failed on": ("3", 0), "Longest": ("3", 0),
        }  # fmt: skip
        assert sorted(digest.right) == [40] and sorted(digest.wrong) == [40, 40, 41, 99]


@pytest.mark.usefixtures("no_plots")
def test_a_large_folder_makes_a_small_page(tmp_path: Path) -> None:
    texts = [f"{i} " * 3000 for i in range(3)]
    samples = [
        sample(str(i), j, Status.RIGHT if (i + j) % 3 else Status.WRONG, text=texts[i % 3], tokens=10 + i % 700)
        for i in range(400) for j in range(2)
    ]  # fmt: skip
    sizes = []
    for count in (40, 800):
        folder = evaluation(tmp_path / str(count), {"sums": samples[:count]})
        markdown, html = write_pages(folder)
        sizes.append((markdown.stat().st_size, html.stat().st_size))
        assert "characters left out" in markdown.read_text("utf-8")
    assert sizes[1][0] < 1.2 * sizes[0][0] and sizes[1][1] < 1.2 * sizes[0][1] + 4000


def test_samples_are_read_one_by_one(tmp_path: Path) -> None:
    folder = evaluation(tmp_path, {"sums": graded()})
    path = folder / "sums" / "samples.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\x1f\x8b\x08damage" + whole)
    reading = each_sample(folder, "sums")
    assert next(reading).problem == "0"  # before the damage behind it is seen
    with pytest.raises(OSError, match=r"samples\.jsonl\.gz is damaged at byte"):
        list(reading)
    path.write_bytes(whole + whole[:-9])
    assert len(list(each_sample(folder, "sums"))) == 12, "a torn end is passed over"
    path.write_bytes(gzip.compress(b'{"problem": 1}\n'))
    with pytest.raises(OSError, match=r"is no sample: .* is missing; `truncate"):
        list(each_sample(folder, "sums"))


@pytest.mark.usefixtures("no_plots")
def test_many_groups_and_many_benchmarks_are_capped(tmp_path: Path) -> None:
    samples = [
        sample(str(i), 0, Status.RIGHT if i % 2 else Status.WRONG, groups={"topic": f"t{i // 2}"}) for i in range(90)
    ]
    text = write_pages(evaluation(tmp_path / "g", {"sums": samples}))[0].read_text("utf-8")
    assert "The 30 largest of 45" in text and len(re.findall(r"\| `t\d+`", text)) == 30
    many = {f"set{i}": [sample(str(i), 0, Status.RIGHT), sample(str(i), 1, Status.WRONG)] for i in range(70)}
    text = write_pages(evaluation(tmp_path / "b", many))[0].read_text("utf-8")
    assert text.count("```text") == 70


@pytest.mark.usefixtures("no_plots")
def test_levels_are_in_their_natural_order(tmp_path: Path) -> None:
    levels = ["Level 10", "Level 9", "Level 1", "other"]
    samples = [sample(str(i), 0, Status.RIGHT, groups={"level": level}) for i, level in enumerate(levels)]
    text = write_pages(evaluation(tmp_path, {"sums": samples}))[0].read_text("utf-8")
    places = [text.index(f"| `{level}`") for level in ("Level 1", "Level 9", "Level 10", "other")]
    assert places == sorted(places)


def test_pages_are_the_same_every_time(tmp_path: Path) -> None:
    folder = evaluation(tmp_path, {"sums": graded()})
    first = [p.read_bytes() for p in write_pages(folder)]
    assert [p.read_bytes() for p in write_pages(folder)] == first
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md", "summary.json", "sums"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "has no summary.json: name the --out folder"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "holds no results"),
        ('{"stages": []}', "holds no results"),
        ('{"results": {"sums": 3}}', "'sums' has no pass_at_1"),
        ('{"results": {"sums": {"pass_at_1": 1, "n": 1, "k": 1}}}', "'sums' has no ci95"),
        (json.dumps({"results": {"../x": results(graded())}}), "is no name of a benchmark"),
        (json.dumps({"results": {"sums": results(graded(), ci95=["<b>", 1])}}), "is not as an evaluation writes it"),
        (
            json.dumps({"results": {"sums": results(graded(), by={"l": {"x": {}}})}}),
            "is not as an evaluation writes it",
        ),
        (json.dumps({"results": {"sums": results(graded(), pass_at=[3])}}), "is not as an evaluation writes it"),
    ],
)
def test_a_folder_that_is_none_ends_in_one_line(content: str | None, wanted: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        write_pages(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("report*"))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read_summary(tmp_path / "nowhere")


@pytest.mark.usefixtures("no_plots")
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evaluation(tmp_path, {"sums": graded()})
    before = [p.read_bytes() for p in write_pages(folder)]

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (folder / "kept").hardlink_to(folder / "report.md")
    write_pages(folder)
    assert not (folder / "kept").samefile(folder / "report.md"), "a new file takes the old one's place"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_pages(folder)
    assert [(folder / name).read_bytes() for name in ("report.md", "report.html")] == before
    assert not list(folder.glob(".*"))


def test_percent() -> None:
    assert (
        percent(0.4123, (0.385, 0.43949)) == "41.2 [38.5, 43.9]" and percent(-0.01, (-0.02, 0.0), sign=True)[0] == "-"
    )
    with pytest.raises(ValueError, match="could not convert"):
        percent("<b>")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_enough_contrast_in_light_and_dark(plain: tuple[str, str]) -> None:
    themes = re.findall(r":root \{([^}]*)\}", plain[1])
    assert len(themes) == 2
    for theme in themes:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        pairs = [(ink, ground) for ink in ("ink", "muted", "link", "right", "wrong") for ground in ("page", "raised")]
        for ink, ground in [*pairs, ("warn-ink", "warn")]:
            dark, light = sorted((luminance(colour[ink]), luminance(colour[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_tables_and_plots_are_told_to_those_who_do_not_see(plain: tuple[str, str]) -> None:
    tags = re.findall(r"<(th|table|svg|pre|html)\b([^>]*)>", plain[1])
    assert all("scope=" in rest for tag, rest in tags if tag == "th")
    labels = set(re.findall(r' id="(t\d+)"', plain[1]))
    assert {re.search(r'aria-labelledby="([^"]*)"', rest)[1] for tag, rest in tags if tag == "table"} == labels  # type: ignore[index]
    assert all('role="img"' in rest and 'aria-label="' in rest for tag, rest in tags if tag == "svg")
    assert ' lang="en"' in plain[1] and 'name="viewport"' in plain[1]


# --- a real browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[str]:
    found = os.environ.get("R1_BROWSER") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
    )
    if not found:
        pytest.skip("no Chromium or Chrome is installed (R1_BROWSER may name one)")
    yield found


def test_a_browser_shows_the_page(browser: str, tmp_path: Path) -> None:
    pages(tmp_path, "<img src=x onerror=document.title='hacked'>")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "<title>Evaluation of &lt;img src=x" in done.stdout and "<img" not in done.stdout
    assert done.stdout.count("<svg") >= 3

"""Two evaluations paired by problem: the test against hand-worked numbers, what is refused, and what a person sees."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evals import compare as comparing
from evals.compare import compare, compare_folders, comparison_blocks, differences, holm, p_text, sign_flip_test
from evals.page_blocks import to_html
from evals.samples import Status
from pipelines.eval_compare import add_arguments, comparison_table, lines, run
from tests.unit.eval_folders import PROTOCOL, evaluation, sample, shares, summary, write_folder


def fractions(*values: float, k: int = 8) -> list[Fraction]:
    return [Fraction(round(value * k), k) for value in values]


def by_hand(changes: Sequence[Fraction]) -> float:
    """Every sign pattern written out."""
    seen = abs(sum(changes))
    sums = [abs(sum(s * c for s, c in zip(signs, changes, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(changes))]  # fmt: skip
    return sum(one >= seen for one in sums) / len(sums)


def pair(old: Sequence[float], new: Sequence[float], k: int = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    return summary({"sums": shares(*old, k=k)}), summary({"sums": shares(*new, k=k)})


# --- the p-value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "p"),
    [
        ([0, 0, 0], 1.0),
        ([1], 1.0),  # +1 and -1 are as far out
        ([0.5, 0.5, 0.5], 2 / 8),
        ([0.25, 0.5, -0.25], 6 / 8),  # sums 4, 2, 2, 0, 0, -2, -2, -4 quarters; 2 was seen
        ([1, -1], 1.0),
        ([1] * 8 + [-1] * 2, 112 / 1024),  # McNemar: 2 (1 + 10 + 45) / 2^10
        ([1] * 10 + [0] * 500, 2 / 1024),  # what did not change counts for nothing
        # the sum of C(40, i) for i <= 5 is 760,099
        ([-1] * 35 + [1] * 5, 2 * 760_099 / 2**40),
    ],
)
def test_p_values_by_hand(changes: list[float], p: float) -> None:
    assert sign_flip_test(fractions(*changes)) == (pytest.approx(p, rel=1e-12), "exact")


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=8))
def test_the_exact_count_is_that_of_all_patterns(steps: list[int]) -> None:
    changes = [Fraction(step, 8) for step in steps]
    assert sign_flip_test(changes)[0] == pytest.approx(by_hand(changes), rel=1e-12)


@given(st.lists(st.sampled_from([Fraction(i, k) for k in (3, 4, 7) for i in range(-k, k + 1)]), min_size=1, max_size=7))
def test_other_ways_to_count_agree(changes: list[Fraction]) -> None:
    """The patterns written out and those drawn, on changes with different numbers of samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "_MOST_STEPS", -1)
        assert sign_flip_test(changes) == (pytest.approx(by_hand(changes), rel=1e-12), "exact")


def test_drawn_patterns_are_near_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = fractions(0.5, 0.25, -0.25, 1, 0.125, 0.125, -0.5, 0.75)
    exact = by_hand(changes)
    monkeypatch.setattr(comparing, "_MOST_STEPS", -1)
    monkeypatch.setattr(comparing, "_FEW", 0)
    p, how = sign_flip_test(changes)
    assert how == "sampled" and abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 100_000)
    assert sign_flip_test(changes) == (p, how)
    assert sign_flip_test(fractions(*[1] * 60))[0] == pytest.approx(1 / 100_001), "never 0"


def test_many_problems_are_counted_exactly_and_at_once() -> None:
    """1,319 problems with 8 samples: as the normal approximation says (sums are 2 apart), and right far out too."""
    generator = np.random.default_rng(7)
    steps = [int(x) for x in generator.integers(-3, 4, 1319)]
    p, how = sign_flip_test([Fraction(step, 8) for step in steps])
    z = (abs(sum(steps)) - 1) / math.sqrt(sum(step * step for step in steps))
    assert how == "exact" and p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.005)
    assert sign_flip_test(fractions(*[1] * 900))[0] == pytest.approx(2.0**-899, rel=1e-9)


def test_equal_models_are_called_different_as_often_as_they_should_be() -> None:
    generator = np.random.default_rng(1)
    chance = generator.random(30)
    found = []
    for _ in range(400):
        draws = generator.binomial(4, np.tile(chance, (2, 1)))
        found.append(sign_flip_test([Fraction(int(y - x), 4) for x, y in draws.T])[0])
    for level in (0.05, 0.2):
        share = sum(p <= level for p in found) / len(found)
        assert level - 4 * math.sqrt(level / 400) < share < level + 3 * math.sqrt(level / 400)


def test_scipy_says_the_same() -> None:
    """permutation_test (samples, every pattern), ttest_rel's interval, binomtest: scipy 1.17.1 on these numbers."""
    old = [0, 0.25, 0.5, 1, 0.75, 0.125, 0.5, 0.875, 0.25, 0.625, 1, 0.5]
    new = [0.25, 0.75, 1, 1, 0.5, 0.25, 0.375, 1, 0.5, 0.5, 1, 0.875]
    row = compare(*pair(old, new, k=8))["benchmarks"]["sums"]
    assert row["p_value"] == pytest.approx(0.115234375, rel=1e-12)
    assert row["difference"] == pytest.approx(0.13541666666666666)
    assert row["ci95"] == pytest.approx([-0.02145812182430093, 0.2922914551576342], abs=1e-8)
    assert sign_flip_test(fractions(*[1] * 5, *[-1] * 35))[0] == pytest.approx(1.382612026645802e-06, rel=1e-12)


def test_holm() -> None:
    # statsmodels' multipletests(…, method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005, 0.2, 0.0001]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2, 0.0006])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


# --- what is compared ------------------------------------------------------------------------------------------------


def test_a_comparison_by_hand() -> None:
    a, b = pair([0, 0.25, 0.5, 1, 0.75], [0.25, 0.75, 1, 1, 0.5])
    found = compare(a, b)
    row = found["benchmarks"]["sums"]
    # changes 1/4, 1/2, 1/2, 0, -1/4: mean .2, squares about it .425, standard deviation sqrt(.425 / 4); t(4) = 2.776445
    reach = 2.7764451 * math.sqrt(0.425 / 4 / 5)
    assert row["difference"] == pytest.approx(0.2) and row["n"] == 5
    assert row["ci95"] == pytest.approx([0.2 - reach, 0.2 + reach])
    assert row["p_value"] == pytest.approx(by_hand(fractions(0.25, 0.5, 0.5, -0.25))) and row["test"] == "exact"
    assert row["a"]["pass_at_1"] == 0.5 and row["b"]["pass_at_1"] == pytest.approx(0.7)
    # one half is not solved: p2 is gained with 1/2 -> 1, p4 is lost with 3/4 -> 1/2
    assert row["flipped"] == {"gained": ["p1", "p2"], "lost": ["p4"]}
    noise = [side["results"]["sums"]["sampling_se"] for side in (a, b)]
    assert row["sampling_se"] == pytest.approx(math.sqrt(noise[0] ** 2 + noise[1] ** 2))
    assert "p_holm" not in row and found["notes"] == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12), st.randoms())
def test_the_other_way_round_is_the_negative(counts: list[tuple[int, int]], random: Any) -> None:
    a, b = pair([x / 4 for x, _ in counts], [y / 4 for _, y in counts])
    there, back = (compare(*sides)["benchmarks"]["sums"] for sides in ((a, b), (b, a)))
    assert back["difference"] == -there["difference"] and back["p_value"] == there["p_value"]
    assert back["ci95"] == pytest.approx([-end for end in reversed(there["ci95"])])
    assert back["flipped"] == {"gained": there["flipped"]["lost"], "lost": there["flipped"]["gained"]}
    shuffled = list(b["results"]["sums"]["by_problem"].items())
    random.shuffle(shuffled)
    b["results"]["sums"]["by_problem"] = dict(shuffled)
    assert compare(a, b)["benchmarks"]["sums"] == there
    assert there["ci95"][0] <= there["difference"] <= there["ci95"][1]


def test_the_same_folder_twice(tmp_path: Path) -> None:
    folder = evaluation(
        tmp_path, {"sums": [sample(str(i), 0, Status.RIGHT if i % 2 else Status.WRONG) for i in range(9)]}
    )
    row = compare_folders(folder, folder)["benchmarks"]["sums"]
    assert (row["difference"], row["p_value"], row["flipped"]) == (0.0, 1.0, {"gained": [], "lost": []})
    # none of nine changed: up to 1 - .025^(1/9) of others may
    assert row["ci95"] == pytest.approx([-(1 - 0.025 ** (1 / 9)), 1 - 0.025 ** (1 / 9)])


def test_all_changes_equal_still_have_an_interval() -> None:
    rate = 1 - 0.025 ** (1 / 4)
    row = compare(*pair([0.25] * 4, [0.5] * 4))["benchmarks"]["sums"]
    assert row["ci95"] == pytest.approx([0.25 - rate * 1.25, 0.25 + rate * 0.75])
    assert compare(*pair([0] * 4, [1] * 4))["benchmarks"]["sums"]["ci95"] == pytest.approx([1 - 2 * rate, 1])
    assert compare(*pair([0], [1]))["benchmarks"]["sums"]["ci95"] == [-1, 1]


def test_shares_are_read_as_the_fractions_that_they_were() -> None:
    a, b = pair([1 / 3, 2 / 3, 5 / 7, 63 / 64], [2 / 3, 1 / 3, 3 / 7, 1.0], k=1)
    row = compare(a, b)["benchmarks"]["sums"]
    assert row["p_value"] == pytest.approx(by_hand([Fraction(1, 3), Fraction(-1, 3), Fraction(-2, 7), Fraction(1, 64)]))
    many = compare(*pair([1 / 3] * 20, [2 / 3] * 19 + [0.0], k=3))["benchmarks"]["sums"]
    assert many["test"] == "exact" and many["p_value"] == pytest.approx(42 / 2**20)  # none or one of 20, either way


def test_only_problems_that_both_have_are_compared() -> None:
    a, b = pair([0, 1, 1], [1, 1, 0])
    b["results"]["sums"]["by_problem"] = {"p0": 1.0, "p1": 1.0, "new": 0.0}
    b["results"]["sums"]["missing"] = 3
    found = compare(a, b)
    row = found["benchmarks"]["sums"]
    assert row["n"] == 2 and row["a"]["pass_at_1"] == 0.5 and row["flipped"]["gained"] == ["p0"]
    assert found["notes"] == [
        "sums: left out what only the first has: 1 of its 3 problems",
        "sums: left out what only the second has: 1 of its 3 problems",
        "sums: samples of the second that are not drawn yet: 3",
    ]


def test_several_benchmarks_are_corrected() -> None:
    names = ("x", "y", "z")
    a = summary({name: shares(*[0] * 10, k=1) for name in names})
    b = summary({n: shares(*[1] * c, *[0] * (10 - c), k=1) for n, c in zip(names, (10, 6, 0), strict=True)})
    a["results"]["only"] = shares(1, 0)
    found = compare(a, b)
    rows = found["benchmarks"]
    assert [rows[n]["p_value"] for n in names] == pytest.approx([2 / 1024, 2 / 64, 1])
    assert [rows[n]["p_holm"] for n in names] == pytest.approx([6 / 1024, 4 / 64, 1])
    assert found["notes"] == ["only the first has 'only': left out"]


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(side: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A summary with other values in its protocol, its benchmark or its files."""
    copy = json.loads(json.dumps(side))
    for place, value in more.items():
        target = {"protocol": copy["protocol"], "row": copy["results"]["sums"], "file": copy["files"]["sums"][0]}[place]
        target |= value
    return copy


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"row": {"version": "2"}}, "sums: version is 1 against 2"),
        ({"row": {"k": 8}}, "sums: k is 4 against 8"),
        ({"file": {"sha256": "cd" * 32}}, "sums/test.jsonl abababababab against sums/test.jsonl cdcdcdcdcdcd"),
        ({"protocol": {"name": "greedy"}}, 'protocol.name is "deepseek" against "greedy"'),
        ({"protocol": {"sampling": {**PROTOCOL["sampling"], "temperature": 1.0}}},
         "protocol.sampling.temperature is 0.6 against 1.0"),
        ({"protocol": {"force_think": False}}, "protocol.force_think is true against false"),
        ({"protocol": {"new": 1}}, "protocol.new is nothing against 1"),
    ],
)  # fmt: skip
def test_what_was_not_evaluated_alike_is_refused(change: dict[str, Any], clause: str) -> None:
    a, _ = pair([0, 1], [0, 1])
    b = changed(a, **change)
    with pytest.raises(ValueError, match="were not evaluated in the same way") as caught:
        compare(a, b)
    assert clause in str(caught.value) and "--anyway" in str(caught.value) and "\n" not in str(caught.value)
    found = compare(a, b, anyway=True)
    assert len(found["notes"]) == 1 and clause in found["notes"][0]


def test_what_may_differ() -> None:
    a, _ = pair([0, 1], [0, 1])
    b = {**changed(a, file={"file": "elsewhere/test.jsonl"}), "model": "other", "seed": 9, "seconds": 1.0}
    assert differences(a, b) == []


def test_problems_asked_in_other_words_are_refused(tmp_path: Path) -> None:
    old = [sample(str(i), 0, Status.RIGHT) for i in range(3)]
    new = [sample(str(i), 0, Status.WRONG, prompt_hash="0" * 64 if i else old[0].prompt_hash) for i in range(3)]
    a, b = evaluation(tmp_path / "a", {"sums": old}), evaluation(tmp_path / "b", {"sums": new})
    with pytest.raises(ValueError, match="sums: problems asked in other words: 2, the first '1'"):
        compare_folders(a, b)
    assert compare_folders(a, b, anyway=True)["benchmarks"]["sums"]["difference"] == -1.0


def test_nothing_in_common_is_one_line(tmp_path: Path) -> None:
    a, b = summary({"x": shares(1, 0)}), summary({"y": shares(1, 0)})
    with pytest.raises(ValueError, match="have no benchmark in common: 'x' against 'y'"):
        compare(a, b)
    a, b = pair([0, 1], [1, 1])
    b["results"]["sums"]["by_problem"] = {"q": 1.0}
    with pytest.raises(ValueError, match="sums: the two evaluations have no problem in common"):
        compare(a, b)
    with pytest.raises(ValueError, match="is no folder: name the --out folder"):
        compare_folders(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("share", ["half", 1.5, -0.1, None, float("nan"), [1]])
def test_shares_that_are_none_are_named(share: Any) -> None:
    a, b = pair([0, 1], [1, 1])
    b["results"]["sums"]["by_problem"]["p1"] = share
    with pytest.raises(ValueError, match=r"sums: by_problem in summary\.json holds what is no share"):
        compare(a, b)
    del b["results"]["sums"]["by_problem"]
    with pytest.raises(ValueError, match=r"sums: summary\.json has no shares by problem"):
        compare(a, b)


# --- what a person sees ----------------------------------------------------------------------------------------------


def options(*words: str, as_json: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return argparse.Namespace(json=as_json, **vars(parser.parse_args(words)))


def folders(tmp_path: Path, old: Sequence[float], new: Sequence[float], **more: Any) -> list[str]:
    names = ("sums", "a-rather-long-benchmark-name")
    return [
        str(write_folder(tmp_path / side, summary({n: shares(*values) for n in names}, **more, model=side), {}))
        for side, values in (("a", old), ("b", new))
    ]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    a, b = folders(tmp_path, [0, 0.25, 0.5, 1], [0.25, 0.75, 1, 1])
    found = run(options(a, b, "--html", str(tmp_path / "page.html")))
    printed = capsys.readouterr().out
    assert "+31.2" in printed and "A  a" in printed and "sums gained: p1, p2" in printed
    assert re.search(r"0\.250.*0\.500", printed), "p and Holm's"
    assert max(map(len, printed.splitlines())) <= 80
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Difference of pass@1, B - A. sums +31.2 [" in page and "<code>p2</code>" in page
    assert run(options(a, b, as_json=True)) == found and capsys.readouterr().out == ""
    json.dumps(found)


def test_the_verb_refuses_and_goes_on_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = folders(tmp_path, [0, 1], [1, 1])
    other = str(write_folder(tmp_path / "c", summary({"sums": shares(0.5, 1, k=2)}), {}))
    with pytest.raises(ValueError, match="k is 4 against 2"):
        run(options(a, other))
    run(options(a, other, "--anyway"))
    assert "note: compared all the same: sums: k is 4 against 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        run(options(a, a, "--html", str(tmp_path / "nowhere" / "page.html")))


def test_hostile_names_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold red]\x1b[2J\x07\u202e"
    for side, values in (("a", [0, 0, 1]), ("b", [1, 1, 0])):
        content = summary({text: shares(*values)}, model=text)
        by_problem = content["results"][text]["by_problem"]
        content["results"][text]["by_problem"] = {f"{text}{i}": v for i, v in enumerate(by_problem.values())}
        write_folder(tmp_path / side, content, {})
    run(options(str(tmp_path / "a"), str(tmp_path / "b")))
    printed = capsys.readouterr().out
    assert "A  [bold red]\\x1b[2J\\x07\\x202e" in printed and printed.count("[bold") >= 6
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}


def test_a_hostile_comparison_is_text() -> None:
    text = "<script>alert(1)</script>[bold red]|\x1b[2J"
    name = "<img src=x onerror=alert(1)>"
    a, b = (summary({name: shares(*v)}, model=text) for v in ([0, 0, 1], [1, 1, 0]))
    for side in (a, b):
        by_problem = side["results"][name]["by_problem"]
        side["results"][name]["by_problem"] = {f"{text}{i}": v for i, v in enumerate(by_problem.values())}
    b["results"][name]["version"] = text
    found = compare(a, b, anyway=True)
    page = to_html("Comparison", comparison_blocks(found))
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page and "\x1b" not in page
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(found))
    assert "<img" in console.export_text()


def test_flips_are_capped_on_the_page() -> None:
    a, b = pair([0] * 300, [1] * 300)
    page = to_html("Comparison", comparison_blocks(compare(a, b)))
    assert "and 100 more" in page and "<code>p199</code>" in page and "<code>p200</code>" not in page
    assert any("292 more: --json has all" in line for line in lines(compare(a, b)))


def test_p_values_have_two_digits() -> None:
    assert [p_text(p) for p in (1.0, 0.0314, 0.001, 0.00021, 2e-9)] == ["1.000", "0.031", "0.001", "0.00021", "2e-09"]

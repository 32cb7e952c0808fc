"""Plots of an evaluation: drawn where the figures are, in the colours of the page, names as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from evals.plots import Point, accuracy_plot, length_plot, pass_at_k_plot
from tests.unit.hostile_pages import HOSTILE, Structure


def colours(svg: str) -> set[str]:
    return set(re.findall(r"#[0-9a-fA-F]{3,6}\b", re.sub(r'(?:href|url\()="?#[^")]*', "", svg)))


def test_plots_take_their_colours_from_the_page() -> None:
    point = Point(name="a", value=0.5, ci95=(0.25, 0.75))
    for svg in (
        accuracy_plot([point], title="t", key="k"),
        accuracy_plot([point], title="t", key="k", difference=True),
        pass_at_k_plot({1: point, 2: point, 4: point}, majority={4: point}, title="t", key="k"),
        length_plot([10, 20, 3000], [5, 9], limit=2048, title="t", key="k"),
    ):
        assert colours(svg) == set() and "var(--right)" in svg
        assert "rgb(" not in svg and "black" not in svg
        ids = re.findall(r'\bid="([^"]*)"', svg)
        assert len(set(ids)) == len(ids) and all(one.startswith("k-") for one in ids)
        references = set(re.findall(r'(?:url\(|href=")#([^")]*)', svg))
        assert references <= set(ids)


def test_an_interval_is_drawn_where_it_lies() -> None:
    """25, 50 and 75 per cent: the point lies half way between the ends of its line."""
    svg = accuracy_plot([Point(name="a", value=0.5, ci95=(0.25, 0.75))], title="t", key="k")
    lines = re.findall(
        r'd="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)\s*" [^>]*stroke: var\(--right\); stroke-width: 2"', svg
    )
    (x0, y0, x1, y1) = map(float, lines[0])
    dots = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)]
    assert y0 == y1 and any(x == pytest.approx((x0 + x1) / 2) and y == pytest.approx(y0) for x, y in dots)
    assert "a 50.0 [25.0, 75.0]" in svg


def test_names_in_plots_are_text() -> None:
    points = [Point(name=text, value=0.1, ci95=(0.0, 0.2)) for text in HOSTILE]
    svg = accuracy_plot(points, title="".join(HOSTILE), key="k")
    found = Structure(svg)
    assert {tag for tag, _ in found.tags} <= {"svg", "g", "path", "text", "tspan", "use", "defs", "clippath", "rect"}
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert "<script>alert(1)</scrip…" in found.text and "$\\frac{1$" in "".join(found.text)
    svg.encode("utf-8")


@pytest.mark.parametrize(
    ("right", "wrong"), [([1], []), ([], [7]), ([5, 5, 5], [5]), ([0, 0], [1]), (list(range(1, 5000, 7)), [32768])]
)
def test_lengths_of_every_shape_are_drawn(right: Sequence[int], wrong: Sequence[int]) -> None:
    svg = length_plot(right, wrong, limit=32768, title="t", key="k")
    assert (f"right: {len(right):,}" in svg) == bool(right) and (f"wrong: {len(wrong):,}" in svg) == bool(wrong)


def test_classes_of_length_hold_as_many_lengths_each() -> None:
    svg = length_plot(list(range(10, 64)), [], limit=0, title="t", key="k")  # 54 lengths: 18 classes of three
    outline = re.findall(r'd="M ([^"]*)"[^>]*stroke: var\(--right\); stroke-width: 2', svg)[0]
    heights = {float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", outline)}
    assert len(heights) == 2, "a flat top and the ground"

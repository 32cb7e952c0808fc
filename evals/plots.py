"""Plots of an evaluation as SVG that stands inside a page: every point with its interval.

Colours are names of the page's style sheet, so that one picture serves light and dark. Names out of data are drawn
letter by letter, never as mathematics. matplotlib is imported by the functions that draw.
"""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evals.page_blocks import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_INK, _MUTED, _GRID, _RIGHT, _WRONG = (f"#0{i}0{i}0{i}" for i in range(1, 6))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _RIGHT: "--right", _WRONG: "--wrong"}
"""Colours as matplotlib writes them, and the variable of the style sheet that takes their place."""
_WIDTH_IN = 4.8  # 346 px: on a phone one to one, so that the letters stay readable
_NAME_CHARS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A figure with its interval.

    Attributes:
        name: what it is of; may come from data.
        value, ci95: as shares (or differences of shares).
        note: after the name, ours: ``n = 30``.
    """

    name: str
    value: float
    ci95: tuple[float, float]
    note: str = ""


def accuracy_plot(points: Sequence[Point], *, title: str, key: str, difference: bool = False) -> str:
    """One line per point: its value and its 95 % interval, in per cent.

    Args:
        points: from top to bottom; at least one.
        title: what a reader who does not see it is told it is.
        key: prefix of the ids in the picture, unique in the page.
        difference: the values are differences: the axis is around 0, which is marked.

    Returns:
        An ``<svg>`` element with a text alternative that says every number.
    """
    assert points
    unit = "difference, points" if difference else "per cent, with 95 % interval"

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, point in enumerate(points):
            low, high = (100 * end for end in point.ci95)
            value = 100 * point.value
            axes.plot([low, high], [y, y], color=_RIGHT, lw=2, solid_capstyle="butt")
            axes.plot([low, low, high, high], [y] * 4, ls="", marker="|", ms=8, color=_RIGHT)
            axes.plot([value], [y], "o", ms=6.5, color=_RIGHT)
            text = f"{value:+.1f}" if difference else f"{value:.1f}"
            axes.annotate(text, (value, y), xytext=(0, 6), textcoords="offset points", ha="center", color=_INK)
        axes.set_yticks(range(len(points)), [_label(point) for point in points])
        axes.set_ylim(len(points) - 0.45, -0.7)
        if difference:
            axes.axvline(0, color=_MUTED, lw=1.2)
            reach = max(1.0, *(abs(100 * end) for point in points for end in point.ci95))
            axes.set_xlim(-1.12 * reach, 1.12 * reach)
        else:
            axes.set_xlim(-3, 103)
        _style(axes, unit, grid="x")
        axes.spines["left"].set_visible(False)

    return _svg(draw, height=0.85 + 0.46 * len(points), title=title, key=key, says=_says(points, difference=difference))


def pass_at_k_plot(curve: Mapping[int, Point], *, majority: Mapping[int, Point], title: str, key: str) -> str:
    """pass@k over k (powers of two) with its 95 % interval, and maj@k beside it.

    Args:
        curve: by k; at least one.
        majority: maj@k by k; may be empty.
        title, key: as in :func:`accuracy_plot`.
    """
    assert curve

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ks = sorted(curve)
        lows, highs = ([100 * curve[k].ci95[i] for k in ks] for i in (0, 1))
        axes.fill_between(ks, lows, highs, color=_RIGHT, alpha=0.18, lw=0)
        axes.plot(ks, [100 * curve[k].value for k in ks], "o-", ms=5, lw=2, color=_RIGHT, label="pass@k")
        _whiskers(axes, curve, _RIGHT)
        beside = {1.06 * k: point for k, point in majority.items()}  # so that the two intervals do not cover each other
        if beside:
            _whiskers(axes, beside, _WRONG)
            axes.plot(list(beside), [100 * point.value for point in beside.values()], "s", ms=6, color=_WRONG,
                      label="maj@k (majority)")  # fmt: skip
        axes.set_xscale("log", base=2)
        shown = ks if len(ks) <= 8 else ks[::2]
        axes.set_xticks(shown, [str(k) for k in shown])
        axes.minorticks_off()
        axes.set_xlim(min(ks) / 1.25, max(*ks, *majority) * 1.25)
        axes.set_ylim(-3, 105)
        axes.set_ylabel("per cent", color=_MUTED)
        _style(axes, "samples k", grid="y")
        _legend(axes)

    says = _says([*(curve[k] for k in sorted(curve)), *majority.values()])
    return _svg(draw, height=3.1, title=title, key=key, says=says)


def length_plot(right: Sequence[int], wrong: Sequence[int], *, limit: int, title: str, key: str) -> str:
    """How long the right and the wrong samples are: the share of each in every class of length.

    Args:
        right, wrong: tokens by sample; not both empty.
        limit: most tokens of one sample, marked where it lies in the range; 0 for none.
        title, key: as in :func:`accuracy_plot`.
    """
    from matplotlib.ticker import MaxNLocator

    both = sorted([*right, *wrong])
    assert both
    edges = _classes(both)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for tokens, colour, style, name in ((right, _RIGHT, "-", "right"), (wrong, _WRONG, (0, (4, 2)), "wrong")):
            if not tokens:
                continue
            counts = _histogram(tokens, edges)
            shares = [100 * count / len(tokens) for count in counts]
            label = f"{name}: {len(tokens):,}"
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16)
            axes.stairs(shares, edges, color=colour, lw=2, ls=style, label=label)
        if edges[0] < limit <= 1.2 * edges[-1]:
            axes.axvline(limit, color=_MUTED, lw=1.2, ls=":", label=f"limit: {limit:,}")
        if edges[0] > 0 and edges[-1] > 30 * edges[0]:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("per cent of these samples", color=_MUTED)
        _style(axes, "tokens of a sample", grid="y")
        _legend(axes)

    middles = [f"{name}: {len(t):,} samples, half of them up to {sorted(t)[(len(t) - 1) // 2]:,} tokens"
               for name, t in (("right", right), ("wrong", wrong)) if t]  # fmt: skip
    return _svg(draw, height=3.1, title=title, key=key, says="; ".join(middles))


def _classes(tokens: Sequence[int], most: int = 24) -> list[float]:
    """Edges of classes of length over sorted values: equal on a logarithmic axis where the lengths span that much."""
    low, high = tokens[0], tokens[-1] + 1
    if low > 0 and high > 30 * low:
        return [low * (high / low) ** (i / most) for i in range(most + 1)]
    width = -(-(high - low) // most)  # whole, so that every class holds as many lengths
    return [float(edge) for edge in range(low, high + width, width)]


def _histogram(tokens: Sequence[int], edges: Sequence[float]) -> list[int]:
    import numpy as np

    return [int(count) for count in np.histogram(np.asarray(tokens), bins=np.asarray(edges))[0]]


def _whiskers(axes: Axes, points: Mapping[Any, Point], colour: str) -> None:
    for k, point in points.items():
        low, high = (100 * end for end in point.ci95)
        axes.plot([k, k], [low, high], color=colour, lw=1.5, solid_capstyle="butt")
        axes.plot([k, k], [low, high], ls="", marker="_", ms=7, color=colour)


def _legend(axes: Axes) -> None:
    """Above the plot, where it covers nothing."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, labelcolor=_INK)


def _label(point: Point) -> str:
    name = visible(point.name, keep="")
    name = name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"
    return f"{name}\n{point.note}" if point.note else name


def _says(points: Sequence[Point], *, difference: bool = False) -> str:
    form = "+.1f" if difference else ".1f"
    return "; ".join(
        f"{p.name} {format(100 * p.value, form)} [{format(100 * p.ci95[0], form)}, {format(100 * p.ci95[1], form)}]"
        for p in points
    )


def _style(axes: Axes, xlabel: str, *, grid: str) -> None:
    axes.set_xlabel(xlabel, color=_MUTED)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.grid(visible=True, axis=grid, color=_GRID, lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    chosen: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "r1", "text.parse_math": False, "text.usetex": False,
        "font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "axes.labelsize": 10,
        "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10, "axes.edgecolor": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's own fonts draw the letters
        yield


def _svg(draw: Callable[[Figure], None], *, height: float, title: str, key: str, says: str) -> str:
    """Draws, and makes the SVG fit to stand inside a page: colours by name, ids of its own, a text alternative."""
    import io

    with _settings():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        target = io.BytesIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(target.getvalue())
    _fit(root, key)
    root.set("role", "img")
    root.set("aria-label", visible(f"{title}. {says}", keep=""))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _fit(root: ElementTree.Element, key: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for name in ("width", "height"):  # the page gives the size; the view box keeps the shape
        root.attrib.pop(name, None)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{key}-{value}")
            elif name in (f"{{{_XLINK}}}href", "href"):
                element.set(name, value.replace("#", f"#{key}-", 1))
            else:
                element.set(name, _named_colours(value.replace("url(#", f"url(#{key}-")))


def _named_colours(style: str) -> str:
    return re.sub("|".join(_VARIABLES), lambda found: f"var({_VARIABLES[found[0]]})", style)

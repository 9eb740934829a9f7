"""A training's metrics by step, an SVG picture each; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nexa_infra.monitoring.report_text import shorten
from nexa_infra.runs.series import MetricsLog, Series, number, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points that are drawn: a picture is some 600 wide.
_MOST_POINTS = 800
# Beyond this no axis can be drawn: as far off as infinity.
_FARTHEST = 1e100
# A metric that spans this many times its least value is drawn by its order of magnitude.
_LOGARITHMIC = 500.0

# Read on white and on black alike; the background is the page's.
_LINE, _INK, _WRONG = "#3d83f5", "#808894", "#e5534b"
# The same list of ten fonts at every word.
_FONTS = re.compile(r"font-family: 'DejaVu Sans'[^;\"]*")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nexa-infra",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.unicode_minus": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
}


def draw(series: Series, marks: Iterable[tuple[str, float]] = ()) -> str:
    """Draw one metric by step, as SVG; `marks` are where later attempts began, each `(axis, step)`."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A letter that matplotlib's font lacks is in the browser's.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(6.4, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _fill(axes, series, [step for axis, step in marks if axis == series.axis])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _FONTS.sub("font-family: 'DejaVu Sans', Verdana, sans-serif", stream.getvalue())


def _fill(axes: Axes, series: Series, marks: Iterable[float]) -> None:
    points = [point for point in thinned(series.points, _MOST_POINTS) if abs(point[0]) <= _FARTHEST]
    values = [value for _, value in points if abs(value) <= _FARTHEST]
    for step in marks:
        axes.axvline(step, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    # What is no finite number interrupts the line.
    heights = [value if abs(value) <= _FARTHEST else math.nan for _, value in points]
    axes.plot(
        [step for step, _ in points],
        heights,
        color=_LINE,
        linewidth=1.4,
        marker="o" if len(values) <= 40 else "",
        markersize=2.6,
    )
    for step, value in points:
        if not abs(value) <= _FARTHEST:
            axes.axvline(step, color=_WRONG, linewidth=1.0)
            word = " NaN" if math.isnan(value) else " infinite"
            axes.text(step, 1, word, color=_WRONG, va="top", transform=axes.get_xaxis_transform())
            break
    if values and min(values) > 0 and max(values) > _LOGARITHMIC * min(values):
        axes.set_yscale("log")
    axes.set_title(shorten(series.name, 60), loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel(series.axis)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.grid(visible=True, axis="y")
    axes.margins(x=0.01)


def draw_all(log: MetricsLog, names: Mapping[str, str]) -> dict[str, str]:
    """Draw the metrics that have a file's name: file name -> SVG."""
    return {names[one.name]: draw(one, log.marks) for one in log.series if one.name in names}

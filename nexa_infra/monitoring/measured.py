"""What a training's metrics came to, each one's course in figures, and the file of its plot: standard library alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nexa_infra.monitoring.report_model import Measured, MeasuredMetric
from nexa_infra.runs.series import MetricsLog, Point, Series

if TYPE_CHECKING:
    from nexa_infra.spec.policy import Health, Objective

# More pictures than this nobody looks at.
MOST_PLOTS = 32


def measure(
    log: MetricsLog | None, stalls: Sequence[str], *, health: Health, objective: Objective | None
) -> Measured | None:
    """Say what a log came to; None where there is nothing to say.

    `stalls` are what was said, while the training ran, of the times when it wrote nothing.
    """
    if log is None:
        return (
            Measured(lines=0, axis=None, step=None, total=None, metrics=(), warnings=tuple(stalls)) if stalls else None
        )
    files = plot_files([one.name for one in log.series[:MOST_PLOTS]])
    wrong = [
        str(one.unsound)
        for one in log.series
        if one.unsound is not None and health.nan != "ignore" and health.watches(one.name)
    ]
    return Measured(
        lines=log.progress.lines,
        axis=log.progress.axis,
        step=log.progress.step,
        total=log.progress.total,
        metrics=tuple(_metric(one, files.get(one.name), objective) for one in log.series),
        warnings=(*wrong, *stalls),
    )


def plot_files(names: Sequence[str]) -> dict[str, str]:
    """Give each metric a file of its own, from the run directory: name -> plots/NAME.svg."""
    files: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip("._-") or "metric"
        chosen, number = plain, 2
        while chosen.lower() in taken:
            chosen, number = f"{plain}-{number}", number + 1
        taken.add(chosen.lower())
        files[name] = f"plots/{chosen}.svg"
    return files


def _metric(series: Series, plot: str | None, objective: Objective | None) -> MeasuredMetric:
    points = series.finite
    least = min(points, key=_value, default=None)
    most = max(points, key=_value, default=None)
    goal = "min" if series.name.lower().endswith("loss") else None
    if objective is not None and objective.metric == series.name:
        goal = objective.goal
    best = {"min": least, "max": most, None: None}[goal]
    return MeasuredMetric(
        name=series.name,
        axis=series.axis,
        first=points[0][1] if points else None,
        last=series.last[1] if math.isfinite(series.last[1]) else None,
        last_step=series.last[0],
        min=least[1] if least else None,
        min_step=least[0] if least else None,
        max=most[1] if most else None,
        max_step=most[0] if most else None,
        best_step=best[0] if best else None,
        unsound=None if series.unsound is None else str(series.unsound),
        plot=plot,
    )


def _value(point: Point) -> float:
    return point[1]

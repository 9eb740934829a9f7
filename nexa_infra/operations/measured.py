"""A training's metrics for its report: read, drawn, and shown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nexa_infra.monitoring.measured import measure
from nexa_infra.monitoring.plots import draw_all
from nexa_infra.monitoring.report import CostReport
from nexa_infra.monitoring.report_model import Measured
from nexa_infra.runs.attempts import Attempt, read_attempts
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.runs.series import MetricsLog, Progress, glance, read_log
from nexa_infra.scheduling.vitals import health_of

# What the pictures in one Markdown artifact may take together, bytes.
MOST_PICTURES = 400_000


def measured_of(run: Run, trials: Sequence[Trial]) -> Measured | None:
    """Read what a training has written to metrics.jsonl; None for a sweep, or where it wrote none."""
    if (health := health_of(run)) is None:
        return None
    log = _log_of(run, trials[0].attempts if trials else ())
    return measure(log, _stalls(run), health=health, objective=run.config.objective)


def write_plots(run: Run, report: CostReport) -> None:
    """Draw the metrics that a report names, each into its file."""
    if report.measured is None:
        return
    log = _log_of(run, read_attempts(run.files).get(0, ()))
    files = {each.name: each.plot for each in report.measured.metrics if each.plot is not None}
    if log is None or not files:
        return
    run.files.plots.mkdir(exist_ok=True)
    for name, picture in draw_all(log, files).items():
        write_atomically(run.files.path / name, picture)


def pictures_of(run: Run, report: CostReport) -> dict[str, str]:
    """Return a report's plots as data URIs, for a page that reaches no file: file name -> URI.

    The first ones are shown, as far as there is room for them.
    """
    found: dict[str, str] = {}
    room = MOST_PICTURES
    for each in report.measured.metrics if report.measured else ():
        path = run.files.path / each.plot if each.plot is not None else None
        if path is not None and path.is_file():
            uri = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
            if (room := room - len(uri)) < 0:
                break
            found[str(each.plot)] = uri
    return found


def progress_of(run: Run) -> Progress | None:
    """Say how far a training is, by what is here of its metrics; None for a sweep, or where it wrote none."""
    return None if health_of(run) is None else glance(run.files.metrics_log(0))


def _stalls(run: Run) -> list[str]:
    try:
        return run.files.stalls.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _log_of(run: Run, attempts: Sequence[Attempt]) -> MetricsLog | None:
    path = run.files.metrics_log(0)
    try:
        found = path.stat()
    except OSError:
        return None
    starts = tuple(each.logged for each in attempts if each.number > 1 and each.logged)
    return _read_once(path, found.st_size, found.st_mtime_ns, starts)


@lru_cache(maxsize=1)
def _read_once(path: Path, size: int, moment: int, starts: tuple[int, ...]) -> MetricsLog | None:  # noqa: ARG001
    # A report reads the log, and so do its plots.
    return read_log(path, starts)

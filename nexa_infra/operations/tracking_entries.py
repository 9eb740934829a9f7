"""What MLflow is told of a run and of each of its trials, in the names and sizes that it takes."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexa_infra.runs.attempts import ENDED_BADLY
from nexa_infra.runs.series import read_log
from nexa_infra.scheduling.trackers import tags_of, trial_name
from nexa_infra.spec.launcher import written

if TYPE_CHECKING:
    from nexa_infra.monitoring.report import CostReport
    from nexa_infra.runs.record import Run
    from nexa_infra.runs.results import Trial

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

# mlflow.utils.validation: the most characters of a name, of a parameter's and of a tag's value.
_MOST_NAME, _MOST_PARAMETER, _MOST_TAG = 250, 6000, 5000
_NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")
# A trial's own files that are logged: more, larger ones, or such with names that no URL takes, stay where they are.
MOST_FILES = 100
MOST_FILE_BYTES = 10 * 2**20
_NO_FILE_NAME = re.compile(r"[^\w.\- +=@,()]")


@dataclass(frozen=True)
class Point:
    """One value of a metric; `moment` is in milliseconds since the epoch, None is now."""

    name: str
    value: float
    step: int = 0
    moment: int | None = None
    ours: bool = False  # what the run is told to cost, which no program knows


@dataclass(frozen=True)
class Entry:
    """One run of MLflow's."""

    name: str
    status: Status
    tags: Mapping[str, str]
    started: int  # ms since the epoch
    ended: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[Point, ...] = ()
    artifacts: tuple[tuple[Path, str | None], ...] = ()  # a file, and the folder among the artifacts

    @property
    def digest(self) -> str:
        """Of all that is logged: where MLflow has it, nothing has to be logged again."""
        files = [(str(path), (seen := path.stat()).st_size, seen.st_mtime_ns) for path, _ in self.artifacts]
        points = [(each.name, repr(each.value), each.step, each.moment) for each in self.metrics]
        told = [self.status, sorted(self.tags.items()), sorted(self.parameters.items()), points, files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def of_run(run: Run, report: CostReport, *, artifacts: bool) -> Entry:
    """Return what MLflow is told of a sweep as a whole."""
    moment = int(run.created_at.timestamp() * 1000)
    status: dict[str, Status] = {"done": "FINISHED", "failed": "FAILED", "unfinished": "RUNNING"}
    return Entry(
        name=run.id,
        status=status.get(report.end, "KILLED"),
        tags=_tags({**_of_code(run), "nexa.state": report.end}),
        started=moment,
        metrics=tuple(_of_report(run, report)),
        artifacts=tuple(_report_files(run)) if artifacts else (),
    )


def of_trial(run: Run, trial: Trial, parent: str | None, *, artifacts: bool) -> Entry:
    """Return what MLflow is told of a trial that has started."""
    last = trial.attempts[-1]
    moment = int((last.ended or last.started) * 1000)
    tags = {
        **_of_code(run),
        "nexa.trial": str(trial.index),
        "nexa.hash": trial.hash,
        "nexa.state": trial.state,
        "nexa.attempt": str(trial.attempt),
        "nexa.node": last.node,
        **({"nexa.exit_code": str(trial.exit_code)} if trial.exit_code is not None else {}),
        **({"mlflow.parentRunId": parent} if parent else {}),
        **{_name(name): value for name, value in trial.metrics.items() if isinstance(value, str)},
    }
    return Entry(
        name=trial_name(run.config, trial.index),
        status=_status(trial),
        tags=_tags(tags),
        started=int(trial.attempts[0].started * 1000),
        ended=moment if last.ended else None,
        parameters={
            _name(name): written(value)[:_MOST_PARAMETER]
            for name, value in trial.parameters.items()
            if value is not None
        },
        metrics=(*_measured(run, trial, moment), *_cost(run, trial)),
        artifacts=tuple(_own_files(run.files.trial(trial.index))) if artifacts else (),
    )


def of_training(run: Run, trial: Trial, report: CostReport, *, artifacts: bool) -> Entry:
    """Return what MLflow is told of a training: its one trial, with the report."""
    entry = of_trial(run, trial, None, artifacts=artifacts)
    files = tuple(_report_files(run)) if artifacts else ()
    metrics = (*entry.metrics, *(each for each in _of_report(run, report) if each.name == "cost.projected_usd"))
    return Entry(
        entry.name, entry.status, entry.tags, entry.started, entry.ended, entry.parameters, metrics,
        (*entry.artifacts, *files),
    )  # fmt: skip


def _of_code(run: Run) -> dict[str, str]:
    code = run.snapshot
    source = os.path.basename(run.config_file) if run.config_file else None  # noqa: PTH119 - of a text
    known = {
        **tags_of(run.config),
        "nexa.run": run.id,
        "nexa.kind": run.kind,
        "nexa.directory": run.directory,
        "nexa.cluster": run.cluster.name if run.cluster else None,
        "nexa.snapshot": code.hash if code else None,
        "mlflow.source.name": source,
        "mlflow.source.git.commit": code.commit if code else None,
        "mlflow.source.git.branch": code.branch if code else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_name(name): value[:_MOST_TAG] for name, value in tags.items()}


def _name(name: str) -> str:
    """Return a name that MLflow takes for a metric, a parameter or a tag, and as a file's."""
    clean = _NOT_IN_NAMES.sub("_", name)[:_MOST_NAME]
    if posixpath.normpath(clean) != clean or clean.startswith(("/", "..")) or clean in {"", "."}:
        clean = clean.replace("/", "_")
    return f"_{clean[1:]}" if clean in {"", ".", ".."} else clean


def _status(trial: Trial) -> Status:
    if trial.state == "completed":
        return "FINISHED"
    if trial.state in ENDED_BADLY:
        return "FAILED"
    return "RUNNING" if trial.state == "running" else "KILLED"


def _measured(run: Run, trial: Trial, moment: int) -> Iterator[Point]:
    """Yield what a trial has measured: its log by step, and what it ended with at the last step of that."""
    last: dict[str, tuple[int, float]] = {}
    for point in _history(run.files.metrics_log(trial.index), moment):
        last[point.name] = point.step, point.value
        yield point
    for name, value in trial.metrics.items():
        number = _number(value)
        step, before = last.get(_name(name), (0, None))
        if number is not None and (before is None or number != before):
            yield Point(_name(name), number, step, moment + 1)


def _history(path: Path, moment: int) -> Iterator[Point]:
    log = read_log(path)
    for series in log.series if log is not None else ():
        whole = all(step.is_integer() and abs(step) < 2**53 for step, _ in series.points)
        for number, (step, value) in enumerate(series.points):
            yield Point(_name(series.name), value, int(step) if whole else number, moment)


def _cost(run: Run, trial: Trial) -> Iterator[Point]:
    """Yield what all attempts of a trial have cost so far, by attempt."""
    unit = f"cost.{run.price.unit.replace('-', '_')}s"
    amounts = {"cost.usd": trial.usd, "cost.wasted_usd": trial.wasted_usd, unit: trial.unit_hours}
    for name, each in {**amounts, "cost.seconds": trial.seconds}.items():
        if each is not None:
            yield Point(name, float(each), trial.attempt, ours=True)


def _of_report(run: Run, report: CostReport) -> Iterator[Point]:
    unit = f"cost.{run.price.unit.replace('-', '_')}s"
    amounts: dict[str, Decimal | int | None] = {
        "cost.usd": report.actual_usd,
        "cost.wasted_usd": report.wasted_usd,
        "cost.projected_usd": report.projected.ceiling_usd,
        unit: report.actual_unit_hours,
        "trials": report.trials,
        **{f"trials.{state}": count for state, count in report.states.items()},
    }
    yield from (Point(name, float(each), ours=True) for name, each in amounts.items() if each is not None)


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, (bool, int, float)) else None
    except OverflowError:
        return None


def _report_files(run: Run) -> Iterator[tuple[Path, None]]:
    files = run.files
    for path in (files.report_markdown, files.report_json, files.results):
        if path.exists():
            yield path, None


def _own_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield a trial's own files that are on this machine, without what W&B keeps there."""
    left = MOST_FILES
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "wandb")
        for name in sorted(names):
            path = Path(place, name)
            above = path.parent.relative_to(folder).as_posix()
            if _NO_FILE_NAME.search(f"{above}{name}".replace("/", "")) or path.is_symlink() or not path.is_file():
                continue
            if not 0 < path.stat().st_size <= MOST_FILE_BYTES:
                continue
            if not left:
                return
            left -= 1
            yield path, None if above == "." else above

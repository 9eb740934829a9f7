"""The cost report: built from a run and its trials; written as JSON, Markdown, terminal text and table rows.

The standard library alone, for a steward builds and writes it too; reading one back takes pydantic.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import re
import signal
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Union

from nexa_infra.monitoring.estimates import CostEstimate
from nexa_infra.monitoring.json_text import json_text
from nexa_infra.monitoring.report_markdown import to_markdown
from nexa_infra.monitoring.report_model import (
    LEFT_OUT,
    CostReport,
    Extended,
    FailedTrial,
    ImageUsed,
    Measured,
    Objective,
    Polling,
    RankedTrial,
    StewardCost,
)
from nexa_infra.monitoring.report_terminal import to_terminal
from nexa_infra.monitoring.report_text import money, shorten, shown
from nexa_infra.monitoring.spending import NEVER_STARTED
from nexa_infra.runs.attempts import ENDED_BADLY, UNFINISHED, TrialState
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.endings import RunEnd
from nexa_infra.runs.results import Trial
from nexa_infra.spec.points import ranges, spans_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from nexa_infra.runs.record import Run

__all__ = ["CostReport", "RunEnd", "build_report", "read_report", "to_json", "to_markdown", "to_table", "to_terminal"]

# The label of a run that extends another: that one's id.
EXTENDS = "extends"

MOST_RANKED = 10
MOST_FAILED = 10
LAST_LINES = 10
MOST_ROWS = 1000
MOST_METRICS = 20

_STYLE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")

Row = dict[str, Union[str, int, float, None]]


def build_report(
    run: Run,
    trials: Iterable[Trial],
    estimate: CostEstimate,
    *,
    end: RunEnd,
    reason: str | None = None,
    stderr_tails: Mapping[int, str] | None = None,
    job_ids: Iterable[str] = (),
    accounted: bool = False,
    measured: Measured | None = None,
    ends: Mapping[str, int] | None = None,
    polls: Polling | None = None,
    steward: StewardCost | None = None,
) -> CostReport:
    """Build a run's report from its trials as `price_trials` has filled them in.

    `stderr_tails` holds the last text on standard error of trials that failed, by their index;
    `job_ids` are the run's arrays on its cluster. `accounted` says that its accounting counted them.
    `measured` is what a training has written to metrics.jsonl. `ends` are the bad ends of attempts,
    by their kind; `polls` is what the run's scheduler was asked, `steward` what followed it
    in place of a client.
    """
    trials = tuple(trials)
    asked = run.config.objective
    objective = None if asked is None else Objective(asked.metric, asked.goal)
    # A run that never started needs no list of its trials.
    states: Counter[TrialState] = Counter({"pending": run.trials})
    if trials:
        states = Counter(trial.state for trial in trials)
    ran = [trial for trial in trials if trial.attempts or trial.usd]
    priced = [trial.usd for trial in ran if trial.usd is not None]
    uncounted = sum(
        trial.usd is None and (bool(trial.attempts) or trial.state not in NEVER_STARTED) for trial in trials
    )
    known = priced or not uncounted
    actual = sum(priced, Decimal(0)) if known else None
    wasted = sum((trial.wasted_usd or Decimal(0) for trial in ran), Decimal(0)) if known else None
    failed = [trial for trial in trials if trial.state in ENDED_BADLY]
    resumable = end != "refused" and not UNFINISHED.isdisjoint(states)
    tails = stderr_tails or {}
    snapshot = run.snapshot
    return CostReport(
        run_id=run.id,
        name=run.config.job.name,
        kind=run.kind,
        end=end,
        reason=None if reason is None else _sound(reason),
        created_at=run.created_at,
        commit=snapshot.commit if snapshot else None,
        branch=snapshot.branch if snapshot else None,
        dirty=snapshot.dirty if snapshot and snapshot.commit else None,
        tree=snapshot.hash if snapshot else None,
        patch=snapshot.patch if snapshot else None,
        image=_image(run),
        extends=extended(run),
        cluster=run.cluster.name if run.cluster else None,
        job_ids=tuple(job_ids) if run.cluster else (),
        directory=run.directory,
        flow_run_url=run.labels.get("flow_run_url"),
        trials=len(trials) or run.trials,
        states=dict(states.most_common()),
        attempts=sum(len(trial.attempts) for trial in trials),
        ends=dict(sorted((ends or {}).items(), key=lambda each: (-each[1], each[0]))),
        steward=steward,
        polls=polls,
        projected=estimate,
        prices=(run.price,),
        actual_usd=actual,
        actual_unit_hours=sum((trial.unit_hours or Decimal(0) for trial in ran), Decimal(0)) if known else None,
        accounted=accounted,
        uncounted=uncounted,
        usd_per_trial_mean=sum(priced, Decimal(0)) / len(priced) if priced else None,
        usd_per_trial_median=statistics.median(priced) if priced else None,
        wasted_usd=wasted,
        wasted_share=float(wasted / actual) if wasted is not None and actual else None,
        measured=measured,
        objective=objective,
        unranked=sum(trial.state == "completed" and _metric(trial, objective) is None for trial in trials if objective),
        best=_best(trials, objective),
        dearest=_dearest(ran, objective),
        failed_trials=ranges(sorted(trial.index for trial in failed)),
        failed=tuple(_failed(run, trial, tails.get(trial.index, "")) for trial in failed[:MOST_FAILED]),
        retry_command=f"python -m nexa_infra retry {run.id}" if failed else None,
        resume_command=f"python -m nexa_infra resume {run.id}" if resumable else None,
    )


def _metric(trial: Trial, objective: Objective | None) -> float | None:
    """Return the objective's value in a trial, where it is a finite number."""
    value = trial.metrics.get(objective.metric) if objective else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _best(trials: Iterable[Trial], objective: Objective | None) -> tuple[RankedTrial, ...]:
    if objective is None:
        return ()
    sign = 1 if objective.goal == "min" else -1
    done = ((_metric(trial, objective), trial) for trial in trials if trial.state == "completed")
    measured = ((sign * value, trial.index, trial) for value, trial in done if value is not None)
    chosen = heapq.nsmallest(MOST_RANKED, measured, key=itemgetter(0, 1))
    return tuple(_ranked(trial, objective) for _, _, trial in chosen)


def _dearest(trials: Iterable[Trial], objective: Objective | None) -> tuple[RankedTrial, ...]:
    priced = ((-trial.usd, trial.index, trial) for trial in trials if trial.usd is not None)
    chosen = heapq.nsmallest(MOST_RANKED, priced, key=itemgetter(0, 1))
    return tuple(_ranked(trial, objective) for _, _, trial in chosen)


def _ranked(trial: Trial, objective: Objective | None) -> RankedTrial:
    metric = _metric(trial, objective)
    per_usd = None
    if objective and objective.goal == "max" and metric is not None and metric > 0 and trial.usd:
        per_usd = float(Decimal(str(metric)) / trial.usd)
    return RankedTrial(
        index=trial.index,
        hash=trial.hash,
        parameters=dict(trial.parameters),
        state=trial.state,
        seconds=float(trial.seconds),
        usd=trial.usd,
        metric=metric,
        metric_per_usd=per_usd if per_usd is not None and math.isfinite(per_usd) else None,
    )


def _failed(run: Run, trial: Trial, tail: str) -> FailedTrial:
    log = RunDirectory(Path(run.directory)).stderr(trial.index, trial.attempt) if trial.attempts else None
    return FailedTrial(
        index=trial.index,
        state=trial.state,
        attempt=trial.attempt,
        exit_code=trial.exit_code,
        signal=_signal(trial.exit_code),
        reason=_sound(trial.reason),
        parameters=dict(trial.parameters),
        usd=trial.usd,
        stderr=_last_lines(tail),
        stderr_file=None if log is None else str(log),
    )


def _last_lines(tail: str) -> tuple[str, ...]:
    """Return the last lines of a text as a terminal would leave them: without colours, progress bars at their end."""
    lines = _STYLE.sub("", _sound(tail)).split("\n")
    last = (line.rstrip("\r").rpartition("\r")[2][:500] for line in lines)
    return tuple(line for line in last if line.strip())[-LAST_LINES:]


def _signal(exit_code: int | None) -> str | None:
    """Return the signal that an exit code of 128 + N stands for."""
    try:
        return signal.Signals((exit_code or 0) - 128).name
    except ValueError:
        return None


def _sound(text: str) -> str:
    """Return text that can be written as UTF-8."""
    return text.encode(errors="replace").decode()


def extended(run: Run) -> Extended | None:
    """Say which run a run extends, and how much of its sweep had finished there."""
    config = run.config
    if not (name := run.labels.get(EXTENDS)) or config.kind != "sweep":
        return None
    finished = sum(last + 1 - first for first, last in spans_of(config.sweep.finished))
    return Extended(run_id=name, finished=finished, trials=finished + run.trials)


def _image(run: Run) -> ImageUsed | None:
    found = run.container
    if found is None:
        return None
    return ImageUsed(image=found.image, digest=found.digest, asked=found.asked, runtime=found.runtime)


def to_json(report: CostReport) -> str:
    """Write a report for programs: amounts as text, keys in the order of `CostReport`."""
    return json_text(report, [name for name in LEFT_OUT if getattr(report, name) is None])


def read_report(text: str | bytes) -> CostReport:
    """Read what `to_json` has written, by an earlier version too.

    Raises:
        ValueError: it is no report.
    """
    data = json.loads(text)
    if isinstance(data, dict):
        data = {**dict.fromkeys(LEFT_OUT), "ends": {}, **data}
    return _reader().validate_python(data)


@lru_cache(maxsize=1)
def _reader() -> TypeAdapter[CostReport]:
    from pydantic import TypeAdapter

    return TypeAdapter(CostReport)


def to_table(report: CostReport, trials: Iterable[Trial]) -> list[Row]:
    """Return a row a trial, for Prefect's table artifact: plain JSON values, every row with the same keys.

    Parameters and metrics have columns of their names, or `parameters.NAME` and `metrics.NAME`
    where a name is taken. Of more than 1,000 trials the first are shown, and a last row says so.
    """
    chosen = list(itertools.islice(trials, MOST_ROWS))
    taken = {"trial", "state", "exit_code", "attempt", "seconds", "usd"}
    parameters = _columns((name for trial in chosen for name in trial.parameters), "parameters", taken)
    metrics = _columns((name for trial in chosen for name in trial.metrics), "metrics", taken, most=MOST_METRICS)
    rows: list[Row] = []
    for trial in chosen:
        row: Row = {
            "trial": trial.index,
            "state": trial.state,
            "exit_code": trial.exit_code,
            "attempt": trial.attempt,
            "seconds": round(trial.seconds, 3),
            "usd": money(trial.usd),
        }
        for name, title in metrics.items():
            row[title] = _plain(trial.metrics.get(name))
        for name, title in parameters.items():
            row[title] = shorten(shown(trial.parameters[name]), 200) if name in trial.parameters else None
        rows.append(row)
    if report.trials > len(rows):
        told = f"only the first {len(rows):,} of {report.trials:,} trials are shown; results.csv has them all"
        rows.append({**dict.fromkeys(rows[0] if rows else ("trial", "state")), "state": told})
    return rows


def _columns(names: Iterable[str], prefix: str, taken: set[str], most: int | None = None) -> dict[str, str]:
    """Give each name a column's title that no other has."""
    titles: dict[str, str] = {}
    for name in itertools.islice(dict.fromkeys(names), most):
        title = shorten(name, 64)
        while title in taken:
            title = f"{prefix}.{title}"
        taken.add(title)
        titles[name] = title
    return titles


def _plain(value: object) -> str | int | float | None:
    """Return a metric as a table can hold it."""
    if value is None or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return value
    return shorten(value if isinstance(value, str) else json.dumps(value, default=str), 200)

"""A run's trials in MLflow: parameters, metrics, cost and artifacts, logged from here once the run has ended.

A sweep is a run of MLflow's with one nested run a trial, a training is one run. They are found again by their tags
`nexa.run` and `nexa.trial`, so that a resumed run, or a program that has logged by itself, has each of them once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nexa_infra.operations.tracking_entries import Entry, of_run, of_training, of_trial
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.scheduling.trackers import experiment_name, store_variables

if TYPE_CHECKING:
    from nexa_infra.monitoring.report import CostReport
    from nexa_infra.spec.tracking import MlflowTracking

# What one request may hold, by mlflow.utils.validation.
MOST_METRICS = 1000
MOST_AT_ONCE = 100  # parameters, or tags
# Requests to a server that are under way at once; a store of one's own is written by one.
_REQUESTS = 8
# A server that is away holds up a run's end no longer than some seconds; nothing is printed, and nobody told of calls.
_MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_PAGE = 1000
# Tells the runs that are made here from those that a trial's program has made.
_OURS = "nexa.client"


@dataclass(frozen=True)
class Tracked:
    """What was logged."""

    experiment: str
    uri: str
    trials: int = 0  # that were logged, or are there as they are
    unchanged: int = 0  # of these, those that were there already
    seconds: float = 0.0
    warning: str = ""  # why not all of it was; empty where it was

    def __str__(self) -> str:
        there = f", {self.unchanged:,} of them as they were" if self.unchanged else ""
        return f"{self.trials:,} trials in MLflow's experiment {self.experiment} at {self.uri}{there}"


def log_to_mlflow(
    run: Run, trials: Sequence[Trial], report: CostReport, stop: threading.Event | None = None
) -> Tracked | None:
    """Log a run's trials, where its config asks for it; None where not.

    Whatever ails the tracker is told as a warning: the run's own end stands. `stop` ends it early.
    """
    tracking = run.config.tracking
    if tracking is None or tracking.mlflow is None or not tracking.mlflow.log:
        return None
    mlflow = tracking.mlflow
    logged = _Logged()
    begun = time.monotonic()
    warning = ""
    with _environment(mlflow):
        try:
            from mlflow import MlflowClient

            with _quiet():
                client = MlflowClient(tracking_uri=mlflow.uri)
                _log(client, mlflow, run, trials, report, stop or threading.Event(), logged)
        except Exception as error:  # noqa: BLE001 - whatever ails a tracker, the run has ended as it has
            warning = _warning(run, mlflow, logged, error)
    seconds = time.monotonic() - begun
    return Tracked(experiment_name(run.config, mlflow), mlflow.uri, logged.trials, logged.unchanged, seconds, warning)


def _warning(run: Run, mlflow: MlflowTracking, logged: _Logged, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
        return (
            f"run {run.id} was not logged to MLflow: it is not installed here. Install it by "
            f"`pip install 'nexa-infra[mlflow]'`; `nexa-infra resume {run.id}` then logs the run"
        )
    words = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return (
        f"run {run.id} is not whole in MLflow at {mlflow.uri}, of its trials {logged.trials:,} are: {words[:500]}. "
        f"Its end, and its files, stand; `nexa-infra resume {run.id}` logs what is missing"
    )


@dataclass
class _Logged:
    trials: int = 0
    unchanged: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, unchanged: bool = False) -> None:
        with self.lock:
            self.trials += 1
            self.unchanged += unchanged


@contextmanager
def _environment(mlflow: MlflowTracking) -> Iterator[None]:
    """Have MLflow's library be quiet, and patient for seconds, where the environment does not say otherwise."""
    wanted = {**_MANNERS, **store_variables(mlflow.uri)}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's library from telling of every table that it makes."""
    log = logging.getLogger("mlflow")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _log(
    client: Any,
    mlflow: MlflowTracking,
    run: Run,
    trials: Sequence[Trial],
    report: CostReport,
    stop: threading.Event,
    logged: _Logged,
) -> None:
    experiment = _experiment(client, experiment_name(run.config, mlflow))
    parents, children = _known(client, experiment, run)
    started = [trial for trial in trials if trial.attempts]
    if run.kind == "training":
        for trial in started:
            entry = of_training(run, trial, report, artifacts=mlflow.artifacts)
            _put(client, experiment, entry, children.get(0))
            logged.add()
        return
    parent = _put(client, experiment, of_run(run, report, artifacts=mlflow.artifacts), parents)

    def one(trial: Trial) -> None:
        if stop.is_set():
            return
        entry = of_trial(run, trial, parent, artifacts=mlflow.artifacts)
        known = children.get(trial.index)
        try:
            there = known is not None and known.data.tags.get("nexa.digest") == entry.digest
            if not there:
                _put(client, experiment, entry, known)
            logged.add(unchanged=there)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(_REQUESTS if mlflow.uri.startswith("http") else 1, thread_name_prefix="mlflow") as pool:
        for _ in pool.map(one, started):
            pass


def _experiment(client: Any, name: str) -> str:
    """Return an experiment's id; it is made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except Exception:  # somebody else may just have made it
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return str(found.experiment_id)


def _known(client: Any, experiment: str, run: Run) -> tuple[Any | None, dict[int, Any]]:
    """Return what MLflow has of a run already: the sweep's own, and each trial's newest."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.`nexa.run` = '{run.id}'", max_results=_PAGE, page_token=token)
        found.extend(page)
        if not (token := page.token):
            break
    of = {each.info.run_id: each.data.tags.get("nexa.trial") for each in found}
    parent = None
    children: dict[int, Any] = {}
    for each in sorted(found, key=_age):
        trial = of[each.info.run_id]
        if trial is None:
            parent = each
        # A run that a trial's program has nested in its own has its tags, too.
        elif trial.isdecimal() and of.get(each.data.tags.get("mlflow.parentRunId")) != trial:
            children[int(trial)] = each
    return parent, children


def _age(found: Any) -> tuple[int, int]:
    attempt = found.data.tags.get("nexa.attempt", "")
    return int(attempt) if attempt.isdecimal() else 0, found.info.start_time or 0


def _put(client: Any, experiment: str, entry: Entry, known: Any | None) -> str:
    """Log one run of MLflow's, or what one that is there lacks; the digest of it comes last."""
    from mlflow.entities import Metric, Param, RunTag

    tags = dict(entry.tags)
    if known is None:
        tags = {**tags, _OURS: "true"}
        run_id = client.create_run(experiment, start_time=entry.started, tags=tags, run_name=entry.name).info.run_id
        tags = {}
        parameters, metrics = list(entry.parameters.items()), list(entry.metrics)
    else:
        run_id = known.info.run_id
        # A parameter is never changed, and what a program has measured and logged by itself is its own to tell.
        parameters = [(name, value) for name, value in entry.parameters.items() if name not in known.data.params]
        theirs = known.data.metrics if _OURS not in known.data.tags else {}
        metrics = [each for each in entry.metrics if each.name not in theirs or each.ours]
        there = _points(client, run_id, {each.name for each in metrics} & set(known.data.metrics))
        metrics = [each for each in metrics if (each.name, each.step, repr(each.value)) not in there]
    for path, folder in entry.artifacts:
        client.log_artifact(run_id, str(path), folder)
    now = int(time.time() * 1000)
    rows = [Metric(each.name, each.value, each.moment or now, each.step) for each in metrics]
    while len(rows) > MOST_METRICS // 2:
        client.log_batch(run_id, metrics=rows[:MOST_METRICS])
        del rows[:MOST_METRICS]
    given = [Param(name, value) for name, value in parameters]
    while len(given) > MOST_AT_ONCE:
        client.log_batch(run_id, params=given[:MOST_AT_ONCE])
        del given[:MOST_AT_ONCE]
    labels = [RunTag(name, value) for name, value in tags.items()]
    while len(labels) >= MOST_AT_ONCE:
        client.log_batch(run_id, tags=labels[:MOST_AT_ONCE])
        del labels[:MOST_AT_ONCE]
    if entry.status == "RUNNING":
        client.update_run(run_id, status=entry.status)
    else:
        client.set_terminated(run_id, status=entry.status, end_time=entry.ended)
    client.log_batch(run_id, metrics=rows, params=given, tags=[*labels, RunTag("nexa.digest", entry.digest)])
    return str(run_id)


def _points(client: Any, run_id: str, names: Iterable[str]) -> set[tuple[str, int, str]]:
    """Return the points of some metrics that MLflow has."""
    return {(name, each.step, repr(each.value)) for name in names for each in client.get_metric_history(run_id, name)}

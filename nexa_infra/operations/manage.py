"""What is done with runs that exist: status, report, cancel, resume, retry."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from pydantic import ValidationError

from nexa_infra.errors import HostError, NexaError, UnknownStateError
from nexa_infra.hosts.connections import host_of
from nexa_infra.monitoring.report import CostReport, read_report, to_json
from nexa_infra.monitoring.spending import seconds_of, unit_seconds
from nexa_infra.operations import steps
from nexa_infra.operations.containers import bring_image
from nexa_infra.operations.measured import progress_of
from nexa_infra.runs.attempts import ENDED_BADLY, UNFINISHED, Attempt, TrialState, read_states
from nexa_infra.runs.endings import how_ended
from nexa_infra.runs.index import Entry, find_run, known_runs, run_at
from nexa_infra.runs.record import Run
from nexa_infra.runs.series import Progress
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.arrays import shares
from nexa_infra.scheduling.policies import slots_of
from nexa_infra.scheduling.slurm.seen import charges_of
from nexa_infra.scheduling.submit import submit_trials


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    run: Run
    active: bool
    states: Mapping[TrialState, int]
    end: str  # running, or how it ended
    reason: str | None = None  # why, where somebody said so
    usd: Decimal | None = None  # of all attempts so far; None where no end was seen
    at_least: bool = False  # whether an attempt's end was never seen, so that `usd` lacks it
    failed: tuple[tuple[int, TrialState], ...] = ()  # the trials that ended badly
    attempts: Mapping[int, list[Attempt]] | None = None  # None where they were not looked at
    progress: Progress | None = None  # of a training that has said how far it is


def home() -> Path:
    """Return where the local default keeps its runs."""
    return steps.home()


def find(name: str) -> Run:
    """Find a run by its id, a part of it, `latest`, or its directory's path."""
    return find_run(name, home())


def status(run: Run) -> Status:
    """Say how a run stands, from its directory and its scheduler."""
    scheduler = steps.scheduler_of(run)
    queue = scheduler.poll(run)
    # Between two waves nothing of it may be in the queue but its steward.
    active = queue.active or queue.steward
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    counts = Counter(states)
    end, reason = ("running", None) if active else how_ended(run, counts)
    usd, at_least = _spent(run, attempts, active)
    failed = tuple((trial, state) for trial, state in enumerate(states) if state in ENDED_BADLY)
    return Status(run, active, counts, end, reason, usd, at_least, failed, attempts, progress_of(run))


def recent(most: int = 20) -> Iterator[Status | tuple[Entry, Exception]]:
    """Yield the newest runs and how they stand, or what is wrong with their records."""
    silent: dict[str, HostError] = {}  # a cluster that does not answer is asked once
    for entry in known_runs(home())[:most]:
        try:
            run = run_at(entry.directory)
            if (found := _as_reported(run)) is None and run.cluster and run.cluster.name in silent:
                yield entry, silent[run.cluster.name]
                continue
            yield found or status(run)
        except HostError as error:
            if run.cluster is not None:
                silent[run.cluster.name] = error
            yield entry, error
        except (NexaError, OSError, ValidationError) as error:
            yield entry, error


def count() -> int:
    """Return how many runs there are."""
    return len(known_runs(home()))


def report_of(run: Run, tell: Callable[[str], None] | None = None) -> CostReport:
    """Return a run's report as it stands now; files that say otherwise, as after a kill, are written again.

    Where the run's cluster cannot be reached, it is the last report that was written here; `tell` is told so.
    """
    try:
        trials = steps.look(run)
    except HostError as error:
        if tell is None or not run.files.report_json.exists():
            raise
        tell(f"this is the report as it was last written here: {error}")
        return read_report(run.files.report_json.read_bytes())
    found = steps.build(run, trials)
    if not _says(run, to_json(found)) and not steps.scheduler_of(run).poll(run).active:
        # A run that somebody else owns, or a disk that is full, can be read all the same.
        with suppress(OSError):
            steps.write(run, trials, found)
    return found


def prepare_resume(name: str) -> Run:
    """Make a run ready to go on: a cancelled one may, a refused one may not."""
    run = find(name)
    if run.files.refused.exists():
        raise NexaError(f"run {run.id} was refused, so there is nothing to resume: start it anew under a larger budget")
    scheduler = steps.scheduler_of(run)
    if not read_submissions(run.files) or not scheduler.poll(run).active:
        scheduler.reopen(run)
    return run


def prepare_retry(name: str) -> Run:
    """Submit a run's failed trials again, as one array.

    Raises:
        NexaError: the run is still running, or none of its trials failed.
    """
    run = find(name)
    scheduler = steps.scheduler_of(run)
    if run.files.refused.exists():
        raise NexaError(f"run {run.id} was refused, so nothing of it failed: start it anew under a larger budget")
    if scheduler.poll(run).active:
        raise NexaError(f"run {run.id} is still running: wait for its end, or cancel it first")
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    failed = [trial for trial, state in enumerate(states) if state in ENDED_BADLY]
    if not failed:
        left = sum(state in UNFINISHED for state in states)
        hint = f"; {left} are unfinished, `nexa-infra resume {run.id}` runs those" if left else ""
        raise NexaError(f"no trial of run {run.id} failed, so there is nothing to retry{hint}")
    scheduler.reopen(run)
    # Trials start as soon as they are submitted, and only this process may have the registry's login.
    bring_image(run, host_of(run.cluster))
    submit_trials(run, scheduler, [(t, attempts[t][-1].number + 1 if t in attempts else 1) for t in failed])
    return run


def cancel(name: str, reason: str = "cancelled by hand") -> Run:
    """End a run by a person's word; one that has ended stays as it is.

    Raises:
        NexaError: it has ended already.
    """
    run = find(name)
    try:
        end = status(run).end
    except UnknownStateError:
        end = "running"  # a person's word stands, whether or not the scheduler can say how things are
    if end in {"done", "failed", "refused", "cancelled"}:
        raise NexaError(f"run {run.id} has already ended ({end}): there is nothing to cancel")
    steps.cancel(run, reason)
    return run


def throttle(name: str, most: int | None) -> Run:
    """Let no more than so many trials of a run be at work at once from now on; None is as many as there is room for.

    Raises:
        NexaError: the run has ended, or `most` is below 1.
    """
    if most is not None and most < 1:
        raise NexaError(f"{most} trials at once is none at all: give 1 or more, or `off` for no limit")
    run = find(name)
    scheduler = steps.scheduler_of(run)
    queue = scheduler.poll(run, fresh=True)
    if not queue.active:
        raise NexaError(f"run {run.id} is not running, so there is nothing to throttle")
    scheduler.keep_throttle(run, "off" if most is None else str(most))
    scheduler.throttle(run, shares(queue.arrays, slots_of(run)))
    return run


def find_by_token(token: str) -> Run | None:
    """Find the run whose id ends with a token; None where there is none."""
    found = [entry for entry in known_runs(home()) if entry.id.endswith(f"-{token}")]
    return run_at(found[0].directory) if found else None


def _as_reported(run: Run) -> Status | None:
    """Return what a run's report says, where nothing has happened to the run since: a large run is read in no time."""
    files = run.files
    if run.cluster is None and steps.scheduler_of(run).poll(run).active:
        return None
    try:
        written = files.report_json.stat().st_mtime_ns
        # Every task that starts or ends is in a journal, and every submission and array task makes a file.
        touched = [
            files.submissions,
            files.status,
            files.brought,
            files.path / "cancelled",
            *files.submissions.glob("*.journal"),
        ]
        if any(path.stat().st_mtime_ns >= written for path in touched if path.exists()):
            return None
        found = read_report(files.report_json.read_bytes())
    except (OSError, ValueError):
        return None
    if run.cluster is not None and found.end == "unfinished":
        return None  # its client has left it: it may have gone on since
    return Status(run, False, found.states, found.end, found.reason, found.actual_usd, bool(found.uncounted))


def _says(run: Run, report: str) -> bool:
    try:
        return run.files.report_json.read_text(encoding="utf-8") == report and run.files.results.exists()
    except (OSError, ValueError):
        return False


def _spent(run: Run, attempts: Mapping[int, list[Attempt]], active: bool) -> tuple[Decimal | None, bool]:
    """Return what all attempts have cost so far, and whether some are left out because no end was seen."""
    now = time.time()
    charges = charges_of(run)
    known = [
        unit_seconds(
            run,
            max(0.0, now - attempt.started) if active and attempt.ended is None else seconds_of(attempt),
            charges.get((attempt.trial, attempt.number)),
        )
        for tried in attempts.values()
        for attempt in tried
    ]
    held = [span for span in known if span is not None]
    if known and not held:
        return None, True
    return sum(held, Decimal(0)) * run.price.usd_per_hour / 3600, len(held) < len(known)

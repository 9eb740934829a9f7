"""What is done with runs that exist: status, cancel, resume, retry, compare, clean."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nexa_infra.errors import NexaError
from nexa_infra.operations import steps
from nexa_infra.runs.directory import read_cancelled
from nexa_infra.runs.index import find_run, known_runs
from nexa_infra.runs.record import Run, read_run, read_submissions
from nexa_infra.runs.results import ENDED_BADLY, UNFINISHED, Trial, read_states
from nexa_infra.scheduling.submit import submit_trials
from nexa_infra.settings import settings
from nexa_infra.spec.fields import Value


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    run: Run
    active: bool
    states: Mapping[str, int]
    end: str  # running, or how it ended


def home() -> Path:
    """Return where the local default keeps its runs."""
    return settings().home.expanduser().resolve()


def find(name: str) -> Run:
    """Find a run by its id, a part of it, `latest`, or its directory's path."""
    return find_run(name, home())


def status(run: Run) -> Status:
    """Say how a run stands, from its directory and its scheduler."""
    scheduler = steps.scheduler_of(run)
    active = scheduler.poll(run).active
    states, _ = read_states(run.files, run.trials, scheduler.tasks(run))
    counts: Counter[str] = Counter(states)
    stopped = read_cancelled(run.files)
    if run.files.refused.exists():
        end = "refused"
    elif active:
        end = "running"
    elif stopped:
        end = "cancelled" if stopped[0] == "person" else "failed"
    elif any(counts[state] for state in UNFINISHED):
        end = "unfinished"
    else:
        end = "failed" if any(counts[state] for state in ENDED_BADLY) else "done"
    return Status(run, active, counts, end)


def recent(most: int = 20) -> Iterator[Status]:
    """Yield the newest runs, and how they stand."""
    for entry in known_runs(home())[:most]:
        yield status(read_run(entry.directory))


def prepare_resume(name: str) -> Run:
    """Make a run ready to go on: a cancelled one may, a refused one may not."""
    run = find(name)
    if run.files.refused.exists():
        raise NexaError(f"run {run.id} was refused, so there is nothing to resume: start it anew under a larger budget")
    if not steps.scheduler_of(run).poll(run).active:
        run.files.cancelled.unlink(missing_ok=True)
    return run


def prepare_retry(name: str) -> Run:
    """Submit a run's failed trials again, as one array.

    Raises:
        NexaError: the run is still running, or none of its trials failed.
    """
    run = find(name)
    scheduler = steps.scheduler_of(run)
    if scheduler.poll(run).active:
        raise NexaError(f"run {run.id} is still running: wait for its end, or cancel it first")
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    failed = [trial for trial, state in enumerate(states) if state in ENDED_BADLY]
    if not failed:
        left = sum(state in UNFINISHED for state in states)
        hint = f"; {left} are unfinished, `nexa-infra resume {run.id}` runs those" if left else ""
        raise NexaError(f"no trial of run {run.id} failed, so there is nothing to retry{hint}")
    run.files.cancelled.unlink(missing_ok=True)
    submit_trials(run, scheduler, [(t, attempts[t][-1].number + 1 if t in attempts else 1) for t in failed])
    return run


def cancel(name: str, reason: str = "cancelled by hand") -> Run:
    """End a run by a person's word; one that has ended stays as it is.

    Raises:
        NexaError: it has ended already.
    """
    run = find(name)
    now = status(run)
    if now.end in {"done", "failed", "refused", "cancelled"}:
        raise NexaError(f"run {run.id} has already ended ({now.end}): there is nothing to cancel")
    steps.cancel(run, reason)
    return run


@dataclass(frozen=True)
class Compared:
    """One point of the parameter space in two runs; None where a run does not have it."""

    hash: str
    parameters: Mapping[str, Value]
    left: Trial | None
    right: Trial | None


def compare(left: Run, right: Run) -> list[Compared]:
    """Set two runs side by side, trial by trial, matched by the hash of their parameters."""
    mine = {trial.hash: trial for trial in steps.collect(left)}
    other = {trial.hash: trial for trial in steps.collect(right)}
    found = []
    for key in dict.fromkeys([*mine, *other]):
        a, b = mine.get(key), other.get(key)
        known = a or b
        if known is not None:
            found.append(Compared(key, known.parameters, a, b))
    return found


@dataclass(frozen=True)
class Leftover:
    """Something that `clean` may remove: a run directory, or a snapshot that no run uses."""

    path: Path
    size: int  # bytes
    files: int


def leftovers(older: float) -> list[Leftover]:
    """Return the run directories that ended more than `older` seconds ago, and the snapshots only they use."""
    base = home()
    limit = time.time() - older
    gone: list[Path] = []
    used: set[Path] = set()
    for entry in known_runs(base):
        run = read_run(entry.directory)
        if newest(run) < limit and not steps.scheduler_of(run).poll(run).active:
            gone.append(entry.directory)
        elif run.snapshot is not None:
            used.add(Path(run.snapshot.path))
    snapshots = base / "snapshots"
    if snapshots.is_dir():
        gone.extend(path for path in snapshots.iterdir() if path not in used and path.stat().st_mtime < limit)
    return [_measured(path) for path in gone]


def remove(leftover: Leftover) -> None:
    """Delete a run directory or a snapshot, and nothing else.

    Raises:
        NexaError: the path is neither.
    """
    path = leftover.path
    is_run = (path / "run.json").is_file() and (path / "submissions").is_dir()
    is_snapshot = path.parent == home() / "snapshots"
    if path.is_symlink() or not (is_run or is_snapshot):
        raise NexaError(f"{path} is neither a run directory nor a snapshot: it stays")
    # First out of sight, so that half a run is never taken for a whole one.
    doomed = path.with_name(f".deleting-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def newest(run: Run) -> float:
    """Return when a run was last submitted or reported, seconds since the epoch."""
    moments = [run.created_at, *(submission.created_at for submission in read_submissions(run.files))]
    last: datetime = max(moments)
    report = run.files.report_json
    return max(last.timestamp(), report.stat().st_mtime if report.exists() else 0.0)


def _measured(path: Path) -> Leftover:
    sizes = [found.lstat().st_size for found in path.rglob("*")]
    return Leftover(path, sum(sizes), len(sizes) + 1)


def find_by_token(token: str) -> Run | None:
    """Find the run whose id ends with a token; None where there is none."""
    found = [entry for entry in known_runs(home()) if entry.id.endswith(f"-{token}")]
    return read_run(found[0].directory) if found else None

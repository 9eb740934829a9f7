"""What trials print, while they run and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nexa_infra.errors import RunNotFoundError
from nexa_infra.hosts.connections import host_of
from nexa_infra.operations import steps
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run, read_submissions
from nexa_infra.runs.results import read_states

_PIECE = 1 << 16
_LOOK_SECONDS = 0.2
# How long a run may take from its record to its array, before it counts as one that does not run.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Log:
    """Which output is meant: a trial's, of one attempt or the last, or, without a trial, the array script's."""

    trial: int | None = None
    attempt: int | None = None
    stderr: bool = False


def tail(run: Run, log: Log, *, follow: bool) -> Iterator[bytes]:
    """Yield a log's bytes; with `follow`, until the trial, or the run, has ended.

    A trial that has not started yet is waited for. Without an attempt, a new one is gone on with.

    Raises:
        RunNotFoundError: the run has no such trial, or the trial no such attempt.
    """
    if run.mirror is not None:
        yield from _tail_there(run, log, follow=follow)
        return
    path, going = _look(run, log)
    looked = time.monotonic()
    offset, cost = 0, 0.0
    patience = _look_seconds(run)
    while True:
        for piece in _pieces(path, offset):
            offset += len(piece)
            yield piece
        if not (follow and going):
            return
        time.sleep(_LOOK_SECONDS)
        # A large run takes longer to look at: looking never takes more than a tenth of the time.
        if time.monotonic() - looked >= max(patience, 9 * cost):
            started = time.monotonic()
            newest, going = _look(run, log)
            looked = time.monotonic()
            cost = looked - started
            if newest != path:
                yield from _pieces(path, offset)
                path, offset = newest, 0


def _tail_there(run: Run, log: Log, *, follow: bool) -> Iterator[bytes]:
    """Yield the bytes of a log on another host, by `cat` or by one `tail -F` that goes on as long as more may come."""
    host = host_of(run.cluster)
    path, going = _look(run, log)
    if not (follow and going):
        done = host.run(["cat", "--", str(path)])
        if done.returncode == 0:
            yield done.stdout.encode("utf-8", "surrogateescape")
        return
    looked = time.monotonic()
    with closing(host.stream(["tail", "-c", "+1", "-F", "--", str(path)])) as pieces:
        for piece in pieces:
            yield piece
            if piece:
                continue
            if not going:
                return  # nothing came since it was seen to have ended
            if time.monotonic() - looked >= _look_seconds(run):
                newest, going = _look(run, log)
                looked = time.monotonic()
                if newest != path:
                    break
    yield from _tail_there(run, log, follow=follow)


def _look_seconds(run: Run) -> float:
    """Return how often it is asked whether more may come: a cluster no oftener than by its polls."""
    return run.cluster.poll_floor if run.cluster else _LOOK_SECONDS


def silence(run: Run, log: Log) -> str:
    """Say why a log is empty."""
    if log.trial is None:
        return (
            f"the array script of run {run.id} has printed nothing, which is as it should be: "
            f"`nexa-infra logs {run.id} TRIAL` shows what a trial printed"
        )
    path, going = _look(run, log)
    started = host_of(run.cluster).run(["test", "-e", str(path)]).returncode == 0
    stream = "standard error" if log.stderr else "standard output"
    if started:
        return f"trial {log.trial} of run {run.id} has written nothing to its {stream}{' yet' if going else ''}"
    return f"trial {log.trial} of run {run.id} has not started{' yet: -f waits for it' if going else ''}"


def _look(run: Run, log: Log) -> tuple[Path, bool]:
    """Return the file that holds a log now, and whether more of it may come."""
    scheduler = steps.scheduler_of(run)
    active = scheduler.poll(run).active or _starting(run)
    files = RunDirectory(Path(run.directory))
    if log.trial is None:
        return files.log, active
    if not 0 <= log.trial < run.trials:
        raise RunNotFoundError(f"run {run.id} has trials 0 to {run.trials - 1}: there is no trial {log.trial}")
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    tried = {each.number: each for each in attempts.get(log.trial, [])}
    if log.attempt is not None:
        if log.attempt not in tried:
            told = ", ".join(map(str, tried)) or "none yet"
            raise RunNotFoundError(f"trial {log.trial} of run {run.id} has no attempt {log.attempt}: it has {told}")
        going = active and tried[log.attempt].ended is None
    else:
        going = active and states[log.trial] in {"pending", "running"}
    number = log.attempt or max(tried, default=1)
    file = files.stderr if log.stderr else files.stdout
    return file(log.trial, number), going


def _starting(run: Run) -> bool:
    """Say whether a run is about to be submitted."""
    if run.files.refused.exists() or run.files.cancelled.exists() or read_submissions(run.files)[:1]:
        return False
    return (datetime.now(UTC) - run.created_at).total_seconds() < _START_SECONDS


def _pieces(path: Path, offset: int) -> Iterator[bytes]:
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(offset)
        while piece := stream.read(_PIECE):
            yield piece

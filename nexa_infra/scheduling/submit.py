"""Submitted once: an intent under a lock, then the scheduler's answer beside it."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from nexa_infra.errors import HostError, SubmitError, UnknownStateError
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run, Submission, read_submissions, write_submission
from nexa_infra.runs.results import UNFINISHED, read_attempts, read_states
from nexa_infra.scheduling.base import Scheduler
from nexa_infra.scheduling.script import array_spec
from nexa_infra.settings import settings

# Intents that come to nothing, one after the other, before somebody should be told.
MOST_VOID = 5
# How long after a scheduler could not say how a run stands it is asked again, seconds.
_ASK_AGAIN = 2.0


def submit_run(run: Run, scheduler: Scheduler) -> Submission:
    """Submit what is unfinished of a run: every trial at first, and nothing twice.

    Where the scheduler has something of the run, or the run was cancelled, or nothing is left to
    do, nothing is submitted: the newest submission is returned, to be followed.

    Raises:
        SubmitError: the scheduler refused; or whether it took it is not known.
        RunCancelledError: a person has ended the run meanwhile.
    """
    with _locked(run):
        if not read_submissions(run.files):
            return _submit(run, scheduler, 1, run.trials, None)
        active = _is_active(run, scheduler)
        earlier = read_submissions(run.files)
        last = earlier[-1]
        if run.files.cancelled.exists():
            return last
        if last.job_id is None and (settled := scheduler.settle(run, last)) is not None:
            write_submission(run.files, settled)
            return settled
        if active:
            return last
        states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
        unfinished = [
            (trial, attempts[trial][-1].number + 1 if trial in attempts else 1)
            for trial, state in enumerate(states)
            if state in UNFINISHED
        ]
        return _submit_listed(run, scheduler, last.number + 1, unfinished) if unfinished else last


def submit_trials(run: Run, scheduler: Scheduler, trials: Sequence[tuple[int, int]]) -> Submission:
    """Submit some trials of a run again, each `(trial, attempt)`, as one array.

    Where the scheduler has something of the run, nothing is submitted: the newest submission is
    returned, to be followed. Attempts that another client has submitted meanwhile are left out.
    """
    if not trials:
        raise ValueError("there is no trial to submit")
    with _locked(run):
        active = bool(read_submissions(run.files)) and _is_active(run, scheduler)
        earlier = read_submissions(run.files)
        if active:
            return earlier[-1]
        used = {trial: tried[-1].number for trial, tried in read_attempts(run.files).items()}
        left = [(trial, attempt) for trial, attempt in trials if attempt > used.get(trial, 0)]
        if not left:
            return earlier[-1]
        return _submit_listed(run, scheduler, earlier[-1].number + 1 if earlier else 1, left)


def _is_active(run: Run, scheduler: Scheduler) -> bool:
    """Ask whether the scheduler has something of the run; what it cannot say is waited for.

    Raises:
        UnknownStateError: it could not say until patience has ended.
    """
    limit = time.monotonic() + settings().patience
    while True:
        try:
            return scheduler.poll(run).active
        except (HostError, UnknownStateError) as error:
            if time.monotonic() > limit:
                raise UnknownStateError(
                    f"run {run.id}: {error}. Nothing was submitted; `nexa-infra resume {run.id}` goes on"
                ) from error
            time.sleep(_ASK_AGAIN)


def _submit_listed(run: Run, scheduler: Scheduler, number: int, trials: Sequence[tuple[int, int]]) -> Submission:
    lines = "".join(f"{trial} {attempt}\n" for trial, attempt in trials)
    return _submit(run, scheduler, number, len(trials), lines)


def _submit(run: Run, scheduler: Scheduler, number: int, count: int, lines: str | None) -> Submission:
    listed = None
    if lines is not None:
        # A name of its own: the list of another client, who has this number first, is not touched.
        listed = f"submissions/{number}-{secrets.token_hex(4)}.trials"
        write_atomically(run.files.path / listed, lines)
    for attempt in range(number, number + MOST_VOID):
        intent = Submission(
            number=attempt,
            token=f"nexa-{run.id}-{attempt}",
            trials=count,
            array=array_spec(count, run.config.job.array_parallelism),
            listed=listed,
            created_at=datetime.now(UTC),
        )
        if not _is_first(run, intent):
            _is_active(run, scheduler)  # brings the other's record
            return read_submissions(run.files)[-1]
        if (answered := scheduler.submit(run, intent)) is not None:
            write_submission(run.files, answered)
            return answered
    raise SubmitError(
        f"run {run.id} could not be submitted: {MOST_VOID} times it was not known whether the array was taken, and it "
        f"was nowhere to be found; `nexa-infra resume {run.id}` tries again"
    )


def _is_first(run: Run, intent: Submission) -> bool:
    """Record an intent, unless another client has recorded one under its number: whole, and never over the other's."""
    record = run.files.submission(intent.number)
    draft = record.with_name(f".{record.name}.{secrets.token_hex(4)}")
    write_atomically(draft, intent.model_dump_json(indent=2) + "\n")
    try:
        os.link(draft, record)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the lock must do
        if record.exists():
            return False
        draft.replace(record)
    finally:
        draft.unlink(missing_ok=True)
    return True


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Hold the run's submission lock, so that two clients never submit at once."""
    with (run.files.submissions / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

"""Submitted once: an intent under a lock, then the scheduler's answer beside it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run, Submission, read_submissions, write_submission
from nexa_infra.runs.results import UNFINISHED, read_states
from nexa_infra.scheduling.base import Scheduler
from nexa_infra.scheduling.script import array_spec


def submit_run(run: Run, scheduler: Scheduler) -> Submission:
    """Submit what is unfinished of a run: every trial at first, and nothing twice.

    Where the scheduler has something of the run, or the run was cancelled, or nothing is left to
    do, nothing is submitted: the newest submission is returned, to be followed.
    """
    with _locked(run):
        earlier = read_submissions(run.files)
        if not earlier:
            return _submit(run, scheduler, 1, run.trials, None)
        if run.files.cancelled.exists() or scheduler.poll(run).active:
            return earlier[-1]
        states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
        unfinished = [
            (trial, attempts[trial][-1].number + 1 if trial in attempts else 1)
            for trial, state in enumerate(states)
            if state in UNFINISHED
        ]
        return _submit_listed(run, scheduler, earlier[-1].number + 1, unfinished) if unfinished else earlier[-1]


def submit_trials(run: Run, scheduler: Scheduler, trials: Sequence[tuple[int, int]]) -> Submission:
    """Submit some trials of a run again, each `(trial, attempt)`, as one array.

    Where the scheduler has something of the run, nothing is submitted: the newest submission is
    returned, to be followed.
    """
    if not trials:
        raise ValueError("there is no trial to submit")
    with _locked(run):
        earlier = read_submissions(run.files)
        if earlier and scheduler.poll(run).active:
            return earlier[-1]
        return _submit_listed(run, scheduler, earlier[-1].number + 1 if earlier else 1, trials)


def _submit_listed(run: Run, scheduler: Scheduler, number: int, trials: Sequence[tuple[int, int]]) -> Submission:
    listed = f"submissions/{number}.trials"
    write_atomically(run.files.path / listed, "".join(f"{trial} {attempt}\n" for trial, attempt in trials))
    return _submit(run, scheduler, number, len(trials), listed)


def _submit(run: Run, scheduler: Scheduler, number: int, count: int, listed: str | None) -> Submission:
    intent = Submission(
        number=number,
        token=f"nexa-{run.id}-{number}",
        trials=count,
        array=array_spec(count, run.config.job.array_parallelism),
        listed=listed,
        created_at=datetime.now(UTC),
    )
    write_submission(run.files, intent)
    answered = intent.model_copy(update={"job_id": scheduler.submit(run, intent)})
    write_submission(run.files, answered)
    return answered


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Hold the run's submission lock, so that two clients never submit at once."""
    with (run.files.submissions / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

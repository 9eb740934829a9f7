"""A person's word to submit: a run as a whole, what is unfinished of it, or some of its trials again."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nexa_infra.errors import RunCancelledError
from nexa_infra.runs.attempts import UNFINISHED, read_states
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, read_submissions, write_submission
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.decide import Submit, arrange, decide
from nexa_infra.scheduling.intents import closed, locked, look, submit_all
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.recorded import read_state, state_of


def submit_run(run: Run, scheduler: Scheduler) -> Submission:
    """Submit what is unfinished of a run: every trial at first, and nothing twice.

    Where the scheduler has something of the run, or the run was cancelled, or nothing is left to
    do, nothing is submitted: the newest submission is returned, to be followed.

    Raises:
        SubmitError: the scheduler refused; or whether it took it is not known.
        RunCancelledError: a person has ended the run meanwhile.
    """
    with locked(run):
        if not read_submissions(run.files):
            if run.files.cancelled.exists():
                raise RunCancelledError(f"run {run.id} was cancelled, so nothing more of it is submitted")
            _keep_steward(run, scheduler)
            actions = decide(state_of(run, policy_of(run), Queue(False), {}), time.time())
            return submit_all(run, scheduler, [each for each in actions if isinstance(each, Submit)])
        queue = look(run, scheduler)
        earlier = read_submissions(run.files)
        last = earlier[-1]
        if run.files.cancelled.exists():
            return last
        if last.job_id is None and last.void is None:
            if (settled := scheduler.settle(run, last)) is not None:
                write_submission(run.files, settled)
                return settled
            queue = look(run, scheduler)
        if queue.active:
            _keep_steward(run, scheduler)
            return last
        if not closed(run, scheduler):
            return read_submissions(run.files)[-1]
        tasks = scheduler.tasks(run)
        states, attempts = read_states(run.files, run.trials, tasks)
        unfinished = [
            (trial, attempts[trial][-1].number + 1 if trial in attempts else 1)
            for trial, state in enumerate(states)
            if state in UNFINISHED
        ]
        if not unfinished:
            return last
        _keep_steward(run, scheduler)
        state = read_state(run, policy_of(run), scheduler, queue)
        return submit_all(run, scheduler, arrange(state, unfinished[: state.affordable], time.time()))


def submit_trials(run: Run, scheduler: Scheduler, trials: Sequence[tuple[int, int]]) -> Submission:
    """Submit some trials of a run again, each `(trial, attempt)`, by a person's word.

    Where the scheduler has something of the run, nothing is submitted: the newest submission is
    returned, to be followed. Attempts that another client has submitted meanwhile are left out.
    """
    if not trials:
        raise ValueError("there is no trial to submit")
    with locked(run):
        queue = look(run, scheduler) if read_submissions(run.files) else Queue(False)
        if queue.active or not closed(run, scheduler):
            return read_submissions(run.files)[-1]
        _keep_steward(run, scheduler)
        state = read_state(run, policy_of(run), scheduler, queue)
        return submit_all(run, scheduler, arrange(state, list(trials)[: state.affordable], time.time()))


def _keep_steward(run: Run, scheduler: Scheduler) -> None:
    """See to it that an unattended run has its steward, before anything is submitted: whenever this client ends."""
    if run.config.unattended:
        scheduler.keep_steward(run)

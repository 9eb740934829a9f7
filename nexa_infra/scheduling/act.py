"""What was decided, done: the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.scheduling.arrays import Throttle
from nexa_infra.scheduling.base import Scheduler
from nexa_infra.scheduling.decide import Action, Finish, Stop, Submit
from nexa_infra.scheduling.intents import closed, locked, submit_arrays

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run


def stop(run: Run, scheduler: Scheduler, reason: str, *, by: Literal["person", "policy"]) -> None:
    """End a run by a person's word, or its policy's: the reason is recorded before anything ends."""
    mark_cancelled(run.files, reason, by=by)
    scheduler.cancel(run)


def carry_out(run: Run, scheduler: Scheduler, actions: Sequence[Action]) -> bool:
    """Do what was decided; say whether the run is over."""
    arrays = [each for each in actions if isinstance(each, Submit)]
    changes = [each for each in actions if isinstance(each, Throttle)]
    if arrays:
        submit_arrays(run, scheduler, arrays)
    if changes:
        scheduler.throttle(run, changes)
    for each in actions:
        if isinstance(each, Stop):
            stop(run, scheduler, each.reason, by="policy")
    if not any(isinstance(each, Finish) for each in actions):
        return False
    # A controller may yet remember an array that it had forgotten: from here on it starts nothing.
    with locked(run):
        return closed(run, scheduler)

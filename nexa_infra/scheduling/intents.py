"""Submitted once: each array an intent under a lock, then the scheduler's answer beside it. Standard library alone."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError, QueueFullError, SubmitError, UnknownStateError
from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.submissions import Submission, read_submissions, to_json, trials_of, write_submission
from nexa_infra.scheduling.arguments import array_spec, pack_minutes
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.budget import read_limit
from nexa_infra.scheduling.decide import Submit
from nexa_infra.scheduling.history import asked_for

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

# Intents that come to nothing, one after the other, before somebody should be told.
MOST_VOID = 5
# How long after a scheduler could not say how a run stands it is asked again, seconds.
_ASK_AGAIN = 2.0


def submit_arrays(run: Run, scheduler: Scheduler, arrays: Sequence[Submit]) -> None:
    """Submit what was decided on, as far as it still stands once nobody else can submit.

    Where nothing of the run was left, all that was submitted is closed first: a controller may remember an array that
    it had forgotten, and what that starts meanwhile is for the next decision.
    """
    with locked(run):
        active = look(run, scheduler).active
        if not run.files.cancelled.exists() and (active or closed(run, scheduler)):
            submit_all(run, scheduler, arrays, active=active)


def closed(run: Run, scheduler: Scheduler) -> bool:
    """See to it that nothing of what was submitted starts any more, and bring what has started.

    It is False where something waits or runs after all, or another client has submitted since.
    """
    before = read_submissions(run.files)
    if not before:
        return True
    if not scheduler.close(run) or look(run, scheduler).active:
        return False
    return len(read_submissions(run.files)) == len(before)


def look(run: Run, scheduler: Scheduler) -> Queue:
    """Ask how the run stands, which brings what others have submitted; what cannot be said is waited for.

    Raises:
        UnknownStateError: it could not be said until patience has ended.
    """
    limit = time.monotonic() + scheduler.patience
    while True:
        try:
            return scheduler.poll(run, fresh=True)
        except (HostError, UnknownStateError) as error:
            if time.monotonic() > limit:
                raise UnknownStateError(
                    f"run {run.id}: {error}. Nothing was submitted; `nexa-infra resume {run.id}` goes on"
                ) from error
            time.sleep(_ASK_AGAIN)


def submit_all(run: Run, scheduler: Scheduler, arrays: Sequence[Submit], *, active: bool = False) -> Submission:
    """Submit arrays one after the other, and return the last; a full queue, or another client, ends it.

    `active` says that the run has arrays already: then only what nobody has asked for may be submitted.
    """
    earlier = [each for each in read_submissions(run.files) if each.void is None]
    attempts = read_attempts(run.files)
    asked, _ = asked_for((trials_of(run, each) for each in earlier), attempts)
    made: list[Submission] = []
    if len(arrays) > 1 and not earlier and all(each.trials is None and each.after is None for each in arrays):
        made, going = _submit_together(run, scheduler, arrays)
        arrays = arrays[len(made) :] if going else ()
    for array in arrays:
        if array.trials is None:
            done = [(each.chunk, each.chunks) for each in earlier + made if each.listed is None]
            if len(done) < len(earlier + made) or done != [(chunk, array.chunks) for chunk in range(array.chunk)]:
                break  # another client has begun with the run
            wanted = array
        else:
            # Another client may have submitted some of it since it was decided on.
            left = tuple(
                (trial, attempt)
                for trial, attempt in array.trials
                if attempt > max((each.number for each in attempts.get(trial, ())), default=0)
                and not (active and trial in asked)
            )
            wanted = replace(array, trials=left)
        if wanted.trials == ():
            continue
        try:
            answered = _submit(run, scheduler, wanted, made, active=active)
        except QueueFullError:
            break
        if answered is None:
            break
        made.append(answered)
    return made[-1] if made else read_submissions(run.files)[-1]


def _submit_together(run: Run, scheduler: Scheduler, arrays: Sequence[Submit]) -> tuple[list[Submission], bool]:
    """Submit the chunks of a run in one question; return those that were taken, and whether to go on with the rest.

    The first that was not taken at once is asked about as any other: the ones behind it were not asked for.
    """
    first = max((each.number for each in read_submissions(run.files)), default=0) + 1
    intents = [_intent(run, array, first + place, [], alone=False) for place, array in enumerate(arrays)]
    made = scheduler.submit_together(run, intents)
    for each in made:
        write_submission(run.files, each)
    if len(made) == len(intents):
        return made, False
    intent = intents[len(made)]
    if not _is_first(run, intent) and not _is_recorded(run, intent):
        look(run, scheduler)
        return made, False
    try:
        answered = _ask(run, scheduler, intent)
    except QueueFullError:
        return made, False
    return ([*made, answered], True) if answered is not None else (made, False)


def _submit(
    run: Run, scheduler: Scheduler, array: Submit, made: Sequence[Submission], *, active: bool
) -> Submission | None:
    """Submit one array; None where another client was first.

    Raises:
        QueueFullError: the queue takes no more of this size; that is recorded.
    """
    number = read_submissions(run.files)[-1].number + 1 if read_submissions(run.files) else 1
    # What came before has no array any more, and may have none again; not so what goes beside this one.
    draft = _intent(run, array, number, made, alone=not active and not made)
    for attempt in range(number, number + MOST_VOID):
        intent = replace(draft, number=attempt, token=f"nexa-{run.id}-{attempt}", created_at=_now())
        if not _is_first(run, intent):
            look(run, scheduler)  # brings the other's record
            return None
        if (answered := _ask(run, scheduler, intent)) is not None:
            return answered if answered.token == intent.token and answered.created_at == intent.created_at else None
    raise SubmitError(
        f"run {run.id} could not be submitted: {MOST_VOID} times it was not known whether the array was taken, and it "
        f"was nowhere to be found; `nexa-infra resume {run.id}` tries again"
    )


def _ask(run: Run, scheduler: Scheduler, intent: Submission) -> Submission | None:
    """Ask for an array whose intent is recorded, and record the answer; None where nothing of it will ever run.

    Raises:
        QueueFullError: the queue takes no more of this size; that is recorded.
    """
    try:
        answered = scheduler.submit(run, intent)
    except QueueFullError:
        write_submission(run.files, replace(intent, void="full"))
        raise
    write_submission(run.files, answered or replace(intent, void="lost"))
    return answered


def _intent(run: Run, array: Submit, number: int, made: Sequence[Submission], *, alone: bool) -> Submission:
    """Return what is to be recorded of an array before it is asked for; its list of trials is written."""
    listed = None
    if array.trials is not None:
        # A name of its own: the list of another client, who has this number first, is not touched.
        listed = f"submissions/{number}-{secrets.token_hex(4)}.trials"
        write_atomically(run.files.path / listed, "".join(f"{trial} {attempt}\n" for trial, attempt in array.trials))
        count, tasks = len(array.trials), -(-len(array.trials) // array.pack)
    else:
        every = run.trials
        groups = -(-every // array.pack)
        tasks = len(range(array.chunk, groups, array.chunks))
        count = sum(len(range(group, every, groups)) for group in range(array.chunk, groups, array.chunks))
    after = made[array.after].job_id if isinstance(array.after, int) else array.after
    return Submission(
        number=number,
        token=f"nexa-{run.id}-{number}",
        trials=count,
        array=array_spec(tasks, array.limit),
        chunk=array.chunk,
        chunks=array.chunks,
        listed=listed,
        pack=array.pack,
        options=tuple(_options(run, array, after)),
        after=after,
        alone=alone,
        created_at=_now(),
    )


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _options(run: Run, array: Submit, after: str | None) -> Iterator[str]:
    """Yield sbatch's options of one array, which stand over the script's."""
    job = run.config.job
    if array.memory is not None:
        yield f"--mem={array.memory}M"
    if array.exclude and not (job.exclude and "/" in job.exclude):  # which is a file's name
        yield f"--exclude={','.join([*([job.exclude] if job.exclude else []), *array.exclude])}"
    again = run.config.checkpoint
    if read_limit(run.files.path / "steward") is not None and not (again.requeue or again.chain_until_done):
        yield "--no-requeue"  # by Slurm, after a node's failure: its cost was not reckoned with
    if (minutes := pack_minutes(job, array.pack)) is not None:
        yield f"--time={minutes}"
    if after is not None:
        yield f"--dependency={','.join([*([job.dependency] if job.dependency else []), f'afterany:{after}'])}"


def _is_recorded(run: Run, intent: Submission) -> bool:
    """Say whether an intent's record is this client's own."""
    return any(
        each.number == intent.number and each.created_at == intent.created_at for each in read_submissions(run.files)
    )


def _is_first(run: Run, intent: Submission) -> bool:
    """Record an intent, unless another client has recorded one under its number: whole, and never over the other's."""
    record = run.files.submission(intent.number)
    draft = record.with_name(f".{record.name}.{secrets.token_hex(4)}")
    write_atomically(draft, to_json(intent))
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
def locked(run: Run) -> Iterator[None]:
    """Hold the run's submission lock, so that two clients never submit at once."""
    with (run.files.submissions / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

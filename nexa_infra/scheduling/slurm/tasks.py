"""What Slurm says of array tasks, told of trials: pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from nexa_infra.monitoring.charges import Charge
from nexa_infra.runs.attempts import Attempt, TaskState
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.arrays import Array
from nexa_infra.scheduling.base import Queue
from nexa_infra.scheduling.slurm.text import AccountingRow, QueueRow, gpus_of, moment, task_indices
from nexa_infra.scheduling.slurm.words import ended, waiting

# Slurm's states of what has not ended; every other state is an end.
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)

# sacct's states of an attempt that has not ended; one that was put back into the queue has.
_OPEN = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING"})

# sacct's row of what an attempt held until it went on with fewer nodes.
RESIZED = "RESIZING"

# The last signal that there is, and the numbers by which sacct says that a script could not be set up, or that it was
# ended for its memory.
_LAST_SIGNAL, _SET_UP, _MEMORY = 64, 53, 125

# The trials of each array task of a submission, in order: each is the trial and its attempt.
Trials = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Left:
    """Array tasks that were seen to end, and how."""

    array_id: str
    tasks: str
    state: str
    name: str


def queue_of(rows: Iterable[QueueRow]) -> Queue:
    """Say how a run's arrays stand, from squeue's rows."""
    pending = running = 0
    over: Counter[str] = Counter()
    notes: dict[str, int] = {}
    stuck: list[str | None] = []
    for row in rows:
        if row.state in _WAITING:
            pending += row.count
            said = waiting(row.reason, row.array_id)
            stuck.append(said[0] if said and said[1] else None)
            if said:
                notes[said[0]] = notes.get(said[0], 0) + row.count
        elif row.state in _RUNNING:
            running += row.count
        else:
            over[row.state] += row.count
    hopeless = stuck[0] if stuck and not running and all(stuck) else None
    told = tuple(f"{count:,} {'trial' if count == 1 else 'trials'} {words}" for words, count in notes.items())
    return Queue(bool(pending or running), pending, running, dict(over), told, hopeless)


def arrays_of(rows: Iterable[QueueRow], submissions: Sequence[Submission]) -> tuple[Array, ...]:
    """Return the arrays that wait or run, in the order of their submission."""
    behind = {each.token for each in submissions if each.after is not None}
    order = {each.token: each.number for each in submissions}
    found: dict[str, Array] = {}
    names: dict[str, str] = {}
    for row in rows:
        if row.state not in _WAITING | _RUNNING:
            continue
        names[row.array_id] = row.name
        array = found.get(row.array_id, Array(row.array_id, 0, 0))
        if row.state in _WAITING:
            limit = row.tasks.partition("%")[2].strip("]")
            held = array.held or (row.reason == "Dependency" and row.name in behind)
            most = int(limit) if limit.isdigit() else array.limit
            array = replace(array, pending=array.pending + row.count, limit=most, held=held)
        else:
            array = replace(array, running=array.running + row.count)
        found[row.array_id] = array
    ordered = sorted(found.values(), key=lambda array: (order.get(names[array.id], 0), int(array.id)))
    # An array of which a task runs waits for nothing, whatever is said of the others.
    return tuple(replace(array, held=array.held and not array.running) for array in ordered)


def left(rows: Iterable[QueueRow]) -> list[Left]:
    """Return the tasks that squeue still knows and that did not end by themselves."""
    going = _WAITING | _RUNNING | {"COMPLETED"}
    return [Left(row.array_id, row.tasks, row.state, row.name) for row in rows if row.state not in going]


def unstarted(
    submissions: Sequence[tuple[Submission, Trials]], gone: Iterable[Left], attempts: Mapping[int, Sequence[Attempt]]
) -> Iterator[tuple[int, int]]:
    """Yield the trials, and their attempts, whose task was seen to fail before anything of it had started.

    It may have held a node all the same, which accounting alone can tell; what was cancelled has as a rule held none.
    """
    known = {submission.token: trials for submission, trials in submissions}
    for each in gone:
        if each.state != "CANCELLED":
            for trial, first, packed in _trials(known.get(each.name), each.tasks):
                if not packed and not _begun(attempts, trial, first):
                    yield trial, first


def task_states(
    submissions: Sequence[tuple[Submission, Trials]],
    rows: Sequence[QueueRow],
    gone: Sequence[Left],
    accounts: Sequence[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
    walltime: str,
) -> dict[int, TaskState]:
    """Say how each trial's newest array task stands: by squeue, else by sacct, else as it was seen.

    A task that was cancelled alone while it waited leaves no trace anywhere: where others of its array are known,
    its absence tells of it.
    """
    known = {submission.token: trials for submission, trials in submissions}
    newest = _newest(submissions)
    by_array: dict[int, dict[str, TaskState]] = defaultdict(dict)
    for each in gone:
        for trial, first, packed in _trials(known.get(each.name), each.tasks):
            if newest.get(trial) == each.name and not (packed and _told(attempts, trial, first)):
                words = ended(each.state, walltime=walltime)
                by_array[trial][each.array_id] = TaskState(_last(attempts, trial, first), each.state, words=words)
    for trial, number, account in charged(submissions, accounts, attempts):
        if newest.get(trial) != account.name or account.state in _OPEN | _WAITING | {RESIZED}:
            continue
        if _ended_itself(attempts, trial, number) and _packed(known[account.name], account.tasks):
            continue  # what became of its task afterwards is no word on it
        state = state_of(account)
        words = ended(
            state,
            exit_code=account.exit_code,
            signal=account.signal,
            reason=account.reason,
            by=account.cancelled_by,
            node=account.nodes,
            walltime=walltime,
        )
        by_array[trial][account.array_id] = TaskState(number, state, _exit_code(account), moment(account.ended), words)
    for row in rows:
        if row.state not in _WAITING | _RUNNING:
            continue
        for trial, first, packed in _trials(known.get(row.name), row.tasks):
            if newest.get(trial) != row.name or (packed and _completed(attempts, trial, first)):
                continue
            tried = _last(attempts, trial, first)
            begun = _begun(attempts, trial, first)
            if row.state in _WAITING or (packed and not begun):
                by_array[trial][row.array_id] = TaskState(tried + 1 if begun else first, "PENDING")
            elif not (packed and _told(attempts, trial, first)):
                by_array[trial][row.array_id] = TaskState(tried, "RUNNING")
    found = {
        trial: min(told.values(), key=_idleness) if len(told) > 1 else next(iter(told.values()))
        for trial, told in by_array.items()
    }
    named: list[QueueRow | Left | AccountingRow] = [*rows, *gone, *accounts]
    listed: dict[str, set[int]] = defaultdict(set)
    for one in named:
        listed[one.name].update(_tasks(one.tasks))
    for submission, trials in submissions:
        started = {trial for asked in trials for trial, first in asked if _begun(attempts, trial, first)}
        if not listed[submission.token] and not started:
            continue  # nothing tells that there ever was such an array
        for task, asked in enumerate(trials):
            if task in listed[submission.token] or any(trial in started for trial, _ in asked):
                continue
            for trial, first in asked:
                if newest[trial] == submission.token:
                    found[trial] = TaskState(first, "CANCELLED", words=_VANISHED)
    return found


_VANISHED = "left the queue before it started, and nothing tells why (as a task does that is cancelled by scancel)"


def state_of(account: AccountingRow) -> str:
    """Return how a task ended: one whose step ran out of memory has failed, by Slurm's word on the batch script."""
    return "OUT_OF_MEMORY" if account.state == "FAILED" and account.step_signal == _MEMORY else account.state


def _exit_code(account: AccountingRow) -> int | None:
    """Return the batch script's exit code, 128 + N for signal N; None where it did not end by itself."""
    if 0 < account.signal <= _LAST_SIGNAL and account.signal != _SET_UP:
        return 128 + account.signal
    # Slurm writes 0:0 for what it ended itself, and 53 and 125 for signals that there are none of.
    ended_itself = account.state in {"COMPLETED", "FAILED"} and not account.signal
    return account.exit_code if ended_itself else account.exit_code or None


def _idleness(task: TaskState) -> int:
    """Order what two arrays of one token say of a trial: the one that gave way has the least to say."""
    return {"RUNNING": 0, "PENDING": 2, "COMPLETED": 3}.get(task.state, 1)


def unexplained(
    submissions: Sequence[tuple[Submission, Trials]],
    found: Mapping[int, TaskState],
    accounts: Iterable[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> list[int]:
    """Return the trials whose newest end nobody has told yet: not in the queue, not well ended, not in accounting."""
    newest = _newest(submissions)
    told = {
        trial
        for trial, number, row in charged(submissions, accounts, attempts)
        if row.state not in _OPEN | _WAITING | {RESIZED}
        and row.name == newest[trial]
        and number >= (attempts[trial][-1].number if attempts.get(trial) else 0)
    }
    going = {trial for trial, task in found.items() if task.state in {"PENDING", "RUNNING"}}
    asked = set(newest)
    return [
        trial
        for trial in sorted(asked - going - told)
        if not (tried := attempts.get(trial)) or tried[-1].exit_code != 0 or tried[-1].signal
    ]


def charged(
    submissions: Sequence[tuple[Submission, Trials]],
    accounts: Iterable[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> Iterator[tuple[int, int, AccountingRow]]:
    """Yield each row of sacct with its trial and attempt: the rows of one task are its attempts, in order.

    A row of a task that runs several trials is each one's that started in it.
    """
    for _, trial, number, row in _charged(submissions, accounts, attempts):
        yield trial, number, row


def _charged(
    submissions: Sequence[tuple[Submission, Trials]],
    accounts: Iterable[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> Iterator[tuple[int, int, int, AccountingRow]]:
    """Yield what `charged` does, each behind its array task."""
    known = {submission.token: trials for submission, trials in submissions}
    later = _next_firsts(submissions)
    seen: dict[tuple[str, int], int] = defaultdict(int)
    for row in accounts:
        trials = known.get(row.name)
        if trials is None:
            continue  # the controller gave the id to another job
        for task in _tasks(row.tasks):
            if task >= len(trials):
                continue
            restart = seen[row.array_id, task]
            for trial, first in trials[task]:
                if len(trials[task]) == 1:
                    yield task, trial, first + restart, row
                    continue
                end = later.get((row.name, trial))
                for each in attempts.get(trial, ()):
                    if each.restart == restart and each.number >= first and (end is None or each.number < end):
                        yield task, trial, each.number, row
            seen[row.array_id, task] += row.state != RESIZED  # the same attempt goes on, with fewer nodes


def _next_firsts(submissions: Sequence[tuple[Submission, Trials]]) -> dict[tuple[str, int], int]:
    """Return the attempt at which another submission went on with a trial: (token, trial) -> attempt."""
    found: dict[tuple[str, int], int] = {}
    before: dict[int, str] = {}
    for submission, trials in submissions:
        for asked in trials:
            for trial, first in asked:
                if trial in before:
                    found[before[trial], trial] = first
                before[trial] = submission.token
    return found


def charges(
    submissions: Sequence[tuple[Submission, Trials]],
    accounts: Iterable[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> dict[tuple[int, int], Charge]:
    """Return what each attempt held, and for how long, by accounting: `(trial, attempt)` -> charge.

    What a second array of the same token held until it gave way is paid for as well. Trials that shared a
    task share what it held, by the time that each ran.
    """
    found: dict[tuple[int, int], Charge] = {}
    rows = [each for each in _charged(submissions, accounts, attempts) if _is_charge(each[3])]
    sharers: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for task, trial, number, row in rows:
        sharers[id(row), task].append((trial, number))
    spans = {(trial, each.number): _span(each) for trial, tried in attempts.items() for each in tried}
    for task, trial, number, row in rows:
        gpus = sum(gpus_of(row.allocated).values())
        billing = row.allocated.get("billing") if row.allocated else 0  # it never started
        before = found.get((trial, number))
        share = _share((trial, number), sharers[id(row), task], spans)
        found[trial, number] = Charge(row.elapsed, row.allocated.get("cpu", 0), gpus, billing, before, share)
    return found


def _is_charge(row: AccountingRow) -> bool:
    return row.state not in _OPEN and (bool(row.allocated) or not row.elapsed)


def _span(attempt: Attempt) -> Decimal:
    return Decimal(str(max(0.0, (attempt.ended or attempt.started) - attempt.started)))


def _share(
    mine: tuple[int, int], sharers: Sequence[tuple[int, int]], spans: Mapping[tuple[int, int], Decimal]
) -> Decimal:
    """Return an attempt's part of what its task held."""
    if len(sharers) == 1:
        return Decimal(1)
    total = sum((spans.get(each, Decimal(0)) for each in sharers), Decimal(0))
    return spans.get(mine, Decimal(0)) / total if total else Decimal(1) / len(sharers)


def _newest(submissions: Sequence[tuple[Submission, Trials]]) -> dict[int, str]:
    return {trial: submission.token for submission, trials in submissions for asked in trials for trial, _ in asked}


def _trials(trials: Trials | None, tasks: str) -> Iterator[tuple[int, int, bool]]:
    """Yield the trials of some array tasks, their attempts, and whether they share a task."""
    if trials is not None:
        for task in _tasks(tasks):
            if task < len(trials):
                for trial, first in trials[task]:
                    yield trial, first, len(trials[task]) > 1


def _packed(trials: Trials, tasks: str) -> bool:
    return any(packed for _, _, packed in _trials(trials, tasks))


def _ended_itself(attempts: Mapping[int, Sequence[Attempt]], trial: int, number: int) -> bool:
    """Say whether an attempt has told its own end, which no signal has brought about."""
    return any(
        each.number == number and each.ended is not None and "TERM" not in (each.signal or "").split()
        for each in attempts.get(trial, ())
    )


def _begun(attempts: Mapping[int, Sequence[Attempt]], trial: int, first: int) -> bool:
    """Say whether a trial has an attempt of this submission."""
    tried = attempts.get(trial, ())
    return bool(tried) and tried[-1].number >= first


def _told(attempts: Mapping[int, Sequence[Attempt]], trial: int, first: int) -> bool:
    """Say whether a trial's last attempt, of this submission, has told its own end."""
    return _begun(attempts, trial, first) and _ended_itself(attempts, trial, attempts[trial][-1].number)


def _completed(attempts: Mapping[int, Sequence[Attempt]], trial: int, first: int) -> bool:
    return _told(attempts, trial, first) and attempts[trial][-1].exit_code == 0


def _tasks(text: str) -> Sequence[int]:
    try:
        return task_indices(text) if text and text != "N/A" else ()
    except ValueError:
        return ()


def _last(attempts: Mapping[int, Sequence[Attempt]], trial: int, first: int) -> int:
    tried = attempts.get(trial)
    return max(tried[-1].number, first) if tried else first

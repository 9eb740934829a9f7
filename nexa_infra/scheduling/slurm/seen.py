"""What a client knows of a run on Slurm: what the last poll has shown, and what the scheduler has said and forgot."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.monitoring.charges import Charge
from nexa_infra.runs.attempts import Attempt, TaskState, read_attempts
from nexa_infra.runs.submissions import Recorded, Submission, read_submissions, trials_of
from nexa_infra.scheduling.slurm import tasks
from nexa_infra.scheduling.slurm.tasks import Trials
from nexa_infra.scheduling.slurm.text import AccountingRow, QueueRow, read_accounting

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run


@dataclass
class Seen:
    """What the last poll of a run has shown; it is asked again in every process."""

    rows: tuple[QueueRow, ...] | None = None
    since: float | None = None  # when files were last brought, by the cluster's clock
    lines: set[bytes] = field(default_factory=set)  # of the status files, as far as this client's copy has them
    asked: frozenset[int] = field(default_factory=frozenset)  # trials that accounting was asked about
    behind: bool = False  # whether there is more of a training's metrics log than was brought
    owners: frozenset[str] = frozenset()  # arrays that have started trials
    calls: Counter[str] = field(default_factory=Counter)  # what was asked, and how often


# States of sacct that are no ends.
GOING = frozenset({"RUNNING", "PENDING", tasks.RESIZED})

_seen: dict[str, Seen] = {}
_lock = threading.Lock()


def seen_of(run: Run) -> Seen:
    """Return what this process has seen of a run by this copy of it."""
    with _lock:
        return _seen.setdefault(str(run.files.path), Seen())


def settled(
    submissions: Sequence[tuple[Submission, Trials]],
    accounts: Sequence[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> frozenset[tuple[int, int]]:
    """Return the attempts whose end accounting knows."""
    found = tasks.charged(submissions, accounts, attempts)
    return frozenset((trial, number) for trial, number, row in found if row.state not in GOING)


def charges_of(run: Recorded) -> dict[tuple[int, int], Charge]:
    """Return what each attempt held, and for how long, by what accounting last said; empty where it said nothing."""
    return tasks.charges(submissions_of(run), accounts_of(run), read_attempts(run.files))


def states_of(
    run: Run,
    submissions: Sequence[tuple[Submission, Trials]],
    rows: Sequence[QueueRow],
    accounts: Sequence[AccountingRow],
    attempts: Mapping[int, Sequence[Attempt]],
) -> dict[int, TaskState]:
    """Say how each trial's newest array task stands; see `tasks.task_states`."""
    return tasks.task_states(submissions, rows, left_of(run), accounts, attempts, run.config.job.time)


def submissions_of(run: Recorded) -> list[tuple[Submission, Trials]]:
    """Return the submissions with the trials of their array tasks, and the attempts.

    One that is void has nothing to say: the trials that it was for are another's, or nobody's yet.
    """
    return [(each, trials_of(run, each)) for each in read_submissions(run.files) if not each.void]


def accounts_of(run: Recorded) -> list[AccountingRow]:
    """Read what accounting last said; of a large run that takes a while, so it is kept until it says more."""
    path = run.files.accounting
    try:
        found = path.stat()
        sign = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = _read.get(path)
        if known is None or known[0] != sign:
            known = sign, read_accounting(path.read_text(encoding="utf-8"))
            while len(_read) >= _MOST_READ:
                _read.pop(next(iter(_read)), None)
            _read[path] = known
    except FileNotFoundError:
        return []
    return known[1]


# Of so many runs.
_MOST_READ = 4
_read: dict[Path, tuple[tuple[int, int, int], list[AccountingRow]]] = {}


def remember(run: Run, rows: Sequence[QueueRow]) -> None:
    """Keep how tasks have ended by the scheduler's hand: it forgets them in minutes."""
    known = set(_left_lines(run))
    lines = [f"{each.array_id}|{each.tasks}|{each.state}|{each.name}" for each in tasks.left(rows)]
    if new := [line for line in dict.fromkeys(lines) if line not in known]:
        with run.files.left.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in new))


def _left_lines(run: Run) -> list[str]:
    try:
        return run.files.left.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def left_of(run: Run) -> list[tasks.Left]:
    """Return what `remember` has kept."""
    return [tasks.Left(*words) for line in _left_lines(run) if len(words := line.split("|", 3)) == 4]

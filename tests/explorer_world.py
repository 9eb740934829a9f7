"""The explorer's world, as a value; what is explored of it; and what of it a client can see."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, TypeVar

from nexa_infra.runs.attempts import Attempt, judge
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.decide import Policy, State, Submit
from nexa_infra.scheduling.history import asked_for, ends_of
from nexa_infra.scheduling.recorded import _full
from nexa_infra.scheduling.slurm.tasks import charged, task_states
from nexa_infra.scheduling.slurm.text import AccountingRow, QueueRow

VOID, UNCLEAR, NO_ROOM = -1, -2, -3  # in place of an array's id: a claim by nobody, and answers of sbatch without one

FORMER = -10  # a claim of FORMER - N: array N had the token until it became void

# What keeps apart what a client has seen and what has happened since:
# - active: while the run has arrays, no attempt of a trial is asked for that was ever asked for;
# - close: before a client submits to a run without arrays, or takes it for finished, it makes every token void, where
#   squeue still shows nothing and no sbatch is under way; then it looks again, and decides anew;
# - owner: a token that becomes void keeps the name of the array that had it, whose trials have started.
GUARDS = frozenset({"active", "close", "owner"})

Pairs = tuple[tuple[int, int], ...]  # trials and their attempts
Rows = tuple[tuple[int, int, tuple[str, ...]], ...]  # squeue's: array, token, and the state of each task
Files = tuple[tuple[str, ...], ...]  # how each attempt of each trial ended: ok, bad, pre(empted), term; empty: no line


class Intent(NamedTuple):
    """One array that is asked for, its record, and its files beside it; its number is its place, from 1 on."""

    trials: Pairs
    chunk: tuple[int, int] | None = None  # of how many of the whole run; None: its trials are listed
    alone: bool = True
    asked: bool = False
    answer: int = 0
    id: int = 0  # as recorded
    void: str = ""  # as recorded
    claim: int = 0


class Job(NamedTuple):
    """An array that the controller has taken; its id is its place, from 1 on."""

    token: int
    tasks: tuple[str, ...]  # P(ending), R(unning), H(idden), or how it ended
    restarts: tuple[int, ...]
    given: bool = False  # whether its id is another job's now


class Flight(NamedTuple):
    """An sbatch that the controller has not heard."""

    number: int
    late: bool = False  # whether it has ended without an answer, and no longer holds the lock


class Client(NamedTuple):
    """How far a client is in its program, and what it holds in its memory."""

    place: str
    settles: bool = True  # whether it sees to an unresolved intent first: a steward does not
    rows: Rows = ()
    files: Files = ()  # read too early, where that is the mutation
    wanted: tuple[Submit, ...] = ()
    last: int = 0  # the newest intent it knows of
    active: bool = False
    made: bool = False  # whether it has submitted an array in this round
    settling: bool = False
    closed: bool = False


class World(NamedTuple):
    """All there is."""

    intents: tuple[Intent, ...]
    jobs: tuple[Job, ...]
    flights: tuple[Flight, ...]
    trials: Files
    clients: tuple[Client | None, ...]
    faults: int  # that may still come; so are these
    requeues: int
    fulls: int
    cancels: int
    cancelled: int = 0  # 1: the word is there; 2: every token is void
    waited: bool = False
    stopped: bool = False  # whether the policy has ended it


@dataclass(frozen=True)
class Setup:
    """What is explored."""

    policy: Policy
    trials: int = 2
    clients: int = 1
    faults: int = 2
    kinds: frozenset[str] = frozenset({"kill", "unheard", "late", "forget", "remember", "given", "lock"})
    requeues: int = 0
    fulls: int = 0
    cancels: int = 0
    steward: bool = False  # whether clients come that only follow
    bad: int = 2  # trials that may fail, the first ones
    mutation: str = ""
    guards: frozenset[str] = GUARDS
    one_machine: bool = True  # whether clients have the run's lock in common


# What happens, the world after it or what is wrong, and whether no chance did it.
Step = tuple[str, World | str, bool]


def owner(claim: int) -> int:
    """Return whose a token is, or was; VOID where it never was any array's."""
    return FORMER - claim if claim < FORMER else claim


def live_tasks(world: World) -> list[tuple[int, int, str]]:
    """Return the tasks that wait or run, each its array's place, its own, and which."""
    return [
        (place, task, state)
        for place, job in enumerate(world.jobs)
        for task, state in enumerate(job.tasks)
        if state in {"P", "R"}
    ]


def running(world: World) -> set[int]:
    """Return the trials that run."""
    live = live_tasks(world)
    return {world.intents[world.jobs[place].token - 1].trials[task][0] for place, task, state in live if state == "R"}


def with_end(world: World, place: int, task: int, how: str) -> World:
    """End what runs, and write its line."""
    job = world.jobs[place]
    trial = world.intents[job.token - 1].trials[task][0]
    trials = put(world.trials, trial, (*world.trials[trial][:-1], how))
    return with_job(world._replace(trials=trials), place, job._replace(tasks=put(job.tasks, task, how)))


T = TypeVar("T")


def put(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1 :])


def with_client(world: World, who: int, client: Client | None) -> World:
    return world._replace(clients=put(world.clients, who, client))


def with_intent(world: World, number: int, intent: Intent) -> World:
    return world._replace(intents=put(world.intents, number - 1, intent))


def with_job(world: World, place: int, job: Job) -> World:
    return world._replace(jobs=put(world.jobs, place, job))


def faulty(world: World) -> World:
    return world._replace(faults=world.faults - 1)


class Data(NamedTuple):
    """What `decide` decides over."""

    state: State
    now: float


_BEGAN = datetime.fromtimestamp(0, UTC)
_SAID = {"ok": "COMPLETED", "gave way": "COMPLETED", "bad": "FAILED", "term": "CANCELLED", "scancelled": "CANCELLED"}


@lru_cache(maxsize=200_000)
def seen(
    policy: Policy,
    rows: Rows,
    accounts: tuple[tuple[int, int, tuple[str, ...], tuple[int, ...]], ...],
    records: tuple[tuple[Pairs, tuple[int, int] | None, str], ...],
    files: Files,
    cancelled: bool,
    waited: bool,
) -> Data:
    """Read a world as recorded.py and the scheduler of Slurm do."""
    submissions = [
        Submission(number, f"t-{number}", len(pairs), f"0-{len(pairs) - 1}", _BEGAN, void=void or None)
        for number, (pairs, _, void) in enumerate(records, 1)
    ]
    tasks_of = [[[pair] for pair in pairs] for pairs, _, _ in records]
    lasting = [(one, tasks) for one, tasks in zip(submissions, tasks_of, strict=True) if one.void is None]
    attempts = {
        trial: [_attempt(trial, number, end) for number, end in enumerate(ends, 1)]
        for trial, ends in enumerate(files)
        if ends
    }
    queue = [
        QueueRow("", str(array), str(task), {"P": "PENDING", "R": "RUNNING"}[state], "", f"t-{token}")
        for array, token, tasks in rows
        for task, state in enumerate(tasks)
        if state != "-"
    ]
    told = [
        _account(array, token, task, said)
        for array, token, tasks, restarts in accounts
        for task, state in enumerate(tasks)
        for said in ["PREEMPTED"] * restarts[task] + ([_SAID[state]] if state in _SAID else [])
    ]
    found = task_states(lasting, queue, (), told, attempts, "1:00")
    nothing: list[Attempt] = []
    states = [judge(attempts.get(trial, nothing), found.get(trial), cancelled=cancelled) for trial in range(len(files))]
    said = {(trial, number): row.state for trial, number, row in charged(lasting, told, attempts)}
    asked, lost = asked_for((tasks for _, tasks in lasting), attempts)
    full, taken = _full(submissions)
    state = State(
        active=bool(rows),
        states=states,
        attempts={trial: len(ends) for trial, ends in enumerate(files) if ends},
        asked=asked,
        ends=ends_of(states, attempts, said),
        lost=lost,
        full=full,
        taken=taken,
        cancelled=cancelled,
        policy=policy,
    )
    return Data(state, 2 * policy.full_seconds if waited else 0.0)


def _attempt(trial: int, number: int, end: str) -> Attempt:
    if not end:
        return Attempt(trial, number, number)
    signal = "TERM" if end in {"pre", "term"} else None
    return Attempt(trial, number, number, "", number + 0.5, {"ok": 0, "bad": 1}.get(end, 143), signal)


def _account(array: int, token: int, task: int, said: str) -> AccountingRow:
    code = 1 if said == "FAILED" else 0
    nothing: dict[str, int] = {}
    return AccountingRow(
        str(array), str(task), said, None, code, 0, 0, 1, nothing, nothing, "", "", "Unknown", "n1", "", f"t-{token}"
    )

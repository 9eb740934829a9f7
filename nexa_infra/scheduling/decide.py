"""What happens next to a run: one pure function over its recorded state; the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

from nexa_infra.scheduling.arrays import Array, Throttle, place, shares

# How often a trial may be asked for and never start, before somebody should be told.
MOST_LOST = 5
# What an array task of trials that are too short for one of their own should take, seconds.
TASK_SECONDS = 600.0
# How many trials run alone first, to find out how long one takes.
PROBES = 4


@dataclass(frozen=True)
class Policy:
    """What the run may do by itself."""

    retries: int = 0  # of each kind of end
    retry_on: frozenset[str] = frozenset()
    max_failures: int | None = None
    requeues: int | None = 0  # how often a trial that ran out of time, or gave way, may go on; None: as it takes
    nan: Literal["warn", "stop", "ignore"] = "warn"  # where a training's loss is no finite number
    silence: float | None = None  # how long a training's metrics may stand still, seconds; None is for ever
    stalled: Literal["warn", "stop"] = "warn"
    breaker: int | None = None  # the first so many trials to end may not all fail in the same way
    canary: int = 0  # how many trials go first; the others only where one of them completes
    parallelism: int | None = None  # trials that run at once
    array_size: int | None = None  # array tasks of one array
    pack: int | None = 1  # trials of one array task; None is as many as their length asks for
    at_once: int = 1  # of those, side by side
    most_pack: int | None = None  # what the walltimes of a task's trials leave room for
    seconds: float | None = None  # how long a trial takes, as far as earlier runs tell
    memory: int | None = None  # MiB a node
    memory_factor: float | None = None  # the next attempt's memory over that of one that ran out of it
    budget: str | None = None  # the limit as it is told, where trials are admitted by what is left of it
    local: bool = False  # whether trials end with their client
    full_seconds: float = 60.0  # how long after the queue was full it is tried again


@dataclass(frozen=True)
class Vitals:
    """What a training's metrics say of its newest attempt."""

    unsound: Mapping[str, str] = field(default_factory=dict)  # metric -> what of it is no finite number, a sentence
    silent: float | None = None  # seconds since the last new line; None where it does not run
    step: str = ""  # where it stands: step 40/100; empty where it has said nothing


@dataclass(frozen=True)
class Full:
    """A queue that took no more: the array tasks that were asked for, and when, seconds since the epoch."""

    tasks: int
    moment: float


@dataclass(frozen=True)
class State:
    """What is recorded of a run: each trial's state, and how many attempts it has used and was asked for."""

    active: bool  # whether the scheduler still has something of the run
    states: Sequence[str]
    attempts: Mapping[int, int] = field(default_factory=dict)  # the newest that started
    asked: Mapping[int, int] | None = None  # the newest that was submitted; None: every trial was
    ends: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # of trials that ended badly: kind -> how often
    lost: Mapping[int, int] = field(default_factory=dict)  # how often a trial was asked for, and never started
    early: tuple[str, ...] = ()  # how the first trials to end have ended, in their order
    nodes: Mapping[str, int] = field(default_factory=dict)  # node -> how often it failed
    arrays: tuple[Array, ...] = ()  # those that wait or run
    room: int | None = None  # array tasks that the queue takes yet, as far as that is known
    full: Full | None = None  # when it took no more, unless it took something since
    taken: int | None = None  # array tasks that it took last, where it was ever full
    affordable: int | None = None  # attempts that the budget leaves room for; None is no budget
    seconds: float | None = None  # the median of what trials took
    cancelled: bool = False
    vitals: Vitals = field(default_factory=Vitals)
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Stop:
    """End what runs; nothing more is submitted."""

    reason: str


@dataclass(frozen=True)
class Submit:
    """Run some trials, as one array; without a list, it is chunk `chunk` of `chunks` of the whole run."""

    trials: tuple[tuple[int, int], ...] | None  # trial and attempt
    chunk: int = 0
    chunks: int = 1
    pack: int = 1
    limit: int | None = None  # array tasks of it that run at once
    after: int | str | None = None  # what it waits for: an array's id, or the place of one in the same answer
    memory: int | None = None  # MiB a node; None is the job's own
    exclude: tuple[str, ...] = ()  # nodes


@dataclass(frozen=True)
class Finish:
    """The run is over, well or badly."""


Action = Union[Stop, Submit, Throttle, Finish]


def decide(state: State, now: float) -> tuple[Action, ...]:
    """Say what happens next to a run; nothing is: look again later.

    A failure is final where it is not retried, or has no attempt left; only final ones count
    towards `max_failures`. Whatever is submitted again was seen to have no array any more.
    """
    policy = state.policy
    if state.cancelled:
        return () if state.active else (Finish(),)
    if state.active and (reason := _ill(state.vitals, policy)) is not None:
        return (Stop(reason),)
    again = [index for index in range(len(state.states)) if _left(state, index)]
    if (reason := _failing(state, sum(state.states[index] in BAD for index in again))) is not None:
        return (Stop(reason),) if state.active or "pending" in state.states else (Finish(),)
    fresh = _fresh(state)
    if fresh:
        return _first(state, fresh, now)
    if state.active:
        return shares(state.arrays, _slots(policy))
    wanted = [(index, state.attempts[index] + 1) for index in again] + _lost(state)
    if not wanted:
        return (Finish(),)
    if state.affordable is not None and (wanted := sorted(wanted)[: state.affordable]) == []:
        return (_broke(state, len(again)),)
    return arrange(state, sorted(wanted), now)


def arrange(state: State, trials: Sequence[tuple[int, int]], now: float) -> tuple[Submit, ...]:
    """Return the arrays that run some trials, each `(trial, attempt)`, as far as the queue takes them now.

    What ran out of memory gets more of it, in an array of its own. Nodes that failed twice are left out.
    """
    policy = state.policy
    groups: dict[int | None, list[tuple[int, int]]] = {}
    for trial, attempt in trials:
        groups.setdefault(_memory(state, trial), []).append((trial, attempt))
    exclude = tuple(sorted(node for node, failed in state.nodes.items() if failed > 1))
    most = _admitted(state, sum(_tasks(len(group), _pack(state, len(group))) for group in groups.values()), now)
    pieces: list[tuple[int | None, int, list[tuple[int, int]]]] = []
    for memory, group in groups.items():
        pack = _pack(state, len(group))
        taken = group if most is None else group[: most * pack]
        if most is not None:
            most -= _tasks(len(taken), pack)
        size = policy.array_size or len(taken) or 1
        count = _tasks(_tasks(len(taken), pack), size)
        # Strided, so that neighbours, which are alike, do not all come last.
        pieces += [(memory, pack, taken[start::count]) for start in range(count)]
    placed = place(state.arrays, [_tasks(len(piece), pack) for _, pack, piece in pieces], _slots(policy))
    return tuple(
        Submit(tuple(piece), pack=pack, limit=limit, after=after, memory=memory, exclude=exclude)
        for (memory, pack, piece), (limit, after) in zip(pieces, placed)
    )


def waiting(state: State) -> str | None:
    """Say that trials wait to be submitted, for the queue has no room for them; None where none do."""
    count = len(_fresh(state))
    if not count or state.cancelled or (state.full is None and (state.room is None or state.room >= count)):
        return None
    told = "1 trial waits" if count == 1 else f"{count:,} trials wait"
    return f"{told} to be submitted: the queue takes no more of your jobs now"


def stalled(vitals: Vitals, policy: Policy) -> str | None:
    """Say that a training's metrics have stood still for too long; None where they have not."""
    if policy.silence is None or vitals.silent is None or vitals.silent < policy.silence:
        return None
    since = f"since {vitals.step}" if vitals.step else "since it started"
    return f"no new line of metrics {since}, for {policy.silence:,.0f} s"


def _ill(vitals: Vitals, policy: Policy) -> str | None:
    """Say why a training is to be ended for its metrics."""
    if policy.nan == "stop" and vitals.unsound:
        return f"{next(iter(vitals.unsound.values()))}, and health.nan is stop"
    if policy.stalled == "stop" and (told := stalled(vitals, policy)) is not None:
        return f"{told}, and health.stalled is stop"
    return None


BAD = frozenset({"failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline", "preempted"})

# Ends of a trial that has been interrupted, and goes on from its checkpoint.
_INTERRUPTED = frozenset({"timeout", "preempted"})
# What has ended before it could say why, and where its scheduler cannot say either.
_UNSEEN = {"interrupted": "node_fail", "boot_fail": "node_fail"}


def _failing(state: State, again: int) -> str | None:
    """Say why a run is to be given up for its failures."""
    policy = state.policy
    final = sum(said in BAD for said in state.states) - again
    if policy.max_failures is not None and final >= policy.max_failures:
        counted = "1 trial" if final == 1 else f"{final} trials"
        return f"{counted} failed, and retry.max_failures is {policy.max_failures}"
    early = state.early[: policy.breaker]
    many = policy.breaker is not None and len(early) == policy.breaker > 1
    if many and len(set(early)) == 1 and early[0] != "completed" and "pending" in state.states:
        return f"the first {len(early)} trials to end all {early[0]}, and retry.breaker is {policy.breaker}"
    return None


def _left(state: State, index: int) -> bool:
    """Say whether a trial that ended badly has an attempt left."""
    policy, said, used = state.policy, state.states[index], state.attempts.get(index, 0)
    if not used or (said == "interrupted" and policy.local):
        return False
    if said in _INTERRUPTED and (policy.requeues is None or used <= policy.requeues):
        return True
    kind = _UNSEEN.get(said, said)
    # Each kind of end is counted for itself: who gave way twice may fail once all the same.
    times = state.ends.get(index, {}).get(kind, used)
    return kind in policy.retry_on and times <= policy.retries


def _fresh(state: State) -> list[int]:
    """Return the trials that nobody has asked for yet."""
    asked = state.asked
    return [] if asked is None else [index for index in range(len(state.states)) if index not in asked]


def _lost(state: State) -> list[tuple[int, int]]:
    """Return the trials that were asked for, never started, and are in no array: their attempt is not spent."""
    return [
        (index, state.attempts.get(index, 0) + 1)
        for index, said in enumerate(state.states)
        if said == "pending" and not state.policy.local and state.lost.get(index, 0) < MOST_LOST
    ]


def _first(state: State, fresh: Sequence[int], now: float) -> tuple[Action, ...]:
    """Say what is done about trials that were never asked for."""
    policy, count = state.policy, len(state.states)
    asked = state.asked or {}
    if state.affordable is not None:
        if not state.affordable:
            return () if state.active else (_broke(state, len(fresh)),)
        live = sum(array.tasks for array in state.arrays)
        if state.active and state.affordable < min(len(fresh), live // 4):
            return ()  # more comes free as trials end: not every one that does makes an array
        fresh = fresh[: state.affordable]
    alone = policy.canary or (PROBES if policy.pack is None and policy.seconds is None else 0)
    if alone and count > alone:
        if not asked:
            return arrange(replaced(state, pack=1), [(trial, 1) for trial in fresh[:alone]], now)
        if len(asked) <= alone and "completed" not in (state.states[trial] for trial in asked):
            going = state.active or any(state.states[trial] not in BAD for trial in asked)
            if going or any(_left(state, trial) for trial in asked):
                return _retried(state, now) if not state.active else ()
            if policy.canary:
                return (Stop(f"no trial of the first {alone} completed, and canary is {policy.canary}"),)
    pack = _pack(state, len(fresh))
    tasks = _tasks(len(fresh), pack)
    if len(fresh) < count or (state.room is not None and state.room < tasks) or state.full is not None or state.nodes:
        rest = shares(state.arrays, _slots(policy))
        return (*arrange(state, [(trial, 1) for trial in fresh], now), *rest)
    chunks = _tasks(tasks, policy.array_size or tasks)
    sizes = [len(range(chunk, tasks, chunks)) for chunk in range(chunks)]
    placed = place((), sizes, _slots(policy))
    return tuple(Submit(None, chunk, chunks, pack, limit, after) for chunk, (limit, after) in enumerate(placed))


def _retried(state: State, now: float) -> tuple[Action, ...]:
    """Run again what went first and may."""
    again = [(index, state.attempts[index] + 1) for index in range(len(state.states)) if _left(state, index)]
    asked = state.asked or {}
    lost = [each for each in _lost(state) if each[0] in asked]
    return arrange(replaced(state, pack=1), [*again, *lost], now) if again or lost else (Finish(),)


def _broke(state: State, count: int) -> Stop:
    trials = "1 trial" if count == 1 else f"{count:,} trials"
    return Stop(f"the budget of {state.policy.budget} leaves no room for {trials} more")


def _admitted(state: State, tasks: int, now: float) -> int | None:
    """Return how many array tasks may be asked for now; None is all."""
    if state.full is not None:
        if now - state.full.moment < state.policy.full_seconds and (state.active or state.full.tasks == 1):
            return 0
        return max(1, min(state.full.tasks // 2, tasks))
    known = [most for most in (state.room, None if state.taken is None else 2 * state.taken) if most is not None]
    if not known or min(known) >= tasks:
        return None
    most = max(0, min(known))
    # Not every task that ends makes an array: a quarter of what waits or runs has to end first.
    live = sum(array.tasks for array in state.arrays)
    return most if most >= max(1, min(tasks, live // 4)) else 0


def _pack(state: State, trials: int) -> int:
    """Return how many trials an array task runs."""
    policy = state.policy
    if policy.pack is not None:
        return policy.pack
    seconds = state.seconds or policy.seconds
    if seconds is None:
        return 1
    pack = int(TASK_SECONDS // max(seconds, 0.001)) * policy.at_once
    # Whatever may run at once has something to run.
    slots = _slots(policy) or 32
    most = min(pack, policy.most_pack or pack, _tasks(trials, slots))
    return max(1, most)


def _memory(state: State, trial: int) -> int | None:
    """Return the memory of a trial's next attempt, MiB; None is the job's own."""
    policy = state.policy
    times = state.ends.get(trial, {}).get("out_of_memory", 0)
    if not times or policy.memory is None or policy.memory_factor is None:
        return None
    return round(policy.memory * policy.memory_factor**times)


def _slots(policy: Policy) -> int | None:
    """Return how many array tasks may run at once."""
    return None if policy.parallelism is None else max(1, policy.parallelism // policy.at_once)


def _tasks(count: int, pack: int) -> int:
    return -(-count // pack)


def replaced(state: State, *, pack: int) -> State:
    """Return a state whose trials are packed otherwise."""
    values = {**vars(state), "policy": Policy(**{**vars(state.policy), "pack": pack})}
    return State(**values)

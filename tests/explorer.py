"""Every interleaving of what can happen to a run on Slurm, two trials and a few faults at a time.

A `World` is a value: the run directory (intents, claims, status lines, the word of a cancel), the controller's arrays,
each sbatch on its way, and how far each client is in its program. `Model.steps` says what may happen next to it; the
clients decide by the real `decide`, `arrange`, `judge`, `task_states`, `asked_for` and `ends_of`, on data made from the
world, and do the rest as intents.py, submit.sh and job.sbatch do. `explore` visits every world that can be reached,
the nearest first, and raises the shortest story of what must not be:

- none doubled: no attempt starts twice, none beside another of its trial, none after its trial has completed or has
  used up what it may, none before the one before it; nothing is asked for, nor starts, between a cancel and a resume;
- none falsely finished: where a client takes the run for finished, every trial is, and nothing is left of it;
- none lost: from every world the run can end, with every trial completed or finally failed, though no chance helps
  (no late array comes, no forgotten one comes back). As there are finitely many worlds, it does so for certain where
  whatever can always happen again happens at some time.

Time matters to `decide` only after a queue was full: `waited` says that long enough has passed since.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, TypeVar

from nexa_infra.runs.attempts import UNFINISHED, Attempt, judge
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, arrange, decide
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

# Where a client does not hold the run's lock, which only those of one machine have in common.
UNLOCKED = frozenset({"begin", "look", "follow", "look again", "close follow"})

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


class WrongError(Exception):
    """Something that must not be has happened."""


class CutOffError(Exception):
    """There is more than was to be looked at: nothing has been shown."""


@dataclass(frozen=True)
class Explored:
    """What an exploration has seen."""

    worlds: int
    steps: int
    ends: int  # worlds in which the run has ended, and nothing is left of it
    seconds: float


def explore(setup: Setup, *, most_worlds: int = 1_000_000) -> Explored:
    """Visit every world that can be reached.

    Raises:
        WrongError: a property does not hold; the message is the shortest story of it.
        CutOffError: there are more worlds than that.
    """
    began = time.monotonic()
    model = Model(setup)
    worlds = [model.first()]
    known = {worlds[0]: 0}
    parents, told = array("l", [-1]), [""]
    sources, targets = array("l"), array("l")  # of the steps that no chance is needed for
    count = 0
    for at, world in enumerate(worlds):  # which grows meanwhile
        for words, after, certain in model.steps(world):
            count += 1
            if isinstance(after, str):
                raise WrongError(_story(worlds, parents, told, at, [words, f"WRONG: {after}"]))
            there = known.setdefault(after, len(worlds))
            if there == len(worlds):
                if there >= most_worlds:
                    raise CutOffError(f"there are more than {most_worlds:,} worlds")
                worlds.append(after)
                parents.append(at)
                told.append(words)
            if certain:
                sources.append(at)
                targets.append(there)
    ends = [at for at, world in enumerate(worlds) if model.ended(world)]
    saved = _reaching(ends, len(worlds), sources, targets)
    if (lost := saved.find(0)) >= 0:
        raise WrongError(_story(worlds, parents, told, lost, ["WRONG: from here the run can never end"]))
    return Explored(len(worlds), count, len(ends), time.monotonic() - began)


def _reaching(ends: list[int], count: int, sources: array[int], targets: array[int]) -> bytearray:
    """Mark every world from which one of some can be reached."""
    before: list[list[int]] = [[] for _ in range(count)]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    found, left = bytearray(count), list(ends)
    for at in ends:
        found[at] = 1
    while left:
        for source in before[left.pop()]:
            if not found[source]:
                found[source] = 1
                left.append(source)
    return found


def _story(worlds: list[World], parents: array[int], told: list[str], at: int, last: list[str]) -> str:
    lines: list[str] = []
    end = worlds[at]
    while parents[at] >= 0:
        lines.append(told[at])
        at = parents[at]
    numbered = [f"{number:3}. {line}" for number, line in enumerate([*reversed(lines), *last], 1)]
    state = "\n".join(f"     {name} {value}" for name, value in end._asdict().items())
    return "\n".join([last[-1], *numbered, "before the last step:", state])


Step = tuple[
    str, "World | str", bool
]  # what happens, the world after it or what is wrong, and whether no chance did it


class Model:
    """What may happen."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.mutation = setup.mutation
        policy = setup.policy
        # Whether an active run of which everything was asked for is only waited for, whatever its files say.
        self.waits = policy.max_failures is None and policy.breaker is None and not policy.canary

    def first(self) -> World:
        """Return the world in which nothing has happened."""
        setup = self.setup
        nobody: tuple[Client | None, ...] = (None,) * setup.clients
        budgets = (setup.faults, setup.requeues, setup.fulls, setup.cancels)
        return World((), (), (), ((),) * setup.trials, nobody, *budgets)

    def steps(self, world: World) -> Iterator[Step]:
        """Yield everything that may happen next."""
        yield from self._cluster(world)
        yield from self._person(world)
        done = self.ended(world)
        for who, client in enumerate(world.clients):
            if client is None:
                if not done:
                    yield f"client {who} begins", _with_client(world, who, Client("begin")), True
                    if self.setup.steward:
                        steward = Client("look", settles=False)
                        yield f"client {who} begins as a steward", _with_client(world, who, steward), True
                continue
            if self._may(world, "kill"):
                yield f"client {who} is killed", _with_client(_faulty(world), who, None), False
            for words, after, certain in self._client(world, who, client):
                yield f"client {who} {words}", after, certain

    def ended(self, world: World) -> bool:
        """Say whether the run has ended, and nothing of it is left."""
        if any(world.clients) or _live(world) or not all(each.late for each in world.flights):
            return False
        if world.cancelled:
            return world.cancelled == 2
        return all(ends and self._final(ends) for ends in world.trials)

    def _may(self, world: World, kind: str) -> bool:
        return world.faults > 0 and kind in self.setup.kinds

    def _final(self, ends: tuple[str, ...]) -> bool:
        """Say whether a trial that does not run has completed, or has used up what it may."""
        kinds = Counter({"bad": "failed", "pre": "preempted", "": "node_fail"}.get(end, end) for end in ends)
        last = {"bad": "failed", "pre": "preempted", "": "node_fail"}.get(ends[-1], ends[-1])
        if last in {"ok", "term"}:
            return last == "ok"
        return last not in self.setup.policy.retry_on or kinds[last] > self.setup.policy.retries

    # The cluster: its controller, and its nodes.

    def _cluster(self, world: World) -> Iterator[Step]:
        for flight in world.flights:
            yield from self._sbatch(world, flight)
        for place, job in enumerate(world.jobs):
            name = f"array {place + 1} of intent {job.token}"
            if self._may(world, "forget") and {"P", "R"} & set(job.tasks):
                # What waits may come back; what runs ends, and nobody hears of it.
                after = job._replace(tasks=tuple({"P": "H", "R": "unseen"}.get(each, each) for each in job.tasks))
                yield f"the controller forgets {name}", _with_job(_faulty(world), place, after), False
            if "H" in job.tasks:
                after = job._replace(tasks=tuple("P" if each == "H" else each for each in job.tasks))
                if "remember" in self.setup.kinds:
                    yield f"the controller remembers {name}", _with_job(world, place, after), False
                if self._may(world, "given"):
                    after = job._replace(tasks=tuple("gone" if each == "H" else each for each in job.tasks), given=True)
                    yield f"the id of {name} is another job's", _with_job(_faulty(world), place, after), False
            for task, state in enumerate(job.tasks):
                trial = world.intents[job.token - 1].trials[task][0]
                what = f"trial {trial} in {name}"
                if state == "P":
                    started = self._started(world, place, task)
                    if started is None:
                        gone = tuple("gave way" if each == "P" else each for each in job.tasks)
                        yield f"{name} gives way", _with_job(world, place, job._replace(tasks=gone)), True
                        break
                    yield f"{what} starts", started, True
                elif state == "R":
                    yield f"{what} ends well", _ended(world, place, task, "ok"), True
                    if trial < self.setup.bad:
                        yield f"{what} fails", _ended(world, place, task, "bad"), True
                    if world.requeues:
                        ended = _ended(world._replace(requeues=world.requeues - 1), place, task, "pre")
                        restarts = _put(job.restarts, task, job.restarts[task] + 1)
                        waits = ended.jobs[place]._replace(tasks=_put(job.tasks, task, "P"), restarts=restarts)
                        yield f"{what} is preempted and requeued", _with_job(ended, place, waits), False
        last = world.intents[-1] if world.intents else None
        if last is not None and last.void == "full" and not world.waited:
            yield "a minute passes", world._replace(waited=True), True

    def _sbatch(self, world: World, flight: Flight) -> Iterator[Step]:
        number, late = flight
        flights = tuple(each for each in world.flights if each is not flight)
        intent = world.intents[number - 1]
        job = Job(number, ("P",) * len(intent.trials), (0,) * len(intent.trials))
        taken = world._replace(jobs=(*world.jobs, job), flights=flights)
        if late:
            yield f"the controller takes the late sbatch of intent {number}", taken, False
            yield f"the late sbatch of intent {number} is lost", world._replace(flights=flights), False
            return
        answered = _with_intent(taken, number, intent._replace(answer=len(taken.jobs)))
        yield f"the controller takes intent {number} as array {len(taken.jobs)}", answered, True
        if self._may(world, "late"):
            after = _faulty(world)._replace(flights=(*flights, Flight(number, late=True)))
            unclear = _with_intent(after, number, intent._replace(answer=UNCLEAR))
            yield f"the sbatch of intent {number} ends without an answer", unclear, False
        if world.fulls:
            after = world._replace(flights=flights, fulls=world.fulls - 1)
            yield (
                f"intent {number}: the queue is full",
                _with_intent(after, number, intent._replace(answer=NO_ROOM)),
                False,
            )

    def _started(self, world: World, place: int, task: int) -> World | str | None:
        """Start a task, as job.sbatch does: the first array of a token owns it; None where it gives way."""
        job = world.jobs[place]
        intent = world.intents[job.token - 1]
        if self.mutation != "no claims":
            if not intent.claim:
                intent = intent._replace(claim=place + 1)
                world = _with_intent(world, job.token, intent)
            if intent.claim != place + 1:
                return None
        trial, attempt = intent.trials[task]
        attempt += job.restarts[task]
        ends = world.trials[trial]
        if world.cancelled == 2:
            return f"trial {trial} starts after a cancel"
        if attempt <= len(ends):
            return f"doubled: attempt {attempt} of trial {trial} starts twice"
        if trial in _running(world):
            return f"doubled: trial {trial} starts while it runs"
        if "ok" in ends:
            return f"doubled: trial {trial} starts, and has completed"
        if ends and ends[-1] and self._final(ends):  # what nobody saw end, a person's resume may run again
            return f"doubled: trial {trial} starts, and has used up its attempts"
        if attempt != len(ends) + 1:
            return f"attempt {attempt} of trial {trial} starts, and attempt {len(ends) + 1} never has"
        world = world._replace(trials=_put(world.trials, trial, (*ends, "")))
        return _with_job(world, place, job._replace(tasks=_put(job.tasks, task, "R")))

    # A person's words.

    def _person(self, world: World) -> Iterator[Step]:
        if world.cancels and not world.cancelled and world.intents and not self.ended(world):
            yield "a person cancels", world._replace(cancelled=1, cancels=world.cancels - 1), False
        if world.cancelled == 1:
            void = tuple(self._voided(each) for each in world.intents)
            yield "the cancel makes every token void", world._replace(intents=void, cancelled=2), True
        if world.cancelled == 2 and (live := _live(world)):
            after = world
            for place, task, state in live:
                if state == "R":
                    after = _ended(after, place, task, "term")
                else:
                    job = after.jobs[place]
                    after = _with_job(after, place, job._replace(tasks=_put(job.tasks, task, "scancelled")))
            yield "the cancel ends all arrays", after, True
        if world.cancelled == 2 and not live and not world.stopped:
            yield "a person resumes", world._replace(cancelled=0), False

    # The client: its program, cut wherever something else may happen.

    def _client(self, world: World, who: int, client: Client) -> Iterator[Step]:
        place = client.place

        def at(after: World, place: str, **changes: object) -> World:
            return _with_client(after, who, client._replace(place=place, **changes))  # type: ignore[arg-type]

        follow = Client("look", settles=client.settles)
        others = (each.place for at, each in enumerate(world.clients) if each is not None and at != who)
        alone = place not in {"begin", "look again", "close follow"} or not self.setup.one_machine
        if not alone and any(each not in UNLOCKED for each in others):
            return  # another client of this machine holds the run's lock
        if place == "begin":
            if world.intents:
                yield from self._look(world, who, client, "run")
            elif not world.cancelled:
                yield "begins the run", at(world, "write", wanted=self._decided(self._data(world, ()))[1]), True
            else:
                yield "leaves a cancelled run", _with_client(world, who, None), True
        elif place == "look":
            yield from self._look(world, who, client, "follow")
        elif place == "look again":
            active = bool(self._queue(world))
            going = client._replace(place="filter", active=active)
            yield "looks again: active" if active else "looks again", _with_client(world, who, going), True
        elif place.startswith(("close ", "void ")):
            yield from self._close(world, who, client)
        elif place in {"look run", "look follow"}:
            yield from self._look(world, who, client, f"{place[5:]} closed")
        elif place in {"run", "follow", "run closed", "follow closed"}:
            yield from self._read(world, who, client)
        elif place == "filter":
            if world.cancelled and self.mutation != "submits after a cancel":
                yield "sees the cancel", _with_client(world, who, follow), True
            else:
                guarded = "active" in self.setup.guards
                still = tuple(_still(world, client.wanted, active=client.active, guarded=guarded))
                last = client.last if client.closed else len(world.intents)
                writes = client._replace(place="write", wanted=still, last=last, made=False, closed=False)
                if not still:
                    yield "sees that nothing of it stands", _with_client(world, who, follow), True
                elif len(world.clients) > 1:
                    yield "sees what still stands", _with_client(world, who, writes), True
                else:  # whatever comes between the two may as well come afterwards
                    yield from self._client(world, who, writes)
        elif place == "write":
            if len(world.intents) > client.last:
                yield "sees that another was first", _with_client(world, who, follow), True
            else:
                alone = not client.active and not client.made
                wanted, pairs = client.wanted[0], _pairs(client.wanted[0], self.setup.trials)
                intent = Intent(pairs, (wanted.chunk, wanted.chunks) if wanted.trials is None else None, alone)
                after = world._replace(intents=(*world.intents, intent), waited=False)
                words = f"writes intent {client.last + 1} for {_told(pairs)}"
                yield words, at(after, "ask", last=client.last + 1), True
        else:
            yield from self._submission(world, who, client)

    def _close(self, world: World, who: int, client: Client) -> Iterator[Step]:
        """Make void what nobody sees, so that nothing of it can start while it is looked at and decided on anew."""
        word, _, purpose = client.place.partition(" ")
        if not all(each.late for each in world.flights):
            return  # the lock is held
        if word == "close" and self._queue(world):
            follow = Client("look", settles=client.settles)
            filters = client._replace(place="filter", active=True)
            go_on = filters if client.wanted and purpose == "follow" else follow
            yield "looks again: active", _with_client(world, who, go_on), True
        elif word == "close" and len(world.clients) == 1:
            yield "looks again", _with_client(world, who, client._replace(place=f"void {purpose}")), True
        else:
            after = world._replace(intents=tuple(self._voided(each) for each in world.intents))
            looks = client._replace(place=f"look {purpose}", last=len(world.intents))
            yield "makes every token void", _with_client(after, who, looks), True

    def _look(self, world: World, who: int, client: Client, place: str) -> Iterator[Step]:
        if self.mutation == "status before squeue":
            yield "reads the files", _with_client(world, who, client._replace(place=place, files=world.trials)), True
            return
        rows = self._queue(world)
        if rows and place == "follow" and self.waits and self._asked(world):
            return  # whatever the files say, it looks again
        words = "looks at the queue:" + "".join(f" array {at} {''.join(tasks)}" for at, _, tasks in rows)
        yield words, _with_client(world, who, client._replace(place=place, rows=rows)), True

    def _read(self, world: World, who: int, client: Client) -> Iterator[Step]:
        """Read the files, after the queue, and decide."""
        if client.place.endswith("closed") and len(world.intents) > client.last:
            yield "sees that another was first", _with_client(world, who, Client("look", settles=client.settles)), True
            return
        early = self.mutation == "status before squeue"
        data = self._data(world, self._queue(world) if early else client.rows, client.files if early else None)
        client = client._replace(rows=(), files=())
        follow = Client("look", settles=client.settles)
        if client.place in {"run", "run closed"}:
            number, last = len(world.intents), world.intents[-1]
            # What is unfinished, should the last intent come to nothing.
            wanted = () if data.state.active else _unfinished(data)
            if world.cancelled:
                yield "reads the cancel", _with_client(world, who, follow), True
            elif not last.id and not last.void and client.place == "run":
                after = client._replace(place="ask", wanted=wanted, last=number, settling=True)
                yield f"sees to intent {number}", _with_client(world, who, after), True
            elif wanted and client.place == "run" and "close" in self.setup.guards:
                yield "wants to go on", _with_client(world, who, client._replace(place="close run")), True
            elif wanted:
                closed = client.place == "run closed"
                after = client._replace(place="filter", active=False, wanted=wanted, closed=closed)
                yield "reads the files, to go on", _with_client(world, who, after), True
            else:
                yield "reads the files, and follows", _with_client(world, who, follow), True
            return
        actions, wanted = self._decided(data)
        if wanted:
            told = " and ".join(_told(_pairs(each, self.setup.trials)) for each in wanted)
            place = "filter"
            if client.place == "follow":
                place = "close follow" if "close" in self.setup.guards else "look again"
            going = client._replace(place=place, wanted=wanted, closed=place == "filter", active=False)
            yield f"decides on {told}", _with_client(world, who, going), True
        elif any(isinstance(each, Stop) for each in actions):
            ends = world.trials[0]
            failed = ends and "ok" not in ends and self._final(ends)
            stopped = _with_client(world, who, follow)._replace(cancelled=world.cancelled or 1, stopped=True)
            yield "stops the run", stopped if failed else "falsely finished: the canary has not failed", True
        elif Finish() in actions and client.place == "follow" and "close" in self.setup.guards and not world.cancelled:
            yield "would finish", _with_client(world, who, client._replace(place="close follow")), True
        elif any(isinstance(each, Finish) for each in actions):
            yield "takes it for finished", self._false_end(world, data) or _with_client(world, who, None), True
        else:
            yield "reads the files, and waits", _with_client(world, who, follow), True

    def _false_end(self, world: World, data: Data) -> str | None:
        """Say what is wrong with taking the run for finished."""
        if world.cancelled:
            return None
        for trial, (ends, state) in enumerate(zip(world.trials, data.state.states, strict=True)):
            if trial in _running(world):
                return f"falsely finished: trial {trial} runs"
            if not ends and self.setup.policy.canary and world.trials[0] and self._final(world.trials[0]):
                continue  # nobody saw the canary end, so that it is not said to have failed: the run is unfinished
            # Of a task that vanished from among its like, nobody can know that nobody has cancelled it.
            if not (ends and self._final(ends)) and state != "cancelled":
                return f"falsely finished: trial {trial} has not ended: {state}"
        return None

    def _submission(self, world: World, who: int, client: Client) -> Iterator[Step]:
        """Submit an intent exactly once, as submit.sh does."""
        place, number = client.place, client.last
        intent = world.intents[number - 1]
        told, certain = f"intent {number}", True
        look_up = client._replace(place="look up")
        if place == "wait":
            if intent.answer == UNCLEAR and not intent.claim:
                yield f"hears no clear answer to {told}", _with_client(world, who, look_up), True
            elif intent.answer:
                yield self._found(world, who, client, self._looked_up(world, number), True)
            if self._may(world, "unheard"):
                words = f"loses its connection while it waits for {told}"
                yield words, _with_client(_faulty(world), who, look_up), False
            return
        if not all(each.late for each in world.flights):  # another sbatch holds the lock
            if not self._may(world, "lock"):
                return
            world, told, certain = _faulty(world), f"{told}, though the lock is held", False
        if place == "ask":
            if intent.asked and self.mutation != "asks without a look-up":
                yield f"finds that {told} was asked for", _with_client(world, who, look_up), certain
            elif intent.claim:
                yield self._found(world, who, client, _owner(intent.claim), certain)
            elif world.cancelled and self.mutation != "submits after a cancel":
                yield f"does not ask for {told}: cancelled", _with_client(world, who, None), certain
            elif world.cancelled:
                yield f"asks sbatch for {told}", "an array is asked for after a cancel", certain
            else:
                earlier = number - 1 if intent.alone and self.mutation != "voids nothing" else 0
                intents = tuple(self._voided(each) for each in world.intents[:earlier]) + world.intents[earlier:]
                after = world._replace(intents=intents, flights=(*world.flights, Flight(number)))
                after = _with_intent(after, number, intent._replace(asked=True, answer=0))
                yield f"asks sbatch for {told}", _with_client(after, who, client._replace(place="wait")), certain
        elif place == "look up":
            found = self._looked_up(world, number)
            if found == NO_ROOM:  # it may have room now
                after = _with_intent(world, number, intent._replace(asked=False, answer=0))
                ask = client._replace(place="ask")
                yield f"sees that there was no room for {told}", _with_client(after, who, ask), certain
            elif found:
                yield self._found(world, who, client, found, certain)
            else:  # twice, a grace period apart
                after = _with_client(world, who, client._replace(place="give up"))
                yield f"finds {told} nowhere", after, certain
        else:
            claim = intent.claim or VOID
            after = _with_intent(world, number, intent._replace(claim=claim))
            yield self._found(after, who, client, _owner(claim), certain)

    def _voided(self, intent: Intent) -> Intent:
        """Let an intent start nothing more."""
        if "owner" in self.setup.guards and intent.claim:
            return intent if intent.claim < 0 else intent._replace(claim=FORMER - intent.claim)
        return intent._replace(claim=VOID)

    def _asked(self, world: World) -> bool:
        """Say whether every trial was asked for."""
        return len({trial for each in world.intents if not each.void for trial, _ in each.trials}) == len(world.trials)

    def _looked_up(self, world: World, number: int) -> int:
        """Look for what became of an intent: a claim beats everything."""
        intent = world.intents[number - 1]
        answer = 0 if intent.answer == UNCLEAR else intent.answer
        listed = next((place for place, token, _ in self._queue(world) if token == number), 0)
        if self.mutation == "an answer before a claim":
            return answer or _owner(intent.claim) or listed
        return _owner(intent.claim) or answer or listed

    def _found(self, world: World, who: int, client: Client, found: int, certain: bool) -> Step:
        """Record what became of an intent, which has to be true, and go on."""
        number = client.last
        intent = world.intents[number - 1]
        follow = Client("look", settles=client.settles)
        if found == NO_ROOM:
            after = _with_intent(world, number, intent._replace(void="full", answer=0, claim=intent.claim or VOID))
            return f"hears that there was no room for intent {number}", _with_client(after, who, follow), certain
        if found == VOID:
            # The same again, under the next number.
            after = _with_intent(world, number, intent._replace(void="lost", answer=0))
            again = client._replace(place="filter" if client.settling else "write", settling=False)
            go_on = again if again.wanted else follow
            if client.settling and "close" in self.setup.guards:
                go_on = Client("begin", settles=client.settles)
            return f"records that intent {number} is void", _with_client(after, who, go_on), certain
        words = f"records intent {number} as array {found}"
        if intent.claim and found != _owner(intent.claim):
            return words, f"intent {number} is void, or another array's: its claim is {intent.claim}", certain
        after = _with_intent(world, number, intent._replace(id=found, answer=0))
        more = client._replace(place="write", wanted=client.wanted[1:], made=True)
        go_on = more if more.wanted and not client.settling else follow
        return words, _with_client(after, who, go_on), certain

    # What a client sees.

    def _queue(self, world: World) -> Rows:
        """Return squeue's answer: what waits or runs."""
        found = []
        for place, job in enumerate(world.jobs, 1):
            if "P" in job.tasks or "R" in job.tasks:
                found.append((place, job.token, tuple(each if each in {"P", "R"} else "-" for each in job.tasks)))
            elif job.given and self.mutation == "alive by a recorded id" and place in {i.id for i in world.intents}:
                found.append((place, job.token, ()))
        return tuple(found)

    def _data(self, world: World, rows: Rows, files: Files | None = None) -> Data:
        """Return what a client knows that has squeue's answer, and reads the rest now."""
        known = {each.id for each in world.intents} | {place for place, _, _ in rows}
        accounts = tuple(
            (place, job.token, job.tasks, job.restarts) for place, job in enumerate(world.jobs, 1) if place in known
        )
        records = tuple((each.trials, each.chunk, each.void) for each in world.intents)
        trials = world.trials if files is None else files
        return _seen(self.setup.policy, rows, accounts, records, trials, world.cancelled > 0, world.waited)

    def _decided(self, data: Data) -> tuple[tuple[Action, ...], tuple[Submit, ...]]:
        """Decide, and say what is to be submitted."""
        actions = decide(data.state, data.now)
        wanted = tuple(each for each in actions if isinstance(each, Submit))
        if self.mutation == "what never started burns an attempt":
            asked = data.state.asked or {}
            wanted = tuple(
                replace(
                    each, trials=tuple((trial, max(attempt, asked.get(trial, 0) + 1)) for trial, attempt in each.trials)
                )
                if each.trials is not None
                else each
                for each in wanted
            )
        return actions, wanted


class Data(NamedTuple):
    """What `decide` decides over."""

    state: State
    now: float


_BEGAN = datetime.fromtimestamp(0, UTC)
_SAID = {"ok": "COMPLETED", "gave way": "COMPLETED", "bad": "FAILED", "term": "CANCELLED", "scancelled": "CANCELLED"}


@lru_cache(maxsize=200_000)
def _seen(
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


def _unfinished(data: Data) -> tuple[Submit, ...]:
    """Return what a client that comes to a run submits, as submit.py does."""
    state = data.state
    left = [(trial, state.attempts.get(trial, 0) + 1) for trial, said in enumerate(state.states) if said in UNFINISHED]
    return arrange(state, left, data.now) if left else ()


def _still(world: World, wanted: tuple[Submit, ...], *, active: bool, guarded: bool) -> Iterator[Submit]:
    """Yield what of it nobody else has asked for meanwhile, as intents.py does."""
    earlier = [each for each in world.intents if not each.void]
    asked: dict[int, int] = {}
    for trial, attempt in (pair for each in earlier for pair in each.trials):
        asked[trial] = max(attempt, asked.get(trial, 0))
    done = [each.chunk for each in earlier]
    for submit in wanted:
        if submit.trials is None:
            if done != [(chunk, submit.chunks) for chunk in range(submit.chunk)]:
                return
            done.append((submit.chunk, submit.chunks))
            yield submit
            continue
        left = tuple(
            (trial, attempt)
            for trial, attempt in submit.trials
            if attempt > len(world.trials[trial])
            and not (active and (trial in asked if guarded else attempt <= asked.get(trial, 0)))
        )
        if left:
            yield replace(submit, trials=left)


def _owner(claim: int) -> int:
    """Return whose a token is, or was; VOID where it never was any array's."""
    return FORMER - claim if claim < FORMER else claim


def _pairs(submit: Submit, trials: int) -> Pairs:
    if submit.trials is not None:
        return submit.trials
    return tuple((trial, 1) for trial in range(submit.chunk, trials, submit.chunks))


def _told(pairs: Pairs) -> str:
    return " ".join(f"{trial}:{attempt}" for trial, attempt in pairs)


def _live(world: World) -> list[tuple[int, int, str]]:
    """Return the tasks that wait or run, each its array's place, its own, and which."""
    return [
        (place, task, state)
        for place, job in enumerate(world.jobs)
        for task, state in enumerate(job.tasks)
        if state in {"P", "R"}
    ]


def _running(world: World) -> set[int]:
    """Return the trials that run."""
    live = _live(world)
    return {world.intents[world.jobs[place].token - 1].trials[task][0] for place, task, state in live if state == "R"}


def _ended(world: World, place: int, task: int, how: str) -> World:
    """End what runs, and write its line."""
    job = world.jobs[place]
    trial = world.intents[job.token - 1].trials[task][0]
    trials = _put(world.trials, trial, (*world.trials[trial][:-1], how))
    return _with_job(world._replace(trials=trials), place, job._replace(tasks=_put(job.tasks, task, how)))


T = TypeVar("T")


def _put(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _with_client(world: World, who: int, client: Client | None) -> World:
    return world._replace(clients=_put(world.clients, who, client))


def _with_intent(world: World, number: int, intent: Intent) -> World:
    return world._replace(intents=_put(world.intents, number - 1, intent))


def _with_job(world: World, place: int, job: Job) -> World:
    return world._replace(jobs=_put(world.jobs, place, job))


def _faulty(world: World) -> World:
    return world._replace(faults=world.faults - 1)

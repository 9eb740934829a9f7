"""The explorer's clients, which decide as real ones do, and with them all that may happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nexa_infra.runs.attempts import UNFINISHED
from nexa_infra.scheduling.decide import Action, Finish, Stop, Submit, arrange, decide
from tests.explorer_cluster import Cluster
from tests.explorer_world import (
    NO_ROOM,
    UNCLEAR,
    VOID,
    Client,
    Data,
    Files,
    Flight,
    Intent,
    Pairs,
    Rows,
    Setup,
    Step,
    World,
    faulty,
    owner,
    running,
    seen,
    with_client,
    with_intent,
)

# Where a client does not hold the run's lock, which only those of one machine have in common.
UNLOCKED = frozenset({"begin", "look", "follow", "look again", "close follow"})


class Model(Cluster):
    """What may happen, clients and all."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
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
        yield from self.cluster(world)
        yield from self.person(world)
        done = self.ended(world)
        for who, client in enumerate(world.clients):
            if client is None:
                if not done:
                    yield f"client {who} begins", with_client(world, who, Client("begin")), True
                    if self.setup.steward:
                        steward = Client("look", settles=False)
                        yield f"client {who} begins as a steward", with_client(world, who, steward), True
                continue
            if self.may(world, "kill"):
                yield f"client {who} is killed", with_client(faulty(world), who, None), False
            for words, after, certain in self._client(world, who, client):
                yield f"client {who} {words}", after, certain

    # The client: its program, cut wherever something else may happen.

    def _client(self, world: World, who: int, client: Client) -> Iterator[Step]:
        place = client.place

        def at(after: World, place: str, **changes: object) -> World:
            return with_client(after, who, client._replace(place=place, **changes))  # type: ignore[arg-type]

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
                yield "leaves a cancelled run", with_client(world, who, None), True
        elif place == "look":
            yield from self._look(world, who, client, "follow")
        elif place == "look again":
            active = bool(self._queue(world))
            going = client._replace(place="filter", active=active)
            yield "looks again: active" if active else "looks again", with_client(world, who, going), True
        elif place.startswith(("close ", "void ")):
            yield from self._close(world, who, client)
        elif place in {"look run", "look follow"}:
            yield from self._look(world, who, client, f"{place[5:]} closed")
        elif place in {"run", "follow", "run closed", "follow closed"}:
            yield from self._read(world, who, client)
        elif place == "filter":
            if world.cancelled and self.mutation != "submits after a cancel":
                yield "sees the cancel", with_client(world, who, follow), True
            else:
                guarded = "active" in self.setup.guards
                still = tuple(_still(world, client.wanted, active=client.active, guarded=guarded))
                last = client.last if client.closed else len(world.intents)
                writes = client._replace(place="write", wanted=still, last=last, made=False, closed=False)
                if not still:
                    yield "sees that nothing of it stands", with_client(world, who, follow), True
                elif len(world.clients) > 1:
                    yield "sees what still stands", with_client(world, who, writes), True
                else:  # whatever comes between the two may as well come afterwards
                    yield from self._client(world, who, writes)
        elif place == "write":
            if len(world.intents) > client.last:
                yield "sees that another was first", with_client(world, who, follow), True
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
            yield "looks again: active", with_client(world, who, go_on), True
        elif word == "close" and len(world.clients) == 1:
            yield "looks again", with_client(world, who, client._replace(place=f"void {purpose}")), True
        else:
            after = world._replace(intents=tuple(self.voided(each) for each in world.intents))
            looks = client._replace(place=f"look {purpose}", last=len(world.intents))
            yield "makes every token void", with_client(after, who, looks), True

    def _look(self, world: World, who: int, client: Client, place: str) -> Iterator[Step]:
        if self.mutation == "status before squeue":
            yield "reads the files", with_client(world, who, client._replace(place=place, files=world.trials)), True
            return
        rows = self._queue(world)
        if rows and place == "follow" and self.waits and self._asked(world):
            return  # whatever the files say, it looks again
        words = "looks at the queue:" + "".join(f" array {at} {''.join(tasks)}" for at, _, tasks in rows)
        yield words, with_client(world, who, client._replace(place=place, rows=rows)), True

    def _read(self, world: World, who: int, client: Client) -> Iterator[Step]:
        """Read the files, after the queue, and decide."""
        if client.place.endswith("closed") and len(world.intents) > client.last:
            yield "sees that another was first", with_client(world, who, Client("look", settles=client.settles)), True
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
                yield "reads the cancel", with_client(world, who, follow), True
            elif not last.id and not last.void and client.place == "run":
                after = client._replace(place="ask", wanted=wanted, last=number, settling=True)
                yield f"sees to intent {number}", with_client(world, who, after), True
            elif wanted and client.place == "run" and "close" in self.setup.guards:
                yield "wants to go on", with_client(world, who, client._replace(place="close run")), True
            elif wanted:
                closed = client.place == "run closed"
                after = client._replace(place="filter", active=False, wanted=wanted, closed=closed)
                yield "reads the files, to go on", with_client(world, who, after), True
            else:
                yield "reads the files, and follows", with_client(world, who, follow), True
            return
        actions, wanted = self._decided(data)
        if wanted:
            told = " and ".join(_told(_pairs(each, self.setup.trials)) for each in wanted)
            place = "filter"
            if client.place == "follow":
                place = "close follow" if "close" in self.setup.guards else "look again"
            going = client._replace(place=place, wanted=wanted, closed=place == "filter", active=False)
            yield f"decides on {told}", with_client(world, who, going), True
        elif any(isinstance(each, Stop) for each in actions):
            ends = world.trials[0]
            failed = ends and "ok" not in ends and self.final(ends)
            stopped = with_client(world, who, follow)._replace(cancelled=world.cancelled or 1, stopped=True)
            yield "stops the run", stopped if failed else "falsely finished: the canary has not failed", True
        elif Finish() in actions and client.place == "follow" and "close" in self.setup.guards and not world.cancelled:
            yield "would finish", with_client(world, who, client._replace(place="close follow")), True
        elif any(isinstance(each, Finish) for each in actions):
            yield "takes it for finished", self._false_end(world, data) or with_client(world, who, None), True
        else:
            yield "reads the files, and waits", with_client(world, who, follow), True

    def _false_end(self, world: World, data: Data) -> str | None:
        """Say what is wrong with taking the run for finished."""
        if world.cancelled:
            return None
        for trial, (ends, state) in enumerate(zip(world.trials, data.state.states, strict=True)):
            if trial in running(world):
                return f"falsely finished: trial {trial} runs"
            if not ends and self.setup.policy.canary and world.trials[0] and self.final(world.trials[0]):
                continue  # nobody saw the canary end, so that it is not said to have failed: the run is unfinished
            # Of a task that vanished from among its like, nobody can know that nobody has cancelled it.
            if not (ends and self.final(ends)) and state != "cancelled":
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
                yield f"hears no clear answer to {told}", with_client(world, who, look_up), True
            elif intent.answer:
                yield self._found(world, who, client, self._looked_up(world, number), True)
            if self.may(world, "unheard"):
                words = f"loses its connection while it waits for {told}"
                yield words, with_client(faulty(world), who, look_up), False
            return
        if not all(each.late for each in world.flights):  # another sbatch holds the lock
            if not self.may(world, "lock"):
                return
            world, told, certain = faulty(world), f"{told}, though the lock is held", False
        if place == "ask":
            if intent.asked and self.mutation != "asks without a look-up":
                yield f"finds that {told} was asked for", with_client(world, who, look_up), certain
            elif intent.claim:
                yield self._found(world, who, client, owner(intent.claim), certain)
            elif world.cancelled and self.mutation != "submits after a cancel":
                yield f"does not ask for {told}: cancelled", with_client(world, who, None), certain
            elif world.cancelled:
                yield f"asks sbatch for {told}", "an array is asked for after a cancel", certain
            else:
                earlier = number - 1 if intent.alone and self.mutation != "voids nothing" else 0
                intents = tuple(self.voided(each) for each in world.intents[:earlier]) + world.intents[earlier:]
                after = world._replace(intents=intents, flights=(*world.flights, Flight(number)))
                after = with_intent(after, number, intent._replace(asked=True, answer=0))
                yield f"asks sbatch for {told}", with_client(after, who, client._replace(place="wait")), certain
        elif place == "look up":
            found = self._looked_up(world, number)
            if found == NO_ROOM:  # it may have room now
                after = with_intent(world, number, intent._replace(asked=False, answer=0))
                ask = client._replace(place="ask")
                yield f"sees that there was no room for {told}", with_client(after, who, ask), certain
            elif found:
                yield self._found(world, who, client, found, certain)
            else:  # twice, a grace period apart
                after = with_client(world, who, client._replace(place="give up"))
                yield f"finds {told} nowhere", after, certain
        else:
            claim = intent.claim or VOID
            after = with_intent(world, number, intent._replace(claim=claim))
            yield self._found(after, who, client, owner(claim), certain)

    def _asked(self, world: World) -> bool:
        """Say whether every trial was asked for."""
        return len({trial for each in world.intents if not each.void for trial, _ in each.trials}) == len(world.trials)

    def _looked_up(self, world: World, number: int) -> int:
        """Look for what became of an intent: a claim beats everything."""
        intent = world.intents[number - 1]
        answer = 0 if intent.answer == UNCLEAR else intent.answer
        listed = next((place for place, token, _ in self._queue(world) if token == number), 0)
        if self.mutation == "an answer before a claim":
            return answer or owner(intent.claim) or listed
        return owner(intent.claim) or answer or listed

    def _found(self, world: World, who: int, client: Client, found: int, certain: bool) -> Step:
        """Record what became of an intent, which has to be true, and go on."""
        number = client.last
        intent = world.intents[number - 1]
        follow = Client("look", settles=client.settles)
        if found == NO_ROOM:
            after = with_intent(world, number, intent._replace(void="full", answer=0, claim=intent.claim or VOID))
            return f"hears that there was no room for intent {number}", with_client(after, who, follow), certain
        if found == VOID:
            # The same again, under the next number.
            after = with_intent(world, number, intent._replace(void="lost", answer=0))
            again = client._replace(place="filter" if client.settling else "write", settling=False)
            go_on = again if again.wanted else follow
            if client.settling and "close" in self.setup.guards:
                go_on = Client("begin", settles=client.settles)
            return f"records that intent {number} is void", with_client(after, who, go_on), certain
        words = f"records intent {number} as array {found}"
        if intent.claim and found != owner(intent.claim):
            return words, f"intent {number} is void, or another array's: its claim is {intent.claim}", certain
        after = with_intent(world, number, intent._replace(id=found, answer=0))
        more = client._replace(place="write", wanted=client.wanted[1:], made=True)
        go_on = more if more.wanted and not client.settling else follow
        return words, with_client(after, who, go_on), certain

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
        return seen(self.setup.policy, rows, accounts, records, trials, world.cancelled > 0, world.waited)

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


def _pairs(submit: Submit, trials: int) -> Pairs:
    if submit.trials is not None:
        return submit.trials
    return tuple((trial, 1) for trial in range(submit.chunk, trials, submit.chunks))


def _told(pairs: Pairs) -> str:
    return " ".join(f"{trial}:{attempt}" for trial, attempt in pairs)

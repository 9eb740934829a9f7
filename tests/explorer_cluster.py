"""What happens to the explorer's world without a client: its controller, its nodes, and a person's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.explorer_world import (
    FORMER,
    NO_ROOM,
    UNCLEAR,
    VOID,
    Flight,
    Intent,
    Job,
    Setup,
    Step,
    World,
    faulty,
    live_tasks,
    put,
    running,
    with_end,
    with_intent,
    with_job,
)


class Cluster:
    """What may happen though no client does anything."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.mutation = setup.mutation

    def ended(self, world: World) -> bool:
        """Say whether the run has ended, and nothing of it is left."""
        if any(world.clients) or live_tasks(world) or not all(each.late for each in world.flights):
            return False
        if world.cancelled:
            return world.cancelled == 2
        return all(ends and self.final(ends) for ends in world.trials)

    def may(self, world: World, kind: str) -> bool:
        """Say whether a fault of a kind may still come."""
        return world.faults > 0 and kind in self.setup.kinds

    def final(self, ends: tuple[str, ...]) -> bool:
        """Say whether a trial that does not run has completed, or has used up what it may."""
        kinds = Counter({"bad": "failed", "pre": "preempted", "": "node_fail"}.get(end, end) for end in ends)
        last = {"bad": "failed", "pre": "preempted", "": "node_fail"}.get(ends[-1], ends[-1])
        if last in {"ok", "term"}:
            return last == "ok"
        return last not in self.setup.policy.retry_on or kinds[last] > self.setup.policy.retries

    def voided(self, intent: Intent) -> Intent:
        """Let an intent start nothing more."""
        if "owner" in self.setup.guards and intent.claim:
            return intent if intent.claim < 0 else intent._replace(claim=FORMER - intent.claim)
        return intent._replace(claim=VOID)

    def cluster(self, world: World) -> Iterator[Step]:
        """Yield what the controller and the nodes may do."""
        for flight in world.flights:
            yield from self._sbatch(world, flight)
        for place, job in enumerate(world.jobs):
            name = f"array {place + 1} of intent {job.token}"
            if self.may(world, "forget") and {"P", "R"} & set(job.tasks):
                # What waits may come back; what runs ends, and nobody hears of it.
                after = job._replace(tasks=tuple({"P": "H", "R": "unseen"}.get(each, each) for each in job.tasks))
                yield f"the controller forgets {name}", with_job(faulty(world), place, after), False
            if "H" in job.tasks:
                after = job._replace(tasks=tuple("P" if each == "H" else each for each in job.tasks))
                if "remember" in self.setup.kinds:
                    yield f"the controller remembers {name}", with_job(world, place, after), False
                if self.may(world, "given"):
                    after = job._replace(tasks=tuple("gone" if each == "H" else each for each in job.tasks), given=True)
                    yield f"the id of {name} is another job's", with_job(faulty(world), place, after), False
            for task, state in enumerate(job.tasks):
                trial = world.intents[job.token - 1].trials[task][0]
                what = f"trial {trial} in {name}"
                if state == "P":
                    started = self._started(world, place, task)
                    if started is None:
                        gone = tuple("gave way" if each == "P" else each for each in job.tasks)
                        yield f"{name} gives way", with_job(world, place, job._replace(tasks=gone)), True
                        break
                    yield f"{what} starts", started, True
                elif state == "R":
                    yield f"{what} ends well", with_end(world, place, task, "ok"), True
                    if trial < self.setup.bad:
                        yield f"{what} fails", with_end(world, place, task, "bad"), True
                    if world.requeues:
                        ended = with_end(world._replace(requeues=world.requeues - 1), place, task, "pre")
                        restarts = put(job.restarts, task, job.restarts[task] + 1)
                        waits = ended.jobs[place]._replace(tasks=put(job.tasks, task, "P"), restarts=restarts)
                        yield f"{what} is preempted and requeued", with_job(ended, place, waits), False
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
        answered = with_intent(taken, number, intent._replace(answer=len(taken.jobs)))
        yield f"the controller takes intent {number} as array {len(taken.jobs)}", answered, True
        if self.may(world, "late"):
            after = faulty(world)._replace(flights=(*flights, Flight(number, late=True)))
            unclear = with_intent(after, number, intent._replace(answer=UNCLEAR))
            yield f"the sbatch of intent {number} ends without an answer", unclear, False
        if world.fulls:
            after = world._replace(flights=flights, fulls=world.fulls - 1)
            yield (
                f"intent {number}: the queue is full",
                with_intent(after, number, intent._replace(answer=NO_ROOM)),
                False,
            )

    def _started(self, world: World, place: int, task: int) -> World | str | None:
        """Start a task, as job.sbatch does: the first array of a token owns it; None where it gives way."""
        job = world.jobs[place]
        intent = world.intents[job.token - 1]
        if self.mutation != "no claims":
            if not intent.claim:
                intent = intent._replace(claim=place + 1)
                world = with_intent(world, job.token, intent)
            if intent.claim != place + 1:
                return None
        trial, attempt = intent.trials[task]
        attempt += job.restarts[task]
        ends = world.trials[trial]
        if world.cancelled == 2:
            return f"trial {trial} starts after a cancel"
        if attempt <= len(ends):
            return f"doubled: attempt {attempt} of trial {trial} starts twice"
        if trial in running(world):
            return f"doubled: trial {trial} starts while it runs"
        if "ok" in ends:
            return f"doubled: trial {trial} starts, and has completed"
        if ends and ends[-1] and self.final(ends):  # what nobody saw end, a person's resume may run again
            return f"doubled: trial {trial} starts, and has used up its attempts"
        if attempt != len(ends) + 1:
            return f"attempt {attempt} of trial {trial} starts, and attempt {len(ends) + 1} never has"
        world = world._replace(trials=put(world.trials, trial, (*ends, "")))
        return with_job(world, place, job._replace(tasks=put(job.tasks, task, "R")))

    def person(self, world: World) -> Iterator[Step]:
        """Yield what a person may say, and what follows from it."""
        if world.cancels and not world.cancelled and world.intents and not self.ended(world):
            yield "a person cancels", world._replace(cancelled=1, cancels=world.cancels - 1), False
        if world.cancelled == 1:
            void = tuple(self.voided(each) for each in world.intents)
            yield "the cancel makes every token void", world._replace(intents=void, cancelled=2), True
        if world.cancelled == 2 and (live := live_tasks(world)):
            after = world
            for place, task, state in live:
                if state == "R":
                    after = with_end(after, place, task, "term")
                else:
                    job = after.jobs[place]
                    after = with_job(after, place, job._replace(tasks=put(job.tasks, task, "scancelled")))
            yield "the cancel ends all arrays", after, True
        if world.cancelled == 2 and not live and not world.stopped:
            yield "a person resumes", world._replace(cancelled=0), False

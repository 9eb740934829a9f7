"""Following a run: polls, and what is decided after each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal

from nexa_infra.errors import HostError, UnknownStateError
from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import read_states
from nexa_infra.runs.series import Progress
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, Wait, decide
from nexa_infra.scheduling.submit import submit_trials
from nexa_infra.scheduling.vitals import MetricsWatch, health_of
from nexa_infra.settings import settings

# A run's age over the longest sensible time between two polls of it.
GROWTH = 30
# How often the trials' own words are read, though the scheduler says nothing new, seconds.
READ_SECONDS = 10.0
# How long a scheduler may say that a trial runs which has said that it has completed, seconds.
SETTLE_SECONDS = 20.0


@dataclass(frozen=True)
class Poll:
    """How a run stands: trials by state, and seconds since it was first looked at."""

    total: int
    states: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...] = ()  # what keeps it from going on, where a person should know
    progress: Progress | None = None  # of a training that has said how far it is
    warnings: tuple[str, ...] = ()  # what is wrong with its metrics; each is said once

    @property
    def over(self) -> int:
        """Trials that have ended, well or badly."""
        return sum(count for state, count in self.states.items() if state not in {"pending", "running"})

    def __str__(self) -> str:
        parts = [f"{count:,} {state}" for state, count in self.states.items() if count]
        told = f"{self.over:,}/{self.total:,} trials over in {self.seconds:.0f} s: {', '.join(parts) or 'none yet'}"
        progress = [str(self.progress)] if self.progress is not None else []
        return "; ".join([told, *progress, *self.notes, *self.warnings])


async def follow(
    run: Run, scheduler: Scheduler, *, period: float, ceiling: float | None = None
) -> AsyncGenerator[Poll, None]:
    """Yield polls until the run is over, submitting retries and stopping it as its policy says.

    `period` is the time between two polls, in seconds; it grows with the run, up to `ceiling`. A
    scheduler that cannot be asked is asked again, until NEXA_PATIENCE is over. A follower that is
    cancelled ends only what would end with its process anyway.

    Raises:
        UnknownStateError: nobody could say how the run stands, or nothing of it can ever start; it is left as it is.
    """
    policy = policy_of(run)
    metrics = MetricsWatch(run)
    started = answered = time.monotonic()
    seen: Queue | None = None
    told: Counter[str] = Counter()
    read = started  # when the trials' own words were last read
    done: float | None = None  # when every trial was first seen to have completed
    try:
        while True:
            looked = time.monotonic()
            reading = 0.0
            try:
                queue = await asyncio.to_thread(scheduler.poll, run)
            except (HostError, UnknownStateError) as error:
                silent = looked - answered
                if silent > settings().patience:
                    raise UnknownStateError(
                        f"run {run.id}: {error}. Its jobs are left as they are; `nexa-infra resume {run.id}` goes on"
                    ) from error
                words = (f"not known for {silent:.0f} s: {error}",)
                yield Poll(run.trials, told, looked - started, words, metrics.progress)
                await asyncio.sleep(min(max(period, 1.0), 30.0))
                continue
            answered = time.monotonic()
            if queue.stuck is not None and seen is not None and seen.stuck is not None:
                raise UnknownStateError(
                    f"run {run.id} can never go on as it is: what is left of it is {queue.stuck}. Nothing was "
                    f"cancelled: `nexa-infra cancel {run.id}` ends it"
                )
            action: Action = Wait()
            # Trials may end, and one array task start another, without a change in the queue's numbers.
            due = queue != seen or not queue.active or looked - read > READ_SECONDS
            moved = metrics.health is not None and await asyncio.to_thread(metrics.read)
            if due or metrics.health is not None:
                seen = queue
                begun = time.monotonic()
                read = begun if due else read
                state = await asyncio.to_thread(read_state, run, scheduler, queue, metrics)
                reading = time.monotonic() - begun
                warnings = metrics.warnings(state.vitals, policy)
                if (counts := Counter(state.states)) != told or (due and queue.notes) or moved or warnings:
                    told = counts
                    since = time.monotonic() - started
                    yield Poll(run.trials, counts, since, queue.notes, metrics.progress, warnings)
                action = decide(state, policy)
                if all(said == "completed" for said in state.states):
                    done = done or time.monotonic()
            # A controller that was away may believe for minutes that what has ended runs.
            if done is not None and time.monotonic() - done > SETTLE_SECONDS:
                return
            match action:
                case Submit(trials):
                    await asyncio.to_thread(submit_trials, run, scheduler, trials)
                case Stop(reason):
                    await asyncio.to_thread(stop, run, scheduler, reason, by="policy")
                    seen = None
                case Finish():
                    return
            # A large run takes longer to read: that never takes more than a tenth of the time.
            grown = min(max(period, (time.monotonic() - started) / GROWTH), ceiling or period)
            await asyncio.sleep(max(grown, 9 * reading))
    except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
        if scheduler.ends_with_client(run):
            scheduler.cancel(run)
        raise


def stop(run: Run, scheduler: Scheduler, reason: str, *, by: Literal["person", "policy"]) -> None:
    """End a run by a person's word, or its policy's: the reason is recorded before anything ends."""
    mark_cancelled(run.files, reason, by=by)
    scheduler.cancel(run)


def read_state(run: Run, scheduler: Scheduler, queue: Queue, metrics: MetricsWatch) -> State:
    """Read what `decide` decides over; the queue was asked first, so nothing that ended since is missed."""
    tasks = scheduler.tasks(run)
    states, attempts = read_states(run.files, run.trials, tasks)
    used = {trial: tried[-1].number for trial, tried in attempts.items()}
    vitals = metrics.vitals(states, attempts, tasks)
    return State(queue.active, tuple(states), used, cancelled=run.files.cancelled.exists(), vitals=vitals)


def policy_of(run: Run) -> Policy:
    """Return what a run's config lets it do by itself."""
    retry, requeues = run.config.retry, run.config.checkpoint.most_requeues
    names = {"oom": "out_of_memory"}
    on = frozenset(names.get(word, word) for word in retry.on)
    if (health := health_of(run)) is None:
        return Policy(retry.times, on, retry.max_failures, requeues)
    return Policy(retry.times, on, retry.max_failures, requeues, health.nan, health.silence, health.stalled)

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
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, Wait, decide
from nexa_infra.scheduling.submit import submit_trials
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

    @property
    def over(self) -> int:
        """Trials that have ended, well or badly."""
        return sum(count for state, count in self.states.items() if state not in {"pending", "running"})

    def __str__(self) -> str:
        parts = [f"{count:,} {state}" for state, count in self.states.items() if count]
        told = f"{self.over:,}/{self.total:,} trials over in {self.seconds:.0f} s: {', '.join(parts) or 'none yet'}"
        return "; ".join([told, *self.notes])


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
                yield Poll(run.trials, told, looked - started, (f"not known for {silent:.0f} s: {error}",))
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
            if queue != seen or not queue.active or looked - read > READ_SECONDS:
                seen = queue
                begun = read = time.monotonic()
                state = await asyncio.to_thread(read_state, run, scheduler, queue)
                reading = time.monotonic() - begun
                if (counts := Counter(state.states)) != told or queue.notes:
                    told = counts
                    yield Poll(run.trials, counts, time.monotonic() - started, queue.notes)
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


def read_state(run: Run, scheduler: Scheduler, queue: Queue) -> State:
    """Read what `decide` decides over; the queue was asked first, so nothing that ended since is missed."""
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    used = {trial: tried[-1].number for trial, tried in attempts.items()}
    return State(queue.active, tuple(states), used, cancelled=run.files.cancelled.exists())


def policy_of(run: Run) -> Policy:
    """Return what a run's config lets it do by itself."""
    retry = run.config.retry
    names = {"oom": "out_of_memory"}
    return Policy(retry.times, frozenset(names.get(word, word) for word in retry.on), retry.max_failures)

"""Following a run: polls, and what is decided after each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from nexa_infra.errors import HostError, UnknownStateError
from nexa_infra.runs.record import Run
from nexa_infra.runs.series import Progress
from nexa_infra.scheduling.act import carry_out
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.counts import Counting
from nexa_infra.scheduling.decide import Action, Stop, decide, waiting
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.recorded import read_state
from nexa_infra.scheduling.vitals import MetricsWatch

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
    scheduler that cannot be asked is asked again, until its patience is over. A follower that is
    cancelled ends only what would end with its process anyway.

    Raises:
        UnknownStateError: nobody could say how the run stands, or nothing of it can ever start; it is left as it is.
    """
    policy = policy_of(run)
    counting = Counting(run, scheduler, period)
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
                if silent > scheduler.patience:
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
            actions: tuple[Action, ...] = ()
            # Trials may end, and one array task start another, without a change in the queue's numbers.
            due = queue != seen or not queue.active or looked - read > READ_SECONDS
            moved = metrics.health is not None and await asyncio.to_thread(metrics.read)
            if due or metrics.health is not None:
                seen = queue
                begun = time.monotonic()
                read = begun if due else read
                state = await asyncio.to_thread(read_state, run, policy_of(run), scheduler, queue, metrics)
                policy = state.policy
                reading = time.monotonic() - begun
                warnings = metrics.warnings(state.vitals, policy)
                unsubmitted = waiting(state)
                notes = (*queue.notes, *([unsubmitted] if unsubmitted else []))
                if (counts := Counter(state.states)) != told or (due and notes) or moved or warnings:
                    told = counts
                    since = time.monotonic() - started
                    yield Poll(run.trials, counts, since, notes, metrics.progress, warnings)
                actions = decide(state, time.time())
                if all(said == "completed" for said in state.states):
                    done = done or time.monotonic()
            # A controller that was away may believe for minutes that what has ended runs.
            if done is not None and time.monotonic() - done > SETTLE_SECONDS:
                return
            try:
                if await asyncio.to_thread(carry_out, run, scheduler, actions):
                    return
            except (HostError, UnknownStateError) as error:
                seen = None  # it is decided anew
                yield Poll(run.trials, told, looked - started, (f"not done yet: {error}",), metrics.progress)
            seen = None if any(isinstance(each, Stop) for each in actions) else seen
            # A large run takes longer to read: that never takes more than a tenth of the time.
            grown = min(max(period, (time.monotonic() - started) / GROWTH), ceiling or period)
            await asyncio.sleep(max(grown, 9 * reading))
    except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
        if scheduler.ends_with_client(run):
            scheduler.cancel(run)
        raise
    finally:
        counting.close()

"""Following a run: polls, and what is decided after each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal

from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import read_states
from nexa_infra.scheduling.base import Queue, Scheduler
from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, Wait, decide
from nexa_infra.scheduling.submit import submit_trials


@dataclass(frozen=True)
class Poll:
    """How a run stands: trials by state, and seconds since it was first looked at."""

    total: int
    states: Mapping[str, int]
    seconds: float

    @property
    def over(self) -> int:
        """Trials that have ended, well or badly."""
        return sum(count for state, count in self.states.items() if state not in {"pending", "running"})

    def __str__(self) -> str:
        parts = [f"{count:,} {state}" for state, count in self.states.items() if count]
        return f"{self.over:,}/{self.total:,} trials over in {self.seconds:.0f} s: {', '.join(parts) or 'none yet'}"


async def follow(run: Run, scheduler: Scheduler, *, period: float) -> AsyncGenerator[Poll, None]:
    """Yield polls until the run is over, submitting retries and stopping it as its policy says.

    `period` is the time between two polls, in seconds. A follower that is cancelled ends
    only what would end with its process anyway.
    """
    policy = policy_of(run)
    started = time.monotonic()
    seen: Queue | None = None
    told: Counter[str] = Counter()
    try:
        while True:
            looked = time.monotonic()
            queue = await asyncio.to_thread(scheduler.poll, run)
            action: Action = Wait()
            if queue != seen or not queue.active:
                seen = queue
                state = await asyncio.to_thread(read_state, run, scheduler, queue)
                if (counts := Counter(state.states)) != told:
                    told = counts
                    yield Poll(run.trials, counts, time.monotonic() - started)
                action = decide(state, policy)
            match action:
                case Submit(trials):
                    await asyncio.to_thread(submit_trials, run, scheduler, trials)
                case Stop(reason):
                    await asyncio.to_thread(stop, run, scheduler, reason, by="policy")
                    seen = None
                case Finish():
                    return
            # A large run takes longer to look at: looking never takes more than a tenth of the time.
            await asyncio.sleep(max(period, 9 * (time.monotonic() - looked)))
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

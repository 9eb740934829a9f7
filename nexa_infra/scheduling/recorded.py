"""What is recorded of a run, as `decide` reads it: the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nexa_infra.runs.attempts import TaskState, read_states
from nexa_infra.runs.submissions import Recorded, Submission, read_submissions, trials_of
from nexa_infra.scheduling.base import Queue
from nexa_infra.scheduling.budget import affordable, lives_of, read_limit
from nexa_infra.scheduling.decide import Full, Policy, State, Vitals
from nexa_infra.scheduling.history import asked_for, early_ends, ends_of, failed_nodes, typical_seconds
from nexa_infra.scheduling.slurm.seen import charges_of

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.scheduling.base import Scheduler
    from nexa_infra.scheduling.vitals import MetricsWatch


def read_state(
    run: Run, policy: Policy, scheduler: Scheduler, queue: Queue, metrics: MetricsWatch | None = None
) -> State:
    """Read what `decide` decides over, once the scheduler has said how the queue stands."""
    tasks = scheduler.tasks(run)
    said, failures = scheduler.ends(run), scheduler.failures(run)
    return state_of(run, policy, queue, tasks, said=said, failures=failures, metrics=metrics)


def state_of(
    run: Recorded,
    policy: Policy,
    queue: Queue,
    tasks: Mapping[int, TaskState],
    *,
    said: Mapping[tuple[int, int], str] | None = None,
    failures: Iterable[tuple[str, float]] = (),
    metrics: MetricsWatch | None = None,
) -> State:
    """Read what `decide` decides over; the queue was asked first, so nothing that ended since is missed.

    `said` is the scheduler's word on how attempts ended, `failures` on nodes that went away, and when.
    """
    states, attempts = read_states(run.files, run.trials, tasks)
    submissions = read_submissions(run.files)
    asked, lost = asked_for((trials_of(run, each) for each in submissions if each.void is None), attempts)
    said = said or {}
    limits = read_limits(run)
    most = limits.get("queue_size")
    full, taken = _full(submissions)
    return State(
        active=queue.active,
        states=states,
        attempts={trial: tried[-1].number for trial, tried in attempts.items()},
        asked=asked,
        ends=ends_of(states, attempts, said),
        lost=lost,
        early=early_ends(states, attempts, policy.breaker, _reopened(run)) if policy.breaker else (),
        nodes=failed_nodes(failures),
        arrays=queue.arrays,
        room=None if most is None or queue.queued is None else most - queue.queued,
        full=full,
        taken=taken,
        affordable=room_in_budget(run, submissions, said),
        seconds=typical_seconds(states, attempts) if policy.pack is None else None,
        cancelled=run.files.cancelled.exists(),
        vitals=metrics.vitals(states, attempts, tasks) if metrics is not None else Vitals(),
        policy=policy,
    )


def room_in_budget(run: Recorded, submissions: Iterable[Submission], said: Mapping[tuple[int, int], str]) -> int | None:
    """Return how many more attempts a run's budget has room for; None where none is held by waves.

    `said` is accounting's word on attempts that have ended.
    """
    place = run.files.path / "steward"
    limit = read_limit(place)
    if limit is None:
        return None
    asked = (trials_of(run, each) for each in submissions if each.void is None)
    return affordable(limit, asked, charges_of(run), dict.fromkeys(said, True), lives_of(place))


def throttled(run: Recorded, most: int | None) -> int | None:
    """Return how many trials may run at once: as many as the config says, unless a person has said another word."""
    try:
        word = run.files.throttle.read_text().strip()
    except FileNotFoundError:
        return most
    return int(word) if word.isdigit() and int(word) else None


def read_limits(run: Recorded) -> dict[str, Any]:
    """Read what the cluster allows; what it did not say is not there."""
    try:
        found = json.loads(run.files.limits.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {name: most for name, most in found.items() if isinstance(most, int)}


def _full(submissions: list[Submission]) -> tuple[Full | None, int | None]:
    """Return when the queue took no more, unless it took something since, and what it took last, if it was full."""
    told = [each for each in submissions if each.void != "lost"]
    if not any(each.void == "full" for each in told):
        return None, None
    taken = next((each.tasks for each in reversed(told) if each.void is None), None)
    last = told[-1]
    return (Full(last.tasks, last.created_at.timestamp()) if last.void == "full" else None), taken


def _reopened(run: Recorded) -> float:
    """Return when a person let the run go on after its end, seconds since the epoch; 0 is never."""
    try:
        return run.files.reopened.stat().st_mtime
    except FileNotFoundError:
        return 0.0

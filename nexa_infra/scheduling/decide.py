"""What happens next to a run: one pure function over its recorded state; the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Policy:
    """What the run may do by itself."""

    retries: int = 0
    retry_on: frozenset[str] = frozenset()
    max_failures: int | None = None
    requeues: int | None = 0  # how often a trial that ran out of time, or gave way, may go on; None: as it takes
    nan: Literal["warn", "stop", "ignore"] = "warn"  # where a training's loss is no finite number
    silence: float | None = None  # how long a training's metrics may stand still, seconds; None is for ever
    stalled: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class Vitals:
    """What a training's metrics say of its newest attempt."""

    unsound: Mapping[str, str] = field(default_factory=dict)  # metric -> what of it is no finite number, a sentence
    silent: float | None = None  # seconds since the last new line; None where it does not run
    step: str = ""  # where it stands: step 40/100; empty where it has said nothing


@dataclass(frozen=True)
class State:
    """What is recorded of a run: each trial's state and how many attempts it has used."""

    active: bool  # whether the scheduler still has something of the run
    states: tuple[str, ...]
    attempts: Mapping[int, int] = field(default_factory=dict)
    cancelled: bool = False
    vitals: Vitals = field(default_factory=Vitals)


@dataclass(frozen=True)
class Wait:
    """Something of the run waits or runs: look again later."""


@dataclass(frozen=True)
class Stop:
    """End what runs; nothing more is submitted."""

    reason: str


@dataclass(frozen=True)
class Submit:
    """Run these trials again, as one array: trial and attempt."""

    trials: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Finish:
    """The run is over, well or badly."""


Action = Wait | Stop | Submit | Finish


def decide(state: State, policy: Policy) -> Action:
    """Say what happens next to a run.

    A failure is final where it is not retried, or has no attempt left; only final ones count
    towards `max_failures`.
    """
    if state.cancelled:
        return Wait() if state.active else Finish()
    if state.active and (reason := _ill(state.vitals, policy)) is not None:
        return Stop(reason)
    again = [index for index in range(len(state.states)) if _left(state, policy, index)]
    final = sum(said in _BAD for said in state.states) - len(again)
    if policy.max_failures is not None and final >= policy.max_failures:
        counted = "1 trial" if final == 1 else f"{final} trials"
        reason = f"{counted} failed, and retry.max_failures is {policy.max_failures}"
        return Stop(reason) if state.active or "pending" in state.states else Finish()
    if state.active:
        return Wait()
    if again:
        return Submit(tuple((index, state.attempts[index] + 1) for index in again))
    return Finish()


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


_BAD = frozenset({"failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline", "preempted"})


# Ends of a trial that has been interrupted, and goes on from its checkpoint.
_INTERRUPTED = frozenset({"timeout", "preempted"})


def _left(state: State, policy: Policy, index: int) -> bool:
    """Say whether a trial that ended badly has an attempt left."""
    said, used = state.states[index], state.attempts.get(index, 0)
    if not used:
        return False
    if said in _INTERRUPTED and (policy.requeues is None or used <= policy.requeues):
        return True
    return said in policy.retry_on and used <= policy.retries

"""What happens next to a run: one pure function over its recorded state; the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Policy:
    """What the run may do by itself."""

    retries: int = 0
    retry_on: frozenset[str] = frozenset()
    max_failures: int | None = None


@dataclass(frozen=True)
class State:
    """What is recorded of a run: each trial's state and how many attempts it has used."""

    active: bool  # whether the scheduler still has something of the run
    states: tuple[str, ...]
    attempts: Mapping[int, int] = field(default_factory=dict)
    cancelled: bool = False


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
    failed = [index for index, said in enumerate(state.states) if said in policy.retry_on]
    final = sum(said in _BAD for said in state.states) - len(again := [i for i in failed if _left(state, policy, i)])
    if policy.max_failures is not None and final >= policy.max_failures:
        counted = "1 trial" if final == 1 else f"{final} trials"
        reason = f"{counted} failed, and retry.max_failures is {policy.max_failures}"
        return Stop(reason) if state.active or "pending" in state.states else Finish()
    if state.active:
        return Wait()
    if again:
        return Submit(tuple((index, state.attempts[index] + 1) for index in again))
    return Finish()


_BAD = frozenset({"failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline", "preempted"})


def _left(state: State, policy: Policy, index: int) -> bool:
    return 0 < state.attempts.get(index, 0) <= policy.retries

"""What happens next to a run."""

from __future__ import annotations

import pytest

from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, Wait, decide

RETRY = Policy(retries=1, retry_on=frozenset({"failed", "timeout"}))


@pytest.mark.parametrize(
    ("state", "policy", "expected"),
    [
        (State(True, ("running", "pending")), Policy(), Wait()),
        (State(False, ("completed", "completed")), Policy(), Finish()),
        (State(False, ("completed", "failed"), {0: 1, 1: 1}), Policy(), Finish()),
        (State(True, ("failed", "running"), {0: 1, 1: 1}), RETRY, Wait()),
        (State(False, ("failed", "completed"), {0: 1, 1: 1}), RETRY, Submit(((0, 2),))),
        (State(False, ("failed", "timeout"), {0: 2, 1: 1}), RETRY, Submit(((1, 2),))),
        (State(False, ("failed", "timeout"), {0: 2, 1: 2}), RETRY, Finish()),
        (State(False, ("out_of_memory",), {0: 1}), RETRY, Finish()),
        (State(False, ("failed",), {}), RETRY, Finish()),  # its script never came to the trial
        (State(True, ("failed", "running"), {0: 1}, cancelled=True), RETRY, Wait()),
        (State(False, ("failed", "cancelled"), {0: 1}, cancelled=True), RETRY, Finish()),
        (State(False, ("interrupted", "pending"), {0: 1}), RETRY, Finish()),
    ],
)
def test_what_comes_next(state: State, policy: Policy, expected: Action) -> None:
    assert decide(state, policy) == expected


def test_a_failure_counts_towards_the_most_only_once_it_is_final() -> None:
    policy = Policy(retries=1, retry_on=frozenset({"failed"}), max_failures=1)
    assert decide(State(True, ("failed", "running"), {0: 1}), policy) == Wait()
    stop = decide(State(True, ("failed", "running"), {0: 2}), policy)
    assert stop == Stop("1 trial failed, and retry.max_failures is 1")

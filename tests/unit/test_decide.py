"""What happens next to a run."""

from __future__ import annotations

import pytest

from nexa_infra.scheduling.decide import Action, Finish, Policy, State, Stop, Submit, Vitals, Wait, decide

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


CHAIN = Policy(requeues=None)
REQUEUE = Policy(requeues=2)


@pytest.mark.parametrize(
    ("states", "used", "policy", "expected"),
    [
        # What was interrupted goes on, as often as it may.
        (("timeout",), {0: 1}, Policy(), Finish()),
        (("timeout",), {0: 1}, REQUEUE, Submit(((0, 2),))),
        (("preempted",), {0: 2}, REQUEUE, Submit(((0, 3),))),
        (("timeout",), {0: 3}, REQUEUE, Finish()),
        (("timeout",), {0: 3}, Policy(requeues=2, retries=3, retry_on=frozenset({"timeout"})), Submit(((0, 4),))),
        (("timeout", "preempted", "completed"), {0: 1, 1: 3, 2: 1}, REQUEUE, Submit(((0, 2),))),
        # A chain ends only by itself.
        (("timeout",), {0: 99}, CHAIN, Submit(((0, 100),))),
        (("preempted",), {0: 99}, CHAIN, Submit(((0, 100),))),
        (("timeout",), {}, CHAIN, Finish()),
        # What failed was not interrupted.
        (("failed",), {0: 1}, CHAIN, Finish()),
        (("out_of_memory",), {0: 1}, REQUEUE, Finish()),
        (("node_fail",), {0: 1}, REQUEUE, Finish()),
        (("cancelled",), {0: 1}, CHAIN, Finish()),
    ],
)
def test_what_was_interrupted_goes_on(
    states: tuple[str, ...], used: dict[int, int], policy: Policy, expected: Action
) -> None:
    assert decide(State(False, states, used), policy) == expected
    assert decide(State(True, states, used), policy) == Wait(), "a job that puts itself back is waited for"
    assert decide(State(False, states, used, cancelled=True), policy) == Finish()


def test_an_interruption_counts_towards_the_most_only_once_it_is_final() -> None:
    policy = Policy(requeues=1, max_failures=1)
    assert decide(State(False, ("timeout", "completed"), {0: 1, 1: 1}), policy) == Submit(((0, 2),))
    assert decide(State(False, ("timeout", "completed"), {0: 2, 1: 1}), policy) == Finish()
    stop = decide(State(True, ("timeout", "running"), {0: 2, 1: 1}), policy)
    assert stop == Stop("1 trial failed, and retry.max_failures is 1")


def test_a_failure_counts_towards_the_most_only_once_it_is_final() -> None:
    policy = Policy(retries=1, retry_on=frozenset({"failed"}), max_failures=1)
    assert decide(State(True, ("failed", "running"), {0: 1}), policy) == Wait()
    stop = decide(State(True, ("failed", "running"), {0: 2}), policy)
    assert stop == Stop("1 trial failed, and retry.max_failures is 1")


NAN = Vitals({"train_loss": "train_loss is NaN at step 40"}, silent=0.0, step="step 40/100")
SILENT = Vitals(silent=600.0, step="step 40/100")


@pytest.mark.parametrize(
    ("vitals", "policy", "expected"),
    [
        (NAN, Policy(), Wait()),
        (NAN, Policy(nan="stop"), Stop("train_loss is NaN at step 40, and health.nan is stop")),
        (SILENT, Policy(stalled="stop"), Wait()),
        (SILENT, Policy(silence=600.0), Wait()),
        (SILENT, Policy(silence=601.0, stalled="stop"), Wait()),
        (
            SILENT,
            Policy(silence=600.0, stalled="stop"),
            Stop("no new line of metrics since step 40/100, for 600 s, and health.stalled is stop"),
        ),
        (
            Vitals(silent=9.0),
            Policy(silence=9.0, stalled="stop"),
            Stop("no new line of metrics since it started, for 9 s, and health.stalled is stop"),
        ),
        (Vitals(silent=None), Policy(silence=9.0, stalled="stop"), Wait()),
    ],
)
def test_a_training_is_ended_for_its_metrics_only_where_its_config_says_so(
    vitals: Vitals, policy: Policy, expected: Action
) -> None:
    assert decide(State(True, ("running",), {0: 1}, vitals=vitals), policy) == expected


def test_what_has_ended_is_not_ended_for_its_metrics() -> None:
    policy = Policy(retries=1, retry_on=frozenset({"failed"}), nan="stop")
    assert decide(State(False, ("completed",), {0: 1}, vitals=NAN), policy) == Finish()
    assert decide(State(False, ("failed",), {0: 1}, vitals=NAN), policy) == Submit(((0, 2),))
    assert decide(State(True, ("running",), {0: 1}, cancelled=True, vitals=NAN), policy) == Wait()

"""What happens next to a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexa_infra.scheduling import decide as decisions
from nexa_infra.scheduling.arrays import Array, Throttle
from nexa_infra.scheduling.decide import Action, Finish, Full, Policy, State, Stop, Submit, Vitals


def decide(state: State, policy: Policy, now: float = 0.0) -> Action | tuple[Action, ...]:
    """Return the one action, or all of them; none is `WAIT`."""
    actions = decisions.decide(replace(state, policy=policy), now)
    return actions[0] if len(actions) == 1 else actions


WAIT: tuple[Action, ...] = ()

RETRY = Policy(retries=1, retry_on=frozenset({"failed", "timeout"}))


@pytest.mark.parametrize(
    ("state", "policy", "expected"),
    [
        (State(True, ("running", "pending")), Policy(), WAIT),
        (State(False, ("completed", "completed")), Policy(), Finish()),
        (State(False, ("completed", "failed"), {0: 1, 1: 1}), Policy(), Finish()),
        (State(True, ("failed", "running"), {0: 1, 1: 1}), RETRY, WAIT),
        (State(False, ("failed", "completed"), {0: 1, 1: 1}), RETRY, Submit(((0, 2),))),
        (State(False, ("failed", "timeout"), {0: 2, 1: 1}), RETRY, Submit(((1, 2),))),
        (State(False, ("failed", "timeout"), {0: 2, 1: 2}), RETRY, Finish()),
        (State(False, ("out_of_memory",), {0: 1}), RETRY, Finish()),
        (State(False, ("failed",), {}), RETRY, Finish()),  # its script never came to the trial
        (State(True, ("failed", "running"), {0: 1}, cancelled=True), RETRY, WAIT),
        (State(False, ("failed", "cancelled"), {0: 1}, cancelled=True), RETRY, Finish()),
        # What was asked for and never started is asked for again: its attempt is not spent.
        (State(False, ("interrupted", "pending"), {0: 1}), RETRY, Submit(((1, 1),))),
        (State(False, ("interrupted", "pending"), {0: 1}), replace(RETRY, local=True), Finish()),
        (State(False, ("completed", "pending"), {0: 1}, lost={1: 5}), RETRY, Finish()),
        # What nobody saw the end of went away with its node.
        (State(False, ("interrupted",), {0: 1}), replace(RETRY, retry_on=frozenset({"node_fail"})), Submit(((0, 2),))),
    ],
)
def test_what_comes_next(state: State, policy: Policy, expected: Action | tuple[Action, ...]) -> None:
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
    states: tuple[str, ...], used: dict[int, int], policy: Policy, expected: Action | tuple[Action, ...]
) -> None:
    assert decide(State(False, states, used), policy) == expected
    assert decide(State(True, states, used), policy) == WAIT, "a job that puts itself back is waited for"
    assert decide(State(False, states, used, cancelled=True), policy) == Finish()


def test_an_interruption_counts_towards_the_most_only_once_it_is_final() -> None:
    policy = Policy(requeues=1, max_failures=1)
    assert decide(State(False, ("timeout", "completed"), {0: 1, 1: 1}), policy) == Submit(((0, 2),))
    assert decide(State(False, ("timeout", "completed"), {0: 2, 1: 1}), policy) == Finish()
    stop = decide(State(True, ("timeout", "running"), {0: 2, 1: 1}), policy)
    assert stop == Stop("1 trial failed, and retry.max_failures is 1")


def test_a_failure_counts_towards_the_most_only_once_it_is_final() -> None:
    policy = Policy(retries=1, retry_on=frozenset({"failed"}), max_failures=1)
    assert decide(State(True, ("failed", "running"), {0: 1}), policy) == WAIT
    stop = decide(State(True, ("failed", "running"), {0: 2}), policy)
    assert stop == Stop("1 trial failed, and retry.max_failures is 1")


NAN = Vitals({"train_loss": "train_loss is NaN at step 40"}, silent=0.0, step="step 40/100")
SILENT = Vitals(silent=600.0, step="step 40/100")


@pytest.mark.parametrize(
    ("vitals", "policy", "expected"),
    [
        (NAN, Policy(), WAIT),
        (NAN, Policy(nan="stop"), Stop("train_loss is NaN at step 40, and health.nan is stop")),
        (SILENT, Policy(stalled="stop"), WAIT),
        (SILENT, Policy(silence=600.0), WAIT),
        (SILENT, Policy(silence=601.0, stalled="stop"), WAIT),
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
        (Vitals(silent=None), Policy(silence=9.0, stalled="stop"), WAIT),
    ],
)
def test_a_training_is_ended_for_its_metrics_only_where_its_config_says_so(
    vitals: Vitals, policy: Policy, expected: Action | tuple[Action, ...]
) -> None:
    assert decide(State(True, ("running",), {0: 1}, vitals=vitals), policy) == expected


def test_what_has_ended_is_not_ended_for_its_metrics() -> None:
    policy = Policy(retries=1, retry_on=frozenset({"failed"}), nan="stop")
    assert decide(State(False, ("completed",), {0: 1}, vitals=NAN), policy) == Finish()
    assert decide(State(False, ("failed",), {0: 1}, vitals=NAN), policy) == Submit(((0, 2),))
    assert decide(State(True, ("running",), {0: 1}, cancelled=True, vitals=NAN), policy) == WAIT


MORE = Policy(retries=1, retry_on=frozenset({"failed", "preempted", "out_of_memory"}), memory=1000, memory_factor=1.5)


def test_each_kind_of_end_is_counted_for_itself() -> None:
    failed = State(False, ("failed",), {0: 2}, ends={0: {"preempted": 1, "failed": 1}})
    assert decide(failed, MORE) == Submit(((0, 3),))
    assert decide(replace(failed, ends={0: {"failed": 2}}), MORE) == Finish()


def test_what_ran_out_of_memory_gets_more_in_an_array_of_its_own() -> None:
    state = State(
        False,
        ("out_of_memory", "failed", "out_of_memory"),
        {0: 1, 1: 1, 2: 2},
        ends={0: {"out_of_memory": 1}, 1: {"failed": 1}, 2: {"out_of_memory": 2}},
    )
    twice = replace(MORE, retries=2)
    assert decide(state, twice) == (
        Submit(((0, 2),), memory=1500),
        Submit(((1, 2),)),
        Submit(((2, 3),), memory=2250),
    )


def test_a_node_that_failed_twice_is_left_out() -> None:
    state = State(False, ("failed",), {0: 1}, nodes={"n1": 1, "n2": 2})
    assert decide(state, MORE) == Submit(((0, 2),), exclude=("n2",))


def fresh(count: int, **more: object) -> State:
    return replace(State(False, ("pending",) * count, asked={}), **more)  # type: ignore[arg-type]


def test_a_run_larger_than_an_array_becomes_strided_chunks_whose_shares_sum_up() -> None:
    policy = Policy(array_size=1000, parallelism=25)
    actions = decisions.decide(replace(fresh(10_000), policy=policy), 0.0)
    assert [each.chunk for each in actions if isinstance(each, Submit)] == list(range(10))
    assert all(isinstance(each, Submit) and each.trials is None and each.after is None for each in actions)
    assert sum(each.limit or 0 for each in actions if isinstance(each, Submit)) == 25


def test_fewer_at_once_than_arrays_makes_chains() -> None:
    policy = Policy(array_size=10, parallelism=3)
    actions = decisions.decide(replace(fresh(75), policy=policy), 0.0)
    told = [(each.limit, each.after) for each in actions if isinstance(each, Submit)]
    assert told == [(1, None), (1, None), (1, None), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_no_more_is_asked_for_than_there_is_room_for() -> None:
    first = decide(fresh(100, room=30), Policy(array_size=1000))
    assert isinstance(first, Submit)
    assert first.trials == tuple((trial, 1) for trial in range(30))
    live = (Array("7", pending=20, running=0),)
    later = fresh(100, room=10, asked=dict.fromkeys(range(30), 1), arrays=live, active=True)
    assert isinstance(decide(later, Policy()), Submit)
    assert decide(replace(later, room=4), Policy()) == WAIT, "an array a task that ends would be too many"
    last = decide(replace(later, room=1000), Policy())
    assert isinstance(last, Submit)
    assert last.trials == tuple((trial, 1) for trial in range(30, 100))


def test_a_full_queue_is_tried_again_later_with_half() -> None:
    full = fresh(100, active=True, full=Full(100, 50.0))
    assert decide(full, Policy(), 60.0) == WAIT
    half = decide(full, Policy(), 200.0)
    assert isinstance(half, Submit)
    assert len(half.trials or ()) == 50
    one = decide(replace(full, active=False, full=Full(1, 50.0)), Policy(), 60.0)
    assert one == WAIT, "nothing at all fits: that is not asked over and over"


def test_the_canary_goes_first_and_the_rest_only_after_it() -> None:
    policy = Policy(canary=2)
    assert decide(fresh(9), policy) == Submit(((0, 1), (1, 1)))
    going = fresh(9, asked={0: 1, 1: 1}, active=True)
    assert decide(going, policy) == WAIT
    states = ("failed", "failed", *("pending",) * 7)
    over = replace(going, active=False, states=states, attempts={0: 1, 1: 1})
    assert decide(over, policy) == Stop("no trial of the first 2 completed, and canary is 2")
    assert decide(over, replace(policy, retries=1, retry_on=frozenset({"failed"}))) == Submit(((0, 2), (1, 2)))
    one = replace(over, states=("failed", "completed", *("pending",) * 7))
    assert decide(one, policy) == Submit(tuple((trial, 1) for trial in range(2, 9)))


def test_the_first_to_end_may_not_all_fail_in_the_same_way() -> None:
    policy = Policy(breaker=3)
    ends = ("failed with exit code 1",) * 3
    state = State(True, ("failed", "failed", "failed", "pending"), {0: 1, 1: 1, 2: 1}, early=ends)
    assert decide(state, policy) == Stop(
        "the first 3 trials to end all failed with exit code 1, and retry.breaker is 3"
    )
    assert decide(replace(state, early=(*ends[:2], "failed with exit code 2")), policy) == WAIT
    assert decide(replace(state, states=("failed",) * 3 + ("running",)), policy) == WAIT, "nothing is left to save"


def test_short_trials_share_a_task_once_it_is_known_how_short_they_are() -> None:
    policy = Policy(pack=None, parallelism=4)
    probes = decide(fresh(1000), policy)
    assert isinstance(probes, Submit)
    assert (len(probes.trials or ()), probes.pack) == (4, 1)
    known = fresh(1000, seconds=6.0, asked=dict.fromkeys(range(4), 1), states=("completed",) * 4 + ("pending",) * 996)
    packed = decide(known, policy)
    assert isinstance(packed, Submit)
    assert packed.pack == 100
    assert isinstance(short := decide(replace(known, seconds=0.01), policy), Submit)
    assert short.pack == 249, "whatever may run at once has something to run"


def test_what_the_budget_has_no_room_for_is_not_begun() -> None:
    policy = Policy(budget="$5.00")
    assert decide(fresh(9, affordable=2), policy) == Submit(((0, 1), (1, 1)))
    assert decide(fresh(9, affordable=0, active=True), policy) == WAIT
    assert decide(fresh(9, affordable=0), policy) == Stop("the budget of $5.00 leaves no room for 9 trials more")


def test_a_run_with_room_to_spare_gives_it_to_what_waits() -> None:
    tail, other = Array("1", 0, 1, 5), Array("2", 50, 5, 5)
    state = State(True, ("running",), arrays=(tail, other))
    assert decide(state, Policy(parallelism=10)) == Throttle("2", 9)
    held = Array("3", 20, 0, 1, held=True)
    state = replace(state, arrays=(tail, held))
    assert decide(state, Policy(parallelism=10)) == Throttle("3", 9)

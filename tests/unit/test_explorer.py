"""No trial is lost, doubled or falsely finished, whatever comes between whatever: see tests/explorer.py."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import get_args

import pytest

from nexa_infra.runs.attempts import TrialState
from nexa_infra.scheduling.decide import Policy, State, decide
from tests.explorer import GUARDS, CutOffError, Setup, WrongError, explore

RETRY = Policy(retries=1, retry_on=frozenset({"failed", "node_fail", "preempted"}))
ONE = Setup(RETRY, bad=1)

# Which of the explorer's guards nexa_infra/scheduling/intents.py, slurm/submit.sh and slurm/scheduler.py have.
AS_IT_IS: frozenset[str] = GUARDS

EXPLORED = {
    "faults": ONE,
    "a cancel": replace(ONE, faults=1, cancels=1),
    "a full queue": replace(ONE, faults=1, fulls=1),
    "a requeue": replace(ONE, faults=1, requeues=1, kinds=frozenset({"kill", "unheard", "late"})),
    "a requeue, and a forgetful controller": replace(ONE, faults=1, requeues=1),
    "chunks": replace(ONE, policy=replace(RETRY, array_size=1), bad=2, faults=1),
    "a canary": replace(ONE, policy=replace(RETRY, canary=1)),
    "two clients": replace(ONE, clients=2, faults=0, steward=True),
    "two clients, and a fault": replace(ONE, clients=2, trials=1, faults=1, steward=True),
}
LARGE = {
    "three faults": replace(ONE, faults=3),
    "a cancel, and two faults": replace(ONE, faults=2, cancels=1),
    "two clients, and a fault": replace(ONE, clients=2, faults=1, steward=True),
}


@pytest.mark.parametrize("name", EXPLORED)
def test_nothing_is_lost_or_doubled_or_falsely_finished(name: str) -> None:
    found = explore(replace(EXPLORED[name], guards=AS_IT_IS), most_worlds=400_000)
    print(f"{name}: {found}")
    assert found.ends


@pytest.mark.skipif(
    os.environ.get("NEXA_EXPLORE") != "large", reason="takes minutes, and gigabytes: NEXA_EXPLORE=large"
)
@pytest.mark.parametrize("name", LARGE)
def test_no_more_faults_change_that(name: str) -> None:
    found = explore(replace(LARGE[name], guards=AS_IT_IS), most_worlds=8_000_000)
    print(f"{name}: {found}")
    assert found.ends


@pytest.mark.parametrize(
    ("mutation", "setup", "told"),
    [
        ("no claims", ONE, "doubled"),
        ("an answer before a claim", replace(ONE, faults=1, cancels=1), "its claim is"),
        ("submits after a cancel", replace(ONE, faults=1, cancels=1), "asked for after a cancel"),
        ("status before squeue", ONE, "doubled"),
        ("what never started burns an attempt", ONE, "never has"),
        ("alive by a recorded id", ONE, "can never end"),
    ],
)
def test_logic_that_is_wrong_is_found_out(mutation: str, setup: Setup, told: str) -> None:
    with pytest.raises(WrongError, match=told):
        explore(replace(setup, mutation=mutation))


@pytest.mark.parametrize("left_out", sorted(GUARDS))
def test_every_guard_is_needed(left_out: str) -> None:
    setup = replace(ONE, faults=1, cancels=1, guards=GUARDS - {left_out})
    with pytest.raises(WrongError, match="doubled"):
        explore(setup)


def test_what_is_cut_off_fails() -> None:
    with pytest.raises(CutOffError, match="more than 1,000 worlds"):
        explore(ONE, most_worlds=1_000)


def test_an_active_run_of_which_all_was_asked_for_is_waited_for() -> None:
    """The explorer leaves out that such a client reads the files."""
    for states in itertools.product(get_args(TrialState), repeat=2):
        for attempts in ({}, {0: 1}, {0: 1, 1: 2}):
            for cancelled in (False, True):
                state = State(True, states, attempts, asked={0: 1, 1: 1}, cancelled=cancelled, policy=RETRY)
                assert decide(state, 0.0) == ()

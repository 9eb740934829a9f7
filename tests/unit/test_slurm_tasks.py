"""What Slurm's rows say of array tasks, told of trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from nexa_infra.monitoring.charges import Charge
from nexa_infra.runs.attempts import Attempt, TaskState
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.slurm.tasks import (
    Left,
    Trials,
    charged,
    charges,
    left,
    queue_of,
    task_states,
    unexplained,
    unstarted,
)
from nexa_infra.scheduling.slurm.text import AccountingRow, read_accounting, read_queue

NEVER = "None|Unknown|None assigned"


def submission(number: int = 1, trials: int = 4, *, chunk: int = 0, chunks: int = 1) -> tuple[Submission, Trials]:
    made = Submission(
        number=number,
        token=f"nexa-r-{number}",
        trials=trials,
        array=f"0-{trials - 1}",
        chunk=chunk,
        chunks=chunks,
        created_at=datetime(2026, 11, 24, tzinfo=UTC),
    )
    return made, [[(task * chunks + chunk, 1)] for task in range(trials)]


def listed(number: int, *trials: tuple[int, int]) -> tuple[Submission, Trials]:
    made, _ = submission(number, len(trials))
    return replace(made, listed=f"submissions/{number}.trials"), [[trial] for trial in trials]


def sacct(*rows: str) -> list[AccountingRow]:
    """Rows of `job state code elapsed number steps`: the number is the submission's, and the last may be left out."""
    lines = []
    for row in rows:
        job, state, code, elapsed, number, *more = row.split("|")
        steps = more[0] if more else "0:0"
        began, nodes = ("1001", "n1") if elapsed else ("Unknown", "None assigned")
        held = "billing=2,cpu=2,gres/gpu:a100=1,gres/gpu=1,node=1" if elapsed else ""
        ended = "Unknown" if state in {"RUNNING", "PENDING"} else "1061"
        said = f"{job}|{state}|{code}|{steps}|{elapsed or 0}|{held}"
        lines.append(f"{said}|cpu=2|1000|{began}|{ended}|{nodes}|None|nexa-r-{number}")
    found = read_accounting("\n".join(lines))
    assert len(found) == len(rows)
    return found


def attempts(*told: tuple[int, int, int | None]) -> dict[int, list[Attempt]]:
    """Attempts of `trial, number, exit code`; None is one whose end was not seen."""
    found: dict[int, list[Attempt]] = {}
    for trial, number, code in told:
        ended = None if code is None else 1060.0
        found.setdefault(trial, []).append(Attempt(trial, number, 1001.0, "n1", ended, code))
    return found


def states(
    submissions: Sequence[tuple[Submission, Trials]],
    queue: str = "",
    accounts: Sequence[AccountingRow] = (),
    tried: dict[int, list[Attempt]] | None = None,
    gone: Sequence[Left] = (),
) -> dict[int, tuple[int, str]]:
    """The attempt and the state of each trial."""
    return {
        trial: (task.attempt, task.state) for trial, task in tasks(submissions, queue, accounts, tried, gone).items()
    }


def tasks(
    submissions: Sequence[tuple[Submission, Trials]],
    queue: str = "",
    accounts: Sequence[AccountingRow] = (),
    tried: dict[int, list[Attempt]] | None = None,
    gone: Sequence[Left] = (),
) -> dict[int, TaskState]:
    return task_states(submissions, read_queue(queue), gone, accounts, tried or {}, "01:00:00")


# ---- the queue ----


def test_a_queue_counts_tasks_and_says_why_they_wait() -> None:
    rows = read_queue(
        "9|9|2-5%2|PENDING|JobHeldUser|nexa-r-1\n8|9|0|RUNNING|None|nexa-r-1\n7|9|1|FAILED|NonZeroExitCode|nexa-r-1\n"
    )
    queue = queue_of(rows)
    assert (queue.active, queue.pending, queue.running, queue.ended) == (True, 4, 1, {"FAILED": 1})
    assert queue.notes == ("4 trials held (JobHeldUser): `scontrol release 9` lets it start",)
    assert queue.stuck is None
    assert not queue_of(read_queue("7|9|1|FAILED|NonZeroExitCode|nexa-r-1")).active


@pytest.mark.parametrize(
    ("lines", "stuck"),
    [
        ("9|9|0-3|PENDING|DependencyNeverSatisfied|n", True),
        ("9|9|0-3|PENDING|DependencyNeverSatisfied|n\n8|8|0|PENDING|Priority|m", False),
        ("9|9|1-3|PENDING|PartitionConfig|n\n8|9|0|RUNNING|None|n", False),
        ("9|9|0-3|PENDING|JobHeldUser|n", False),
        ("9|9|0-3|COMPLETED|None|n", False),
    ],
)
def test_a_queue_is_stuck_where_nothing_of_it_can_ever_start(lines: str, stuck: bool) -> None:
    assert (queue_of(read_queue(lines)).stuck is not None) is stuck


def test_what_ended_by_the_scheduler_s_hand_is_kept_and_what_waits_again_is_not() -> None:
    rows = read_queue(
        "9|9|0|TIMEOUT|TimeLimit|n\n9|9|1|COMPLETED|None|n\n9|9|2|REQUEUED|None|n\n9|9|3|COMPLETING|None|n\n"
        "9|9|4-6|CANCELLED|None|n\n"
    )
    assert left(rows) == [Left("9", "0", "TIMEOUT", "n"), Left("9", "4-6", "CANCELLED", "n")]


# ---- states ----


def test_squeue_beats_sacct_which_beats_what_was_seen() -> None:
    accounts = sacct("9_0|RUNNING|0:0|5|1", "9_1|TIMEOUT|0:0|60|1", "9_2|FAILED|3:0|60|1")
    queue = "9|9|3|PENDING|Priority|nexa-r-1\n8|9|0|RUNNING|None|nexa-r-1\n7|9|2|FAILED|NonZeroExitCode|nexa-r-1"
    gone = [Left("9", "1-3", "CANCELLED", "nexa-r-1")]
    tried = attempts((0, 1, None), (1, 1, None), (2, 1, 3))
    assert states([submission()], queue, accounts, tried, gone) == {
        0: (1, "RUNNING"),
        1: (1, "TIMEOUT"),
        2: (1, "FAILED"),
        3: (1, "PENDING"),
    }


def test_what_sacct_says_of_an_end_carries_when_and_whose() -> None:
    accounts = sacct("9_0|CANCELLED by 1000|0:15|60|1", "9_1|TIMEOUT|0:0|60|1", "9_2|OUT_OF_MEMORY|0:125|60|1",
                     "9_3|FAILED|0:53|60|1")  # fmt: skip
    found = tasks([submission()], "", accounts, attempts(*((trial, 1, None) for trial in range(4))))
    assert found[0].words == "was cancelled by user 1000 on n1 (CANCELLED by 1000)"
    assert "ran into its walltime of 01:00:00 on n1 (TIMEOUT)" in found[1].words
    assert [found[trial].exit_code for trial in range(4)] == [143, None, None, None], "Slurm's 0:0 is no exit code"
    assert {task.ended for task in found.values()} == {1061.0}


def test_a_step_that_ran_out_of_memory_is_told_as_such() -> None:
    # srun ends with 1, and so does the script: for Slurm it has failed.
    found = tasks([submission(1, 1)], "", sacct("9_0|FAILED|1:0|60|1|0:125"), attempts((0, 1, 1)))
    assert (found[0].state, found[0].exit_code) == ("OUT_OF_MEMORY", 1)
    assert found[0].words == "used more memory than it had asked for on n1 (OUT_OF_MEMORY): raise job.memory"


def test_chunks_are_strided_over_the_trials() -> None:
    two = [submission(1, 3, chunk=0, chunks=2), submission(2, 2, chunk=1, chunks=2)]
    queue = "9|9|1-2|PENDING|Priority|nexa-r-1\n8|9|0|RUNNING|None|nexa-r-1\n5|5|0-1|PENDING|Priority|nexa-r-2"
    assert states(two, queue) == {
        0: (1, "RUNNING"),
        2: (1, "PENDING"),
        4: (1, "PENDING"),
        1: (1, "PENDING"),
        3: (1, "PENDING"),
    }


def test_a_requeued_task_has_an_attempt_a_row() -> None:
    accounts = sacct("9_0|NODE_FAIL|0:0|10|1", "9_0|REQUEUED|0:0|20|1", "9_0|COMPLETED|0:0|30|1")
    one = [submission(1, 1)]
    assert [number for _, number, _ in charged(one, accounts, {})] == [1, 2, 3]
    assert states(one, "", accounts, attempts((0, 1, None), (0, 2, None), (0, 3, 0))) == {0: (3, "COMPLETED")}
    waiting = "9|9|0|PENDING|BeginTime|nexa-r-1"
    tried = attempts((0, 1, None), (0, 2, None))
    assert states(one, waiting, accounts[:2], tried) == {0: (3, "PENDING")}, "the next attempt is waited for"
    assert states(one, "9|9|0|RUNNING|None|nexa-r-1", accounts[:2], tried) == {0: (2, "RUNNING")}


def test_a_listed_submission_runs_the_trials_and_attempts_of_its_list() -> None:
    both = [submission(1, 4), listed(2, (3, 2), (1, 3))]
    accounts = sacct("9_[0-3]|FAILED|1:0|60|1", "12_0|COMPLETED|0:0|60|2", "12_1|NODE_FAIL|0:0|60|2",
                     "12_1|FAILED|1:0|60|2")  # fmt: skip
    tried = attempts(*((trial, 1, 1) for trial in range(4)), (3, 2, 0), (1, 3, None), (1, 4, 1))
    assert states(both, "", accounts, tried) == {
        0: (1, "FAILED"),
        1: (4, "FAILED"),
        2: (1, "FAILED"),
        3: (2, "COMPLETED"),
    }, "the newest submission of a trial speaks for it"


def test_an_id_that_was_given_to_another_job_says_nothing() -> None:
    accounts = [*sacct("9_0|COMPLETED|0:0|60|1"), *sacct("9_0|FAILED|1:0|60|7")]
    assert states([submission(1, 1)], "9|9|0|RUNNING|None|nexa-r-17", accounts, attempts((0, 1, 0))) == {
        0: (1, "COMPLETED")
    }


@pytest.mark.parametrize("task", ["[4-9%2]", "", "[0,3,...", "7"])
def test_a_task_that_the_array_has_not_is_left_out(task: str) -> None:
    accounts = sacct(f"9_{task}|FAILED|1:0|60|1" if task else "9|FAILED|1:0|60|1")
    assert list(charged([submission()], accounts, {})) == []


@pytest.mark.parametrize("tasks_", ["[0-3]", "[0-3%2]", "[0,1,2-3]", "[0-3:1]"])
def test_the_tasks_of_an_array_that_never_ran_are_one_row(tasks_: str) -> None:
    accounts = sacct(f"9_{tasks_}|CANCELLED by 0|0:0||1")
    found = tasks([submission()], "", accounts)
    assert {trial: task.state for trial, task in found.items()} == dict.fromkeys(range(4), "CANCELLED")
    assert all("CANCELLED by 0" in task.words for task in found.values())
    assert charges([submission()], accounts, {}) == {(trial, 1): Charge(0, 0, 0, 0) for trial in range(4)}, (
        "known: nothing"
    )


def test_a_waiting_task_that_vanished_was_cancelled() -> None:
    queue = "9|9|0-1,3|PENDING|JobHeldUser|nexa-r-1"
    found = tasks([submission()], queue)
    assert (found[2].attempt, found[2].state) == (1, "CANCELLED") and "left the queue before it started" in found[
        2
    ].words
    # Slurm forgets what has ended after minutes: those that ran are known by their own lines.
    tried = attempts((0, 1, 0), (1, 1, 0), (3, 1, 0))
    assert states([submission()], "", [], tried) == {2: (1, "CANCELLED")}
    assert states([submission()], "7|9|2|COMPLETED|None|nexa-r-1", [], tried) == {}, "it is there, and may be read late"
    assert states([submission()], "", sacct("9_2|FAILED|1:0|1|1"), tried) == {2: (1, "FAILED")}


def test_of_an_array_of_which_nobody_knows_nothing_is_said() -> None:
    assert states([submission()]) == {}
    forgotten = [submission(1, 2), listed(2, (0, 2), (1, 2))]
    assert states(forgotten, "", [], attempts((0, 1, None), (1, 1, None))) == {}


def test_of_two_arrays_of_one_token_the_one_that_gave_way_says_nothing() -> None:
    accounts = sacct("9_0|TIMEOUT|0:0|60|1", "9_1|COMPLETED|0:0|60|1", "12_[0-1]|COMPLETED|0:0|2|1")
    tried = attempts((0, 1, None), (1, 1, 0))
    for rows in (accounts, accounts[::-1]):
        assert states([submission(1, 2)], "", rows, tried) == {0: (1, "TIMEOUT"), 1: (1, "COMPLETED")}
    queue = "8|9|0|RUNNING|None|nexa-r-1\n12|12|0-1|PENDING|Priority|nexa-r-1"
    assert states([submission(1, 2)], queue, [], attempts((0, 1, None)))[0] == (1, "RUNNING")


# ---- who is to be asked about ----


def test_only_what_nobody_has_explained_is_asked_about() -> None:
    tried = attempts((0, 1, 0), (1, 1, 3), (2, 1, None))
    found = tasks([submission()], "9|9|3|PENDING|Priority|nexa-r-1", [], tried)
    assert unexplained([submission()], found, [], tried) == [1, 2]
    accounts = sacct("9_1|FAILED|3:0|60|1", "9_2|RUNNING|0:0|60|1")
    assert unexplained([submission()], found, accounts, tried) == [2], "accounting lags"


def test_what_failed_before_it_started_is_asked_about_for_its_cost() -> None:
    gone = left(read_queue("9|9|0|FAILED|None|nexa-r-1\n8|9|1|CANCELLED|None|nexa-r-1\n7|9|2|NODE_FAIL|None|nexa-r-1"))
    assert list(unstarted([submission()], gone, attempts((2, 1, None)))) == [(0, 1)], "the others: free, or known"
    assert list(unstarted([listed(2, (0, 2))], gone, {})) == [], "another's"


def test_an_earlier_submission_s_end_explains_nothing() -> None:
    both = [submission(1, 2), listed(2, (0, 1), (1, 1))]
    accounts = sacct("9_[0-1]|CANCELLED by 0|0:0||1")
    assert unexplained(both, {}, accounts, {}) == [0, 1]


# ---- costs ----


def test_every_attempt_is_charged_for_what_it_held() -> None:
    accounts = sacct("9_0|NODE_FAIL|0:0|10|1", "9_0|REQUEUED|0:0|20|1", "9_0|RUNNING|0:0|5|1", "9_1|COMPLETED|0:0|60|1")
    assert charges([submission(1, 2)], accounts, {}) == {
        (0, 1): Charge(10, 2, 1, 2),
        (0, 2): Charge(20, 2, 1, 2),
        (1, 1): Charge(60, 2, 1, 2),
    }, "what still runs is not charged yet"


def test_a_retry_is_charged_under_its_own_attempt() -> None:
    both = [submission(1, 2), listed(2, (1, 2))]
    accounts = sacct(
        "9_0|COMPLETED|0:0|60|1", "9_1|FAILED|1:0|30|1", "12_0|COMPLETED|0:0|40|2", "77_0|COMPLETED|0:0|9|6"
    )
    assert {key: charge.seconds for key, charge in charges(both, accounts, {}).items()} == {
        (0, 1): 60,
        (1, 1): 30,
        (1, 2): 40,
    }


def test_what_gave_way_is_paid_for_too() -> None:
    accounts = sacct("9_0|COMPLETED|0:0|60|1", "12_0|COMPLETED|0:0|2|1")
    assert charges([submission(1, 1)], accounts, {}) == {(0, 1): Charge(2, 2, 1, 2, Charge(60, 2, 1, 2))}


def test_an_attempt_that_went_on_with_fewer_nodes_is_one_and_paid_for_by_what_it_held_when() -> None:
    resized = sacct("9_0|RESIZING|0:0|21|1", "9_0|COMPLETED|0:0|71|1")
    assert charges([submission(1, 1)], resized, {}) == {(0, 1): Charge(71, 2, 1, 2, Charge(21, 2, 1, 2))}
    tried = {0: [Attempt(0, 1, 1.0, "n1", 90.0, 0)]}
    found = task_states([submission(1, 1)], [], [], resized, tried, "60")
    assert found[0].attempt == 1 and found[0].state == "COMPLETED"
    half = sacct("9_0|RESIZING|0:0|21|1")
    assert unexplained([submission(1, 1)], {}, half, {}) == [0], "accounting lags behind its end"


def test_what_accounting_cannot_say_is_not_charged_as_nothing() -> None:
    row = read_accounting("9_0|FAILED|1:0|0:0|60||cpu=2|1000|1001|1061|n1|None|nexa-r-1")
    assert charges([submission(1, 1)], row, {}) == {}

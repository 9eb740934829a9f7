"""What a run does by itself where trials fail, here: its canary, its breaker, its retries, its throttle."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from nexa_infra import launch_slurm_sweep
from nexa_infra.errors import NexaError, RunFailedError
from nexa_infra.operations import manage
from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.submissions import read_submissions
from tests.unit.test_local_runs import a_sweep, latest, project

__all__ = ["project"]


def states(**counts: int) -> dict[str, int]:
    return counts


def told() -> dict[str, int]:
    return {str(state): count for state, count in manage.report_of(latest()).states.items()}


def test_where_the_canary_fails_nothing_else_is_begun() -> None:
    with pytest.raises(RunFailedError, match="no trial of the first 2 completed, and canary is 2"):
        launch_slurm_sweep(a_sweep("exit 4", 9, canary=2), submit=True)
    assert told() == {"cancelled": 7, "failed": 2}
    assert "canary is 2" in (manage.report_of(latest()).reason or "")


def test_after_a_canary_that_completed_the_rest_runs() -> None:
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(a_sweep("[ $1 != 0 ]", 6, canary=2), submit=True)
    assert told() == {"completed": 5, "failed": 1}
    assert [each.trials for each in read_submissions(latest().files)] == [2, 4]


def test_a_run_whose_first_trials_all_fail_in_the_same_way_is_stopped(tmp_path: Path) -> None:
    sweep = a_sweep("sleep 0.1; exit 3", 60, retry={"breaker": 4})
    with pytest.raises(RunFailedError, match="the first 4 trials to end all failed with exit code 3"):
        launch_slurm_sweep(sweep, submit=True)
    found = told()
    assert found["cancelled"] > 30
    # A person's word goes over it, until so many more have ended in the same way.
    with pytest.raises(RunFailedError, match="retry.breaker is 4"):
        launch_slurm_sweep(None, submit=True, resume="latest")
    assert told()["failed"] > found["failed"]


def test_different_failures_do_not_stop_a_run() -> None:
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(a_sweep("exit $(($1 % 2 + 1))", 12, retry={"breaker": 4}), submit=True)
    assert told() == {"failed": 12}


def test_a_throttle_holds_from_the_next_trial_on() -> None:
    sweep = a_sweep("sleep 0.4", 16, job={"array_parallelism": 4})
    client = threading.Thread(target=launch_slurm_sweep, args=(sweep,), kwargs={"submit": True}, daemon=True)
    client.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if len(read_attempts(latest().files)) >= 4:
                break
        except NexaError:
            pass
        time.sleep(0.05)
    manage.throttle(latest().id, 1)
    begun = time.time()
    client.join(60)
    later = sorted(
        tried[0].started for tried in read_attempts(latest().files).values() if tried[0].started > begun + 0.6
    )
    assert len(later) > 5
    gaps = [after - before for before, after in pairwise(later)]
    assert min(gaps) > 0.35, "one at a time"
    with pytest.raises(NexaError, match="is not running, so there is nothing to throttle"):
        manage.throttle(latest().id, 2)


def test_a_retry_of_one_kind_leaves_those_of_another() -> None:
    script = "case $NEXA_ATTEMPT in 1) exit 1 ;; 2) sleep 30 ;; esac"
    sweep = a_sweep(script, 1, job={"time": "0:02"}, retry={"times": 1, "on": ["failed", "timeout"]})
    launch_slurm_sweep(sweep, submit=True)
    report = manage.report_of(latest())
    assert told() == states(completed=1)
    assert report.ends == states(failed=1, timeout=1)
    assert report.attempts == 3

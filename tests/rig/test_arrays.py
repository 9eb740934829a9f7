"""Runs of several arrays on a real Slurm: no more than was asked for at once, whatever becomes of the arrays."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pytest

from nexa_infra.operations import manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.base import Admission
from tests.chaos.test_submission import Site, once, ran, resume, site, started, submit, there, wait

__all__ = ["site"]

SLEEP = 'launcher.command=["sh","-c","echo $NEXA_TRIAL >>$NEXA_RUN_DIR/ran; sleep {seconds}"]'


def trials(count: int) -> str:
    return f"sweep.parameters={{'n': {list(range(count))}}}"


def most_at_once(site: Site, run: Run) -> int:
    """The most of a run's tasks that ran at one time, by sacct's intervals."""
    told = site.slurm.run(
        ["sacct", "-nP", "-X", "-D", "-S", run.created_at.strftime("%Y-%m-%dT%H:%M:%S"), "-o", "JobName,Start,End"]
    ).stdout
    rows = [line.split("|") for line in told.splitlines() if line.startswith(f"nexa-{run.id}-")]
    changes: list[tuple[datetime, int]] = []
    for _, start, end in rows:
        if "T" in start and "T" in end:
            changes += [(datetime.fromisoformat(start), 1), (datetime.fromisoformat(end), -1)]
    # Seconds are whole: what ends and what starts in the same one followed each other.
    return peak(change for _, change in sorted(changes))


def peak(changes: Iterable[int]) -> int:
    most = now = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def arrays_of(run: Run) -> list[tuple[str, int]]:
    return [(each.array, each.chunks) for each in read_submissions(run.files) if each.void is None]


def test_chunks_are_submitted_at_once_and_share_what_may_run_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "check", lambda run: Admission(array_size=4))
    run = site.run(trials(14), "job.array_parallelism=6", SLEEP.format(seconds=2), over_ssh=True)
    assert site.client(resume, run).wait() == "done"
    assert [each[1] for each in arrays_of(manage.find(run.id))] == [4] * 4
    assert [each[0] for each in arrays_of(manage.find(run.id))] == ["0-3%2", "0-3%2", "0-2%1", "0-2%1"]
    assert ran(run) == started(run) == once(14)
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    assert 4 <= most_at_once(site, run) <= 6


def test_fewer_at_once_than_there_are_arrays_is_held_by_chains(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "check", lambda run: Admission(array_size=3))
    run = site.run(trials(8), "job.array_parallelism=2", SLEEP.format(seconds=1))
    assert site.client(submit, run).wait() == "done"
    told = site.slurm.run(["squeue", "-h", "-o", "%F|%E|%j"]).stdout
    assert sum("afterany" in line for line in told.splitlines() if run.id in line) == 1, told
    assert site.client(resume, run).wait() == "done"
    assert ran(run) == started(run) == once(8)
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    assert most_at_once(site, run) == 2


def test_a_client_that_is_killed_between_two_chunks_is_gone_on_with(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "check", lambda run: Admission(array_size=2))
    run = site.run(trials(7), over_ssh=True)
    there(run, f"held-nexa-{run.id}-3").touch()
    client = site.client(submit, run)
    wait(there(run, "submissions/3.json").exists)
    client.kill_all(run)
    there(run, f"held-nexa-{run.id}-3").unlink()
    assert site.client(resume, run).wait() == "done"
    assert ran(run) == started(run) == once(7)


def test_a_live_run_is_throttled_and_let_go(site: Site) -> None:
    run = site.run(trials(12), SLEEP.format(seconds=3), over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    manage.throttle(run.id, 2)
    limit = site.slurm.run(["squeue", "-h", "-t", "pending", "-o", "%K|%j"]).stdout
    assert "%2" in limit or run.id not in limit, limit
    assert Path(there(run, "throttle")).read_text().strip() == "2"
    follower = site.client(resume, run)
    wait(lambda: len(ran(run)) >= 6)
    manage.throttle(run.id, None)
    begun = time.monotonic()
    assert follower.wait() == "done"
    assert time.monotonic() - begun < 60
    assert ran(run) == started(run) == once(12)

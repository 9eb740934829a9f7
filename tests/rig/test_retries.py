"""Retries, and what runs share, on a real Slurm."""

from __future__ import annotations

import json
import time

import pytest

from nexa_infra.operations import manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.counts import polls_of
from tests.chaos.test_submission import Site, once, ran, resume, site, started, submit, there, wait
from tests.rig.test_arrays import SLEEP, trials

__all__ = ["site"]


def test_what_ran_out_of_memory_gets_more_the_next_time(site: Site) -> None:
    # 150 MiB are more than the first attempt has, and less than the second; the other trial fails by itself, once.
    code = (
        "import os; os.environ['NEXA_TRIAL'] == '0' and bytearray(150 << 20); print(os.environ['SLURM_MEM_PER_NODE'])"
    )
    bad = "[ $NEXA_TRIAL = 0 ] || [ $NEXA_ATTEMPT = 2 ] || exit 3"
    command = json.dumps(["sh", "-c", f'echo $NEXA_TRIAL >>$NEXA_RUN_DIR/ran; {bad}; exec python3 -c "{code}"'])
    retry = "retry={'times': 1, 'memory_factor': 3, 'on': ['oom', 'failed']}"
    run = site.run(f"launcher.command={command}", retry, over_ssh=True)
    assert site.client(resume, run).wait() == "done"
    report = manage.report_of(manage.find(run.id))
    assert report.states == {"completed": 2}
    assert report.ends == {"failed": 1, "out_of_memory": 1}
    found = [(each.trials, each.options) for each in read_submissions(run.files)]
    assert sorted(found[1:]) == [(1, ()), (1, ("--mem=300M",))]
    assert there(run, "trials/0/attempt-2.out").read_text() == "300\n"


def test_packs_run_in_one_task_and_only_what_failed_of_them_runs_again(site: Site) -> None:
    fails = "[ $NEXA_ATTEMPT = 2 ] || [ $(($NEXA_TRIAL % 4)) != 1 ]"
    command = json.dumps(["sh", "-c", f"echo $NEXA_TRIAL >>$NEXA_RUN_DIR/ran; sleep 0.2; {fails}"])
    run = site.run(trials(10), f"launcher.command={command}", "job.trials_per_task=4", "retry.times=1", over_ssh=True)
    assert site.client(resume, run).wait() == "done"
    report = manage.report_of(manage.find(run.id))
    assert report.states == {"completed": 10} and report.accounted
    assert [(each.trials, each.array, each.pack) for each in read_submissions(run.files)] == [
        (10, "0-2", 4),
        (3, "0-0", 4),
    ]
    again = {"1": 2, "5": 2, "9": 2}
    assert ran(run) == started(run) == once(10) | again
    # What the three tasks held is shared out among their trials, to the last second.
    told = site.slurm.run(["sacct", "-nPX", "-S", "today", "-o", "JobName,ElapsedRaw"]).stdout
    held = sum(int(line.split("|")[1]) for line in told.splitlines() if line.startswith(f"nexa-{run.id}-"))
    assert abs(float(report.actual_unit_hours or 0) * 3600 - held) < 0.01


def test_many_runs_share_one_question(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "check", lambda run: Admission())
    first = site.run(SLEEP.format(seconds=12))
    runs = [first, *(site.run(SLEEP.format(seconds=12), snapshot=first) for _ in range(4))]
    for run in runs:
        assert site.client(submit, run).wait() == "done"
    clients = [site.client(resume, run) for run in runs]
    assert [client.wait() for client in clients] == ["done"] * 5
    found = [polls_of(manage.find(run.id)) for run in runs]
    calls = [each.calls for each in found if each is not None]
    polls, squeue, shared = (sum(each.get(name, 0) for each in calls) for name in ("polls", "squeue", "shared"))
    assert len(calls) == 5 and polls == squeue + shared
    assert shared > polls / 3, calls
    assert manage.report_of(manage.find(first.id)).polls is not None


def nodes_of(run: Run, attempt: int) -> set[str]:
    """Where an attempt of the run's trials has started."""
    lines = [line.split("\t") for path in there(run, "status").iterdir() for line in path.read_text().splitlines()]
    return {words[4] for words in lines if words[0] == "start" and words[2] == str(attempt)}


def test_a_node_that_went_away_twice_is_left_out(site: Site) -> None:
    retry = "retry={'times': 2, 'on': ['node_fail']}"
    only = ("job.extra={'no-requeue': true}", "job.partition=cpu")
    site.slurm.run(["scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=all shall be on n1"])
    run = site.run(trials(2), SLEEP.format(seconds=600), retry, *only, over_ssh=True)
    follower = site.client(resume, run)
    try:
        for attempt in (1, 2):
            wait(lambda attempt=attempt: sum(ran(run).values()) == 2 * attempt, 60)  # type: ignore[misc]
            assert nodes_of(run, attempt) == {"n1"}
            site.slurm.node_down("n1")
            time.sleep(6)
            site.slurm.node_up("n1")
        wait(there(run, "submissions/3.json").exists, 60)
        assert "--exclude=n1" in json.loads(there(run, "submissions/3.json").read_text())["options"]
    finally:
        site.slurm.run(["scontrol", "update", "NodeName=n2", "State=RESUME"])
        manage.cancel(run.id)
        follower.kill()


def test_short_trials_are_timed_and_then_share_tasks(site: Site) -> None:
    run = site.run(trials(30), "job.trials_per_task=auto", "job.array_parallelism=3", over_ssh=True)
    assert site.client(resume, run).wait() == "done"
    assert ran(run) == started(run) == once(30)
    first, rest = read_submissions(run.files)
    assert (first.trials, first.pack) == (4, 1)
    # One of the first may run yet, and takes its place among the three.
    assert (rest.trials, rest.array.partition("%")[0], rest.pack) == (26, "0-2", 9)
    # Nine times five minutes, and one for their starts.
    assert "--time=46" in rest.options or "--time=00:46:00" in rest.options

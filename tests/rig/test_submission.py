"""Submitting to a real Slurm that is away, full, unwilling, or asked by two at once: one array, or one clear word."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from nexa_infra.errors import SubmitError
from nexa_infra.operations import manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.act import stop
from nexa_infra.scheduling.submit import submit_trials
from tests.chaos.test_submission import (
    Site,
    cancel,
    once,
    ran,
    resume,
    site,
    started,
    submit,
    there,
    wait,
)
from tests.rig.slurm_files import TIGHT_MAX_SUBMIT

__all__ = ["site"]


def give_the_word(name: str) -> None:
    """End a run whose scheduler is away: what can be recorded is."""
    run = manage.find(name)
    stop(run, steps.scheduler_of(run), "enough", by="person")


def answer(run: Run) -> str:
    """What sbatch's exit code was, and when; empty as long as it has not ended."""
    path = there(run, "submissions/1.answer")
    return path.read_text() if path.exists() else ""


def said(run: Run) -> str:
    return there(run, "submissions/1.err").read_text()


def records(run: Run) -> list[str]:
    """The run's submissions on the cluster."""
    return sorted(path.name for path in there(run, "submissions").glob("*.json"))


def await_trials(run: Run) -> None:
    """Wait until each trial has run, once."""
    wait(lambda: ran(run) == once())


def make_impatient(site: Site, *runs: Run) -> None:
    """Let sbatch and squeue wait for an answer for 2 seconds only, where it is about these runs."""
    path = site.folder / "impatient.conf"
    path.write_text(site.slurm.conf.read_text() + "MessageTimeout=2\n")
    for name in ("gres.conf", "cgroup.conf"):
        (site.folder / name).write_text((site.slurm.conf.parent / name).read_text())
    for run in runs:
        there(run, "impatient").write_text(str(path))


def test_a_controller_that_stands_still_is_waited_for_and_has_one_array(site: Site) -> None:
    run = site.run()
    site.slurm.controller.send(signal.SIGSTOP)
    make_impatient(site, run)
    client = site.client(submit, run)
    wait(lambda: answer(run))
    # Whether it was taken nobody knows: the controller may read the question yet.
    assert re.search("Socket timed out|Unable to contact", said(run)), said(run)
    assert not client.line.poll(1.0), "it is left open"
    site.slurm.controller.send(signal.SIGCONT)
    assert client.wait() == "done"
    await_trials(run)
    assert started(run) == once() and len(site.queued(run)) == 1


def test_a_controller_that_is_away_is_asked_until_it_is_back(site: Site) -> None:
    other, far = site.run(), site.run(over_ssh=True)
    here = site.run(snapshot=other)
    runs = (here, far, other)
    make_impatient(site, *runs)
    site.slurm.stop_controller()
    clients = [site.client(submit, run) for run in runs]
    wait(lambda: all(map(answer, runs)))
    assert all("Unable to contact slurm controller" in said(run) for run in runs)
    # A person's word, though the controller cannot be asked: the client that tries again hears of it.
    word = site.client(give_the_word, other).wait()
    assert word.startswith("UnknownStateError: squeue cannot say how the jobs stand"), word
    site.slurm.start_controller()
    told = [client.wait() for client in clients]
    assert told[:2] == ["done", "done"] and told[2].startswith(f"RunCancelledError: run {other.id} was cancelled")
    for run in (here, far):
        await_trials(run)
        assert started(run) == once() and len(site.queued(run)) == 1 and records(run) == ["1.json"]
    assert not site.queued(other) and not ran(other)


def test_more_than_may_be_queued_is_submitted_as_room_appears(site: Site) -> None:
    run = site.run("job.qos=tight", over_ssh=True)
    jobs = [site.slurm.submit("--hold", "--qos=tight") for _ in range(TIGHT_MAX_SUBMIT)]
    assert site.client(submit, run).wait() == "done", "the queue is full, which is no error: it is tried again"
    assert not site.queued(run)
    follower = site.client(resume, run)
    wait(lambda: len(records(run)) > 1)
    site.slurm.run(["scancel", *jobs])
    assert follower.wait() == "done"
    assert ran(run) == started(run) == once()
    voids = [json.loads(there(run, f"submissions/{name}").read_text())["void"] for name in records(run)]
    assert voids[0] == "full" and None in voids
    assert all(there(run, f"claims/nexa-{run.id}-{number + 1}").readlink() == Path("void")
               for number, void in enumerate(voids) if void)  # fmt: skip


def test_a_sweep_larger_than_the_queue_is_submitted_piece_by_piece(site: Site) -> None:
    run = site.run("job.qos=tight", "sweep.parameters.i=[1,2,3,4,5,6,7,8]", over_ssh=True)
    assert site.client(resume, run).wait(120) == "done"
    assert ran(run) == started(run) == once(16)
    arrays = [json.loads(there(run, f"submissions/{name}").read_text()) for name in records(run)]
    taken = [each for each in arrays if each["void"] is None]
    assert sum(each["trials"] for each in taken) == 16
    assert len(taken) > 2 and all(each["trials"] <= TIGHT_MAX_SUBMIT for each in taken)


def test_an_account_that_was_taken_away_is_one_error_and_resume_submits_once_it_is_back(site: Site) -> None:
    run = site.run("job.account=passing")
    account = ["Account=passing", "Cluster=rig"]
    told = site.client(submit, run).wait()
    assert "Invalid account or account/partition combination specified: check job.account" in told, told
    assert told.startswith("SubmitError") and told.count("\n") == 0
    for words in (["account", "passing", "Cluster=rig"], ["user", "root", *account]):
        added = site.slurm.run(["sacctmgr", "-i", "add", *words])
        assert added.returncode == 0, added.stdout + added.stderr
    try:
        assert site.client(resume, run).wait() == "done"
    finally:
        site.slurm.run(["sacctmgr", "-i", "remove", "account", "passing"])
    assert ran(run) == started(run) == once()


def test_two_clients_from_two_places_make_one_array(site: Site, tmp_path: Path) -> None:
    first = site.run(over_ssh=True)
    for turn in range(2):
        run = first if not turn else site.run(over_ssh=True, snapshot=first)
        # One from afar; one on the login node, within a trial of something else.
        elsewhere = {"NEXA_HOME": str(tmp_path / "other"), "NEXA_RUN_DIR": "/nowhere", "NEXA_TRIAL": "7"}
        clients = [site.client(submit, run), site.client(submit, run.directory, **elsewhere)]
        assert [client.wait() for client in clients] == ["done", "done"]
        if not turn:
            ends = [site.client(resume, run), site.client(resume, run.directory, **elsewhere)]
            assert [client.wait() for client in ends] == ["done", "done"]
        await_trials(run)
        assert ran(run) == started(run) == once()
        assert len(site.queued(run)) == 1 and records(run) == ["1.json"]


def test_after_a_person_s_word_nothing_is_submitted(site: Site) -> None:
    run, never = site.run(over_ssh=True), site.run(over_ssh=True)
    held = there(run, f"held-nexa-{run.id}-1")
    held.touch()
    late = site.client(submit, run)
    wait(there(run, "argv").exists)
    # sbatch is being asked as the word is given: the word waits for it, and ends what it has made.
    ending = site.client(cancel, run)
    wait(there(run, "cancelled").exists)
    held.unlink()
    assert ending.wait() == "done"
    assert late.wait() in {"done", f"RunCancelledError: run {run.id} was cancelled, so nothing more of it is submitted"}
    assert site.client(submit, run).wait() == "done", "there is nothing to submit"
    assert len(site.queued(run)) == 1 and not ran(run)

    assert site.client(cancel, never).wait() == "done"
    told = site.client(submit, never).wait()
    assert told == f"RunCancelledError: run {never.id} was cancelled, so nothing more of it is submitted"
    assert not site.queued(never)
    # Until a person says that it may go on.
    ends = [site.client(resume, run), site.client(resume, never)]
    assert [client.wait() for client in ends] == ["done", "done"]
    assert ran(run) == ran(never) == once()


def test_what_another_client_has_retried_is_not_retried_again(site: Site) -> None:
    run = site.run()
    steps.submit(run)
    scheduler = steps.scheduler_of(run)
    wait(lambda: not scheduler.poll(run).active)
    again = submit_trials(run, scheduler, [(0, 1), (1, 2)])
    assert (again.number, again.trials) == (2, 1)
    wait(lambda: not scheduler.poll(run).active)
    assert submit_trials(run, scheduler, [(1, 2)]) == read_submissions(run.files)[-1], "there is nothing left of it"
    assert ran(run) == once() + Counter("1")


def test_a_run_directory_that_is_gone_or_broken_is_told_as_such(site: Site) -> None:
    run = site.run()
    there(run, "submissions").rename(there(run, "elsewhere"))
    scheduler = steps.scheduler_of(run)
    with pytest.raises(FileNotFoundError):
        steps.submit(run)
    there(run, "elsewhere").rename(there(run, "submissions"))
    there(run, "submissions/.sbatch.lock").mkdir()
    with pytest.raises(SubmitError, match="is not there, or cannot be written: .*sbatch.lock"):
        steps.submit(run)
    there(run, "submissions/.sbatch.lock").rmdir()
    assert steps.submit(run).job_id
    wait(lambda: not scheduler.poll(run).active)

"""Runs that nobody follows but their steward, on a real Slurm."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from nexa_infra.errors import SubmitError
from nexa_infra.operations import launch, manage, steps, unattended
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.slurm.probe import NodeAbilities
from tests.chaos.test_submission import Site, once, ran, resume, site, started, submit, there, wait
from tests.rig.test_arrays import SLEEP, trials

__all__ = ["site"]

UNATTENDED = "unattended=true"


def is_over(run: Run) -> bool:
    return there(run, "steward/over").exists()


def stewards(site: Site, run: Run) -> set[str]:
    told = site.slurm.run(["squeue", "-h", "-o", "%F|%j"]).stdout
    return {line.partition("|")[0] for line in told.splitlines() if f"|steward-{run.id}-" in line}


def log(run: Run) -> str:
    path = there(run, "steward/log")
    return path.read_text() if path.exists() else "the steward has said nothing"


def await_end(site: Site, run: Run, within: float = 120.0) -> None:
    try:
        wait(lambda: is_over(run) and not stewards(site, run), within)
    except AssertionError:
        raise AssertionError(f"{log(run)}\n{site.slurm.run(['squeue', '-h']).stdout}") from None


@pytest.mark.parametrize("over_ssh", [False, True])
def test_a_run_goes_on_though_its_client_is_gone_for_good(site: Site, over_ssh: bool) -> None:
    failing = 'launcher.command=["sh","-c","echo $NEXA_TRIAL >>$NEXA_RUN_DIR/ran; [ $NEXA_ATTEMPT = 2 ]"]'
    run = site.run(UNATTENDED, failing, "retry.times=1", over_ssh=over_ssh)
    client = site.client(submit, run)
    wait(there(run, "steward/1.answer").exists)  # from here on nobody else is needed
    client.kill_all(run)
    await_end(site, run)
    assert ran(run) == started(run) == once(2) + once(2), log(run)
    written = {name: there(run, name).read_text() for name in ("cost_report.json", "cost_report.md", "results.csv")}
    assert json.loads(written["cost_report.json"])["states"] == {"completed": 2}
    assert json.loads(written["cost_report.json"])["ends"] == {"failed": 2}
    launch.write_report(manage.find(run.directory))
    again = {name: there(run, name).read_text() for name in written}
    assert again == written, "a client says the same, byte for byte"
    assert not site.slurm.run(["squeue", "-h"]).stdout


def test_a_client_comes_back_and_goes_again(site: Site) -> None:
    run = site.run(UNATTENDED, trials(6), SLEEP.format(seconds=2), "job.array_parallelism=2", over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    wait(lambda: len(ran(run)) >= 2)
    assert site.client(resume, run).wait() == "done"
    await_end(site, run)
    assert ran(run) == started(run) == once(6)
    assert len(list(there(run, "submissions").glob("*.json"))) == 1


def test_what_does_not_fit_is_submitted_by_the_steward(site: Site) -> None:
    run = site.run(UNATTENDED, trials(8), "job.qos=narrow", over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    await_end(site, run, 180)
    assert ran(run) == started(run) == once(8), log(run)
    lives = json.loads(there(run, "steward/3.json").read_text())["array"]
    assert lives == "0-9%1", "forty lives are more than the queue takes, and so are twenty"


def test_a_budget_is_never_gone_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # An attempt of a minute costs 1/60 USD at the most; a life of the steward a hundredth of that.
    monkeypatch.setattr(steps, "check", lambda run: Admission(over_seconds=0))
    price = ("job.cost_per_core_hour=1", "job.time=1")
    run = site.run(UNATTENDED, trials(8), SLEEP.format(seconds=12), *price, "budget.limit_usd=0.53", over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    await_end(site, run, 240)
    done = len(ran(run))
    # At the most one could begin at first: what others have cost less makes room for more.
    assert 2 <= done < 8, log(run)
    spent = sum((trial.usd or Decimal(0) for trial in steps.look(manage.find(run.id))), Decimal(0))
    report = json.loads(there(run, "cost_report.json").read_bytes())
    assert Decimal(report["actual_usd"]) == spent
    assert spent + Decimal(report["steward"]["usd"]) <= Decimal("0.53")
    assert "the budget of $0.53 leaves no room for" in there(run, "cancelled").read_text()


def test_a_person_s_word_ends_the_run_and_its_steward(site: Site) -> None:
    run = site.run(UNATTENDED, trials(4), SLEEP.format(seconds=300), over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    wait(lambda: len(ran(run)) >= 1)
    manage.cancel(run.id)
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    assert json.loads(run.files.report_json.read_bytes())["end"] == "cancelled"


def test_a_run_that_was_cancelled_goes_on_with_a_new_steward(site: Site) -> None:
    run = site.run(UNATTENDED, trials(4), SLEEP.format(seconds=5), "job.array_parallelism=1", over_ssh=True)
    assert site.client(submit, run).wait() == "done"
    wait(lambda: len(ran(run)) >= 1)
    manage.cancel(run.id)
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    manage.prepare_resume(run.id)
    assert site.client(submit, run).wait() == "done"
    await_end(site, run)
    assert json.loads(there(run, "cost_report.json").read_bytes())["states"] == {"completed": 4}


def test_where_nodes_may_not_submit_the_option_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # That a real node is asked is held by test_doctor.py: one machine cannot be two for AllocNodes.
    told = NodeAbilities(False, "jobs may not be submitted from n1", "ask its administrators")
    monkeypatch.setattr(unattended, "probe_steward", lambda *_: told)
    cluster = site.cluster(over_ssh=True)
    with pytest.raises(
        SubmitError, match=r"rig cannot follow a run by itself \(unattended: true\):\n  jobs may not be"
    ):
        launch.launch_slurm_sweep(site.config, submit=True, cluster=cluster, overrides=[UNATTENDED])
    assert not list(Path(cluster.workdir).glob("runs/*"))
    assert not site.slurm.run(["squeue", "-h"]).stdout

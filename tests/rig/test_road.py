"""The digits sweep through real SSH to real Slurm, from Python: the whole road."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest

from nexa_infra import launch_slurm_sweep, launch_training_job
from nexa_infra.blocks import SlurmCluster
from nexa_infra.errors import BudgetError, HostError, RunFailedError
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run, read_run
from nexa_infra.runs.results import read_results
from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler
from nexa_infra.spec.cluster import Cluster
from tests.rig.accounts import CSH, NOISY, Account
from tests.rig.clusters import ON_THE_RIG, cluster_at, digits, shell_config, states_by_sacct
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig


def test_the_digits_run_on_a_cluster_over_one_login(
    cluster: Cluster, sshd: SshRig, slurm: SlurmRig, project: Path, home: Path
) -> None:
    batch = launch_slurm_sweep(digits(project), submit=True, cluster=cluster, overrides=ON_THE_RIG)

    assert sshd.logins() == 1
    assert states_by_sacct(slurm, batch.run_id) == ["COMPLETED"] * 12
    report = batch.report
    assert report is not None and report.end == "done" and report.states == {"completed": 12}
    assert (report.cluster, report.job_ids, report.accounted) == ("rig", batch.job_ids, True)
    # What accounting counted, to the cent: AllocTRES x ElapsedRaw of every attempt.
    said = slurm.run(["sacct", "-XnPD", "--format=ElapsedRaw", f"--name=nexa-{batch.run_id}-1", "-S", "now-1hour"])
    seconds = sum(int(word) for word in said.stdout.split())
    assert report.actual_usd is not None
    assert abs(report.actual_usd - seconds * report.prices[0].usd_per_hour / Decimal(3600)) < Decimal("1e-15")

    there = Path(cluster.workdir) / "runs" / batch.run_id
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    assert batch.directory == home / "runs" / batch.run_id
    for name in ("results.csv", "cost_report.json", "cost_report.md", "job.sbatch", "run.json"):
        assert (there / name).read_bytes() == (batch.directory / name).read_bytes(), name
    table = read_results(there / "results.csv")
    assert len(table) == 12 and table["accuracy"].min() > 0.8

    recorded = read_run(there)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True)
    assert recorded.snapshot is not None and recorded.snapshot.commit == head.stdout.strip()
    assert (there / "code").resolve() == Path(recorded.snapshot.path).resolve()
    assert (there / "code" / "deployments" / "examples" / "digits" / "train.py").is_file()


@pytest.mark.parametrize("user", [CSH, NOISY], ids=lambda user: user.name)
def test_a_login_shell_that_is_another_or_talks_does_not_matter(
    user: Account, sshd: SshRig, slurm: SlurmRig, home: Path, tmp_path: Path, workdir: Path
) -> None:
    cluster = cluster_at(sshd, workdir, user=user.name)
    batch = launch_slurm_sweep(shell_config(tmp_path, "echo $2", [1, 2]), submit=True, cluster=cluster)
    assert batch.report is not None and batch.report.states == {"completed": 2}
    assert (workdir / "runs" / batch.run_id / "trials" / "1" / "attempt-1.out").read_text() == "2\n"
    connections.close_all()


def test_a_cluster_that_cannot_be_reached_is_one_clear_error(sshd: SshRig, home: Path, tmp_path: Path) -> None:
    cluster = cluster_at(sshd, tmp_path / "work", port=1)
    with pytest.raises(HostError, match="refuses connections: check the port"):
        launch_slurm_sweep(shell_config(tmp_path, "true", [1]), submit=True, cluster=cluster)
    assert not home.exists() and not (tmp_path / "work").exists()


def test_the_login_node_one_stands_on_runs_the_same(
    login_node: Cluster, slurm: SlurmRig, project: Path, home: Path
) -> None:
    overrides = [*ON_THE_RIG, "sweep.parameters.epochs=[1, 2]"]
    batch = launch_slurm_sweep(digits(project), submit=True, cluster=login_node, overrides=overrides)

    assert states_by_sacct(slurm, batch.run_id) == ["COMPLETED"] * 12
    assert batch.directory == Path(login_node.workdir) / "runs" / batch.run_id
    assert manage.find(batch.run_id).directory == str(batch.directory)
    assert batch.report is not None and batch.report.accounted


def test_a_training_on_a_cluster_describes_what_it_made(
    cluster: Cluster, sshd: SshRig, project: Path, home: Path
) -> None:
    config = project / "deployments" / "configs" / "digits-training.yaml"
    made = launch_training_job(config, cluster=cluster, overrides=[*ON_THE_RIG, "training.parameters.epochs=2"])

    assert made.uri.startswith(f"ssh://root@{sshd.host}:{sshd.port}/")
    assert made.metrics["accuracy"]
    assert made.bytes > 0
    assert sshd.logins() == 1


def test_a_preview_changes_nothing_anywhere(cluster: Cluster, slurm: SlurmRig, project: Path, home: Path) -> None:
    preview = launch_slurm_sweep(digits(project), cluster=cluster, overrides=ON_THE_RIG)

    assert preview.starts is not None and preview.starts.startswith("20")
    assert preview.estimate is not None and preview.estimate.ceiling_usd
    assert [index for index, _ in preview.shown] == [0, 1, 2, 9, 10, 11]
    assert not Path(cluster.workdir).exists() and not home.exists()
    assert slurm.run(["squeue", "-h"]).stdout == ""


def test_round_trips_and_scheduler_calls_are_few(cluster: Cluster, project: Path, home: Path, tmp_path: Path) -> None:
    config = shell_config(tmp_path, "true", [1, 2])
    with connections.kept_open(cluster):
        run = steps.plan(config, cluster=cluster)
        steps.admit(run, steps.estimate_cost(run))
        run = steps.render(steps.sync(run))
        steps.submit(run)
        host = connections.host_of(cluster)
        submitted = host.round_trips  # type: ignore[attr-defined]
        assert submitted <= 6
        steps.scheduler_of(run).poll(run)
        assert host.round_trips == submitted + 1  # type: ignore[attr-defined]
        steps.cancel(run, "enough")


def test_only_the_failed_trials_are_retried_and_the_rest_costs_nothing_again(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mended"
    config = shell_config(
        tmp_path, f'echo try; [ "$2" != 1 ] || [ -e {mark} ] || {{ echo broken >&2; exit 3; }}', [0, 1, 2]
    )
    with pytest.raises(RunFailedError, match=r"trial 1 ended as failed with exit code 3\n    broken"):
        launch_slurm_sweep(config, submit=True, cluster=cluster)
    run = manage.find("latest")
    mark.touch()
    launch.follow_run(manage.prepare_retry(run.id))

    assert states_by_sacct(slurm, run, 1).count("COMPLETED") == 2
    assert states_by_sacct(slurm, run, 2) == ["COMPLETED"]
    attempts = {trial.index: len(trial.attempts) for trial in steps.look(run)}
    assert attempts == {0: 1, 1: 2, 2: 1}


def test_a_secret_in_an_env_file_reaches_the_trial_and_nothing_else(
    cluster: Cluster, home: Path, tmp_path: Path, workdir: Path
) -> None:
    secret = "s3cr3t-value-of-a-token"
    env_file = workdir.parent / "secrets.env"
    env_file.write_text(f"TOKEN={secret}\n")
    known = hashlib.sha256(secret.encode()).hexdigest()
    script = f'[ "$(printf %s "$TOKEN" | sha256sum)" = "{known}  -" ]'
    config = shell_config(tmp_path, script, [1], job=f", env_file: {env_file}")
    env_file.chmod(0o644)
    with pytest.raises(Exception, match=r"mode 644, so that others may read it: chmod 600 it"):
        launch_slurm_sweep(config, submit=True, cluster=cluster)
    assert not workdir.exists()
    env_file.chmod(0o600)
    batch = launch_slurm_sweep(config, submit=True, cluster=cluster)

    assert batch.report is not None and batch.report.end == "done"
    for top in (workdir, home):
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder) / name
                assert path.is_symlink() or secret.encode() not in path.read_bytes(), path


def test_a_run_that_is_over_its_budget_leaves_nothing_there_and_reads_as_refused(
    cluster: Cluster, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="over the budget"):
        launch_slurm_sweep(shell_config(tmp_path, "true", [1]), submit=True, cluster=cluster, budget_usd=0.0001)
    run = manage.find("latest")
    assert manage.status(run).end == manage.report_of(run).end == "refused"
    assert not Path(cluster.workdir).exists()


def test_a_client_that_ends_before_the_run_directory_is_there_is_gone_on_with(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_here(_scheduler: SlurmScheduler, run: Run) -> None:
        raise HostError(f"the client of {run.id} ends here")

    with monkeypatch.context() as patched:
        patched.setattr(SlurmScheduler, "prepare", ends_here)
        with pytest.raises(HostError, match="ends here"):
            launch_slurm_sweep(shell_config(tmp_path, "true", [1, 2]), submit=True, cluster=cluster)
    run = manage.find("latest")
    launch.follow_run(manage.prepare_resume(run.id))
    assert states_by_sacct(slurm, run) == ["COMPLETED"] * 2


def test_a_cluster_may_be_given_as_a_file_or_as_a_block(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path
) -> None:
    block = SlurmCluster(
        workdir=cluster.workdir,
        host=cluster.host or "",
        port=cluster.port,
        user="root",
        key_file=cluster.key_file or "",
        known_hosts=cluster.known_hosts or "",
        poll_floor=0.3,
    )
    (tmp_path / "rig.yaml").write_text(cluster.model_dump_json(exclude_none=True))
    config = shell_config(tmp_path, "true", [1])
    for given in (block, tmp_path / "rig.yaml", str(tmp_path / "rig.yaml")):
        batch = launch_slurm_sweep(config, submit=True, cluster=given)
        assert states_by_sacct(slurm, batch.run_id) == ["COMPLETED"]


def test_both_roads_record_the_same_but_for_where_they_ran(
    cluster: Cluster, project: Path, home: Path, tmp_path: Path
) -> None:
    config = shell_config(tmp_path, 'echo "{\\"score\\": $2}" >"$NEXA_METRICS"', [1, 2, 3])
    there = launch_slurm_sweep(config, submit=True, cluster=cluster)
    here = launch_slurm_sweep(config, submit=True)

    def read(batch: object, name: str) -> dict[str, object]:
        data: dict[str, object] = json.loads((batch.directory / name).read_text())  # type: ignore[attr-defined]
        return data

    ran_there, ran_here = read(there, "run.json"), read(here, "run.json")
    assert set(ran_there) == set(ran_here)
    assert ran_there["config"] == ran_here["config"] and ran_there["price"] == ran_here["price"]
    # Here nobody is asked how a run stands.
    assert set(read(there, "cost_report.json")) - {"polls"} == set(read(here, "cost_report.json"))
    columns = ["index", "hash", "n", "state", "exit_code", "attempt", "score"]
    tables = [read_results(batch.directory / "results.csv")[columns] for batch in (there, here) if batch.directory]
    assert tables[0].equals(tables[1])

"""`doctor CLUSTER` on real Slurm and real SSH, healthy and sick."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexa_infra.hosts.connections import close_all, host_of
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.provisioning.doctor import Check, check_cluster
from nexa_infra.provisioning.inspect import inspect
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.probe import probe, probe_steward
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob
from tests.rig.accounts import ADA, BOB, CSH, NOISY, ROOT, Account
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def block(sshd: SshRig, workdir: Path | str, user: Account = ROOT, **fields: object) -> Cluster:
    return Cluster.model_validate(
        {
            "name": "rig",
            "host": sshd.host,
            "port": sshd.port,
            "user": user.name,
            "key_file": str(sshd.key),
            "known_hosts": str(sshd.known_hosts),
            "workdir": str(workdir),
            **fields,
        }
    )


def look(cluster: Cluster) -> list[Check]:
    return list(check_cluster(cluster, host_of(cluster)))


def told(checks: list[Check], name: str) -> str:
    return "\n".join(each.found for each in checks if each.name == name)


def wrong(checks: list[Check]) -> dict[str, Check]:
    return {each.name: each for each in checks if not each.fine}


def probes(slurm: SlurmRig) -> list[str]:
    """Test jobs that wait or run; one that has given its answer is at its last line."""
    time.sleep(0.5)
    names = slurm.run(["squeue", "-h", "-t", "PENDING,RUNNING", "-o", "%j"]).stdout.split()
    return [name for name in names if name.startswith("nexa-probe-")]


def test_a_healthy_cluster_is_told_in_two_round_trips(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    slurm.submit("--hold", "--array=0-9")
    slurm.submit("--hold")
    cluster = block(sshd, tmp_path / "work")
    host = host_of(cluster)
    checks = list(check_cluster(cluster, host))

    assert not wrong(checks)
    assert isinstance(host, SshHost) and host.round_trips == 2 and sshd.logins() == 1
    assert told(checks, "SSH").startswith(f"root@127.0.0.1:{sshd.port}: logged in on ")
    assert told(checks, "Slurm").startswith(f"{slurm.version}, cluster rig, controller up on ")
    assert told(checks, "queue") == "squeue answers: root has 11 tasks in it"
    assert told(checks, "submit").startswith("a small job could start in cpu at ")
    assert told(checks, "accounting") == "sacct answers: GPUs by type (a100, h100)"
    assert told(checks, "account") == "research, root, teaching; QOS hasty, narrow, normal, tight"
    assert told(checks, "limits").splitlines() == [
        "1,000 tasks an array at most (MaxArraySize); 10,000 jobs of all users (MaxJobCount)",
        "QOS hasty: walltime 00:05:00",
        "QOS narrow: 12 tasks queued or running a user",
        "QOS tight: 3 tasks queued or running a user",
    ]
    assert told(checks, "partitions").splitlines() == [
        "7 take your jobs: cpu (default), gpu, short, low, spare, high, greedy",
        "not for you: closed (only for jobs from elsewhere)",
    ]
    assert told(checks, "memory") == "without job.memory a job takes the whole node's in greedy"
    assert told(checks, "nodes") == "2 of 2 up: 8 cores, 16 GiB each"
    assert told(checks, "GPUs") == "6 a100, 2 h100 in every partition"
    assert told(checks, "clock").startswith("agrees with this machine's within ")
    assert told(checks, "workdir") == f"{tmp_path}/work can be made"
    yes, python = told(checks, "unattended").splitlines()
    assert yes in {f"compute nodes may submit jobs (asked on {node} in cpu)" for node in ("n1", "n2")}
    assert re.fullmatch(r"Python for the steward: /\S+ 3\.\d+\.\d+", python)
    assert not list(tmp_path.iterdir())
    assert not probes(slurm)
    assert {"bash", "rsync", "Python", "containers", "space", "quota"} < {each.name for each in checks}


@pytest.mark.parametrize("user", [CSH, NOISY], ids=lambda user: user.name)
def test_a_login_shell_changes_nothing(sshd: SshRig, user: Account, tmp_path: Path) -> None:
    checks = look(block(sshd, tmp_path, user))
    assert not wrong(checks)
    assert told(checks, "workdir") == f"{tmp_path} can be written"


def test_a_cluster_without_a_host_is_the_machine_at_hand(slurm: SlurmRig, tmp_path: Path) -> None:
    cluster = Cluster(name="here", workdir=str(tmp_path), partition="gpu", account="research")
    checks = look(cluster)
    assert not wrong(checks)
    assert told(checks, "SSH").startswith("not needed: root is on the login node, ")
    assert told(checks, "GPUs") == "6 a100, 2 h100 in every partition"
    assert " in gpu at " in told(checks, "submit")
    checks = look(cluster.model_copy(update={"partition": "closed"}))
    assert {name: check.found for name, check in wrong(checks).items()} == {
        "submit": "sbatch refuses a job: Access/permission denied",
        "partitions": "closed is only for jobs from elsewhere",
    }


def test_without_its_controller_the_rest_is_told(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    slurm.stop_controller()
    begun = time.monotonic()
    checks = look(block(sshd, tmp_path))
    # One question waits for it, not each.
    assert time.monotonic() - begun < 20
    (sick,) = wrong(checks).values()
    assert sick.name == "Slurm" and sick.found.startswith(f"{slurm.version}, controller down on ")
    assert sick.found.endswith(": Unable to contact slurm controller (connect failure)")
    assert "jobs that run go on" in sick.remedy
    assert told(checks, "accounting") == "sacct answers"
    assert told(checks, "account").startswith("research, root, teaching")
    assert not told(checks, "partitions")


def test_without_slurmdbd_accounting_alone_is_sick(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    slurm.stop_dbd()
    checks = look(block(sshd, tmp_path))
    (sick,) = wrong(checks).values()
    assert (sick.name, sick.found) == ("accounting", "sacct: Problem talking to the database: Connection refused")
    assert "slurmdbd" in sick.remedy and "the trials' own clocks" in sick.remedy
    assert told(checks, "partitions").startswith("7 take your jobs")


def test_no_accounting_is_fine_and_told(rig_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SlurmRig(rig_folder, accounting=False, settings={"MaxArraySize": "20"}) as slurm:
        for name, value in slurm.environment().items():
            monkeypatch.setenv(name, value)
        checks = look(Cluster(name="bare", workdir=str(tmp_path)))
    assert not wrong(checks)
    assert told(checks, "accounting") == "no accounting: actual cost comes from the trials' own clocks"
    assert told(checks, "limits").startswith("19 tasks an array at most")
    assert not told(checks, "account")


def test_a_node_that_is_down_is_counted(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    slurm.node_down("n2")
    try:
        checks = look(block(sshd, tmp_path))
    finally:
        slurm.node_up("n2")
    assert not wrong(checks)
    assert told(checks, "nodes").startswith("1 of 2 up")
    assert told(checks, "GPUs") == "6 a100 (2 down), 2 h100 (all down) in every partition"


def test_a_user_without_an_account_is_told_so(sshd: SshRig, slurm: SlurmRig) -> None:
    home = sshd.accounts.home(BOB)
    checks = look(block(sshd, home / "work", BOB))
    assert {name: check.found for name, check in wrong(checks).items()} == {
        "submit": "sbatch refuses a job: Invalid account or account/partition combination specified",
        "account": "bob has none",
    }
    assert told(checks, "workdir") == f"{home}/work can be made"


def test_a_workdir_that_cannot_be_written_is_told(sshd: SshRig, slurm: SlurmRig, rig_folder: Path) -> None:
    for place, where in ((rig_folder, "there"), (rig_folder / "runs" / "of ada", f"in {rig_folder}")):
        checks = look(block(sshd, place, ADA))
        (sick,) = wrong(checks).values()
        assert (sick.name, sick.found) == ("workdir", f"{place}: no folder can be made {where}: Permission denied")
        assert told(checks, "account").startswith("teaching; QOS ")
    assert not list(rig_folder.iterdir())


def test_a_host_without_rsync_is_told(slurm: SlurmRig, rig_folder: Path) -> None:
    commands = rig_folder / "bin"
    commands.mkdir()
    for folder in (*os.environ["PATH"].split(os.pathsep), "/bin", "/usr/bin", "/usr/sbin"):
        for command in Path(folder).iterdir():
            if command.name != "rsync" and not (commands / command.name).exists():
                (commands / command.name).symlink_to(command)
    environment = {"SLURM_CONF": str(slurm.conf), "PATH": str(commands)}
    with SshRig(rig_folder / "sshd", environment=environment, accounts=slurm.accounts) as sshd:
        checks = look(block(sshd, rig_folder))
    (sick,) = wrong(checks).values()
    assert (sick.name, sick.remedy) == ("rsync", "ask its administrators for rsync")
    assert sick.found == f"not installed on {os.uname().nodename}"


def test_an_sshd_that_does_not_run_is_one_line(sshd: SshRig, tmp_path: Path) -> None:
    sshd.stop()
    (check,) = look(block(sshd, tmp_path))
    assert (check.name, check.fine) == ("SSH", False)
    assert check.found == f"root@127.0.0.1:{sshd.port} refuses connections"
    assert check.remedy.startswith(f"check the port ({sshd.port})")


def test_a_host_key_that_changed_is_one_line(sshd: SshRig, tmp_path: Path) -> None:
    sshd.change_host_key()
    try:
        (check,) = look(block(sshd, tmp_path))
    finally:
        sshd.trust_host_key()
    assert (check.name, check.fine) == ("SSH", False)
    assert "host key" in check.found and "ssh-keygen -R" in check.remedy


def test_what_was_asked_can_be_used_by_others(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    cluster = block(sshd, tmp_path, ADA)
    found = inspect(host_of(cluster), cluster)
    assert (found.user, found.config["MaxArraySize"]) == ("ada", "1001")
    assert {node.name: dict(node.gpus) for node in found.nodes} == {"n1": {"a100": 4}, "n2": {"a100": 2, "h100": 2}}
    assert [each.account for each in found.associations] == ["teaching"]
    assert found.qos["tight"] == {"MaxSubmitPU": "3"}
    assert found.disk is not None and found.disk.free_kib > 0
    assert abs(found.clock.skew) < 1


# ---- what a test job on a compute node may do


@pytest.fixture
def gate(slurm: SlurmRig) -> Iterator[str]:
    """A partition of one node, to be closed by a test."""
    name = f"gate{time.monotonic_ns()}"
    done = slurm.run(["scontrol", "create", f"PartitionName={name}", "Nodes=n1", "DefMemPerCPU=512", "State=UP"])
    assert done.returncode == 0, done.stderr
    yield name
    slurm.run(["scancel", "--partition", name])
    slurm.wait_until(lambda: not slurm.run(["squeue", "-h", "-p", name]).stdout.strip(), 20.0, "jobs are left")
    assert slurm.run(["scontrol", "delete", f"PartitionName={name}"]).returncode == 0


def test_nodes_that_may_not_submit_say_so_in_slurms_words(
    slurm: SlurmRig, gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rig's login node and its compute nodes are one machine: the partition takes jobs from it until the test job
    # runs, which asks squeue first.
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, closes in (("squeue", True), ("sbatch", False)):
        real = slurm.run(["sh", "-c", f"command -v {name}"]).stdout.strip()
        close = f"scontrol update PartitionName={gate} AllocNodes=elsewhere\n" if closes else ""
        close = f'case " $* " in *" -j "*)\n{close};; esac\n' if closes else ""
        (commands / name).write_text(f'#!/bin/sh\n{close}exec {shlex.quote(real)} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    cluster = Cluster(name="here", workdir=str(tmp_path), partition=gate)
    (no,) = [check for check in look(cluster) if check.name == "unattended"]
    assert no.fine  # nothing but a steward is hindered
    assert no.found == (
        "no: jobs may not be submitted from n1: sbatch says Access/permission denied: ask its administrators to let "
        "the partition take jobs from its nodes (AllocNodes)"
    )
    assert "`unattended: true` is refused here" in no.remedy
    # Nothing of it is remembered: once it is mended, it may.
    client, job = SlurmClient(host_of(cluster)), SlurmJob()
    slurm.run(["scontrol", "update", f"PartitionName={gate}", "AllocNodes=ALL"])
    (commands / "squeue").unlink()
    assert probe_steward(client, cluster, job).able
    # A yes is.
    slurm.run(["scontrol", "update", f"PartitionName={gate}", "AllocNodes=elsewhere"])
    assert probe_steward(client, cluster, job).able
    refused = probe(client, cluster, job)
    assert refused.able is None
    assert refused.why.startswith("sbatch refuses a test job: Batch job submission failed: Access/permission denied: ")


def test_a_busy_queue_leaves_it_unknown_and_nothing_behind(
    sshd: SshRig, slurm: SlurmRig, gate: str, tmp_path: Path
) -> None:
    slurm.submit("--partition", gate, "--exclusive", script="sleep 300")
    cluster = block(sshd, tmp_path / "work", partition=gate)
    begun = time.monotonic()
    abilities = probe_steward(SlurmClient(host_of(cluster)), cluster, SlurmJob(), seconds=3)
    assert time.monotonic() - begun < 10
    assert (abilities.may_submit, abilities.able) == (None, None)
    assert abilities.why == "the test job did not start within 3 s (Resources)"
    assert not probes(slurm) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["here", "over SSH"])
def test_a_client_that_is_killed_leaves_nothing_behind(
    sshd: SshRig, slurm: SlurmRig, gate: str, tmp_path: Path, how: str
) -> None:
    slurm.submit("--partition", gate, "--exclusive", script="sleep 300")
    work = tmp_path / "work"
    work.mkdir()
    cluster = block(sshd, work, partition=gate)
    if how == "here":
        cluster = cluster.model_copy(update={"host": None})
    client = subprocess.Popen([sys.executable, "-c", _PROBE, cluster.model_dump_json()])
    try:
        slurm.wait_until(lambda: bool(probes(slurm)), 20.0, "there is no test job")
    finally:
        client.kill()
        client.wait()
    slurm.wait_until(lambda: not probes(slurm) and not list(work.iterdir()), 20.0, "the test job is left")


_PROBE = """
import sys
from nexa_infra.hosts.connections import host_of
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.probe import probe
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob
cluster = Cluster.model_validate_json(sys.argv[1])
probe(SlurmClient(host_of(cluster)), cluster, SlurmJob(), seconds=4)
"""


def test_a_workdir_that_the_nodes_do_not_share_is_told(slurm: SlurmRig, tmp_path: Path) -> None:
    block = tmp_path / "cluster.yaml"
    work = tmp_path / "work"
    work.mkdir()
    block.write_text(f"workdir: {work}\n")
    # In a mount namespace of its own, the doctor's workdir is another than the nodes'.
    doctor = f"mount -t tmpfs none {shlex.quote(str(work))} && exec {sys.executable} -m nexa_infra doctor {block}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", doctor], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NO ")]
    assert re.fullmatch(rf"NO  workdir +the workdir {work} is not seen on n[12]", line)
    assert "name one that the compute nodes share" in done.stdout
    assert not probes(slurm)


def test_an_account_of_its_own_is_asked_for_as_its_user(sshd: SshRig, slurm: SlurmRig, tmp_path: Path) -> None:
    cluster = block(sshd, sshd.accounts.home(ADA) / "work", ADA, account="teaching")
    abilities = probe_steward(SlurmClient(host_of(cluster)), cluster, SlurmJob(partition="short", qos="normal"))
    assert abilities.able and abilities.partition == "short" and abilities.accounting
    full = SlurmJob(account="teaching", qos="tight")
    slurm.submit("--hold", "--array=0-1", "--qos=tight", "--account=teaching", user=ADA)
    slurm.submit("--hold", "--qos=tight", "--account=teaching", user=ADA)
    abilities = probe_steward(SlurmClient(host_of(cluster)), cluster, full)
    assert abilities.able is None and "QOSMaxSubmitJobPerUserLimit" in abilities.why

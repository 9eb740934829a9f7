"""What a cluster does not admit is refused before anything is copied: one clear error, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nexa_infra.errors import SubmitError
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, steps
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm.site import read_site
from nexa_infra.spec.cluster import Cluster
from tests.rig.accounts import ADA, BOB
from tests.rig.clusters import cluster_at, shell_config
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig


def planned(folder: Path, cluster: Cluster, *, job: str = "", count: int = 3) -> Run:
    return steps.plan(shell_config(folder, "true", list(range(count)), job=job), cluster=cluster)


REFUSED = [
    (", partition: cpux", ["job.partition: there is no partition 'cpux' (did you mean 'cpu'?)"]),
    (", account: reserch", ["job.account: you have no account 'reserch'", "did you mean 'research'?"]),
    (", qos: nosuch", ["job.qos: there is no QOS 'nosuch'", "it has hasty, narrow, normal, tight"]),
    (", partition: short", ["job.time: 00:05:00 is over the limit of partition short, 00:02:00"]),
    (", partition: short, time: UNLIMITED", ["job.time: UNLIMITED is over the limit"]),
    (", gpus_per_node: 1, gpu_type: v100, partition: gpu", ["partition gpu has no v100", "it has a100, h100"]),
    (", gpus_per_node: 9, gpu_type: h100, partition: gpu", ["Requested node configuration is not available"]),
    (", cpus_per_task: 64", ["Requested node configuration is not available"]),
    (", memory: 900G", ["Requested node configuration is not available", "memory"]),
    (", nodelist: n9", ["Invalid node name specified", "job.nodelist"]),
    (", partition: closed", ["permission"]),
    (", extra: {licenses: matlab}", ["Invalid license specification", "job.extra"]),
    (", env_file: ~/nosuch.env", ["job.env_file:", "nosuch.env is not there", "chmod 600"]),
]


@pytest.mark.parametrize(("job", "words"), REFUSED, ids=[job for job, _ in REFUSED])
def test_what_cannot_run_is_refused_in_the_schedulers_words_and_ours(
    job: str, words: list[str], cluster: Cluster, home: Path, tmp_path: Path
) -> None:
    job = re.sub(r"^, (time|memory): ", r", \1: ", job)
    config = shell_config(tmp_path, "true", [1, 2, 3, 4], job=job)
    text = config.read_text()
    for key in ("time", "memory"):  # a key may stand once
        if text.count(f"{key}: ") > 1:
            text = (
                re.sub(rf'{key}: ("00:05:00"|50M), ?', "", text, count=1)
                if key == "time"
                else text.replace(", memory: 50M", "", 1)
            )
    config.write_text(text)
    with pytest.raises(SubmitError) as raised:
        launch.launch_slurm_sweep(config, submit=True, cluster=cluster)
    said = str(raised.value)
    for each in words:
        assert each in said, said
    assert "nothing was copied or submitted" in said and "Traceback" not in said
    assert said.count("\n  ") == 1, said  # one reason, told once
    assert not Path(cluster.workdir).exists() and not home.exists()


def test_more_trials_than_one_array_takes_become_several(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    config = shell_config(tmp_path, "true", [0])
    many = ", ".join(map(str, range(501)))
    config.write_text(config.read_text().replace("{n: [0]}", f"{{n: [0, 1], m: [{many}]}}"))
    said = steps.check(steps.plan(config, cluster=cluster))
    assert said.array_size == 1000, "MaxArraySize 1001 is one more than the largest index"
    assert "1,002 array tasks are more than one array takes there (1,000): 2 arrays" in said.notes
    assert not Path(cluster.workdir).exists()


def test_more_than_may_be_queued_at_once_is_told(
    cluster: Cluster, sshd: SshRig, home: Path, tmp_path: Path, workdir: Path
) -> None:
    said = steps.check(planned(tmp_path, cluster, job=", qos: tight", count=4))
    told = "4 array tasks are more than may be queued at once: 3 by QOS tight. The rest is submitted as room appears"
    assert said.queue_size == 3 and told in said.notes
    said = steps.check(planned(tmp_path, cluster_at(sshd, workdir, limits={"max_submit": 2, "max_array_size": 3})))
    assert (said.array_size, said.queue_size) == (2, 2)
    assert any("2 by the cluster's block" in note for note in said.notes)
    connections.close_all()


def test_a_workdir_that_cannot_be_written_is_refused(sshd: SshRig, home: Path, tmp_path: Path) -> None:
    cluster = cluster_at(sshd, "/root/nexa", user=ADA.name)
    with pytest.raises(SubmitError, match=r"the workdir /root/nexa cannot be written: /\S* belongs to root"):
        steps.check(planned(tmp_path, cluster))
    (tmp_path / "file").touch()
    with pytest.raises(SubmitError, match=r"lies below .*/file, which is no folder"):
        steps.check(planned(tmp_path, cluster_at(sshd, tmp_path / "file" / "nexa")))
    connections.close_all()


def test_a_user_without_an_account_is_told(sshd: SshRig, home: Path, tmp_path: Path, workdir: Path) -> None:
    workdir.parent.chmod(0o777)
    with pytest.raises(SubmitError, match="Invalid account"):
        steps.check(planned(tmp_path, cluster_at(sshd, workdir, user=BOB.name)))
    connections.close_all()


def test_a_plain_user_runs_a_sweep(sshd: SshRig, slurm: SlurmRig, home: Path, tmp_path: Path, workdir: Path) -> None:
    workdir.parent.chmod(0o777)
    config = shell_config(tmp_path, "id -un", [1, 2])
    batch = launch.launch_slurm_sweep(config, submit=True, cluster=cluster_at(sshd, workdir, user=ADA.name))
    assert batch.report is not None and batch.report.states == {"completed": 2}
    out = workdir / "runs" / batch.run_id / "trials" / "0" / "attempt-1.out"
    assert out.read_text() == "ada\n" and out.stat().st_uid == ADA.uid
    connections.close_all()


def test_the_sites_own_name_of_a_gpu_is_asked_for(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    run = planned(tmp_path, cluster, job=", gpus_per_node: 2, gpu_type: A100-SXM4-80GB, partition: gpu")
    assert steps.check(run).gpu == "a100"
    config = shell_config(
        tmp_path, 'echo "$CUDA_VISIBLE_DEVICES"', [1], job=", gpus_per_node: 2, gpu_type: A100, partition: gpu"
    )
    batch = launch.launch_slurm_sweep(config, submit=True, cluster=cluster)
    assert "#SBATCH --gpus-per-node=a100:2" in batch.script_text
    report = batch.report
    assert report is not None and report.prices[0].unit == "gpu-hour" and report.accounted
    out = Path(cluster.workdir) / "runs" / batch.run_id / "trials" / "0" / "attempt-1.out"
    assert len(out.read_text().split(",")) == 2


def test_no_memory_where_none_is_given_by_default_is_told(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    config = shell_config(tmp_path, "true", [1], job=", partition: greedy")
    config.write_text(config.read_text().replace(", memory: 50M", ""))
    [note] = steps.check(steps.plan(config, cluster=cluster)).notes
    assert "each trial takes all of its node's memory" in note


def test_what_is_remembered_of_a_cluster_refuses_nothing_by_itself(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path
) -> None:
    steps.check(planned(tmp_path, cluster))
    job = ", partition: fresh"
    with pytest.raises(SubmitError, match="there is no partition 'fresh'"):
        steps.check(planned(tmp_path, cluster, job=job))
    slurm.run(["scontrol", "create", "PartitionName=fresh", "Nodes=n1", "DefMemPerCPU=100"])
    try:
        assert steps.check(planned(tmp_path, cluster, job=job)).starts
    finally:
        slurm.run(["scontrol", "delete", "PartitionName=fresh"])


def test_a_cluster_without_slurm_is_one_clear_error() -> None:
    with pytest.raises(SubmitError, match="Slurm's commands are not found on the cluster's login node"):
        read_site({"config": ("sh: 1: scontrol: not found", 127)})
    with pytest.raises(SubmitError, match="Slurm does not answer: .*connect failure"):
        read_site({"config": ("slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)", 1)})

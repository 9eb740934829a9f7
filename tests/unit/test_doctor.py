"""What the doctor reads out of a cluster's answers, and what it makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexa_infra.errors import ContainerError, HostError
from nexa_infra.hosts.base import Completed, ConnectionLostError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.provisioning import here
from nexa_infra.provisioning.doctor import Check, check_cluster, check_here
from nexa_infra.provisioning.inspect import (
    Association,
    Clock,
    Disk,
    Quota,
    inspect,
    read_answers,
    read_associations,
    read_disk,
    read_gres,
    read_nodes,
    read_qos,
    read_quotas,
)
from nexa_infra.spec.cluster import Cluster, ClusterLimits
from nexa_infra.spec.container import RuntimeName
from tests.unit.little_server import Server

CONFIG = """\
Configuration data as of 2026-11-24T11:10:58
AccountingStorageEnforce = associations,limits,qos
AccountingStorageTRES   = cpu,mem,energy,node,billing,gres/gpu,gres/gpu:a100
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = deep
DefMemPerNode           = UNLIMITED
MaxArraySize            = 1001
MaxJobCount             = 10000
SelectTypeParameters    = CR_CORE_MEMORY
"""
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllocNodes=ALL Default=YES State=UP TotalNodes=2 DefMemPerCPU=1024
PartitionName=big AllowGroups=ALL AllocNodes=ALL Default=NO State=UP TotalNodes=1 DefMemPerNode=UNLIMITED
"""
NODES = """\
g1|gpu|gpu:a100:4(S:0-1)|64|515072|mix
g2|gpu|gpu:a100:4(S:0-1)|64|515072|drain
g2|big|gpu:a100:4(S:0-1)|64|515072|drain
b1|big|(null)|128|1031168|idle~
"""
SPACE = """\
Filesystem              Type   1024-blocks      Used Available Capacity Mounted on
10.0.0.1@o2ib:/the work lustre  1000000000 895142400 104857600      90% /scratch
"""
INODES = """\
Filesystem               Inodes IUsed   IFree IUse% Mounted on
10.0.0.1@o2ib:/the work 9000000 4000000 5000000 45% /scratch
"""
STARTS = "sbatch: Job 2 to start at 2026-11-24T11:16:54 using 1 processors on nodes g1 in partition gpu\n"


@dataclass(frozen=True)
class Says:
    """A command's answer: its exit code, or `missing`."""

    stdout: str = ""
    stderr: str = ""
    code: int | str = 0


MISSING = Says(code="missing")
HUNG = Says(code=124)
HEALTHY: dict[str, Says] = {
    "user": Says("ada\n"),
    "groups": Says("ada ml\n"),
    "machine": Says("login1.deep\n"),
    "path": Says("/usr/bin:/bin\n"),
    "bash": Says("GNU bash, version 5.2.15(1)-release (x86_64-pc-linux-gnu)\n"),
    "rsync": Says("rsync  version 3.2.7  protocol version 31\n"),
    "python": Says("Python 3.9.18\n"),
    "lacking": Says(),
    "apptainer": Says("apptainer version 1.3.4-1.el9\n"),
    "singularity": MISSING,
    "docker": Says("\n", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.\n", 1),
    "enroot": MISSING,
    "slurm": Says("slurm 23.11.10\n"),
    "commands": Says(),
    "pyxis": Says(code=1),
    "config": Says(CONFIG),
    "ping": Says("Slurmctld(primary) at ctl1 is UP\nSlurmctld(backup) at ctl2 is UP\n"),
    "partitions": Says(PARTITIONS),
    "nodes": Says(NODES),
    "queue": Says("12|12|[0-9%4]|PENDING|Resources|nexa|a\n13|13|N/A|RUNNING|None|nexa\n"),
    "submit": Says(stderr=STARTS),
    "sacct": Says(),
    "associations": Says("deep|vision||normal,long|500|20|||||gres/gpu=16|\nother|vision||normal||||||||\n"),
    "qos": Says("normal||||||||\nlong|||7-00:00:00|||||\nsecret|1|||||||\n"),
    "nearest": Says("/scratch/ada"),
    **{name: Says() for name in ("make", "write", "lock", "link", "session", "execute", "remove")},
    "space": Says(SPACE),
    "inodes": Says(INODES),
    "quota": Says("Disk quotas for user ada (uid 21001): none\n"),
    "lfs": MISSING,
}
CLUSTER = Cluster(name="deep", host="login1", workdir="/scratch/ada")
# What a test job on a node says: a section's name -> its output and exit code.
ON_A_NODE: dict[str, tuple[str, int]] = {
    "place": ("", 0),
    "submitted": ("4711", 0),
    "node": ("g1", 0),
    "partition": ("gpu", 0),
    "lacking": ("", 0),
    "writes": ("", 0),
    "squeue": ("RUNNING", 0),
    "scontrol": ("JobId=4711 JobName=nexa-probe-1", 0),
    "sacct": ("4711", 0),
    "sbatch": (STARTS, 0),
    "python": ("3.12.7 /usr/bin/python3.12", 0),
}
NO_ANSWER = {name: ON_A_NODE[name] for name in ("place", "submitted")}


@dataclass
class Site(LocalHost):
    """A login node that gives these answers, and whose clock is so far ahead of ours."""

    answers: Mapping[str, Says]
    ahead: float = 0.0
    asked: list[str] = field(default_factory=list)
    node: Mapping[str, tuple[str, int]] | HostError = field(default_factory=lambda: ON_A_NODE)
    name = "ada@login1"
    remote = True

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        self.asked.append(text)
        found = re.search(r"^mark=(\S+)$", text, re.MULTILINE)
        if not found:
            if isinstance(self.node, HostError):
                raise self.node
            said = "".join(f"{output}\n==nexa {name} {code}==\n" for name, (output, code) in self.node.items())
            return Completed(("sh",), 0, said, "")
        mark = found[1]
        now = Says(f"{time.time() + self.ahead:.9f}\n")
        stdout, stderr = "Welcome to the cluster\n", ""
        for name, says in {"began": now, **self.answers, "ended": now}.items():
            stdout += f"\n{mark} {name}\n{says.stdout}\n{mark} = {says.code} 15\n"
            stderr += f"\n{mark} {name}\n{says.stderr}"
        return Completed(("sh",), 0, stdout, stderr)


def look(
    cluster: Cluster = CLUSTER, /, *, ahead: float = 0.0, without: tuple[str, ...] = (), **changed: Says
) -> list[Check]:
    return look_at({name: says for name, says in {**HEALTHY, **changed}.items() if name not in without}, cluster, ahead)


def look_at(answers: Mapping[str, Says], cluster: Cluster = CLUSTER, ahead: float = 0.0) -> list[Check]:
    return list(check_cluster(cluster, Site(answers, ahead)))


def told(checks: list[Check], name: str) -> str:
    return "\n".join(each.found for each in checks if each.name == name)


def wrong(checks: list[Check]) -> list[tuple[str, str, str]]:
    for each in checks:
        # To do without a steward is no sickness, and can be mended.
        assert each.fine == (not each.remedy) or each.name == "unattended"
    return [(each.name, each.found, each.remedy) for each in checks if not each.fine]


def block(**fields: object) -> Cluster:
    return Cluster.model_validate({**CLUSTER.model_dump(), **fields})


def test_a_healthy_site_is_told_line_by_line() -> None:
    checks = look()
    assert not wrong(checks)
    assert told(checks, "SSH") == "ada@login1: logged in on login1.deep as ada, in 0.0 s"
    assert told(checks, "Slurm") == "23.11.10, cluster deep, controller up on ctl1 and ctl2"
    assert told(checks, "queue") == "squeue answers: ada has 11 tasks in it"
    assert told(checks, "submit") == "a small job could start in gpu at 2026-11-24T11:16:54"
    assert told(checks, "accounting") == "sacct answers: GPUs by type (a100)"
    assert told(checks, "account") == "vision; QOS long, normal"
    assert told(checks, "limits").splitlines() == [
        "1,000 tasks an array at most (MaxArraySize); 10,000 jobs of all users (MaxJobCount)",
        "account vision: 500 tasks queued or running, 20 running at once, gres/gpu=16 in all",
        "QOS long: walltime 7-00:00:00",
    ]
    assert told(checks, "partitions") == "2 take your jobs: gpu (default), big"
    assert told(checks, "memory") == "without job.memory a job takes the whole node's in big"
    assert told(checks, "nodes") == "2 of 3 up: 64 to 128 cores, 503 to 1,007 GiB each"
    assert told(checks, "GPUs") == "8 a100 (4 down) in every partition"
    assert told(checks, "containers") == "apptainer 1.3.4, docker gives no answer"
    assert told(checks, "clock").startswith("agrees with this machine's within 0.")
    assert told(checks, "workdir") == "/scratch/ada can be written"
    assert told(checks, "space") == "100.0 GiB and 5,000,000 inodes free (lustre)"
    assert told(checks, "quota") == "none is set"
    assert told(checks, "unattended").splitlines() == [
        "compute nodes may submit jobs (asked on g1 in gpu)",
        "Python for the steward: /usr/bin/python3.12 3.12.7",
    ]
    assert max(len(each.found) for each in checks) < 86


@pytest.mark.parametrize(
    ("changed", "name", "found"),
    [
        ({"slurm": MISSING}, "Slurm", "no scontrol in /usr/bin:/bin"),
        ({"slurm": Says("slurm 20.02.7\n")}, "Slurm", "20.02.7: 20.11 or newer is needed"),
        ({"commands": Says("sbatch\nsrun\n")}, "Slurm", "23.11.10, without sbatch, srun"),
        (
            {"slurm": Says("", "scontrol: fatal: Could not establish a configuration source\n", 1)},
            "Slurm",
            "scontrol --version: Could not establish a configuration source",
        ),
        ({"queue": HUNG}, "queue", "squeue: no answer within 15 s"),
        ({"nodes": HUNG}, "nodes", "sinfo: no answer within 15 s"),
        (
            {"submit": Says("", "allocation failure: Invalid user id\n", 1)},
            "submit",
            "sbatch refuses a job: Invalid user id",
        ),
        (
            {"sacct": Says("", "sacct: error: one\nsacct: error: Problem talking to the database: refused\n", 1)},
            "accounting",
            "sacct: Problem talking to the database: refused",
        ),
        ({"sacct": MISSING}, "accounting", "sacct: not installed"),
        ({"associations": Says("", "sacctmgr: error: no\n", 1)}, "account", "sacctmgr: no"),
        ({"associations": Says()}, "account", "ada has none"),
        ({"config": Says(CONFIG.replace("1001", "0"))}, "limits", "no job arrays (MaxArraySize 0)"),
        ({"partitions": Says(PARTITIONS.replace("State=UP", "State=DOWN"))}, "partitions", "none takes your jobs now"),
        ({"bash": Says("GNU bash, version 4.1.2(1)-release\n")}, "bash", "4.1.2"),
        ({"rsync": MISSING}, "rsync", "not installed on login1.deep"),
        ({"python": MISSING}, "Python", "python3: not installed on login1.deep"),
        ({"lacking": Says("flock\n")}, "tools", "not installed: flock"),
        (
            {"make": Says("", "mkdir: cannot create directory ‘/scratch/ada/.nexa’: Permission denied\n", 1)},
            "workdir",
            "/scratch/ada: no folder can be made there: Permission denied",
        ),
        (
            {"write": Says("", "sh: 1: head: Disk quota exceeded\n", 1)},
            "workdir",
            "/scratch/ada: no file can be written there: Disk quota exceeded",
        ),
        ({"lock": HUNG}, "workdir", "/scratch/ada: flock does not lock there: no answer within 15 s"),
        ({"space": Says(SPACE.replace("104857600", "1048575"))}, "space", "1.0 GiB and 5,000,000 inodes free (lustre)"),
        ({"inodes": Says(INODES.replace(" 5000000", "    9999"))}, "space", "100.0 GiB and 9,999 inodes free (lustre)"),
    ],
)  # fmt: skip
def test_one_sickness_is_one_line_with_a_remedy(changed: dict[str, Says], name: str, found: str) -> None:
    assert [each[:2] for each in wrong(look_at({**HEALTHY, **changed}))] == [(name, found)]


def test_two_clocks_that_differ_make_times_and_costs_wrong() -> None:
    (clock,) = wrong(look(ahead=61.5))
    assert clock[:2] in {("clock", "61 s ahead of this machine's"), ("clock", "62 s ahead of this machine's")}
    assert "behind this machine's" in told(look(ahead=-30), "clock") and not wrong(look(ahead=-30))


def test_a_block_that_names_what_is_not_there_is_told_the_nearest() -> None:
    assert wrong(look(block(partition="gpus", account="vison", limits=ClusterLimits(max_array_size=5000)))) == [
        ("account", "ada has no vison (did you mean 'vision'?)", "correct `account` in the cluster's block: vision"),
        (
            "limits",
            "MaxArraySize is 1001, and 5000 in the cluster's block",
            "take limits.max_array_size out of the block: the cluster is asked",
        ),
        (
            "partitions",
            "gpus is not here (did you mean 'gpu'?)",
            "name another `partition` in the cluster's block: gpu, big",
        ),
    ]
    assert wrong(look(block(runtime="docker"))) == [
        (
            "containers",
            "no docker that works on login1.deep; apptainer 1.3.4, docker gives no answer",
            (
                "set `runtime` in the cluster's block to apptainer, or ask its administrators for docker; where a "
                "module brings it, load that in job.setup"
            ),
        )
    ]
    assert [each[:2] for each in wrong(look(block(workdir="scratch")))] == [("workdir", "scratch is no absolute path")]


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("State=UP", "State=DOWN", "down"),
        ("TotalNodes=1", "TotalNodes=0", "without nodes"),
        ("AllocNodes=ALL", "AllocNodes=login2,login3", "only for jobs from login2,login3"),
        ("AllowGroups=ALL", "AllowGroups=physics,bio", "only for group physics or bio"),
        ("AllowGroups=ALL", "AllowGroups=ALL AllowAccounts=bio", "only for account bio"),
        ("AllowGroups=ALL", "AllowGroups=ALL DenyAccounts=vision", "closed to your account"),
        ("AllowGroups=ALL", "AllowGroups=ALL RootOnly=YES", "only for root"),
    ],
)
def test_a_partition_that_takes_no_job_of_ours_says_why(before: str, after: str, why: str) -> None:
    gpu, big = PARTITIONS.splitlines(keepends=True)
    checks = look(partitions=Says(gpu + big.replace(before, after)))
    assert told(checks, "partitions").splitlines() == ["1 take your jobs: gpu (default)", f"not for you: big ({why})"]
    assert not wrong(checks)


def test_root_is_told_where_its_jobs_are_refused() -> None:
    checks = look(user=Says("root\n"), config=Says(f"{CONFIG}DisableRootJobs         = Yes\n"))
    assert told(checks, "partitions").splitlines() == [
        "none takes your jobs now",
        "not for you: gpu, big (closed to root)",
    ]


def test_an_account_is_needed_only_where_slurm_asks_for_one() -> None:
    checks = look(associations=Says(), config=Says(CONFIG.replace("associations,limits,qos", "none")))
    assert told(checks, "account") == "ada has none, and needs none" and not wrong(checks)


def test_nodes_that_are_all_down_leave_no_partition() -> None:
    checks = look(nodes=Says(NODES.replace("mix", "down*").replace("idle~", "idle*")))
    assert [each[:2] for each in wrong(checks)] == [
        ("partitions", "none takes your jobs now"),
        ("nodes", "none of 3 is up"),
    ]
    assert "not for you: gpu, big (without a node that is up)" in told(checks, "partitions")
    assert told(checks, "GPUs") == "8 a100 (all down) in every partition"


def test_a_site_without_accounting_is_fine_and_says_what_costs_come_from() -> None:
    config = CONFIG.replace("accounting_storage/slurmdbd", "accounting_storage/none").replace(
        "associations,limits", "none"
    )
    disabled = Says("", "Slurm accounting storage is disabled\n", 1)
    checks = look(config=Says(config), sacct=disabled, without=("associations", "qos"))
    assert not wrong(checks)
    assert told(checks, "accounting") == "no accounting: actual cost comes from the trials' own clocks"
    assert not told(checks, "account")


def test_a_controller_that_is_down_is_told_once() -> None:
    words = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n"
    checks = look(
        config=Says("", words, 1),
        ping=Says("Slurmctld(primary) at ctl1 is DOWN\n*** RESTORE ***\n", code=1),
        without=("partitions", "nodes", "queue", "submit"),
    )
    (slurm,) = wrong(checks)
    assert slurm[1] == "23.11.10, controller down on ctl1: Unable to contact slurm controller (connect failure)"
    assert not [each for each in checks if each.name in {"partitions", "nodes", "queue", "submit", "memory"}]


def test_a_rule_of_the_sites_own_is_told_and_no_sickness() -> None:
    words = "sbatch: error: You must ask for a time\nallocation failure: Unspecified error\n"
    checks = look(submit=Says("", words, 1))
    assert told(checks, "submit") == "sbatch refuses a job that asks for nothing: Unspecified error"
    assert not wrong(checks)


def test_a_workdir_without_execution_hinders_nothing() -> None:
    checks = look(execute=Says("", "sh: 1: /scratch/ada/run: Permission denied\n", 126))
    assert told(checks, "workdir") == (
        "/scratch/ada can be written; programs in it cannot be executed: run them by python or bash"
    )
    assert not wrong(checks)


def test_limits_that_cannot_be_read_are_told_as_such() -> None:
    checks = look(qos=Says("", " Unknown field 'maxsubmitpu'\n", 1))
    assert "those of QOS are not known: sacctmgr: Unknown field 'maxsubmitpu'" in told(checks, "limits")
    assert not wrong(checks)


def unattended(site: Site, cluster: Cluster = CLUSTER) -> list[tuple[str, str]]:
    checks = list(check_cluster(cluster, site))
    assert not wrong(checks)
    return [(each.found, each.remedy) for each in checks if each.name == "unattended"]


def test_nodes_that_may_not_submit_are_no_sickness_and_told() -> None:
    no = ("allocation failure: Access/permission denied", 1)
    site = Site(HEALTHY, node={**ON_A_NODE, "sbatch": no, "python": ("none", 0)})
    assert unattended(site) == [
        (
            (
                "no: jobs may not be submitted from g1: sbatch says Access/permission denied: ask its administrators "
                "to let the partition take jobs from its nodes (AllocNodes)"
            ),
            "",
        ),
        (
            "no: there is no Python 3.9 or newer on g1: ask its administrators for one",
            "till then `unattended: true` is refused here; nothing else is",
        ),
    ]


def test_a_test_job_that_does_not_start_leaves_it_unknown() -> None:
    job = ("JobId=4711 JobName=nexa-probe-1 JobState=PENDING Reason=Priority", 0)
    ((found, remedy),) = unattended(Site(HEALTHY, node={**NO_ANSWER, "job": job}))
    assert found == "unknown: the test job did not start within 60 s (Priority)"
    assert remedy.startswith("ask again later")
    ((found, remedy),) = unattended(Site(HEALTHY, node=ConnectionLostError("login1 has gone")))
    assert (found, remedy) == ("unknown: login1 has gone", "ask again")


def test_a_workdir_that_nodes_do_not_share_is_wrong_for_every_run() -> None:
    job = ("JobId=4711 JobState=FAILED Reason=NonZeroExitCode ExitCode=61:0 BatchHost=g1", 0)
    checks = list(check_cluster(CLUSTER, Site(HEALTHY, node={**NO_ANSWER, "job": job})))
    remedy = "name one that the compute nodes share"
    assert wrong(checks) == [("workdir", "the workdir /scratch/ada is not seen on g1", remedy)]


@pytest.mark.parametrize(
    "changed",
    [
        {"submit": Says("", "allocation failure: Invalid user id\n", 1)},
        {"config": Says("", "Unable to contact slurm controller\n", 1), "submit": MISSING},
        {"make": Says("", "mkdir: Permission denied\n", 1)},
    ],
)
def test_no_test_job_is_started_where_none_can_run(changed: dict[str, Says]) -> None:
    site = Site({**HEALTHY, **changed})
    assert not told(list(check_cluster(CLUSTER, site)), "unattended")
    assert len(site.asked) == 1


def test_a_rule_of_the_sites_own_does_not_hinder_the_test_job() -> None:
    submit = Says("", "allocation failure: Requested time limit is missing\n", 1)
    assert unattended(Site({**HEALTHY, "submit": submit}))[0][0].startswith("compute nodes may submit jobs")


def test_what_a_sick_machine_says_moves_no_cursor() -> None:
    checks = look(slurm=Says("slurm 23.11.10\n"), config=Says("", "\x1b[2J\x07gone \udcff\n", 1))
    assert all(text.isprintable() for each in checks for text in (each.found, each.remedy))
    assert r"\x1b[2J\x07gone \udcff" in told(checks, "Slurm")


class Unreached(LocalHost):
    """A host that raises in place of an answer."""

    remote = True

    def __init__(self, *errors: HostError) -> None:
        self.errors = list(errors)

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        if self.errors:
            raise self.errors.pop(0)
        return super().script(text, timeout=timeout)


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (
            "ada@deep:2222 refuses connections: check the port (2222), and whether its sshd runs",
            "ada@deep:2222 refuses connections",
            "check the port (2222), and whether its sshd runs",
        ),
        (
            "the host key of deep is not the one in k: somebody may be in between. Ask its administrators: now",
            "the host key of deep is not the one in k",
            "somebody may be in between. Ask its administrators: now",
        ),
        (
            "deep cannot be reached: No route to host",
            "deep cannot be reached: No route to host",
            "see whether it lets you in by hand, by `ssh`, and answers there",
        ),
    ],
)
def test_a_host_that_is_not_reached_is_one_line(words: str, found: str, remedy: str) -> None:
    assert list(check_cluster(CLUSTER, Unreached(HostError(words)))) == [Check("SSH", False, found, remedy)]


def test_a_workdir_that_hangs_leaves_the_rest_told(tmp_path: Path) -> None:
    cluster = block(workdir=str(tmp_path))
    checks = list(check_cluster(cluster, Unreached(ConnectionLostError("has not answered for 60 s"))))
    assert told(checks, "workdir") == f"{tmp_path} does not answer: its file system hangs"
    assert told(checks, "bash")
    twice = Unreached(ConnectionLostError("cut"), ConnectionLostError("has not answered for 60 s"))
    assert [(each.name, each.fine) for each in check_cluster(cluster, twice)] == [("SSH", False)]


def test_a_shell_that_is_none_is_told_with_its_words() -> None:
    class Restricted(Unreached):
        name = "deep"

        def script(self, text: str, *, timeout: float | None = None) -> Completed:
            return Completed(("sh",), 1, "", "This account is for file transfers only\n")

    (check,) = check_cluster(CLUSTER, Restricted())
    assert (check.fine, check.found) == (
        False,
        "deep did not answer as a POSIX shell does: This account is for file transfers only",
    )


# ---- what is read


def test_answers_are_told_apart_by_their_marks() -> None:
    stdout = (
        "motd\n\nM one\nMM two\n\nM = 0 5\n\nM hung\npart\nM = 137 15\n\nM gone\n\nM = missing 5\n\nM cut off\nwords"
    )
    stderr = "\nM one\nerror: no\n\nM hung\n\nM gone\n"
    answers = read_answers(Completed(("sh",), 0, stdout, stderr), "M")
    assert set(answers) == {"one", "hung", "gone"}
    one, hung, gone = answers["one"], answers["hung"], answers["gone"]
    assert (one.works, one.stdout, one.stderr, one.words) == (True, "MM two\n", "error: no\n", "no")
    assert (hung.outcome, hung.stdout, hung.words) == ("cut", "part", "no answer within 15 s")
    assert (gone.outcome, gone.works, gone.words) == ("missing", False, "not installed")


def test_gpus_are_read_by_type() -> None:
    assert read_gres("gpu:a100:4(S:0-1),gpu:h100:2(IDX:0,1),shard:8") == {"a100": 4, "h100": 2}
    assert read_gres("gpu:4") == {"": 4}
    assert read_gres("gpu:a100_1g.5gb:7") == {"a100_1g.5gb": 7}
    assert read_gres("gpu") == {"": 1}
    assert read_gres("(null)") == {}


def test_a_node_is_usable_unless_somebody_must_mend_it() -> None:
    states = (
        "idle",
        "mix",
        "alloc",
        "comp",
        "resv",
        "idle~",
        "mix#",
        "down",
        "drain*",
        "drng",
        "idle*",
        "maint",
        "inval",
        "unk",
    )
    nodes = read_nodes("".join(f"n|p|(null)|8|16384|{state}\n" for state in states) + "no node\n")
    assert [node.state for node in nodes if node.usable] == ["idle", "mix", "alloc", "comp", "resv", "idle~", "mix#"]


def test_limits_are_those_that_are_set_on_this_cluster() -> None:
    text = "deep|vision|gpu|normal,long|500||1-00:00:00|||||\nother|vision||normal|1|||||||\nnoise\n"
    limits = {"MaxSubmit": "500", "MaxWall": "1-00:00:00"}
    assert read_associations(text, "deep") == (Association("vision", "gpu", limits, ("normal", "long")),)
    assert read_qos("tight|3|||cpu=4||||\nnoise\n\n") == {"tight": {"MaxSubmitPU": "3", "MaxTRESPU": "cpu=4"}}


def test_space_is_read_whatever_the_file_system_is_called() -> None:
    assert read_disk(SPACE, INODES) == Disk("lustre", 104857600, 5000000)
    zero = "Filesystem Inodes IUsed IFree IUse% Mounted on\nnfs:/home 0 0 0 - /home\n"
    assert read_disk("F T 1 2 3 4 M\nnfs:/home nfs4 10 5 4 60% /home of all\n", zero) == Disk("nfs4", 4, None)
    assert read_disk("", "") is None


def test_quotas_are_read_as_quota_and_lfs_write_them() -> None:
    text = """\
Disk quotas for user ada (uid 21001):
     Filesystem   space   quota   limit   grace   files   quota   limit   grace
server:/home        51G*    50G     55G   6days    120k    500k    550k
/dev/sdb1            4K      0K      0K              1       0       0
"""
    assert read_quotas(text) == [
        Quota("server:/home", "51G", "50G", "120k", "500k", over=True),
        Quota("/dev/sdb1", "4K", "0K", "1", "0", over=False),
    ]
    lustre = "Disk quotas for usr ada (uid 21001):\n Filesystem used quota limit grace files quota limit grace\n"
    lustre += "  /scratch  10.2T      0k     20T       -  123456       0 1000000       -\n"
    assert read_quotas(lustre) == [Quota("/scratch", "10.2T", "20T", "123456", "1000000", over=False)]
    checks = look(quota=Says(text, code=1), lfs=Says(lustre))
    assert told(checks, "quota").splitlines() == [
        "51G of 50G and 120k of 500k files in server:/home",
        "no limit in /dev/sdb1",
        "10.2T of 20T and 123456 of 1000000 files in /scratch",
    ]
    assert [each[0] for each in wrong(checks)] == ["quota"]


def test_a_clock_is_as_sure_as_the_way_was_short() -> None:
    assert Clock(-0.2, 1.0).skew == 0 and Clock(-0.2, 1.0).doubt == pytest.approx(1.2)
    assert Clock(70.0, 71.0).skew == 70.0
    assert Clock(-91.0, -90.0).skew == -90.0


# ---- the script itself


def test_the_script_passes_shellcheck_and_leaves_nothing(tmp_path: Path) -> None:
    site = Site(HEALTHY)
    place = tmp_path / "it's a 'work' dir\nwith $lines"
    place.mkdir()
    inspect(site, block(workdir=f"{tmp_path}/x"))
    (text,) = site.asked
    # SC2016: what is quoted is for another shell. SC1091: /etc/profile is the site's own.
    argv = ["shellcheck", "--shell=sh", "--exclude=SC2016,SC1091", "-"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for workdir in (place, place / "runs" / "more"):
        # A block's path is one line; the script takes any.
        found = inspect(LocalHost(), CLUSTER.model_copy(update={"workdir": str(workdir), "host": None}))
        assert found.nearest == str(place)
        assert all(found.answer(name).works for name in ("make", "write", "lock", "link", "session", "remove"))
        assert not list(place.iterdir())
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_where_the_workdir_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cluster = CLUSTER.model_copy(update={"workdir": f"{tmp_path}/file/runs", "host": None})
    checks = list(check_cluster(cluster, LocalHost()))
    assert f"no folder can be made in {tmp_path}/file: Not a directory" in told(checks, "workdir")
    assert told(checks, "SSH").startswith("not needed: ")
    assert not told(checks, "clock")


@pytest.mark.parametrize("runtime", ["auto", "apptainer", "none"])
def test_what_the_block_says_runs_containers_is_there(runtime: RuntimeName) -> None:
    checks = look(CLUSTER.model_copy(update={"runtime": runtime}))
    assert wrong(checks) == []
    assert told(checks, "containers") == "apptainer 1.3.4, docker gives no answer"


def test_enroot_alone_runs_nothing_and_is_not_proposed() -> None:
    only = {"apptainer": MISSING, "docker": MISSING, "enroot": Says("3.5.0\n")}
    assert told(look_at({**HEALTHY, **only}), "containers") == "enroot 3.5.0: trials run without"
    pyxis = CLUSTER.model_copy(update={"runtime": "pyxis"})
    assert wrong(look_at({**HEALTHY, **only}, pyxis)) == [
        (
            "containers",
            "no pyxis that works on login1.deep; enroot 3.5.0",
            (
                "set `runtime` in the cluster's block to none, or ask its administrators for pyxis; where a module "
                "brings it, load that in job.setup"
            ),
        )
    ]
    spank = Says("      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH\n")
    assert (
        told(look_at({**HEALTHY, **only, "pyxis": spank}, pyxis), "containers")
        == "enroot 3.5.0, pyxis (srun --container-image)"
    )


# -- this machine


def containers_here(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *programs: str, engine: str | None = None
) -> tuple[bool, str, str]:
    """What is told of containers on a machine with these programs, and Docker's engine at this address."""
    for name in programs:
        (folder / name).write_text(f"#!/bin/sh\necho {name} version 1.3.4-1.el9\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(here, "SOCKET", folder / "docker.sock")
    monkeypatch.setenv("PATH", f"{folder}:/no/such/folder")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    if engine is not None:
        monkeypatch.setenv("DOCKER_HOST", engine)
    (found,) = [each for each in check_here(folder / "home") if each.name == "containers"]
    return found.fine, found.found, found.remedy


def test_a_machine_without_containers_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = "neither Docker nor Apptainer is here: trials run without"
    assert containers_here(monkeypatch, tmp_path) == (True, told, "")
    (tmp_path / "docker.sock").touch()  # somebody else's, or of an engine that was stopped
    told = f"docker gives no answer at {tmp_path}/docker.sock"
    monkeypatch.setattr(here, "connect", _no_engine)
    assert containers_here(monkeypatch, tmp_path) == (True, f"{told}: trials run without", "")
    assert containers_here(monkeypatch, tmp_path, "apptainer") == (True, f"apptainer 1.3.4, {told}", "")


def _no_engine() -> None:
    raise ContainerError("no")


def test_what_runs_containers_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = json.dumps({"Version": "27.3.1", "ApiVersion": "1.47"}).encode()
    engine = Server(lambda asked: (200, {"Content-Type": "application/json"}, version))
    told = containers_here(monkeypatch, tmp_path, "apptainer", "singularity", engine=f"tcp://{engine.host}")
    engine.close()
    assert told == (True, "docker 27.3.1, apptainer 1.3.4, singularity 1.3.4", "")


def test_an_engine_that_is_named_and_does_not_answer_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert containers_here(monkeypatch, tmp_path, engine=f"unix://{tmp_path}/no.sock") == (
        False,
        f"docker gives no answer at unix://{tmp_path}/no.sock",
        "start Docker's engine, or correct or unset DOCKER_HOST",
    )


def test_without_a_socket_the_sdk_of_docker_is_not_even_looked_at(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from nexa_infra.provisioning import here\n"
        f"here.SOCKET = Path({str(tmp_path / 'no.sock')!r}); list(here.check_here(Path({str(tmp_path)!r})))\n"
        "print('docker' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

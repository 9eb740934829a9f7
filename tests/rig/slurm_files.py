"""The configuration of the rig's Slurm, as text."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
CPUS = 8
MEMORY_MIB = 16384
GPUS: dict[str, dict[str, int]] = {"n1": {"a100": 4}, "n2": {"a100": 2, "h100": 2}}

# Name, then its options; `{here}` is this machine.
PARTITIONS: dict[str, str] = {
    "cpu": "Default=YES Nodes=n1,n2 DefMemPerCPU=1024 MaxTime=2-0 DefaultTime=1:00:00",
    "gpu": "Nodes=n1,n2 DefMemPerCPU=1024 MaxTime=1-0 DefaultTime=1:00:00",
    "short": "Nodes=n1,n2 DefMemPerCPU=1024 MaxTime=2",
    # slurmctld looks for jobs past their grace time every 30 s: low's end 2 to 32 s after the warning, spare's at once.
    "low": "Nodes=n1,n2 DefMemPerCPU=1024 DefaultTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=2",
    "spare": "Nodes=n1,n2 DefMemPerCPU=1024 DefaultTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE",
    "high": "Nodes=n1,n2 DefMemPerCPU=1024 DefaultTime=1:00:00 PriorityTier=10",
    "closed": "Nodes=n1,n2 DefMemPerCPU=1024 AllocNodes=elsewhere",
    "greedy": "Nodes=n1,n2",  # no default memory: a job that asks for none takes the node's
}


@dataclass(frozen=True)
class Ports:
    """Where the daemons listen, on the loopback."""

    database: int
    dbd: int
    controller: int
    n1: int
    n2: int

    def of(self, node: str) -> int:
        """A node's port."""
        return {"n1": self.n1, "n2": self.n2}[node]


def here() -> str:
    """This machine's name, as Slurm wants it."""
    return socket.gethostname().partition(".")[0]


def slurm_conf(
    folder: Path, ports: Ports, settings: Mapping[str, str], *, accounting: bool, memory_limits: bool
) -> str:
    """Return slurm.conf; `settings` come last and replace those of the same name."""
    options = {
        "ClusterName": "rig",
        "SlurmctldHost": f"{here()}(127.0.0.1)",
        "SlurmctldPort": str(ports.controller),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # A requeued job waits for cred_expire + 1 seconds: 121 on most sites.
        "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "StateSaveLocation": f"{folder}/state",
        "SlurmctldPidFile": f"{folder}/daemons/slurmctld.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdPidFile": f"{folder}/daemons/%n.pid",
        "SlurmdLogFile": f"{folder}/log/%n.log",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmdParameters": "config_overrides",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/cgroup" if memory_limits else "task/none",
        "MpiDefault": "none",
        "PropagateResourceLimits": "NONE",  # the machine may lack CAP_SYS_RESOURCE
        "ReturnToService": "2",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "GresTypes": "gpu",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        # Quick, for tests: a real site's scheduler is asked to rest between two rounds.
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2",
        "KillWait": "3",
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": "task=1",
        "AccountingStorageType": "accounting_storage/none",
    }
    if accounting:
        options |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(ports.dbd),
            "AccountingStoragePass": f"{folder}/munge/socket",
            "AccountingStorageTRES": "gres/gpu,gres/gpu:a100,gres/gpu:h100",
            "AccountingStorageEnforce": "associations,limits,qos",
        }
    lines = [f"{name}={value}" for name, value in {**options, **settings}.items()]
    for node in NODES:
        gres = ",".join(f"gpu:{kind}:{count}" for kind, count in GPUS[node].items())
        lines.append(
            f"NodeName={node} NodeHostname={here()} NodeAddr=127.0.0.1 Port={ports.of(node)} "
            f"CPUs={CPUS} RealMemory={MEMORY_MIB} Gres={gres} State=UNKNOWN"
        )
    for name, text in PARTITIONS.items():
        # Only low and spare give way: high's tier is above the others' as well.
        mode = "" if "PreemptMode" in text else " PreemptMode=OFF"
        lines.append(f"PartitionName={name} State=UP {text}{mode}")
    return "\n".join(lines) + "\n"


def devices(folder: Path) -> dict[str, list[tuple[str, list[Path]]]]:
    """Return each node's GPU types with their device files."""
    return {node: _numbered(folder / "dev" / node, kinds) for node, kinds in GPUS.items()}


def _numbered(folder: Path, kinds: Mapping[str, int]) -> list[tuple[str, list[Path]]]:
    found, first = [], 0
    for kind, count in kinds.items():
        found.append((kind, [folder / f"nvidia{number}" for number in range(first, first + count)]))
        first += count
    return found


def gres_conf(folder: Path) -> str:
    """Return gres.conf: a node whose GPUs have no file is invalid."""
    lines = ["AutoDetect=off"]
    for node, kinds in devices(folder).items():
        for kind, files in kinds:
            lines += [f"NodeName={node} Name=gpu Type={kind} File={file}" for file in files]
    return "\n".join(lines) + "\n"


def cgroup_conf(*, memory_limits: bool) -> str:
    """Return cgroup.conf: slurmd loads a cgroup plugin even where nothing asks for one."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\n"
    limits = "ConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\n" if memory_limits else ""
    return f"CgroupPlugin=cgroup/v1\n{limits}"


def slurmdbd_conf(folder: Path, ports: Ports, password: str, settings: Mapping[str, str]) -> str:
    """Return slurmdbd.conf, which must be readable by its owner alone; `settings` as in `slurm_conf`."""
    options = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/socket",
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": str(ports.dbd),
        "SlurmUser": "root",
        "PidFile": f"{folder}/daemons/slurmdbd.pid",
        "LogFile": f"{folder}/log/slurmdbd.log",
        "CommitDelay": "0",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1",
        "StoragePort": str(ports.database),
        "StorageUser": "slurm",
        "StoragePass": password,
        "StorageLoc": "slurm_rig",
    }
    return "".join(f"{name}={value}\n" for name, value in {**options, **settings}.items())


# What sacctmgr is told once, before slurmctld reads it. bob has no account here: his jobs are refused.
TIGHT_MAX_SUBMIT, NARROW_MAX_SUBMIT = 3, 12
ACCOUNTING = (
    "add cluster rig",
    f"add qos tight MaxSubmitJobsPerUser={TIGHT_MAX_SUBMIT}",
    f"add qos narrow MaxSubmitJobsPerUser={NARROW_MAX_SUBMIT}",
    "add qos hasty MaxWall=00:05:00",
    "modify cluster rig set QOS=normal,tight,narrow,hasty DefaultQOS=normal",
    "add account research,teaching Cluster=rig",
    "add user root Account=research,teaching DefaultAccount=research",
    "add user ada Account=teaching",
)

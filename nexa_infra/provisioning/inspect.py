"""What a cluster's login node is and has: asked by one script, and read into plain facts."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import ConnectionLostError, Host
from nexa_infra.provisioning.questions import OF_ASSOCIATIONS, OF_QOS, Answer, questions, read_answers
from nexa_infra.scheduling.slurm.text import read_config, read_queue, read_records
from nexa_infra.spec.cluster import Cluster

__all__ = [
    "Answer", "Association", "Clock", "Disk", "Inspection", "Node", "Partition", "Quota", "inspect", "read_answers",
    "read_associations", "read_disk", "read_gres", "read_inspection", "read_nodes", "read_partition", "read_qos",
    "read_quotas",
]  # fmt: skip

# Longer than any one question may take: a script that is silent for so long hangs where no signal reaches it.
SILENCE = 60.0


@dataclass(frozen=True)
class Clock:
    """How far its clock is ahead of ours, seconds: between these two, apart by the way there and back."""

    least: float
    most: float

    @property
    def skew(self) -> float:
        """What the two clocks differ by, at the least; 0 where they may well agree."""
        return self.least if self.least > 0 else min(self.most, 0.0)

    @property
    def doubt(self) -> float:
        """The time that went by on the way: the login, where there was one, and half a round trip twice."""
        return max(0.0, self.most - self.least)


@dataclass(frozen=True)
class Partition:
    """A partition, as `scontrol show partition` tells it; an empty tuple of names is everybody."""

    name: str
    default: bool
    state: str  # UP, DOWN, DRAIN, INACTIVE
    nodes: int
    default_memory: bool
    hosts: str  # from which jobs are taken; empty: from all
    groups: tuple[str, ...]
    accounts: tuple[str, ...]
    denied: tuple[str, ...]
    for_root: bool | None  # True: for root alone, False: for all but root


@dataclass(frozen=True)
class Node:
    """A node, as `sinfo` tells it in each of its partitions."""

    name: str
    partition: str
    gpus: Mapping[str, int]  # by type; an empty text is an untyped one
    cores: int
    memory_mib: int
    state: str  # sinfo's short word: idle, mix, alloc, drain*, …

    @property
    def usable(self) -> bool:
        """Whether jobs can start on it, now or later, without an administrator's hand."""
        word = re.match(r"[a-z]*", self.state)
        broken = word is not None and word[0] in _BROKEN
        return not broken and not self.state.endswith("*")


_BROKEN = {"down", "drain", "drng", "fail", "failg", "unk", "inval", "futr", "maint", "boot_fail", "pow_dn"}


@dataclass(frozen=True)
class Association:
    """What a user may do under an account; `limits` holds sacctmgr's fields that are set."""

    account: str
    partition: str
    limits: Mapping[str, str]
    qos: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """What is free where the workdir is; inodes are None where the file system counts none."""

    kind: str
    free_kib: int
    free_inodes: int | None


@dataclass(frozen=True)
class Quota:
    """What one may still write in one place; texts as `quota -s` writes them."""

    place: str
    used: str
    limit: str  # 0 is none
    files: str
    files_limit: str
    over: bool


@dataclass(frozen=True)
class Inspection:
    """A login node. What could not be asked is empty; `answers` tells each question's words."""

    cluster: Cluster
    host: str  # its name in messages
    remote: bool
    answers: Mapping[str, Answer]
    clock: Clock
    user: str
    groups: tuple[str, ...]
    machine: str
    lacking: tuple[str, ...]  # tools that every run needs
    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    associations: tuple[Association, ...]
    qos: Mapping[str, Mapping[str, str]]
    queued: int  # the user's array tasks that wait or run
    nearest: str  # the workdir, or the folder above it that is there
    disk: Disk | None
    quotas: tuple[Quota, ...]

    def answer(self, name: str) -> Answer:
        """Return what was said to a question, which may not have been asked."""
        return self.answers.get(name, Answer())

    def version(self, name: str) -> str:
        """Return the version that a tool told: `3.2.7`; empty where it told none."""
        answer = self.answer(name)
        found = re.search(r"\d+(?:\.\d+)+", answer.stdout) if answer.works else None
        return found[0] if found else ""


def inspect(host: Host, cluster: Cluster) -> Inspection:
    """Look at a cluster's login node: one round trip, and a second where the workdir does not answer the first.

    It starts no job, and leaves no file. On a healthy site it takes about a second, and on one whose controller
    does not answer about ten more.

    Raises:
        HostError: the host cannot be reached, or answers nothing that can be read.
    """
    mark = f"nexa-{secrets.token_hex(8)}"
    begun = time.time()
    try:
        done = host.script(questions(cluster, mark, workdir=cluster.workdir), timeout=SILENCE)
    except HostError as error:
        if host.remote and not isinstance(error, ConnectionLostError):
            raise
        # A file system that hangs holds its processes whatever signal they are sent: do without.
        begun = time.time()
        done = host.script(questions(cluster, mark), timeout=SILENCE)
    ended = time.time()
    answers = read_answers(done, mark)
    if not answers:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-300:]
        raise HostError(f"{host.name} did not answer as a POSIX shell does: {words}")
    first, last = (_seconds(answers.get(name, Answer()).stdout) for name in ("began", "ended"))
    clock = Clock(least=last - ended if last else 0.0, most=first - begun if first else 0.0)
    return read_inspection(answers, clock, cluster, host)


def read_inspection(answers: Mapping[str, Answer], clock: Clock, cluster: Cluster, host: Host) -> Inspection:
    """Read the facts out of the answers of a cluster's host."""

    def told(name: str) -> str:
        answer = answers.get(name, Answer())
        return answer.stdout if answer.works else ""

    config = read_config(told("config"))
    quotas = [answers.get(name, Answer()).stdout for name in ("quota", "lfs")]
    return Inspection(
        cluster=cluster,
        host=host.name,
        remote=host.remote,
        answers=answers,
        clock=clock,
        user=told("user").strip(),
        groups=tuple(told("groups").split()),
        machine=told("machine").strip(),
        lacking=tuple(told("lacking").split()),
        config=config,
        partitions=tuple(read_partition(record, config) for record in read_records(told("partitions"))),
        nodes=read_nodes(told("nodes")),
        associations=read_associations(told("associations"), config.get("ClusterName", "")),
        qos=read_qos(told("qos")),
        queued=_queued(told("queue")),
        nearest=told("nearest"),
        disk=read_disk(told("space"), told("inodes")),
        quotas=tuple(quota for text in quotas for quota in read_quotas(text)),
    )


def read_partition(record: Mapping[str, str], config: Mapping[str, str]) -> Partition:
    """Read a record of `scontrol show partition -o`; what it does not say of memory, slurm.conf says for all."""

    def names(key: str) -> tuple[str, ...]:
        text = record.get(key, "ALL")
        return () if text in {"ALL", "(null)", ""} else tuple(text.split(","))

    memory = [source.get(f"DefMemPer{of}", "") for source in (record, config) for of in ("CPU", "Node", "GPU")]
    for_root = True if record.get("RootOnly") == "YES" else None
    if record.get("DisableRootJobs") == "YES":
        for_root = False
    nodes = record.get("TotalNodes", "")
    return Partition(
        name=record.get("PartitionName", ""),
        default=record.get("Default") == "YES",
        state=record.get("State", "UP"),
        nodes=int(nodes) if nodes.isdigit() else 0,
        default_memory=any(text.isdigit() and text != "0" for text in memory)
        or "DefMemPerGPU" in record.get("JobDefaults", ""),
        hosts=",".join(names("AllocNodes")),
        groups=names("AllowGroups"),
        accounts=names("AllowAccounts"),
        denied=names("DenyAccounts"),
        for_root=for_root,
    )


def read_nodes(text: str) -> tuple[Node, ...]:
    """Read `sinfo -h -N -o '%N|%R|%G|%c|%m|%t'`: a node stands in a line for each of its partitions."""
    found = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 6:
            name, partition, gres, cores, memory, state = fields
            found.append(Node(name, partition, read_gres(gres), _leading(cores), _leading(memory), state))
    return tuple(found)


def read_gres(text: str) -> dict[str, int]:
    """Read a node's GPUs by type: `gpu:a100:4(S:0-1),gpu:2,shard:8`; an untyped one's type is an empty text."""
    found: dict[str, int] = {}
    for word in re.sub(r"\([^)]*\)", "", text).split(","):
        if gpu := re.fullmatch(r"gpu(?::([^:]+))??(?::(\d+))?", word):
            kind = gpu[1] or ""
            found[kind] = found.get(kind, 0) + int(gpu[2] or 1)
    return found


def read_associations(text: str, cluster: str) -> tuple[Association, ...]:
    """Read those of sacctmgr's associations that are of this cluster: it may keep several clusters' accounts."""
    found = []
    for line in text.splitlines():
        of, *fields = line.split("|")
        if len(fields) != 3 + len(OF_ASSOCIATIONS) or (cluster and of != cluster):
            continue
        account, partition, qos, *values = fields
        limits = {name: value for name, value in zip(OF_ASSOCIATIONS, values, strict=True) if value}
        found.append(Association(account, partition, limits, tuple(name for name in qos.split(",") if name)))
    return tuple(found)


def read_qos(text: str) -> dict[str, dict[str, str]]:
    """Read sacctmgr's QOS: name -> the limits that are set."""
    rows = [line.split("|") for line in text.splitlines()]
    return {
        name: {field: value for field, value in zip(OF_QOS, values, strict=True) if value}
        for name, *values in rows
        if len(values) == len(OF_QOS)
    }


def read_disk(space: str, inodes: str) -> Disk | None:
    """Read `df -PTk` and `df -Pi`; a file system without inodes of its own says 0 of 0, or `-`."""
    room = re.search(r"(\S+) +\d+ +-?\d+ +(-?\d+) +\S+ +/.*\s*$", space)
    if not room:
        return None
    counted = re.search(r" (\d+) +-?\d+ +(-?\d+) +\S+ +/.*\s*$", inodes)
    return Disk(room[1], int(room[2]), int(counted[2]) if counted and counted[1] != "0" else None)


def read_quotas(text: str) -> list[Quota]:
    """Read `quota -ws`, or `lfs quota -h`: place, used, quota, limit, grace, and the same of files; `*` is over."""
    found = []
    for line in text.splitlines():
        place, *words = line.split() or [""]
        # The grace time stands only where one is over its quota, in quota's lines; `-` is none, in Lustre's.
        sizes = [word for word in words if re.fullmatch(r"[\d.]+[kKMGTPE]?\*?", word)]
        if len(sizes) != 6:
            continue
        used, soft, hard, files, files_soft, files_hard = sizes
        limit, files_limit = (
            (hard if soft.rstrip("kK") == "0" else soft),
            (files_hard if files_soft == "0" else files_soft),
        )
        found.append(Quota(place, used.rstrip("*"), limit, files.rstrip("*"), files_limit, "*" in used + files))
    return found


def _queued(text: str) -> int:
    rows = read_queue(text)
    try:
        return sum(row.count for row in rows)
    except ValueError:
        return len(rows)  # a list of tasks that was cut short


def _seconds(text: str) -> float:
    found = re.match(r"\s*(\d+(?:\.\d+)?)", text)
    return float(found[1]) if found else 0.0


def _leading(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0

"""What a cluster allows a run: asked in one round trip, before anything is copied or submitted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nexa_infra.errors import HostError, SubmitError, WalltimeError
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.arguments import pack_rounds
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.slurm.billing import billing
from nexa_infra.scheduling.slurm.client import SlurmClient, sections
from nexa_infra.scheduling.slurm.questions import questions
from nexa_infra.scheduling.slurm.text import explained, queue_full, read_config, read_queue, read_records, refusal
from nexa_infra.spec.fields import suggestion
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.walltime import parse_walltime

# A run needs room for its code, its script and what its trials write: this much free is no room at all.
LEAST_MIB = 64
INODES_A_TRIAL = 5

# What is asked seldom, and for how long it is believed, seconds.
FACTS = ("config", "partitions", "associations", "qos", "nodes")
REMEMBER_SECONDS = 600.0

_START = re.compile(r"to start at (\S+)")


@dataclass(frozen=True)
class Site:
    """A cluster's answer. What it could not say is None or empty: that forbids nothing."""

    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[Mapping[str, str], ...] = ()
    associations: tuple[tuple[str, str, str, str], ...] | None = None  # account, partition, QOS list, MaxSubmitJobs
    qos: Mapping[str, tuple[str, str]] | None = None  # name -> MaxSubmitJobsPerUser, MaxWall
    gpus: Mapping[str, frozenset[str]] = field(default_factory=dict)  # partition -> GPU types; '' is an untyped one
    gpu: str | None = None  # the site's name for the GPU that is asked for
    queued: int = 0  # array tasks of this user that wait or run
    free_mib: int | None = None
    free_inodes: int | None = None
    problem: str | None = None  # what is wrong with the workdir or the far side's tools
    env_file: str | None = None  # what is wrong with it
    needs: tuple[str, ...] = ()  # what else the run needs there and does not find
    verdict: str = ""  # what sbatch --test-only said
    refused: bool = False

    @property
    def max_array_size(self) -> int | None:
        """Slurm's MaxArraySize: an index must be below it."""
        text = self.config.get("MaxArraySize", "")
        return int(text) if text.isdigit() else None

    def partition(self, name: str | None) -> Mapping[str, str] | None:
        """Return a partition, or the default one; None where there is none such."""
        for each in self.partitions:
            if each.get("PartitionName") == name or (name is None and each.get("Default") == "YES"):
                return each
        return None


def check(client: SlurmClient, run: Run) -> Admission:
    """Say whether a cluster can run a run, in one round trip.

    What changes seldom (its configuration, partitions, accounts) is remembered for `REMEMBER_SECONDS`;
    nothing is refused by what was remembered alone.

    Raises:
        HostError: it cannot be reached.
        SubmitError: there is no Slurm, or it cannot run the run; every reason is told.
    """
    known = _remembered(run)
    if known is not None:
        with suppress(SubmitError):
            return admission(run, ask(client, run, known))
    return admission(run, ask(client, run))


def ask(client: SlurmClient, run: Run, known: Mapping[str, tuple[str, int]] | None = None) -> Site:
    """Ask a cluster what it allows a run; of what is known already it is not asked.

    Raises:
        HostError: it cannot be reached.
        SubmitError: there is no Slurm.
    """
    done = client.ask(questions(run, facts=known is None))
    found = {**(known or {}), **sections(done.stdout)}
    if "config" not in found:
        raise HostError(
            f"{client.host.name} did not answer as it should: {done.stderr.strip()[-300:] or done.stdout[-300:]}"
        )
    site = read_site(found)
    if known is None:
        _remember(run, {name: found[name] for name in FACTS})
    return site


def _remembered(run: Run) -> dict[str, tuple[str, int]] | None:
    path = _memory(run)
    try:
        if time.time() - path.stat().st_mtime > REMEMBER_SECONDS:
            return None
        data = json.loads(path.read_bytes())
        return {name: (str(data[name][0]), int(data[name][1])) for name in FACTS}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _remember(run: Run, facts: Mapping[str, tuple[str, int]]) -> None:
    if facts["config"][1] or facts["partitions"][1]:
        return
    path = _memory(run)
    with suppress(OSError):  # a disk that is full forgets
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, json.dumps(facts))


def _memory(run: Run) -> Path:
    """Return the file that holds what is known of a cluster, as its user sees it."""
    cluster = run.cluster
    who = (cluster.host, cluster.user, cluster.port, cluster.jump_host) if cluster and cluster.host else ("here",)
    key = hashlib.sha256(repr((*who, os.environ.get("SLURM_CONF"))).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "nexa-infra" / "sites" / f"{key}.json"


def read_site(found: Mapping[str, tuple[str, int]]) -> Site:
    """Read the answer to `ask`'s script: a section's name -> its output and exit code.

    Raises:
        SubmitError: there is no Slurm, or its controller does not answer.
    """
    config, code = found["config"]
    if code == 127:
        raise SubmitError(
            "Slurm's commands are not found on the cluster's login node: check host, and that `sinfo` works"
        )
    if code:
        raise SubmitError(f"Slurm does not answer: {' '.join(config.split())[-300:]}")
    space = [word for word in found["space"][0].split() if word.isdigit()]
    inodes = [word for word in found["inodes"][0].split() if word.isdigit()]
    verdict, refused = found["test"]
    return Site(
        config=read_config(config),
        partitions=tuple(read_records(found["partitions"][0])) if not found["partitions"][1] else (),
        associations=_associations(found["associations"]),
        qos=_qos(found["qos"]),
        gpus=_gpu_types(found["nodes"]),
        gpu=found["gpu"][0].strip() or None,
        queued=sum(row.count for row in read_queue(found["queue"][0]) if row.state in {"PENDING", "RUNNING"}),
        free_mib=int(space[-1]) // 1024 if space else None,
        # A file system that counts no inodes says 0 of 0.
        free_inodes=int(inodes[1]) if len(inodes) > 1 and inodes[0] != "0" else None,
        problem=found["workdir"][0].strip() or None,
        env_file=found["env_file"][0].strip() or None,
        needs=tuple(found["needs"][0].strip().splitlines()),
        verdict=verdict.strip(),
        refused=refused != 0,
    )


def admission(run: Run, site: Site) -> Admission:
    """Say whether a run can run at a site.

    Raises:
        SubmitError: it cannot; every reason is told.
    """
    wrong = list(problems(run, site))
    if wrong:
        where = run.cluster.name if run.cluster else "Slurm"
        told = "".join(f"\n  {each}" for each in wrong)
        raise SubmitError(f"{where} cannot run {run.config.job.name}; nothing was copied or submitted:{told}")
    start = _START.search(site.verdict)
    return Admission(
        tuple(_notes(run, site)),
        start[1] if start else None,
        site.gpu,
        billing(run, site),
        _link(run, site) if run.config.checkpoint.chain_until_done else None,
        _array_size(run, site),
        found[0] if (found := _queue_size(run, site, _account(run))) else None,
        over_seconds=_over_seconds(site),
        pack=_most_in_turn(run, site),
    )


def problems(run: Run, site: Site) -> Iterator[str]:
    """Yield what forbids a run, in our words and the scheduler's, each with a remedy."""
    job, cluster = run.config.job, run.cluster
    name = job.partition or (cluster.partition if cluster else None)
    account = _account(run)
    partition = site.partition(name)
    names = sorted(each.get("PartitionName", "") for each in site.partitions)
    told = False
    if site.partitions and partition is None:
        hint = f"there is no partition {name!r}{suggestion(name, names)}" if name else "there is no default partition"
        yield f"job.partition: {hint}; it has {', '.join(names)}"
        told = True
    if partition is not None:
        if not run.config.checkpoint.chain_until_done:  # which is cut to the limit
            yield from _walltime(job, partition)
        if partition.get("State", "UP") not in {"UP", "DRAIN"}:
            word = partition.get("State")
            yield f"job.partition: {partition.get('PartitionName')} is {word}: ask for another, or wait"
    if site.associations:
        accounts = sorted({row[0] for row in site.associations})
        if account is not None and account.lower() not in accounts:
            hint = suggestion(account, accounts)
            yield f"job.account: you have no account {account!r} there{hint}; yours: {', '.join(accounts)}"
            told = True
    if job.qos is not None and site.qos is not None and job.qos not in site.qos:
        known = sorted(site.qos)
        yield f"job.qos: there is no QOS {job.qos!r}{suggestion(job.qos, known)}; it has {', '.join(known)}"
        told = True
    sizes = list(_size(run, site, account))
    yield from sizes
    yield from (_gpu(job, site, partition) if partition is not None else ())
    if site.problem:
        yield site.problem
    yield from site.needs
    if site.env_file:
        yield f"job.env_file: {site.env_file}"
    if site.free_mib is not None and site.free_mib < LEAST_MIB:
        yield f"the workdir {run.workdir} has {site.free_mib} MiB left: `nexa-infra clean`, or name another"
    if site.free_inodes is not None and site.free_inodes < INODES_A_TRIAL * run.trials:
        yield (
            f"the workdir {run.workdir} has {site.free_inodes:,} inodes left, and {run.trials:,} trials make about "
            f"{INODES_A_TRIAL * run.trials:,} files: `nexa-infra clean`, or name another"
        )
    # What was told above in our words is not told again in the scheduler's.
    told = (told and _same(site.verdict)) or (bool(sizes) and "ubmit" in site.verdict)
    if (
        site.refused
        and refusal(site.verdict) == "permanent"
        and not told
        and not queue_full(site.verdict, beside=False)
    ):
        yield f"sbatch --test-only: {explained(site.verdict)}"


def _same(verdict: str) -> bool:
    return any(word in verdict for word in ("Invalid partition", "Invalid account", "Invalid qos"))


def _walltime(job: SlurmJob, partition: Mapping[str, str]) -> Iterator[str]:
    limit = _limit(partition.get("MaxTime"))
    if limit is None:
        return
    asked = job.walltime
    if asked is None or asked.total_seconds() > limit * 60:
        # Slurm takes such a job by default, and lets it wait for ever.
        yield (
            f"job.time: {job.time} is over the limit of partition {partition.get('PartitionName')}, "
            f"{partition.get('MaxTime')}: shorten it, or ask for another partition"
        )


def _link(run: Run, site: Site) -> str | None:
    """Return the walltime of one link of a chain, where the partition's limit is below the job's."""
    job, cluster = run.config.job, run.cluster
    partition = site.partition(job.partition or (cluster.partition if cluster else None))
    limit = _limit(partition.get("MaxTime")) if partition is not None else None
    over = limit is not None and (job.walltime is None or job.walltime.total_seconds() > limit * 60)
    return f"{limit:.0f}" if over else None


def _limit(text: str | None) -> float | None:
    """Return a partition's time limit in minutes; None is no limit, or not to be read."""
    try:
        limit = parse_walltime(text or "UNLIMITED")
    except WalltimeError:
        return None
    return None if limit is None else math.ceil(limit.total_seconds() / 60)


def _account(run: Run) -> str | None:
    return run.config.job.account or (run.cluster.account if run.cluster else None)


def _over_seconds(site: Site) -> int:
    """Return how long a job may go on after its walltime: OverTimeLimit, and KillWait."""
    found = [re.match(r"[0-9]+", site.config.get(name, "")) for name in ("KillWait", "OverTimeLimit")]
    wait, over = (int(each[0]) if each else 0 for each in found)
    return wait + 60 * over


def _most_in_turn(run: Run, site: Site) -> int | None:
    """Return how many trials the partition's limit leaves room for, one after the other in one task."""
    job, cluster = run.config.job, run.cluster
    partition = site.partition(job.partition or (cluster.partition if cluster else None))
    limit = _limit(partition.get("MaxTime")) if partition is not None else None
    if limit is None or job.walltime is None:
        return None
    return max(1, int((limit - 1) * 60 // max(60.0, job.walltime.total_seconds())))


def _array_size(run: Run, site: Site) -> int | None:
    """Return how many tasks one array may have: what Slurm's MaxArraySize says is one more than the largest index."""
    limits = run.cluster.limits if run.cluster else None
    sizes = [size for size in (site.max_array_size, limits.max_array_size if limits else None) if size]
    return max(1, min(sizes) - 1) if sizes else None


def _queue_size(run: Run, site: Site, account: str | None) -> tuple[int, str] | None:
    """Return how many array tasks of this user may wait or run at once, and who says so."""
    limits = run.cluster.limits if run.cluster else None
    most = _most_submitted(site, account, run.config.job.qos)
    if limits and limits.max_submit is not None:
        most = [*most, (limits.max_submit, "the cluster's block")]
    return min(most, default=None)


def _size(run: Run, site: Site, account: str | None) -> Iterator[str]:
    found = _queue_size(run, site, account)
    if found is not None and not found[0]:
        yield f"sweep: {found[1]} lets you queue no job at all: ask its administrators"
    job, most = run.config.job, _most_in_turn(run, site)
    if isinstance(job.trials_per_task, int) and most is not None and pack_rounds(job, job.trials_per_task) > most:
        yield (
            f"job.trials_per_task: {job.trials_per_task} trials of {job.time} each are over the partition's limit in "
            f"one task: {most * job.trials_at_once} are the most, or write auto"
        )


def _most_submitted(site: Site, account: str | None, qos: str | None) -> list[tuple[int, str]]:
    found = [
        (int(row[3]), f"the association with account {row[0]}")
        for row in site.associations or ()
        if row[3].isdigit() and (account is None or row[0] == account.lower())
    ]
    named = (site.qos or {}).get(qos or "", ("", ""))[0]
    return [*found, *([(int(named), f"QOS {qos}")] if named.isdigit() else [])]


def _gpu(job: SlurmJob, site: Site, partition: Mapping[str, str]) -> Iterator[str]:
    if not job.gpus_per_node or job.gpu_type is None or site.gpu is not None:
        return
    name = partition.get("PartitionName", "")
    types = site.gpus.get(name, frozenset())
    if not types:
        yield f"job.gpus_per_node: partition {name} has no GPU: ask for a partition that has"
    elif "" not in types:
        yield (
            f"job.gpu_type: partition {name} has no {job.gpu_type}{suggestion(job.gpu_type, sorted(types))}; "
            f"it has {', '.join(sorted(types))}"
        )


def _notes(run: Run, site: Site) -> Iterator[str]:
    job, cluster = run.config.job, run.cluster
    partition = site.partition(job.partition or (cluster.partition if cluster else None))
    size, room = _array_size(run, site), _queue_size(run, site, _account(run))
    tasks = -(-run.trials // (job.trials_per_task if isinstance(job.trials_per_task, int) else 1))
    if size is not None and tasks > size:
        yield f"{tasks:,} array tasks are more than one array takes there ({size:,}): {-(-tasks // size)} arrays"
    if room is not None and tasks + site.queued > room[0]:
        taken = f", of which {site.queued:,} are taken" if site.queued else ""
        yield (
            f"{tasks:,} array tasks are more than may be queued at once: {room[0]:,} by {room[1]}{taken}. The rest is "
            "submitted as room appears"
        )
    if partition is not None and job.memory is None and not _has_default_memory(partition, site.config):
        yield (
            f"job.memory is not set, and partition {partition.get('PartitionName')} has no default: each trial takes "
            "all of its node's memory, so that one runs on a node at a time"
        )
    if not site.config.get("AccountingStorageType", "").endswith("slurmdbd"):
        yield "the cluster keeps no accounting: costs are counted by the trials' own clocks"


def _has_default_memory(partition: Mapping[str, str], config: Mapping[str, str]) -> bool:
    names = ("DefMemPerCPU", "DefMemPerNode", "DefMemPerGPU")
    said = [partition.get(name) for name in names] + [config.get(name) for name in names]
    return (
        "CR_" not in config.get("SelectTypeParameters", "")
        or "MEMORY" not in config.get("SelectTypeParameters", "")
        or any(value is not None and value.isdigit() and value != "0" for value in said)
    )


def _associations(found: tuple[str, int]) -> tuple[tuple[str, str, str, str], ...] | None:
    if found[1]:
        return None
    rows = [line.split("|") for line in found[0].splitlines() if line.count("|") >= 3]
    return tuple((row[0], row[1], row[2], row[3]) for row in rows)


def _qos(found: tuple[str, int]) -> dict[str, tuple[str, str]] | None:
    if found[1]:
        return None
    rows = [line.split("|") for line in found[0].splitlines() if line.count("|") >= 2]
    return {row[0]: (row[1], row[2]) for row in rows} or None


def _gpu_types(found: tuple[str, int]) -> dict[str, frozenset[str]]:
    types: dict[str, set[str]] = {}
    for line in found[0].splitlines():
        partition, _, gres = line.partition("|")
        for word in re.sub(r"\([^)]*\)", "", gres).split(","):
            kind, *rest = word.split(":")
            if kind == "gpu":
                types.setdefault(partition, set()).add(rest[0] if rest and not rest[0].isdigit() else "")
    return {name: frozenset(each) for name, each in types.items()}

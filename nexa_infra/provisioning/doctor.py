"""What is wrong with a machine, and what to do about it: a line a check."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Host
from nexa_infra.monitoring.report_text import clean
from nexa_infra.provisioning.check import ASK_FOR, Check, numbers
from nexa_infra.provisioning.here import check_here
from nexa_infra.provisioning.inspect import Inspection, Partition, inspect
from nexa_infra.provisioning.login_node import check_clock, check_containers, check_tools, check_workdir
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.probe import NodeAbilities, probe
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.fields import suggestion
from nexa_infra.spec.job import SlurmJob

__all__ = ["Check", "check_cluster", "check_here"]

_OLDEST_SLURM = (20, 11)
# How many names of a kind are told.
_SHOWN = 8


def check_cluster(cluster: Cluster, host: Host) -> Iterator[Check]:
    """Look at a cluster from its login node, and from inside a test job; `host` is where its commands run.

    That is two round trips, the second as long as the job waits for its start, a minute at most. A host that
    is not reached is one failed line, with nothing after it: nothing is raised.
    """
    for check in _look(cluster, host):
        # A sick machine's own words may hold anything.
        yield Check(check.name, check.fine, clean(check.found), clean(check.remedy))


def _look(cluster: Cluster, host: Host) -> Iterator[Check]:
    try:
        found = inspect(host, cluster)
    except HostError as error:
        yield _unreached(str(error))
        return
    for look in _LOOKS:
        yield from look(found)
    if not _takes_a_job(found):
        return  # why was told above
    try:
        abilities = probe(SlurmClient(host), cluster, SlurmJob())
    except HostError as error:
        yield Check("unattended", True, f"unknown: {error}", "ask again")
    else:
        yield from _unattended(abilities)


# HostErrors end in what to do, where they know it.
_WHAT_TO_DO = re.compile(r"(.+?): ((?:check |log in |somebody may |`ssh-add ).+)", re.DOTALL)


def _unreached(words: str) -> Check:
    if known := _WHAT_TO_DO.fullmatch(words):
        return Check("SSH", False, clean(known[1]), clean(known[2]))
    return Check("SSH", False, clean(words), "see whether it lets you in by hand, by `ssh`, and answers there")


def _few(names: Iterable[str], separator: str = ", ") -> str:
    told = list(names)
    more = [f"and {len(told) - _SHOWN:,} more"] if len(told) > _SHOWN else []
    return separator.join([*told[:_SHOWN], *more])


def _ssh(found: Inspection) -> Iterator[Check]:
    if found.remote:
        yield Check(
            "SSH", True, f"{found.host}: logged in on {found.machine} as {found.user}, in {found.clock.doubt:.1f} s"
        )
    else:
        yield Check("SSH", True, f"not needed: {found.user} is on the login node, {found.machine}")


def _slurm(found: Inspection) -> Iterator[Check]:
    slurm, config = found.answer("slurm"), found.answer("config")
    if slurm.outcome == "missing":
        text = f"no scontrol in {found.answer('path').stdout.strip()}"
        yield Check("Slurm", False, text, "name a login node, or put Slurm's commands into PATH there (~/.bashrc)")
        return
    version = found.version("slurm")
    ping = re.findall(r" at (\S+) is (UP|DOWN)", found.answer("ping").stdout)
    up, down = (" and ".join(name for name, state in ping if state == wanted) for wanted in ("UP", "DOWN"))
    lacking = found.answer("commands").stdout.split()
    if not slurm.works:
        yield Check("Slurm", False, f"scontrol --version: {slurm.words}", _silent(slurm.words))
    elif version and numbers(version) < _OLDEST_SLURM:
        yield Check("Slurm", False, f"{version}: 20.11 or newer is needed", f"{ASK_FOR} an upgrade")
    elif not config.works:
        where = f", controller down on {down}" if down and not up else ""
        yield Check("Slurm", False, f"{version}{where}: {config.words}", _silent(config.words))
    elif lacking:
        yield Check("Slurm", False, f"{version}, without {', '.join(lacking)}", f"{ASK_FOR} all of Slurm's commands")
    else:
        where = f", controller up on {up}" if up else ""
        yield Check("Slurm", True, f"{version}, cluster {found.config.get('ClusterName', 'without a name')}{where}")


def _silent(words: str) -> str:
    """Say what to do where the controller does not say how it is configured."""
    if "configuration source" in words or "configuration file" in words:
        return "it finds no slurm.conf: name a login node, or set SLURM_CONF there (~/.bashrc)"
    if "uthentication" in words or "munge" in words.lower():
        return "tell its administrators that munge does not work on this machine"
    return "jobs that run go on: try later, or tell its administrators; partitions are not known till then"


# What sbatch says to a job that asks for nothing -> what to do. Others may be a site's own rules: a job must
# name its time, for one.
_REFUSED = {
    "Invalid account": f"{ASK_FOR} an account, or name yours as `account` in the cluster's block",
    "Invalid partition": "correct `partition` in the cluster's block (`sinfo -s` lists them)",
    "Invalid qos": f"{ASK_FOR} a QOS for your account",
    "Invalid user id": "root may not submit here: use an account of your own",
    "Access/permission denied": "name another `partition` in the cluster's block, or a host that may submit there",
}


def _jobs(found: Inspection) -> Iterator[Check]:
    queue, submit = found.answer("queue"), found.answer("submit")
    if queue.works:
        tasks = f"{found.queued:,} task{'' if found.queued == 1 else 's'}" if found.queued else "nothing"
        yield Check("queue", True, f"squeue answers: {found.user} has {tasks} in it")
    elif queue.outcome != "not asked":
        yield Check("queue", False, f"squeue: {queue.words}", "runs cannot be followed: tell its administrators")
    words = submit.words.removeprefix("allocation failure: ")
    if submit.works:
        start = re.search(r"to start at (\S+) .*in partition (\S+)", submit.stderr + submit.stdout)
        yield Check(
            "submit", True, f"a small job could start in {start[2]} at {start[1]}" if start else "jobs are taken"
        )
    elif remedy := next((remedy for refused, remedy in _REFUSED.items() if refused in words), ""):
        yield Check("submit", False, f"sbatch refuses a job: {words}", remedy)
    elif submit.outcome != "not asked":
        yield Check("submit", True, f"sbatch refuses a job that asks for nothing: {words}")


def _accounting(found: Inspection) -> Iterator[Check]:
    sacct, kept = found.answer("sacct"), found.config.get("AccountingStorageType", "")
    clocks = "actual cost comes from the trials' own clocks"
    if sacct.works:
        counted = found.config.get("AccountingStorageTRES", "")
        types = re.findall(r"gres/gpu:([^,]+)", counted)
        gpus = f": GPUs by type ({_few(types)})" if types else ", without GPUs' types: the nodes tell them"
        yield Check("accounting", True, f"sacct answers{gpus if types or any(n.gpus for n in found.nodes) else ''}")
        yield from _account(found)
    elif kept.endswith("/none") or kept == "(null)" or "storage is disabled" in sacct.words:
        yield Check("accounting", True, f"no accounting: {clocks}")
    elif sacct.outcome != "not asked":
        remedy = f"tell its administrators (slurmdbd); till then {clocks}"
        yield Check("accounting", False, f"sacct: {sacct.words}", remedy)


def _account(found: Inspection) -> Iterator[Check]:
    answer, named = found.answer("associations"), found.cluster.account
    accounts = sorted({each.account for each in found.associations})
    if not answer.works:
        yield Check("account", False, f"sacctmgr: {answer.words}", "limits are not known: tell its administrators")
    elif not accounts:
        enforced = found.config.get("AccountingStorageEnforce", "")
        free = enforced in {"none", "(null)"}
        remedy = f"{ASK_FOR} one: jobs are refused without" if enforced and not free else ""
        yield Check("account", not remedy, f"{found.user} has none{', and needs none' if free else ''}", remedy)
    elif named and named.lower() not in accounts:
        remedy = f"correct `account` in the cluster's block: {_few(accounts)}"
        yield Check("account", False, f"{found.user} has no {named}{suggestion(named, accounts)}", remedy)
    else:
        qos = sorted({qos for each in found.associations for qos in each.qos})
        yield Check("account", True, f"{_few(accounts)}{f'; QOS {_few(qos)}' if qos else ''}")


# sacctmgr's limits in words; Slurm counts each of an array's tasks as a job.
_LIMITS = {
    "MaxSubmit": "{} tasks queued or running",
    "MaxSubmitPU": "{} tasks queued or running a user",
    "MaxSubmitPA": "{} tasks queued or running an account",
    "MaxJobs": "{} running at once",
    "MaxJobsPU": "{} running at once a user",
    "MaxWall": "walltime {}",
    "MaxTRES": "{} a job",
    "MaxTRESPU": "{} a user",
    "GrpSubmit": "{} tasks queued or running in all",
    "GrpJobs": "{} running at once in all",
    "GrpTRES": "{} in all",
    "GrpTRESMins": "{} minutes in all",
}


def _limits(found: Inspection) -> Iterator[Check]:
    def in_words(limits: Mapping[str, str]) -> str:
        return ", ".join(words.format(limits[name]) for name, words in _LIMITS.items() if name in limits)

    size, asked = found.config.get("MaxArraySize", ""), found.cluster.limits.max_array_size
    if size.isdigit() and int(size) < 2:
        yield Check("limits", False, f"no job arrays (MaxArraySize {size})", f"{ASK_FOR} job arrays")
    elif size.isdigit() and asked and asked > int(size):
        text = f"MaxArraySize is {size}, and {asked} in the cluster's block"
        yield Check("limits", False, text, "take limits.max_array_size out of the block: the cluster is asked")
    elif size.isdigit():
        jobs = found.config.get("MaxJobCount", "")
        whole = f"; {int(jobs):,} jobs of all users (MaxJobCount)" if jobs.isdigit() else ""
        yield Check("limits", True, f"{int(size) - 1:,} tasks an array at most (MaxArraySize){whole}")
    for each in found.associations:
        if each.limits:
            where = f" in {each.partition}" if each.partition else ""
            yield Check("limits", True, f"account {each.account}{where}: {in_words(each.limits)}")
    if found.answer("qos").outcome != "not asked" and not found.answer("qos").works:
        yield Check("limits", True, f"those of QOS are not known: sacctmgr: {found.answer('qos').words}")
    mine = {qos for each in found.associations for qos in each.qos}
    limited = sorted(name for name, limits in found.qos.items() if limits and name in mine)
    for name in limited[:_SHOWN]:
        yield Check("limits", True, f"QOS {name}: {in_words(found.qos[name])}")
    if limited[_SHOWN:]:
        yield Check("limits", True, f"{len(limited[_SHOWN:]):,} more QOS have limits: `sacctmgr show qos`")


def _partitions(found: Inspection) -> Iterator[Check]:
    answer, named = found.answer("partitions"), found.cluster.partition
    if answer.outcome == "not asked":
        return
    if not answer.works:
        yield Check("partitions", False, f"scontrol: {answer.words}", "tell its administrators")
        return
    barred = {each.name: _barred(each, found) for each in found.partitions}
    usable = [each for each in found.partitions if not barred[each.name]]
    names = [f"{each.name} (default)" if each.default else each.name for each in usable]
    if named and (why := barred.get(named, "not here")):
        others = f": {_few(each.name for each in usable)}" if usable else ""
        remedy = f"name another `partition` in the cluster's block{others}"
        yield Check("partitions", False, f"{named} is {why}{suggestion(named, barred)}", remedy)
    elif usable:
        yield Check("partitions", True, f"{len(usable)} take your jobs: {_few(names)}")
    else:
        yield Check("partitions", False, "none takes your jobs now", f"{ASK_FOR} one, or wait where nodes are down")
    reasons: dict[str, list[str]] = {}
    for name, why in barred.items():
        if why:
            reasons.setdefault(why, []).append(name)
    if reasons:
        told = "; ".join(f"{_few(each)} ({why})" for why, each in reasons.items())
        yield Check("partitions", True, f"not for you: {told}")
    if not usable:
        return
    if "MEMORY" not in found.config.get("SelectTypeParameters", "MEMORY").upper():
        yield Check("memory", True, "Slurm does not count it here: jobs share their node's")
    elif greedy := [each.name for each in usable if not each.default_memory]:
        yield Check("memory", True, f"without job.memory a job takes the whole node's in {_few(greedy)}")
    else:
        yield Check("memory", True, "without job.memory a job gets its partition's default")


def _barred(partition: Partition, found: Inspection) -> str:
    """Say why a job of this user's does not start in a partition; an empty text where it does."""
    nodes = [node for node in found.nodes if node.partition == partition.name]
    accounts = {each.account for each in found.associations}
    root = found.user == "root"
    if partition.state != "UP":
        return {"DOWN": "down", "DRAIN": "drained", "INACTIVE": "inactive"}.get(partition.state, partition.state)
    if not partition.nodes:
        return "without nodes"
    if nodes and not any(node.usable for node in nodes):
        return "without a node that is up"
    if partition.hosts and found.machine.partition(".")[0] not in partition.hosts:
        return f"only for jobs from {partition.hosts}"
    if partition.groups and not root and not {*partition.groups} & {*found.groups}:
        return f"only for group {' or '.join(partition.groups)}"
    if partition.accounts and accounts and not accounts & {*partition.accounts}:
        return f"only for account {' or '.join(partition.accounts)}"
    if partition.denied and accounts and accounts <= {*partition.denied}:
        return "closed to your account"
    if partition.for_root and not root:
        return "only for root"
    if root and (partition.for_root is False or found.config.get("DisableRootJobs", "").upper() == "YES"):
        return "closed to root"
    return ""


def _nodes(found: Inspection) -> Iterator[Check]:
    nodes, answer = {node.name: node for node in found.nodes}, found.answer("nodes")
    if answer.outcome != "not asked" and not answer.works:
        yield Check("nodes", False, f"sinfo: {answer.words}", "tell its administrators")
    if not nodes:
        return
    up = [node for node in nodes.values() if node.usable]
    if up:
        cores, memory = [node.cores for node in up], [node.memory_mib // 1024 for node in up]
        yield Check(
            "nodes", True, f"{len(up):,} of {len(nodes):,} up: {_range(cores)} cores, {_range(memory)} GiB each"
        )
    else:
        yield Check(
            "nodes", False, f"none of {len(nodes):,} is up", "`sinfo -R` tells why: jobs wait till they are back"
        )
    places: dict[tuple[str, ...], list[str]] = {}
    for kind in sorted({kind for node in nodes.values() for kind in node.gpus}):
        whole = sum(node.gpus.get(kind, 0) for node in nodes.values())
        lost = whole - sum(node.gpus.get(kind, 0) for node in up)
        down = f" ({'all' if lost == whole else f'{lost:,}'} down)" if lost else ""
        parts = tuple(sorted({node.partition for node in found.nodes if kind in node.gpus}))
        places.setdefault(parts, []).append(f"{whole:,} {kind or 'without a type'}{down}")
    for parts, texts in places.items():
        everywhere = len(parts) > 1 and len(parts) == len({node.partition for node in found.nodes})
        yield Check("GPUs", True, f"{', '.join(texts)} in {'every partition' if everywhere else _few(parts)}")
    if not places:
        yield Check("GPUs", True, "Slurm knows of none")


def _takes_a_job(found: Inspection) -> bool:
    submit, made = found.answer("submit"), found.answer("make")
    # A refusal that is not known may be of what the small job did not ask for, such as its time.
    barred = not submit.works and any(refused in submit.words for refused in _REFUSED)
    return submit.outcome == "ran" and made.works and not barred


def _unattended(abilities: NodeAbilities) -> Iterator[Check]:
    """Tell of what `unattended: true` needs of the nodes; to do without hinders nothing else."""
    if abilities.shared is False:
        yield Check("workdir", False, abilities.why, abilities.remedy)
    elif abilities.may_submit is None:
        yield Check("unattended", True, f"unknown: {abilities.why}", abilities.remedy)
    elif abilities.able:
        asked = f"asked on {abilities.node} in {abilities.partition}"
        yield Check("unattended", True, f"compute nodes may submit jobs ({asked})")
        yield Check("unattended", True, f"Python for the steward: {abilities.python} {abilities.version}")
    else:
        *first, last = abilities.problems
        for problem in first:
            yield Check("unattended", True, f"no: {problem}")
        remedy = "till then `unattended: true` is refused here; nothing else is"
        yield Check("unattended", True, f"no: {last}", remedy)


def _range(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


_LOOKS = (
    _ssh, _slurm, _jobs, _accounting, _limits, _partitions, _nodes, check_tools, check_containers, check_clock,
    check_workdir,
)  # fmt: skip

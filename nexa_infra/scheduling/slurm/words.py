"""What Slurm says of a job's end or wait, in a user's words: the scheduler's own stay in them."""

from __future__ import annotations

import re
from signal import Signals

# -- ends


def ended(
    state: str,
    *,
    exit_code: int = 0,
    signal: int = 0,
    reason: str | None = None,
    by: str | None = None,
    node: str | None = None,
    walltime: str | None = None,
) -> str:
    """Say how a task ended, as it follows its name: `trial 7` … `failed with exit code 3 on n1 (FAILED)`.

    Args:
        state: Slurm's word, such as `OUT_OF_MEMORY`; one that is not known is told as it is.
        exit_code: the batch script's.
        signal: the one that ended it, by sacct's ExitCode `0:9`; 53 and 125 are Slurm's own.
        reason: squeue's or sacct's. Sacct's is why the task waited: only what says something of an end is told.
        by: who cancelled it, a user's id or name; `0` is root. None where it is not known.
        node: where it ran, as sacct's NodeList has it.
        walltime: its limit, as a person reads it.
    """
    place = f" on {node}" if node and node != "None assigned" else ""
    if not signal and (raised := _RAISED.match(reason or "")):
        signal = int(raised[1])
    word = f"CANCELLED by {by}" if state == "CANCELLED" and by else state
    told = [word, *([reason] if reason and reason.startswith(_OF_AN_END) else [])]
    if state == "COMPLETED":
        return f"ended well{place} (COMPLETED, exit code 0)"
    if state == "FAILED":
        return _failed(exit_code, signal, place, ", ".join(told), started=node != "None assigned")
    if state == "CANCELLED":
        said = f"was cancelled{_by_whom(by)}{place}"
        remedy = "an administrator, or Slurm itself" if by in _ROOT else ""
    elif state in _ENDS:
        limit = f"its walltime of {walltime}" if walltime else "its walltime"
        words, remedy = _ENDS[state]
        said = words.format(place=place, limit=limit, node=f" {node}" if place else "")
    else:
        told += [reason] if reason and reason not in {*told, "None"} else []
        told += _numbers(exit_code, signal)
        return f"ended{place} as Slurm says: {', '.join(told)}"
    return f"{said} ({', '.join(told)})" + (f": {remedy}" if remedy else "")


# An end -> what it means, and what to do about it.
_ENDS = {
    "TIMEOUT": ("ran into {limit}{place}", "raise job.time, or let it resume from a checkpoint"),
    "OUT_OF_MEMORY": ("used more memory than it had asked for{place}", "raise job.memory"),
    "NODE_FAIL": ("lost its node{node}", "no fault of the trial's: a retry may go well"),
    "BOOT_FAIL": ("met a node that did not boot{place}", "no fault of the trial's: a retry may go well"),
    "PREEMPTED": ("gave way to a job of higher priority{place}", "a retry may go well"),
    "REQUEUED": ("was put back into the queue{place}", "it runs again"),
    "DEADLINE": ("could not end by its deadline{place}", "lower job.time, or submit it with a later deadline"),
    "REVOKED": ("was taken over by another cluster of the federation", ""),
}

_ROOT = {"0", "root"}
_RAISED = re.compile(r"RaisedSignal:([0-9]+)")  # newer than 22.05, and told by squeue alone

# Reasons that tell more than the state does. `JobLaunchFailure` is left out: 22.05's squeue says it of every batch
# script that a signal ended.
_OF_AN_END = (
    "BadConstraints",
    "DependencyNeverSatisfied",
    "InactiveLimit",
    "InvalidAccount",
    "InvalidQOS",
    "NodeDown",
    "ReservationDeleted",
    "SystemFailure",
)


def _failed(exit_code: int, signal: int, place: str, told: str, *, started: bool) -> str:
    said, remedy = f"failed{f' with exit code {exit_code}' if exit_code else ''}{place} ({told})", ""
    if signal == 53:
        said = f"could not be set up{place} ({told}, signal 53)"
        remedy = "its log's folder is missing on the node, or cannot be written there"
    elif signal:
        said = f"was ended by {_signal(signal)}{place} ({told})"
        remedy = "often for want of memory" if signal == Signals.SIGKILL else ""
    elif not started:
        said = f"never started ({', '.join([told, *_numbers(exit_code, 0)])})"
        remedy = "no node of the cluster is what the job asks for"
    elif exit_code == 126:
        remedy = "a command could not be run, for want of permission or of the right format"
    elif exit_code == 127:
        remedy = "a command was not found: check job.setup and launcher.script"
    elif exit_code > 128:
        remedy = f"its program was ended by {_signal(exit_code - 128)}"
    return f"{said}: {remedy}" if remedy else said


def _signal(number: int) -> str:
    try:
        return f"signal {number}, {Signals(number).name}"
    except ValueError:
        return f"signal {number}"


def _numbers(exit_code: int, signal: int) -> list[str]:
    return [*([f"exit code {exit_code}"] if exit_code else []), *([_signal(signal)] if signal else [])]


def _by_whom(by: str | None) -> str:
    if not by:
        return ""
    if by in _ROOT:
        return " by root"
    return f" by user {by}" if by.isdecimal() else f" by {by}"


# -- waits

# A user need not be told of these: the job's turn comes.
_ORDINARY = {
    "", "None", "Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "Prolog", "Cleaning",
    "SchedDefer", "BurstBufferResources", "BurstBufferStageIn", "FedJobLock", "MpiPortsBusy", "MaxPoweredUpNodes",
}  # fmt: skip

_SHOW_PARTITION = "`scontrol show partition` tells what it gives"
_ASK = "ask those who run the cluster"

# How squeue's %r begins -> what that means, a remedy, and whether the job can never start as it is.
_WAITS: tuple[tuple[str, str, str, bool], ...] = (
    ("JobHeldUser", "held", "`scontrol release {job}` lets it start", False),
    ("JobHeldAdmin", "held by an administrator", _ASK, False),
    ("JobHoldMaxRequeue", "held after too many requeues", "`scontrol release {job}` lets it start", False),
    ("launch failed requeued held", "held after a launch that failed",
     "a fault of the node, as a rule its prolog: `scontrol release {job}` tries again", False),
    ("job requeued in held state", "requeued and held", "`scontrol release {job}` lets it start", False),
    ("job requeued in special exit state", "requeued and held", "`scontrol release {job}` lets it start", False),
    ("DependencyNeverSatisfied", "waiting for what can no longer happen",
     "what the job depends on ended otherwise: cancel it, and check job.dependency", True),
    ("PartitionTimeLimit", "asking for more time than the partition gives",
     "lower job.time (`sinfo -o '%P %l'` tells the limits)", True),
    ("PartitionNodeLimit", "asking for more nodes than the partition gives",
     f"lower job.nodes ({_SHOW_PARTITION})", True),
    ("PartitionConfig", "asking for more than the partition gives, in time, nodes, cores or memory",
     _SHOW_PARTITION, True),
    ("PartitionDown", "waiting for the partition, which is down", "choose another job.partition, or wait", False),
    ("PartitionInactive", "waiting for the partition, which starts no jobs now",
     "choose another job.partition, or wait", False),
    ("ReqNodeNotAvail, Reserved for maintenance", "waiting, not to run into a maintenance of the nodes",
     "lower job.time to end before it, or wait until after", False),
    ("ReqNodeNotAvail, May be reserved", "waiting for nodes that are drained, or kept for others",  # drained: 24.11
     "`sinfo -R` and `scontrol show reservation` tell which and until when; a shorter job.time may fit in before",
     False),
    ("ReqNodeNotAvail", "waiting for nodes that are down, drained or reserved", "`sinfo -R` tells why", False),
    ("Nodes required for job are DOWN", "waiting for nodes",
     "`sinfo -R` tells which are down; those that only serve others now come back by themselves", False),
    ("NodeDown", "waiting for a node that is down", "`sinfo -R` tells why", False),
    ("FrontEndDown", "waiting for a front end that is down", _ASK, False),
    ("ReservationDeleted", "asking for a reservation that is gone", "cancel it, and check job.reservation", True),
    ("ReservationInvalid", "asking for a reservation that is not valid", "cancel it, and check job.reservation", True),
    ("Reservation", "waiting for the reservation to begin", "`scontrol show reservation` tells when", False),
    ("Licenses", "waiting for licenses", "`scontrol show licenses` tells how many are free", False),
    ("BadConstraints", "asking for what no node of the cluster is",
     "check job.constraint, job.gres, job.gpu_type and job.memory", True),
    ("Constraints", "asking for what no node is now", "check job.constraint", False),
    ("InvalidAccount", "under an account that is not, or no longer, valid",
     "check job.account (`sacctmgr show assoc user=$USER`)", True),
    ("InvalidQOS", "under a QOS that is not, or no longer, valid",
     "check job.qos (`sacctmgr show assoc user=$USER format=qos`)", True),
    ("AccountNotAllowed", "under an account that the partition does not admit",
     "choose another job.account or job.partition", True),
    ("QOSNotAllowed", "under a QOS that the partition does not admit", "choose another job.qos or job.partition", True),
    ("QOSUsageThreshold", "waiting, for the account has used more than the QOS grants", _ASK, False),
)  # fmt: skip


def waiting(reason: str, job_id: str) -> tuple[str, bool] | None:
    """Say why pending tasks do not start, as it follows their number, and whether they never can as they are.

    Takes squeue's %r, and the id by which a person releases them: `40 trials` … `held (JobHeldUser): …`.
    Returns None where nothing need be told: their turn comes. What is held, and what waits for a node, a
    partition or room under a limit, can start; what never can must be changed or cancelled.
    """
    said = reason.strip()
    # Several reasons may be told in one text: `ReqNodeNotAvail, UnavailableNodes:n1,BeginTime`.
    while (head := said.partition(","))[0] in _ORDINARY:
        if not head[2]:
            return None
        said = head[2].strip()
    if limit := over_limit(said):
        meaning, remedy, never = limit
    else:
        known = next((wait for wait in _WAITS if re.match(rf"{re.escape(wait[0])}\b", said)), None)
        _, meaning, remedy, never = known or ("", "waiting", "`scontrol show job {job}` tells more", False)
    return f"{meaning} ({said}): {remedy.replace('{job}', job_id)}", never


_SUBMIT_LIMIT = "fewer trials, or wait until some of your queued tasks are done"
_LIMIT = re.compile(
    r"(?P<of>QOS|Assoc|)(?:Grp|Max|Min)[A-Z]\w+|(?P<old>QOS|Association)(?:Job|Resource|Time)Limit|AccountingPolicy"
)


def over_limit(reason: str) -> tuple[str, str, bool] | None:
    """Explain a limit of a QOS or an association: what it means, a remedy, whether the job can never start."""
    if reason == "MaxMemPerLimit":
        return (
            "asking for more memory a core or a node than is allowed",
            "lower job.memory, or ask for more cores",
            True,
        )
    found = _LIMIT.fullmatch(reason.partition(",")[0])
    if not found or reason in _ORDINARY:
        return None
    qos = "QOS" in {found["of"], found["old"]} or reason.startswith("Max")
    whose = "the QOS" if qos else "the account" if found["of"] or found["old"] else "the account or QOS"
    show = "`sacctmgr show qos`" if qos else "`sacctmgr show assoc user=$USER`"
    if "Submit" in reason:
        return f"over a limit of {whose} on queued tasks", _SUBMIT_LIMIT, False
    if "Min" in reason and "Minutes" not in reason and "RunMins" not in reason:
        return f"asking for less than {whose} wants a job to ask for", f"ask for more ({show} tells how much)", True
    if re.search(r"PerJob|PerNode", reason):
        what = "job.time" if "Wall" in reason else "what each asks for"
        return f"asking for more than {whose} gives one job", f"lower {what} ({show} tells the limits)", True
    if "RunMin" in reason:
        meaning = f"waiting for room under a limit of {whose} on the time of what runs"
        return meaning, f"a shorter job.time needs less of it ({show})", False
    if "Minutes" in reason or "GrpWall" in reason:
        return f"waiting, for the hours of {whose} are used up", f"{_ASK} when they come back ({show})", False
    whom = "your running tasks" if "PerUser" in reason or reason.startswith("AssocMax") else "the jobs that share it"
    remedy = f"room comes when {whom} end, but never for one task that alone is over the limit ({show})"
    return f"waiting for room under a limit of {whose}", remedy, False

"""What Slurm's commands print, read by pure functions: strings in, frozen rows out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from nexa_infra.scheduling.slurm.words import over_limit

# squeue -h -t all -o QUEUE_FORMAT, with SLURM_BITSTR_LEN=0: without it %K is cut at 63 characters.
QUEUE_FORMAT = "%A|%F|%K|%T|%r|%j"

# sacct -nP -X -D -o ACCOUNTING_FIELDS; an unknown field is fatal, so only those that 22.05 has. A name, which
# may hold `|`, comes last. SLURM_BITSTR_LEN=0 again, for the tasks that never ran.
ACCOUNTING_FIELDS = (
    "JobID,State,ExitCode,DerivedExitCode,ElapsedRaw,AllocTRES,ReqTRES,Submit,Start,End,NodeList,Reason,JobName"
)


@dataclass(frozen=True)
class QueueRow:
    """A line of squeue: one task, or the pending tasks of an array."""

    job_id: str
    array_id: str
    tasks: str  # `7`, `1-41:2%1`, or N/A for a job that is no array
    state: str
    reason: str
    name: str

    @property
    def count(self) -> int:
        """How many array tasks the line stands for.

        Raises:
            ValueError: its list of tasks was cut.
        """
        return len(task_indices(self.tasks)) if self.tasks != "N/A" else 1


def read_queue(text: str) -> list[QueueRow]:
    """Read squeue's lines; what is no row of it is left out."""
    rows = []
    for line in text.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6 and fields[0].isdecimal() and fields[1].isdecimal():
            rows.append(QueueRow(*fields))
    return rows


def task_indices(text: str) -> range | list[int]:
    """Read an array's task list: `7`, `0-9%2`, `[1-41:2%1]`, `1,3,5-7`.

    Raises:
        ValueError: it is no such list, or was cut (`[0,3,6,9,...`).
    """
    words = text.strip("[]").split("%", 1)[0].split(",")
    pieces = [_indices(word) for word in words]
    return pieces[0] if len(pieces) == 1 else [index for piece in pieces for index in piece]


def _indices(word: str) -> range:
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([1-9][0-9]*))?)?", word)
    if not found:
        raise ValueError(f"{word!r} is no list of array tasks")
    first = int(found[1])
    return range(first, int(found[2] or first) + 1, int(found[3] or 1))


def read_job_id(stdout: str) -> str | None:
    """Return the id that `sbatch --parsable` printed; wrappers may print before it, `;cluster` may follow it."""
    for line in reversed(stdout.splitlines()):
        if found := re.fullmatch(r"\s*([0-9]+)(?:;\S+)?\s*", line):
            return found[1]
    return None


@dataclass(frozen=True)
class AccountingRow:
    """An attempt, by sacct: one execution of one array task, or the tasks of an array that never ran."""

    array_id: str
    tasks: str  # `7`, `[4-9%2]`, or an empty text for a job that is no array
    state: str  # COMPLETED, FAILED, … without `by 1000`
    cancelled_by: str | None  # a user's id
    exit_code: int
    signal: int  # 125 stands for memory
    step_signal: int  # the worst of its steps': srun itself ends with 1 where its step ran out of memory
    elapsed: int  # seconds
    allocated: Mapping[str, int]
    requested: Mapping[str, int]
    submitted: str
    started: str  # these three as sacct tells them: see `moment`
    ended: str
    nodes: str  # `n1`, `n[1-2]`, or `None assigned`
    reason: str  # why it waited, which stays when it has run
    name: str


def read_accounting(text: str) -> list[AccountingRow]:
    """Read sacct's lines; steps, and lines that are torn, are left out."""
    return [row for line in text.splitlines() if (row := _accounting_row(line))]


_JOB = re.compile(r"([0-9]+)(?:_([0-9]+|\[.+))?")


def _accounting_row(line: str) -> AccountingRow | None:
    fields = line.split("|", 12)
    if len(fields) < 13 or not (job := _JOB.fullmatch(fields[0])):
        return None
    _, state, ended_by, steps, elapsed, allocated, requested, submitted, started, ended, nodes, reason, name = fields
    word, _, by = state.partition(" by ")
    exit_code, _, signal = ended_by.partition(":")
    if word == "NODE_FAIL":  # nobody heard how the script ended: 22.05 writes 0 for that, 24.11 writes 1
        exit_code = "0"
    try:
        numbers = [int(number or 0) for number in (exit_code, signal, elapsed, steps.partition(":")[2])]
    except ValueError:
        return None
    return AccountingRow(
        array_id=job[1],
        tasks=job[2] or "",
        state=word.rstrip("+"),
        cancelled_by=by or None,
        exit_code=numbers[0],
        signal=numbers[1],
        step_signal=numbers[3],
        elapsed=numbers[2],
        allocated=read_tres(allocated),
        requested=read_tres(requested),
        submitted=submitted,
        started=started,
        ended=ended,
        nodes=nodes,
        reason=reason,
        name=name,
    )


def moment(text: str) -> float | None:
    """Return a time of sacct's in seconds since the epoch; None for `Unknown`, `None` and what is no time.

    Ask sacct with SLURM_TIME_FORMAT=%s, and it is exact. An ISO time is the cluster's own, whose zone
    is not known here: it is taken for UTC.
    """
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text):
        return float(text)
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp()


def read_tres(text: str) -> dict[str, int]:
    """Read trackable resources: `cpu=2,gres/gpu:a100=1,gres/gpu=1,node=1`; memory, with its unit, is left out."""
    found = {}
    for word in text.split(","):
        name, _, amount = word.partition("=")
        if amount.isdecimal():
            found[name] = int(amount)
    return found


def gpus_of(tres: Mapping[str, int]) -> dict[str | None, int]:
    """Return GPUs by type; `gres/gpu` counts the typed ones again, so it stands only where there are none."""
    typed: dict[str | None, int] = {
        name.removeprefix("gres/gpu:"): count for name, count in tres.items() if name.startswith("gres/gpu:")
    }
    plain = tres.get("gres/gpu", 0)
    return typed or ({None: plain} if plain else {})


def read_config(text: str) -> dict[str, str]:
    """Read `scontrol show config`: `MaxArraySize = 1001`, a line a setting."""
    found = {}
    for line in text.splitlines():
        name, sign, value = line.partition("=")
        if sign:
            found[name.strip()] = value.strip()
    return found


# A value may hold spaces and signs: it ends where the next name begins.
_WORD = re.compile(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)")


def read_records(text: str) -> list[dict[str, str]]:
    """Read `scontrol show partition -o` and its kind: a record a line, `Name=value` words in it."""
    records = [dict(_WORD.findall(line)) for line in text.splitlines()]
    return [record for record in records if record]


Refusal = Literal["transient", "permanent", "ambiguous"]

# The controller may have taken the job before the answer was lost. Only a connection that never came
# about ("connect failure") says that it has not.
_AMBIGUOUS = (
    "Socket timed out",
    "Zero Bytes were transmitted or received",
    "Unexpected message received",
    "Unexpected missing socket",
    "Message send failure",
    "Message receive failure",
    "Failed to send entire message",
    "Received zero length message",
    "Header lengths are longer than data received",
    "Insane message length",
    "Communication connection failure",
    "Communication shutdown failure",
    "Transport endpoint is not connected",
    "Connection reset by peer",
    "Connection timed out",
    "Broken pipe",
    "slurm controller (send failure)",
    "slurm controller (receive failure)",
    "slurm controller (shutdown failure)",
)
# The controller is away, or full for now: the job was not taken.
_TRANSIENT = (
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
    "Slurm job queue full",
    "Job creation temporarily disabled",
    "Unable to create job record, try again",
    "Unable to contact slurm controller",
    "Connection refused",
    "in standby mode",
)


def refusal(stderr: str) -> Refusal:
    """Say whether a refused sbatch may be tried again, and whether it may have been taken all the same.

    sbatch tries by itself before it gives up, and says so: its last word decides.
    """
    if any(words in stderr for words in _AMBIGUOUS):
        return "ambiguous"
    verdicts = [line for line in stderr.splitlines() if "submission failed: " in line]
    if any(words in (verdicts[-1] if verdicts else stderr) for words in _TRANSIENT):
        return "transient"
    return "permanent"


# A limit on how many jobs may be queued: the array is refused whole, though a part of it may fit.
_FULL = re.compile(r"\b(?:Assoc|QOS|Part)\w*Submit\w*Limit\b")
_NO_ROOM = ("Slurm job queue full", "Resource temporarily unavailable")


def queue_full(stderr: str, *, beside: bool) -> bool:
    """Say whether sbatch refused only because the queue takes no more of this user's jobs now.

    `beside` says that others of the run are queued: then a controller that is full is not waited for.
    """
    limit = _FULL.search(stderr) is not None or ("job submit limit" in stderr and "Limit" not in stderr)
    return limit or (beside and any(words in stderr for words in _NO_ROOM))


# What sbatch says -> what to do. The first that fits is told, so the general ones come last.
_REMEDIES = {
    "Invalid account or account/partition": "check job.account and job.partition (`sacctmgr show assoc user=$USER`)",
    "Invalid partition name": "check job.partition (`sinfo -s` lists them)",
    "No partition specified": "set job.partition (`sinfo -s` lists them)",
    "User's group not permitted to use this partition": "choose another job.partition",
    "Required partition not available": "the partition takes no jobs now: choose another job.partition, or wait",
    "Invalid qos": "check job.qos (`sacctmgr show assoc user=$USER format=qos`)",
    "Memory specification can not be satisfied": "no node has so much: lower job.memory",
    "Requested node configuration is not available": (
        "no node is like that: check job.gpu_type, gpus_per_node, cpus_per_task and memory (`sinfo -o '%P %G %c %m'`)"
    ),
    "Node count specification invalid": "check job.nodes (`scontrol show partition` tells how many there may be)",
    "Requested nodes not in this partition": "check job.nodelist and job.exclude",
    "Invalid node name": "check job.nodelist and job.exclude (`sinfo -N` lists the nodes)",
    "Invalid feature": "check job.constraint (`sinfo -o '%N %f'` lists the features)",
    "Invalid generic resource": "check job.gres (`sinfo -o '%P %G'` lists what there is)",
    "Invalid license": "check job.extra.licenses (`scontrol show licenses`)",
    "reservation": "check job.reservation (`scontrol show reservation`)",
    "Job dependency problem": "check job.dependency",
    "Requested time limit is invalid": "job.time is over the partition's limit (`sinfo -o '%P %l'`)",
    "Invalid --time specification": "check job.time",
    "Invalid --mem specification": "check job.memory",
    "unrecognized option": "this cluster's sbatch is too old, or too new, for one of job.extra",
    "Access/permission denied": "this host may not submit to the partition: submit from a login node",
    "Invalid user id": "root may not submit here: use an account of your own",
    "Invalid job array specification": "the array is larger than the site's MaxArraySize",
    "System submissions disabled": "the cluster takes no jobs now",
    "Munge encode failed": "munge does not run on this host: tell those who run it",
    "Unable to contact slurm controller": "the controller is away, or not to be reached from here (`scontrol ping`)",
    "Socket timed out": "the controller is too busy to answer: the job may have been taken all the same",
    "job submit limit": "over a limit of your account or QOS (`sacctmgr show assoc user=$USER`, `sacctmgr show qos`)",
}


def explained(stderr: str) -> str:
    """Return the scheduler's words, with ours after them where they help."""
    lines = [re.sub(r"^sbatch: (?:error: )?", "", line.strip()) for line in stderr.strip().splitlines()]
    words = "; ".join(dict.fromkeys(line for line in lines if line))
    # With a limit, its name is told first, alone on its line.
    remedies = [limit[1] for line in lines if (limit := over_limit(line))]
    remedies += [remedy for pattern, remedy in _REMEDIES.items() if pattern in stderr]
    return f"{words}: {remedies[0]}" if remedies else words or "sbatch said nothing"

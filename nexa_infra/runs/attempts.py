"""What the status files and the scheduler say of trials: the standard library alone, for a steward reads it too."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from nexa_infra.runs.directory import BROUGHT, RunDirectory

TrialState = Literal[
    "pending",  # it has not started, and may yet
    "running",  # it has started and has not ended
    "completed",  # its program ended with exit code 0
    "failed",  # its program ended with another exit code, or by a signal of its own
    "timeout",  # the walltime ended it
    "out_of_memory",  # the kernel ended it for its memory
    "node_fail",  # its node went away
    "boot_fail",  # its node did not come up for it
    "deadline",  # it could not end before the deadline that the job names
    "preempted",  # a job with a better claim took its place
    "cancelled",  # a person ended it, or the run before it could start
    "interrupted",  # its client or supervisor ended: not its own fault, `resume` runs it
    "unknown",  # nobody could say
]
ENDED_BADLY: frozenset[TrialState] = frozenset(
    {"failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline", "preempted"}
)
UNFINISHED: frozenset[TrialState] = frozenset({"pending", "running", "cancelled", "interrupted", "unknown"})


@dataclass(frozen=True)
class Attempt:
    """One execution of a trial; times are seconds since the epoch."""

    trial: int
    number: int
    started: float
    node: str = ""
    ended: float | None = None
    exit_code: int | None = None
    signal: str | None = None  # what the wrapper was sent and passed on: TERM, USR2, …
    logged: int = 0  # what metrics.jsonl held before it started, bytes
    # What ended it, by its script: timeout, preempted, oom, or stuck (a chain that saves nothing).
    cause: str | None = None
    restart: int = 0  # how often its array task had been put back into the queue before

    @property
    def seconds(self) -> float:
        """How long it ran; 0 where its end was never seen."""
        return max(0.0, self.ended - self.started) if self.ended is not None else 0.0


@dataclass(frozen=True)
class TaskState:
    """What the scheduler says of a trial's newest array task."""

    attempt: int
    state: str  # PENDING, RUNNING, or how it ended, as Slurm calls it
    exit_code: int | None = None
    ended: float | None = None  # seconds since the epoch
    words: str = ""  # what that means, for people


_STATUS_WORDS = ("start\t", "end\t", "log\t", "why\t")


@dataclass
class _Known:
    """What this process has read of a folder of status files."""

    signs: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of each file: size, mtime, inode
    read: int = 0  # how much of what a client has brought, bytes
    starts: dict[int, dict[int, tuple[float, str, int]]] = field(default_factory=dict)  # trial -> attempt -> …
    ends: dict[tuple[int, int], tuple[float, int, str | None]] = field(default_factory=dict)
    logged: dict[tuple[int, int], int] = field(default_factory=dict)
    causes: dict[tuple[int, int], str] = field(default_factory=dict)
    trials: dict[int, list[Attempt]] = field(default_factory=dict)


_known: dict[str, _Known] = {}
_lock = threading.Lock()
# So many run directories are remembered.
_MOST_KNOWN = 16
# What has changed less than this ago may change once more and look the same, nanoseconds.
_MOMENT = 2_000_000_000


def read_attempts(directory: RunDirectory) -> dict[int, list[Attempt]]:
    """Read every attempt from the status files: trial -> attempts, in order.

    A line that a crash tore is left out: an attempt exists once its start line is whole. A file that looks as it did
    when this process last read it is not read again: of ten thousand, few change between two polls.
    """
    folder = str(directory.status)
    with _lock:
        known = _known.pop(folder, None) or _Known()
        signs = _signs(folder)
        if any(name not in signs or signs[name][0] < sign[0] for name, sign in known.signs.items()):
            known = _Known()  # nothing is ever taken back: these are another run's
        _known[folder] = known
        while len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]
        _read_changed(folder, known, signs)
        return {trial: list(tried) for trial, tried in known.trials.items()}


def _read_changed(folder: str, known: _Known, signs: Mapping[str, tuple[int, int, int]]) -> None:
    changed: set[int] = set()
    recent = time.time_ns() - _MOMENT
    for name, sign in signs.items():
        if known.signs.get(name) == sign:
            continue
        try:
            lines, length = _lines(f"{folder}/{name}", known.read if name == BROUGHT else 0)
        except OSError:
            continue
        if name == BROUGHT:
            known.read += length
        known.signs[name] = sign if sign[1] < recent else (sign[0], 0, 0)
        for line in lines:
            # What a crash tore has no newline, so the next line stands behind it, on the same one.
            words = line[max([0, *map(line.rfind, _STATUS_WORDS)]) :].split("\t")
            try:
                trial, number = key = (int(words[1]), int(words[2]))
                if words[0] == "start":
                    started = (float(words[3]), words[4], int(words[5]) if len(words) > 5 else 0)
                    known.starts.setdefault(trial, {})[number] = started
                elif words[0] == "end":
                    known.ends[key] = (float(words[3]), int(words[4]), words[5] or None)
                elif words[0] == "log":
                    known.logged[key] = int(words[3])
                elif words[0] == "why":
                    known.causes[key] = words[3]
            except (ValueError, IndexError):
                continue
            changed.add(trial)
    new = [trial for trial in changed if trial in known.starts]
    known.trials.update((trial, _tried(known, trial)) for trial in new)
    if len(known.trials) > 1 and new:
        known.trials = dict(sorted(known.trials.items()))


def _tried(known: _Known, trial: int) -> list[Attempt]:
    found = []
    for number, (started, node, restart) in sorted(known.starts[trial].items()):
        key = (trial, number)
        ended, code, caught = known.ends.get(key, (None, None, None))
        logged, cause = known.logged.get(key, 0), known.causes.get(key)
        found.append(Attempt(trial, number, started, node, ended, code, caught, logged, cause, restart))
    return found


def _signs(folder: str) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether each status file has changed: its size, its mtime and its inode."""
    found = {}
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return {}
    try:
        for name in os.listdir(handle):  # noqa: PTH208 - a Path an entry would double the time of ten thousand
            if name.startswith("."):
                continue  # one that is being brought
            try:
                stat = os.stat(name, dir_fd=handle)
            except FileNotFoundError:
                continue
            found[name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    finally:
        os.close(handle)
    return found


def _lines(path: str, begin: int) -> tuple[list[str], int]:
    """Return the whole lines of a status file from a byte on, and how many bytes they are."""
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 - likewise
        stream.seek(begin)
        whole, newline, _ = stream.read().rpartition(b"\n")
    return whole.decode("utf-8", "replace").split("\n") if newline else [], len(whole) + len(newline)


_BY_SCHEDULER: dict[str, TrialState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "TIMEOUT": "timeout",
    "CANCELLED": "cancelled",
    "OUT_OF_MEMORY": "out_of_memory",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "boot_fail",
    "DEADLINE": "deadline",
    "REVOKED": "cancelled",
    "PREEMPTED": "preempted",
    "FAILED": "failed",
    "INTERRUPTED": "interrupted",
}


# What a script says of a trial that it has warned, or that gave way.
BY_CAUSE: dict[str, tuple[TrialState, str]] = {
    "timeout": ("timeout", "ended after the warning that its walltime would soon be over"),
    "preempted": ("preempted", "gave way to a job with a better claim"),
    "oom": ("out_of_memory", "the kernel ended it for its memory: its container was given no more"),
    "stuck": ("failed", "came to its walltime twice without a new checkpoint: chained on, it would never end"),
}

# Ends that the scheduler brings about, whatever the program's exit code.
_BY_FORCE: frozenset[TrialState] = frozenset(
    {"timeout", "out_of_memory", "preempted", "node_fail", "boot_fail", "deadline"}
)


def _has_completed(attempt: Attempt) -> bool:
    """Say whether an attempt has told that it did what it was to do."""
    return attempt.ended is not None and attempt.exit_code == 0 and not attempt.signal and attempt.cause is None


def judge(attempts: Sequence[Attempt], task: TaskState | None, *, cancelled: bool) -> TrialState:
    """Say how a trial stands: its own status lines first, the scheduler's word where they end.

    A trial has completed when its status line says so, and never because it is missing.
    """
    last = attempts[-1] if attempts else None
    if task is not None and last is not None and task.attempt < last.number:
        task = None  # its word on an earlier attempt is none on this one
    said = _BY_SCHEDULER.get(task.state) if task else None
    if last is None or (task is not None and task.attempt > last.number):
        if last is not None and task is not None and task.state == "COMPLETED" and _has_completed(last):
            return "completed"  # Slurm has started it once more, and it had nothing left to do
        # The newest attempt has not started.
        return "cancelled" if cancelled and said in {None, "pending"} else said or "pending"
    if last.cause is not None and (last.ended is not None or said in {None, "failed", "timeout", "cancelled"}):
        return "cancelled" if said == "cancelled" else BY_CAUSE.get(last.cause, ("failed", ""))[0]
    if last.ended is None or last.signal == "KILL":
        return said if said and said != "pending" else "interrupted"
    if "TERM" in (last.signal or "").split():
        return said if said and (said in _BY_FORCE or said == "cancelled") else "interrupted"
    if last.exit_code == 0:
        return "completed"
    # The kernel or the scheduler may have ended the program alone, whose exit code does not say so.
    return said if said and (said in _BY_FORCE or said == "cancelled") else "failed"


def read_states(
    directory: RunDirectory, count: int, tasks: Mapping[int, TaskState]
) -> tuple[list[TrialState], dict[int, list[Attempt]]]:
    """Return each trial's state, and the attempts of those that have started."""
    attempts = read_attempts(directory)
    for trial, task in tasks.items():
        # A script that was killed could not write its end: the scheduler saw it.
        last = attempts[trial][-1] if trial in attempts else None
        if last and last.ended is None and task.ended and last.number == task.attempt:
            attempts[trial][-1] = replace(last, ended=task.ended, exit_code=task.exit_code, signal="KILL")
    cancelled = directory.cancelled.exists()
    none: list[Attempt] = []
    return [judge(attempts.get(i, none), tasks.get(i), cancelled=cancelled) for i in range(count)], attempts

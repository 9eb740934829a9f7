"""Trials as a table: their states and seconds, from the status files; collecting adds metrics and USD."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.spec.fields import Value
from nexa_infra.spec.launcher import written
from nexa_infra.spec.sweep import SweepDefinition, trial_hash

if TYPE_CHECKING:
    import pandas as pd

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
    cause: str | None = (
        None  # what ended it, by its script: timeout, preempted, oom, or stuck (a chain that saves nothing)
    )

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


@dataclass(frozen=True)
class Trial:
    """One point of a sweep and what became of it."""

    index: int
    hash: str
    parameters: Mapping[str, Value]
    state: TrialState = "pending"
    attempts: tuple[Attempt, ...] = ()
    usd: Decimal | None = None  # of all attempts; None until it is known
    wasted_usd: Decimal | None = None  # of the attempts that did not complete
    unit_hours: Decimal | None = None  # GPU-hours, or core-hours, of all attempts
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""  # the scheduler's word on how it ended, for people; empty where it has none

    @property
    def attempt(self) -> int:
        """The number of the last attempt; 0 where there was none."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def exit_code(self) -> int | None:
        """The exit code of the last attempt; 128 + N for signal N; None where its end was never seen."""
        return self.attempts[-1].exit_code if self.attempts else None

    @property
    def seconds(self) -> float:
        """Seconds over all attempts."""
        return sum(attempt.seconds for attempt in self.attempts)


_STATUS_WORDS = ("start\t", "end\t", "log\t", "why\t")


def read_attempts(directory: RunDirectory) -> dict[int, list[Attempt]]:
    """Read every attempt from the status files: trial -> attempts, in order.

    A line that a crash tore is left out: an attempt exists once its start line is whole.
    """
    starts: dict[tuple[int, int], tuple[float, str]] = {}
    ends: dict[tuple[int, int], tuple[float, int, str | None]] = {}
    logged: dict[tuple[int, int], int] = {}
    causes: dict[tuple[int, int], str] = {}
    for line in _status_lines(directory.status):
        # What a crash tore has no newline, so the next line stands behind it, on the same one.
        words = line[max(0, *(line.rfind(word) for word in _STATUS_WORDS)) :].split("\t")
        try:
            key = (int(words[1]), int(words[2]))
            if words[0] == "start":
                starts[key] = (float(words[3]), words[4])
            elif words[0] == "end":
                ends[key] = (float(words[3]), int(words[4]), words[5] or None)
            elif words[0] == "log":
                logged[key] = int(words[3])
            elif words[0] == "why":
                causes[key] = words[3]
        except (ValueError, IndexError):
            continue
    trials: dict[int, list[Attempt]] = {}
    for key in sorted(starts):
        ended, code, caught = ends.get(key, (None, None, None))
        attempt = Attempt(*key, *starts[key], ended, code, caught, logged.get(key, 0), causes.get(key))
        trials.setdefault(key[0], []).append(attempt)
    return trials


def _status_lines(folder: Path) -> Iterator[str]:
    """Yield the whole lines of every status file."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - a Path an entry would double the time of ten thousand
    except FileNotFoundError:
        return
    for name in names:
        try:
            with open(f"{folder}/{name}", "rb", buffering=0) as stream:  # noqa: PTH123 - likewise
                data = stream.read()
        except OSError:
            continue
        yield from data.decode("utf-8", "replace").split("\n")[:-1]


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
_BY_CAUSE: dict[str, tuple[TrialState, str]] = {
    "timeout": ("timeout", "ended after the warning that its walltime would soon be over"),
    "preempted": ("preempted", "gave way to a job with a better claim"),
    "oom": ("out_of_memory", "the kernel ended it for its memory: its container was given no more"),
    "stuck": ("failed", "came to its walltime twice without a new checkpoint: chained on, it would never end"),
}

# Ends that the scheduler brings about, whatever the program's exit code.
_BY_FORCE: frozenset[TrialState] = frozenset(
    {"timeout", "out_of_memory", "preempted", "node_fail", "boot_fail", "deadline"}
)


def judge(attempts: Sequence[Attempt], task: TaskState | None, *, cancelled: bool) -> TrialState:
    """Say how a trial stands: its own status lines first, the scheduler's word where they end.

    A trial has completed when its status line says so, and never because it is missing.
    """
    last = attempts[-1] if attempts else None
    said = _BY_SCHEDULER.get(task.state) if task else None
    if last is None or (task is not None and task.attempt > last.number):
        # The newest attempt has not started.
        return "cancelled" if cancelled and said in {None, "pending"} else said or "pending"
    if last.cause is not None and (last.ended is not None or said in {None, "failed", "timeout", "cancelled"}):
        return "cancelled" if said == "cancelled" else _BY_CAUSE.get(last.cause, ("failed", ""))[0]
    if last.ended is None or last.signal == "KILL":
        return said if said and said != "pending" else "interrupted"
    if "TERM" in (last.signal or "").split():
        return said if said and (said in _BY_FORCE or said == "cancelled") else "interrupted"
    if last.exit_code == 0:
        return "completed"
    # The kernel or the scheduler may have ended the program alone, whose exit code does not say so.
    return said if said and said in _BY_FORCE else "failed"


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


def read_trials(directory: RunDirectory, sweep: SweepDefinition, tasks: Mapping[int, TaskState]) -> Iterator[Trial]:
    """Yield every trial with its parameters, state, attempts and metrics."""
    states, attempts = read_states(directory, len(sweep), tasks)
    for index, state in enumerate(states):
        parameters = sweep.parameters_of(index)
        tried = tuple(attempts.get(index, ()))
        metrics = read_metrics(directory.metrics(index)) if tried else {}
        task = tasks.get(index)
        words = task.words if task is not None and state not in {"completed", "running"} else ""
        if state == "failed" and tried and tried[-1].exit_code is not None and tried[-1].signal != "KILL":
            words = ""  # the program's own exit code says more than what became of it on its way to the scheduler
        cause = tried[-1].cause if tried else None
        if cause in _BY_CAUSE and state == _BY_CAUSE[cause][0]:
            words = _BY_CAUSE[cause][1]
        yield Trial(index, trial_hash(parameters), parameters, state, tried, metrics=metrics, reason=words)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a trial's metrics.json; names of nested objects are joined by dots.

    Where the trial wrote none, or something other than a JSON object of at most 16 MiB, there are none.
    """
    try:
        with open(path, "rb", opener=without_waiting) as stream:
            raw = stream.read(_MOST_METRICS + 1) or b""
        data = json.loads(raw) if len(raw) <= _MOST_METRICS else None
        return dict(_flatten(data)) if isinstance(data, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def without_waiting(path: str, flags: int) -> int:
    """Open a trial's file, which may be anything: a pipe must not hold up whoever reads it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _flatten(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{_sound(name)}.")
        else:
            yield f"{above}{_sound(name)}", _sound(value)


def _sound(value: Any) -> Any:
    """Return a value whose texts can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case list():
            return [_sound(one) for one in value]
        case dict():
            return {_sound(name): _sound(one) for name, one in value.items()}
        case _:
            return value


# A trial that writes more than this into metrics.json is not measuring.
_MOST_METRICS = 16 * 2**20

FIXED_COLUMNS = ("index", "hash", "state", "exit_code", "attempt", "seconds", "usd")


def write_results(path: Path, trials: Iterable[Trial]) -> None:
    """Write results.csv: a row a trial; index, hash, parameters, state, exit code, attempt, seconds, USD, metrics.

    A parameter named as one of the fixed columns becomes `parameters.NAME`, a metric named as
    anything before it `metrics.NAME`; no two columns have one name.
    """
    rows = list(trials)
    taken = set(FIXED_COLUMNS)
    parameters = _columns((name for row in rows for name in row.parameters), "parameters", taken)
    metrics = _columns((name for row in rows for name in row.metrics), "metrics", taken)
    lines = [_csv_line([*FIXED_COLUMNS[:2], *parameters.values(), *FIXED_COLUMNS[2:], *metrics.values()])]
    lines.extend(
        _csv_line(
            [
                row.index,
                row.hash,
                *(_cell(row.parameters.get(name)) for name in parameters),
                row.state,
                _cell(row.exit_code),
                row.attempt,
                f"{row.seconds:.3f}",
                "" if row.usd is None else f"{row.usd:.9f}",
                *(_cell(row.metrics.get(name)) for name in metrics),
            ]
        )
        for row in rows
    )
    write_atomically(path, "".join(lines))


def _csv_line(cells: Sequence[object]) -> str:
    # A text with a carriage return is quoted only where lines end in one; Unix tools want lines that do not.
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\r\n").writerow(cells)
    return stream.getvalue()[:-2] + "\n"


def read_results(path: Path) -> pd.DataFrame:
    """Read results.csv as a data frame; hashes stay text."""
    import pandas as pd

    return pd.read_csv(path, dtype={"hash": "string"})


def _columns(names: Iterable[str], group: str, taken: set[str]) -> dict[str, str]:
    """Give each name a column that no other has, and add it to `taken`.

    A name that can be kept is kept, so that another's longer one never takes it away.
    """
    distinct = dict.fromkeys(names)
    columns = {name: name for name in distinct if name not in taken}
    taken.update(columns)
    for name in distinct:
        column = name
        while name not in columns and column in taken:
            column = f"{group}.{column}"
        columns.setdefault(name, column)
        taken.add(columns[name])
    return {name: columns[name] for name in distinct}


def _cell(value: Value | float | list[Any]) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (str, bool)):
        return written(value)
    return json.dumps(value)

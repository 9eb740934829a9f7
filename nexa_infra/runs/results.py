"""Trials as a table: their states and seconds, from the status files; collecting adds metrics and USD."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa_infra.runs.attempts import BY_CAUSE, Attempt, TaskState, TrialState, read_states
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.metrics import metrics_of
from nexa_infra.spec.points import Decoder, Value, trial_hash, written

if TYPE_CHECKING:
    import pandas as pd


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


def read_trials(directory: RunDirectory, sweep: Decoder, tasks: Mapping[int, TaskState]) -> Iterator[Trial]:
    """Yield every trial with its parameters, state, attempts and metrics."""
    states, attempts = read_states(directory, len(sweep), tasks)
    measured = metrics_of(directory)
    for index, state in enumerate(states):
        parameters = sweep.parameters_of(index)
        tried = tuple(attempts.get(index, ()))
        metrics = measured(index) if tried else {}
        task = tasks.get(index)
        words = task.words if task is not None and state not in {"completed", "running"} else ""
        if state == "failed" and tried and tried[-1].exit_code is not None and tried[-1].signal != "KILL":
            words = ""  # the program's own exit code says more than what became of it on its way to the scheduler
        cause = tried[-1].cause if tried else None
        if cause in BY_CAUSE and state == BY_CAUSE[cause][0]:
            words = BY_CAUSE[cause][1]
        yield Trial(index, trial_hash(parameters), parameters, state, tried, metrics=metrics, reason=words)


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

"""What was asked of a scheduler: one record an array, an intent first. The standard library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from nexa_infra.errors import NexaError
from nexa_infra.runs.directory import RunDirectory, write_atomically


@dataclass(frozen=True)
class Submission:
    """One array that was asked of the scheduler: an intent first, its answer added afterwards."""

    number: int  # 1, 2, … in the run
    token: str  # the job's name, `nexa-<run>-<number>`; it makes the submission unique
    trials: int  # how many trials the array runs
    array: str  # sbatch's --array, such as 0-11%2
    created_at: datetime
    chunk: int = 0
    chunks: int = 1
    listed: str | None = None  # a file of `trial attempt` lines in the run directory
    pack: int = 1  # how many trials an array task runs
    options: tuple[str, ...] = ()  # sbatch's, besides those of the script: --mem=8192M
    after: str | None = None  # the array that it waits for, so that no more run at once
    alone: bool = True  # whether nothing that was submitted before may start any more
    job_id: str | None = None  # the scheduler's answer
    void: str | None = None  # why nothing of it ever runs: the queue was `full`, or it is `lost`: nowhere to be found

    @property
    def tasks(self) -> int:
        """How many array tasks it has."""
        return int(self.array.partition("%")[0].rpartition("-")[2]) + 1


class Recorded(Protocol):
    """What a run is, to those who read its submissions."""

    @property
    def files(self) -> RunDirectory:
        """Where its files are on this machine."""

    @property
    def trials(self) -> int:
        """How many trials it has."""


def read_moment(text: str) -> datetime:
    """Read a moment as ISO 8601 has it; of Python 3.11 on, `Z` is read without our help."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def to_json(submission: Submission) -> str:
    """Write a submission as its record holds it."""
    data = {**asdict(submission), "created_at": submission.created_at.isoformat()}
    return json.dumps(data, indent=2) + "\n"


def write_submission(directory: RunDirectory, submission: Submission) -> None:
    """Record a submission: its intent before it is asked for, its id once there is an answer."""
    write_atomically(directory.submission(submission.number), to_json(submission))


def read_submissions(directory: RunDirectory) -> list[Submission]:
    """Read a run's submissions, in order.

    Raises:
        NexaError: one of them is damaged; the message names its file.
    """
    found = (_read(path) for path in directory.submissions.glob("*.json"))
    return sorted(found, key=lambda submission: submission.number)


_NAMES = {field.name for field in fields(Submission)}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "trials": int,
    "chunk": int,
    "chunks": int,
    "pack": int,
    "token": str,
    "array": str,
    "created_at": str,
    "options": list,
    "alone": bool,
}


def _read(path: Path) -> Submission:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        if unknown := sorted(set(data) - _NAMES):
            raise ValueError(f"{unknown[0]} is not known to this version")
        for name, kind in _KINDS.items():
            if name in data and not isinstance(data[name], kind):
                raise ValueError(f"{name} is {data[name]!r}")
        moment = read_moment(data["created_at"])
        return Submission(**{**data, "created_at": moment, "options": tuple(data.get("options", ()))})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NexaError(f"{path} is damaged: {error}") from error


def trials_of(run: Recorded, submission: Submission) -> Sequence[Sequence[tuple[int, int]]]:
    """Return the trials of each array task of a submission, in order: each is the trial and its attempt.

    A task of a pack holds every G-th of all that there is, where G tasks hold it all; see job.sbatch.
    """
    return _trials_of(run.files.path, run.trials, submission)


# What a submission runs never changes; a poll asks for it several times.
@lru_cache(maxsize=64)
def _trials_of(folder: Path, count: int, submission: Submission) -> tuple[tuple[tuple[int, int], ...], ...]:
    if submission.listed is not None:
        lines = (line.split() for line in (folder / submission.listed).read_text().splitlines())
        asked = tuple((int(trial), int(attempt)) for trial, attempt in lines)
        return tuple(asked[task :: submission.tasks] for task in range(submission.tasks))
    groups = -(-count // submission.pack)
    mine = range(submission.chunk, groups, submission.chunks)
    return tuple(tuple((trial, 1) for trial in range(group, count, groups)) for group in mine)

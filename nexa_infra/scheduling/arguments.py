"""What sbatch and the array script are told of one array: the standard library alone."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.spec.walltime import format_walltime

if TYPE_CHECKING:
    from nexa_infra.runs.submissions import Submission
    from nexa_infra.spec.job import SlurmJob


def array_spec(count: int, parallelism: int | None) -> str:
    """Return sbatch's `--array` for tasks 0 to count - 1."""
    return f"0-{count - 1}" + (f"%{parallelism}" if parallelism else "")


def script_arguments(submission: Submission) -> list[str]:
    """Return the arguments by which an array's script knows what its tasks run: CHUNK CHUNKS [LIST [PACK]]."""
    words = [str(submission.chunk), str(submission.chunks)]
    if submission.pack > 1:
        return [*words, submission.listed or "", str(submission.pack)]
    return [*words, submission.listed] if submission.listed else words


def pack_rounds(job: SlurmJob, pack: int) -> int:
    """Return how many trials of a pack run one after the other, at most."""
    return -(-pack // job.trials_at_once)


def pack_minutes(job: SlurmJob, pack: int) -> str | None:
    """Return sbatch's `--time` for a task of so many trials; None where the script's own stands.

    Each trial has the walltime of one, and the script itself sees to that; a minute more is for starting them.
    """
    limit = job.walltime
    if limit is None or pack == 1:
        return None
    return format_walltime(limit * pack_rounds(job, pack) + timedelta(minutes=1))


def log_option(log: Path | str) -> str:
    r"""Return sbatch's --output for a log: Slurm reads % and \ in a path, so that there the script keeps it itself."""
    return "/dev/null" if {"%", "\\"} & set(str(log)) else str(log)

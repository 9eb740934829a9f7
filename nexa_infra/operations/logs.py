"""What trials print, while they run and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from nexa_infra.errors import NexaError
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import read_attempts

_PIECE = 1 << 16
_LOOK_SECONDS = 0.2


def log_path(run: Run, trial: int | None, *, attempt: int | None = None, stderr: bool = False) -> Path:
    """Return the file that holds a trial's output, or, without a trial, the array script's.

    Raises:
        NexaError: the run has no such trial, or the trial no such attempt.
    """
    if trial is None:
        return run.files.log
    if not 0 <= trial < run.trials:
        raise NexaError(f"run {run.id} has trials 0 to {run.trials - 1}: there is no trial {trial}")
    tried = [each.number for each in read_attempts(run.files).get(trial, [])]
    if attempt is not None and attempt not in tried:
        told = ", ".join(str(number) for number in tried) or "none yet"
        raise NexaError(f"trial {trial} of run {run.id} has no attempt {attempt}: it has {told}")
    number = attempt or (tried[-1] if tried else 1)
    return run.files.stderr(trial, number) if stderr else run.files.stdout(trial, number)


def tail(run: Run, path: Path, trial: int | None, *, follow: bool) -> Iterator[bytes]:
    """Yield a log's bytes; with `follow`, until the trial, or the run, has ended."""
    offset = 0
    while True:
        going = follow and _going(run, trial)
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(offset)
                while piece := stream.read(_PIECE):
                    offset += len(piece)
                    yield piece
        if not going:
            return
        time.sleep(_LOOK_SECONDS)


def _going(run: Run, trial: int | None) -> bool:
    if not steps.scheduler_of(run).poll(run).active:
        return False
    last = read_attempts(run.files).get(trial, [])[-1:] if trial is not None else []
    return not last or last[0].ended is None

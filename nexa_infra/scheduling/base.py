"""What every scheduler can do with a run: submit an array, say how it stands, end it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from nexa_infra.runs.record import Run, Submission
from nexa_infra.runs.results import TaskState


@dataclass(frozen=True)
class Queue:
    """How a run's arrays stand, by the scheduler's word."""

    active: bool  # whether anything of the run waits or runs
    pending: int = 0
    running: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # the scheduler's state -> array tasks


class Scheduler(Protocol):
    """Where arrays are submitted."""

    def submit(self, run: Run, submission: Submission) -> str:
        """Submit an array whose intent is recorded; return the scheduler's id for it.

        Raises:
            SubmitError: it was refused; the message carries the scheduler's words.
        """

    def poll(self, run: Run) -> Queue:
        """Say how the run's arrays stand."""

    def tasks(self, run: Run) -> dict[int, TaskState]:
        """Say how each trial's newest array task stands: trial -> state."""

    def cancel(self, run: Run) -> None:
        """End everything of the run, and return once it has ended."""

    def ends_with_client(self, run: Run) -> bool:
        """Say whether what runs of the run ends with this process."""

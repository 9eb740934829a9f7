"""What every scheduler can do with a run: submit an array, say how it stands, end it."""

from __future__ import annotations

from collections.abc import Sequence
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
    notes: tuple[str, ...] = ()  # why what waits does not start, where a person should know
    stuck: str | None = None  # why nothing of it can ever start as it is


@dataclass(frozen=True)
class Admission:
    """What a scheduler says of a run before anything of it is there."""

    notes: tuple[str, ...] = ()  # what a person should know, though nothing forbids it
    starts: str | None = None  # when the first trial would start, in words
    gpu: str | None = None  # the site's own name for the GPU that is asked for
    billing: int | None = None  # the billing units of one trial, by the partition's weights
    walltime: str | None = None  # the partition's limit, where a chain's job asks for more


class Scheduler(Protocol):
    """Where arrays are submitted."""

    def check(self, run: Run) -> Admission:
        """Ask whether the run can run as it is; nothing is changed anywhere.

        Raises:
            SubmitError: it cannot; the message says why, and what to do.
        """

    def prepare(self, run: Run) -> None:
        """Bring a run directory that was made here to where the run executes."""

    def submit(self, run: Run, submission: Submission) -> Submission | None:
        """Submit an array whose intent is recorded; return it with the scheduler's id, or another client's.

        Called again with the same intent, it finds what became of it, and submits nothing twice. None says
        that this intent will never run anything, so that a new one is safe.

        Raises:
            SubmitError: it was refused, or what became of it is not known; the message carries the scheduler's words.
        """

    def leave(self, run: Run) -> None:
        """Stop a `submit` that waits, in another thread, to hear what became of it."""

    def settle(self, run: Run, submission: Submission) -> Submission | None:
        """Say what became of an intent whose answer was never recorded; None where it will never run anything."""

    def poll(self, run: Run) -> Queue:
        """Say how the run's arrays stand, once what they have written is here.

        Raises:
            UnknownStateError: the scheduler cannot say.
            HostError: it cannot be asked.
        """

    def tasks(self, run: Run) -> dict[int, TaskState]:
        """Say how each trial's newest array task stood at the last poll: trial -> state."""

    def cancel(self, run: Run) -> None:
        """End everything of the run, and return once it has ended."""

    def reopen(self, run: Run) -> None:
        """Take back the word that ended the run, so that it may go on."""

    def bring(self, run: Run) -> None:
        """Bring what the report reads: states, metrics, accounting."""

    def bring_words(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """Bring the last words of some attempts, each `(trial, attempt)`."""

    def bring_ranks(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """Bring what the ranks of some attempts that torchrun started have left, each `(trial, attempt)`."""

    def publish(self, run: Run) -> None:
        """Leave the report beside what it reports on."""

    def ends_with_client(self, run: Run) -> bool:
        """Say whether what runs of the run ends with this process."""

"""What every scheduler can do with a run: submit an array, say how it stands, end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nexa_infra.runs.attempts import TaskState
from nexa_infra.scheduling.arrays import Array, Throttle

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.runs.submissions import Submission


@dataclass(frozen=True)
class Queue:
    """How a run's arrays stand, by the scheduler's word."""

    active: bool  # whether anything of the run waits or runs
    pending: int = 0
    running: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # the scheduler's state -> array tasks
    notes: tuple[str, ...] = ()  # why what waits does not start, where a person should know
    stuck: str | None = None  # why nothing of it can ever start as it is
    arrays: tuple[Array, ...] = ()  # those that wait or run, in the order of their submission
    steward: bool = False  # whether one lives that follows it without a client
    queued: int | None = None  # array tasks of this user that wait or run there, other runs' too


@dataclass(frozen=True)
class Admission:
    """What a scheduler says of a run before anything of it is there."""

    notes: tuple[str, ...] = ()  # what a person should know, though nothing forbids it
    starts: str | None = None  # when the first trial would start, in words
    gpu: str | None = None  # the site's own name for the GPU that is asked for
    billing: int | None = None  # the billing units of one trial, by the partition's weights
    walltime: str | None = None  # the partition's limit, where a chain's job asks for more
    array_size: int | None = None  # array tasks that one array may have
    queue_size: int | None = None  # array tasks of this user that may wait or run at once
    over_seconds: int = 0  # how long what is over its walltime may go on until it is ended
    pack: int | None = None  # trials in turn that the partition's limit leaves room for


class Scheduler(Protocol):
    """Where arrays are submitted."""

    @property
    def patience(self) -> float:
        """How long one that does not answer is waited for, seconds."""

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
            QueueFullError: nothing was taken, for the queue takes no more of this size now.
            SubmitError: it was refused, or what became of it is not known; the message carries the scheduler's words.
        """

    def submit_together(self, run: Run, submissions: Sequence[Submission]) -> list[Submission]:
        """Submit several arrays in one question; return those, of the first ones, that were taken at once.

        What became of the next is for `submit` to find out; those behind it were not asked for.
        """

    def leave(self, run: Run) -> None:
        """Stop a `submit` that waits, in another thread, to hear what became of it."""

    def settle(self, run: Run, submission: Submission) -> Submission | None:
        """Say what became of an intent whose answer was never recorded; None where it will never run anything."""

    def poll(self, run: Run, *, fresh: bool = False) -> Queue:
        """Say how the run's arrays stand, once what they have written is here.

        What another run was told a moment ago may do, unless it is to be `fresh`.

        Raises:
            UnknownStateError: the scheduler cannot say.
            HostError: it cannot be asked.
        """

    def tasks(self, run: Run) -> dict[int, TaskState]:
        """Say how each trial's newest array task stood at the last poll: trial -> state."""

    def ends(self, run: Run) -> Mapping[tuple[int, int], str]:
        """Say how attempts have ended, by the scheduler's word: (trial, attempt) -> state, where it has one."""

    def failures(self, run: Run) -> Sequence[tuple[str, float]]:
        """Return the nodes that went away under attempts, and when, seconds since the epoch."""

    def close(self, run: Run) -> bool:
        """See to it that nothing that was submitted may start any more; say whether nothing of it waits or runs."""

    def counts(self, run: Run) -> Mapping[str, int]:
        """Return how often the scheduler was asked about the run by this process, by what was asked."""

    def throttle(self, run: Run, changes: Sequence[Throttle]) -> None:
        """Let more, or fewer, tasks of arrays run at once."""

    def keep_steward(self, run: Run) -> None:
        """See to it that the run has a steward, which follows it without a client."""

    def keep_throttle(self, run: Run, word: str) -> None:
        """Record how many trials may run at once, a number or `off`, for everybody who follows the run."""

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

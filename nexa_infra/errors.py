"""NexaError and its kinds: what happened, to which run, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass


class NexaError(Exception):
    """The root of every error that this package raises on purpose.

    `exit_code` is what a command line ends with when the error reaches it.
    """

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One complaint about a config: where it is, what is wrong, what to do."""

    key: str
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.file or 'config'}:{self.line}: " if self.line else f"{self.file or 'config'}: "
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


class ConfigError(NexaError):
    """What was asked cannot be understood; every complaint names file, line and key."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class WalltimeError(NexaError, ValueError):
    """A text is none of sbatch's walltime forms."""

    exit_code = 2


class PriceError(NexaError):
    """A price is not known; the message names the nearest that are."""

    exit_code = 2


class BudgetError(NexaError):
    """The projected cost is over the budget: the run was refused, nothing was submitted."""

    exit_code = 3


class SyncError(NexaError):
    """The code could not be brought over."""


class HostError(NexaError):
    """A host could not be reached, or a command on it could not be started."""


class ContainerError(NexaError):
    """An image cannot be had, or nothing here can run it; the message carries the registry's or runtime's words."""


class SubmitError(NexaError):
    """The scheduler refused the submission; the message carries its own words."""


class QueueFullError(SubmitError):
    """The scheduler's queue takes no more of this user's jobs now; it may as others end."""


class UnknownStateError(NexaError):
    """The scheduler could not say how something stands: it may be anything, and is waited for."""


class RunNotFoundError(NexaError):
    """No run has this name here; the message names the nearest."""

    exit_code = 2


class RunFailedError(NexaError):
    """The run has ended with trials that failed; the message says which, and why."""


class ArtifactError(NexaError):
    """What a training made is not as it was written; the message names the files, and what to do."""


class DetachedError(NexaError):
    """A person has left a run on a cluster to itself: its jobs go on."""

    exit_code = 130


class RunCancelledError(NexaError):
    """The run was ended by a person's word."""

    exit_code = 130

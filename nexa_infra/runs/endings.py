"""How a run has ended, and its trials' last words: the standard library alone, for a steward tells them too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nexa_infra.runs.attempts import ENDED_BADLY, UNFINISHED, TrialState
from nexa_infra.runs.directory import read_cancelled
from nexa_infra.runs.log import end_of
from nexa_infra.runs.ranks import (
    Failure,
    Gang,
    candidates,
    first_failure,
    no_rendezvous,
    read_gang,
    read_records,
)
from nexa_infra.runs.results import Trial

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

RunEnd = Literal["done", "failed", "cancelled", "refused", "unfinished"]

# Lines of a failed trial's standard error that are shown.
TAIL_LINES = 10


def ending(run: Run, trials: Sequence[Trial]) -> tuple[RunEnd, str | None]:
    """Say how a run has ended, and why where somebody said so."""
    return how_ended(run, Counter(trial.state for trial in trials))


def how_ended(run: Run, states: Mapping[TrialState, int]) -> tuple[RunEnd, str | None]:
    """Say how a run has ended, from how many trials are in which state; and why where somebody said so.

    A person's word that came once every trial had ended has cancelled nothing.
    """
    if run.files.refused.exists():
        return "refused", run.files.refused.read_text(encoding="utf-8").strip()
    stopped = read_cancelled(run.files)
    left = {state for state in UNFINISHED if states.get(state)}
    if stopped and stopped[0] != "person":
        return "failed", stopped[1]
    if stopped and left:
        return "cancelled", stopped[1]
    if left == {"cancelled"}:
        return "cancelled", f"{states['cancelled']:,} of its trials were cancelled on the cluster, not by this package"
    if left:
        return "unfinished", "its jobs went on when this was written" if run.cluster and "running" in left else None
    return ("failed" if any(states.get(state) for state in ENDED_BADLY) else "done"), None


def failed(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that ended badly."""
    return [trial for trial in trials if trial.state in ENDED_BADLY]


def explained(run: Run, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Say of trials that torchrun started and that failed which rank did so first, and how."""
    return tuple(_explained(run, trial) if trial.state in _OWN_FAULT else trial for trial in trials)


# Ends of a gang that one of its ranks brought about.
_OWN_FAULT: frozenset[TrialState] = frozenset({"failed", "out_of_memory"})


def _explained(run: Run, trial: Trial) -> Trial:
    launcher = run.config.launcher
    if launcher.type != "torchrun" or not trial.attempts:
        return trial
    gang, failure = gang_failure(run, trial.index, trial.attempt)
    told = str(failure) if failure else no_rendezvous(gang, run.config.job.nodes, launcher.rdzv_timeout)
    if not told:
        return trial
    return replace(trial, reason=f"{trial.reason}: {told}" if trial.state == "out_of_memory" else told)


def gang_failure(run: Run, trial: int, attempt: int) -> tuple[Gang, Failure | None]:
    """Read what an attempt's nodes recorded, and which rank failed first."""
    folder = run.files.ranks(trial, attempt)
    folder = folder if folder.exists() else run.files.rank_tails(trial, attempt)
    gang = read_gang(read_records(folder))
    logs = {end.rank: _end_of(folder / f"rank-{end.rank}.log") for end in candidates(gang)}
    return gang, first_failure(gang, logs)


def last_words(run: Run, trial: int, attempt: int, lines: int = TAIL_LINES) -> str:
    """Return the last lines that an attempt of a trial wrote to its stderr, or the rank of it that failed first."""
    if run.config.launcher.type == "torchrun":
        _, failure = gang_failure(run, trial, attempt)
        if failure is not None and failure.words:
            return "\n".join(failure.words.splitlines()[-lines:])
    whole = run.files.stderr(trial, attempt)
    text = _end_of(whole if whole.exists() else run.files.tail(trial, attempt))
    # How the launcher ended says less than what the program said before.
    said = [line for line in text.rstrip().splitlines() if not line.startswith("srun: ")]
    return "\n".join((said or text.rstrip().splitlines())[-lines:])


def _end_of(path: Path) -> str:
    return end_of(path, 8192).decode("utf-8", "replace")

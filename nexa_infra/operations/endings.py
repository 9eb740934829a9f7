"""What is said of a run that has failed."""

from __future__ import annotations

from collections.abc import Sequence

from nexa_infra.runs.endings import ending, failed, last_words
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial

__all__ = ["ending", "failure", "last_words"]


def failure(run: Run, trials: Sequence[Trial], reason: str | None) -> str:
    """Say which trials failed, with the last words of the first of them, and what to do."""
    bad = failed(trials)
    lines = [f"run {run.id} failed: {reason or f'{len(bad)} of {len(trials)} trials did not complete'}"]
    for trial in bad[:5]:
        code = "" if trial.exit_code is None else f" with exit code {trial.exit_code}"
        lines.append(
            f"  trial {trial.index} {trial.reason}"
            if trial.reason
            else f"  trial {trial.index} ended as {trial.state}{code}"
        )
        lines.extend(f"    {line}" for line in last_words(run, trial.index, trial.attempt, 5).splitlines())
    if len(bad) > 5:
        lines.append(f"  … and {len(bad) - 5} more: see {run.files.report_markdown}")
    again = f"retry {run.id}` runs only these again" if bad else f"resume {run.id}` goes on with it all the same"
    lines.append(f"`nexa-infra {again}")
    return "\n".join(lines)

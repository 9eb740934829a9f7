"""The one place that knows the layout of a run directory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BROUGHT = "brought"


@dataclass(frozen=True)
class RunDirectory:
    """Where each of a run's files is; `path` is absolute, on the host that runs it."""

    path: Path

    @property
    def record(self) -> Path:
        """run.json: frozen at submission."""
        return self.path / "run.json"

    @property
    def script(self) -> Path:
        """The job array script."""
        return self.path / "job.sbatch"

    @property
    def submissions(self) -> Path:
        """One record a submission, `<number>.json`, and what belongs to it."""
        return self.path / "submissions"

    def submission(self, number: int) -> Path:
        """A submission's record."""
        return self.submissions / f"{number}.json"

    @property
    def claims(self) -> Path:
        """One symlink a token, whose target is the array that owns it."""
        return self.path / "claims"

    @property
    def status(self) -> Path:
        """Append-only lines, one file an array task."""
        return self.path / "status"

    @property
    def brought(self) -> Path:
        """The lines of all those files, in a client's copy of a run directory: one file is read in no time."""
        return self.status / BROUGHT

    @property
    def trials(self) -> Path:
        """What each trial writes; a trial's directory is made when it starts."""
        return self.path / "trials"

    def trial(self, index: int) -> Path:
        """One trial's directory."""
        return self.trials / str(index)

    def stdout(self, index: int, attempt: int) -> Path:
        """What an attempt printed."""
        return self.trial(index) / f"attempt-{attempt}.out"

    def stderr(self, index: int, attempt: int) -> Path:
        """What an attempt complained about."""
        return self.trial(index) / f"attempt-{attempt}.err"

    def metrics(self, index: int) -> Path:
        """What a trial measured, as a JSON object."""
        return self.trial(index) / "metrics.json"

    @property
    def metrics_pack(self) -> Path:
        """Every trial's metrics.json, in a client's copy: packed as they came, by `tar`."""
        return self.path / "metrics.tar.gz"

    def metrics_log(self, index: int) -> Path:
        """What a trial measures while it runs, a JSON object a line."""
        return self.trial(index) / "metrics.jsonl"

    def tail(self, index: int, attempt: int) -> Path:
        """The last words of an attempt, in a client's copy of a run directory, which holds no whole logs."""
        return self.path / "tails" / f"{index}-{attempt}"

    def ranks(self, index: int, attempt: int) -> Path:
        """What the ranks of an attempt that torchrun started have left: rank-N.log, and node-N, what each node saw."""
        return self.trial(index) / f"attempt-{attempt}"

    def rank_tails(self, index: int, attempt: int) -> Path:
        """The same of a failed attempt, in a client's copy: the logs' ends."""
        return self.path / "tails" / f"{index}-{attempt}.ranks"

    @property
    def accounting(self) -> Path:
        """What sacct said of the run's arrays, every attempt, as it said it."""
        return self.path / "sacct.txt"

    @property
    def left(self) -> Path:
        """Array tasks that were seen to end by the scheduler's hand: a line each, for it forgets them."""
        return self.path / "left"

    @property
    def code(self) -> Path:
        """A link to the snapshot that the trials run."""
        return self.path / "code"

    @property
    def log(self) -> Path:
        """What the array script itself printed: set-up errors, and the scheduler's last words."""
        return self.path / "job.log"

    @property
    def cancelled(self) -> Path:
        """Present once the run was ended before its time; it says by whom, and why."""
        return self.path / "cancelled"

    @property
    def limits(self) -> Path:
        """What its cluster allows: how large an array may be, and a queue."""
        return self.path / "limits.json"

    @property
    def throttle(self) -> Path:
        """How many trials may run at once, by a person's last word: a number, or `off`."""
        return self.path / "throttle"

    @property
    def reopened(self) -> Path:
        """When a person last let the run go on after it had ended."""
        return self.path / "reopened"

    @property
    def polls(self) -> Path:
        """How often the scheduler was asked, a line of JSON for each client that has followed the run."""
        return self.path / "polls.jsonl"

    @property
    def refused(self) -> Path:
        """Present where the run was refused; it holds the reason."""
        return self.path / "refused"

    @property
    def stalls(self) -> Path:
        """When a training's metrics have stood still for too long: a line each, as it was said."""
        return self.path / "stalls"

    @property
    def plots(self) -> Path:
        """A training's metrics by step, an SVG file each."""
        return self.path / "plots"

    @property
    def results(self) -> Path:
        """The trials as a table."""
        return self.path / "results.csv"

    @property
    def report_json(self) -> Path:
        """The cost report, for programs."""
        return self.path / "cost_report.json"

    @property
    def manifest(self) -> Path:
        """What a training made: each file's SHA-256, bytes and path."""
        return self.path / "manifest.txt"

    @property
    def artifact(self) -> Path:
        """What a training made, as a whole: written last."""
        return self.path / "artifact.json"

    @property
    def report_markdown(self) -> Path:
        """The cost report, for people."""
        return self.path / "cost_report.md"


def mark_cancelled(directory: RunDirectory, reason: str, *, by: Literal["person", "policy"]) -> None:
    """Record who ended a run, and why; the first word stands."""
    if not directory.cancelled.exists():
        write_atomically(directory.cancelled, f"{by}: {reason}\n")


def read_cancelled(directory: RunDirectory) -> tuple[str, str] | None:
    """Return who ended a run (`person` or `policy`), and why; `None` where nobody did."""
    try:
        by, _, reason = directory.cancelled.read_text(encoding="utf-8").partition(": ")
    except FileNotFoundError:
        return None
    return by, reason.strip()


def write_atomically(path: Path, text: str | bytes, *, mode: int = 0o600) -> None:
    """Write a file so that its final name never holds half of it, not after a crash either."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staged = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        staged.chmod(mode)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def without_waiting(path: str, flags: int) -> int:
    """Open a trial's file, which may be anything: a pipe must not hold up whoever reads it."""
    return os.open(path, flags | os.O_NONBLOCK)

"""The line that each case of the chaos suite prints: counted from Slurm's words and from what the trials wrote."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.runs.record import Run
from tests.rig.slurm import SlurmRig

# Read before the tests take a person's NEXA_* variables away.
ROUNDS = int(os.environ.get("NEXA_CHAOS_ROUNDS", "20"))
SEED = int(os.environ.get("NEXA_CHAOS_SEED", "20261124"))
OUT = os.environ.get("NEXA_CHAOS_OUT", "")
# As `make chaos` runs it; otherwise it is a part of `make test`.
FULL = ROUNDS >= 100

# What a trial is to do, by its scheduler's last word, where it has not come to its own end.
_TRUE = {
    "FAILED": "failed", "NODE_FAIL": "node_fail", "PREEMPTED": "preempted", "TIMEOUT": "timeout",
    "OUT_OF_MEMORY": "out_of_memory", "DEADLINE": "deadline", "BOOT_FAIL": "boot_fail",
}  # fmt: skip
_WHO = "$NEXA_TRIAL $NEXA_ATTEMPT $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID ${SLURM_RESTART_COUNT:-0}"


def only_in_full(test: Any) -> Any:
    """Leave a test to `make chaos`: pytest sees none where this is a part of `make test`."""
    return test if FULL else None


def sweep(words: Path, trials: int, work: str = "true") -> list[str]:
    """Overrides for a sweep whose trials say when they begin, and, after their work, that they have ended well.

    They say it outside of the run directory, which may be full.
    """
    words.mkdir(exist_ok=True)
    script = f'W={words}/$NEXA_RUN_ID; echo "{_WHO}" >>$W.began; {work} || exit; echo "{_WHO}" >>$W.ended'
    return [
        f"launcher.command={json.dumps(['sh', '-c', script])}",
        f"sweep.parameters={json.dumps({'n': list(map(str, range(trials)))})}",
    ]


@dataclass(frozen=True)
class Start:
    """A trial that began, by its own words."""

    trial: int
    attempt: int
    task: str  # array_index
    restart: int


@dataclass(frozen=True)
class Row:
    """A line of sacct's: one execution of an array task."""

    state: str
    began: datetime | None
    ended: datetime | None


def starts(words: Path, run: Run, what: str = "began") -> list[Start]:
    """What the trials of a run have said, in the order in which they said it."""
    path = words / f"{run.id}.{what}"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = (line.split() for line in lines)
    return [
        Start(int(trial), int(attempt), f"{array}_{task}", int(again)) for trial, attempt, array, task, again in found
    ]


def rows(slurm: SlurmRig, run: Run) -> dict[str, list[Row]]:
    """What sacct says of a run's array tasks, each execution."""
    since = run.created_at.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    told = slurm.run(["sacct", "-XnPD", "-S", since, "--format=JobID,JobName,State,Start,End"]).stdout
    found: dict[str, list[Row]] = defaultdict(list)
    for line in told.splitlines():
        job, name, state, *moments = line.split("|")
        if name.startswith(f"nexa-{run.id}-"):
            began, ended = (datetime.fromisoformat(each) if each[:1] == "2" else None for each in moments)
            found[job].append(Row(state.split()[0], began, ended))
    return found


def in_queue(slurm: SlurmRig, run: Run) -> set[str]:
    """The jobs of a run, and of its steward, that wait or run."""
    told = slurm.run(["squeue", "-h", "-r", "-o", "%i|%j"]).stdout
    names = (f"nexa-{run.id}-", f"steward-{run.id}-")
    return {line.partition("|")[0] for line in told.splitlines() if line.partition("|")[2].startswith(names)}


@dataclass
class Tally:
    """What a case has shown, over all of its runs."""

    case: str
    words: Path
    expected: int = 0
    ran: int = 0
    twice: int = 0
    lost: int = 0
    orphans: int = 0
    wrong: int = 0
    killed: Counter[str] = field(default_factory=Counter)  # by phase: before, between, after
    notes: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what is not as it should be
    begun: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        seen = "".join(f" | {each}" for each in self.notes)
        return (
            f"{self.case}: trials expected {self.expected}, run {self.ran}, run twice {self.twice}, lost {self.lost}, "
            f"orphan jobs {self.orphans}, wrong states {self.wrong} | kills before the intent {self.killed['before']}, "
            f"between intent and id {self.killed['between']}, after {self.killed['after']} | seed {SEED}, "
            f"{time.monotonic() - self.begun:.0f} s{seen}"
        )

    def add(self, slurm: SlurmRig, run: Run, *, results: Path | None = None, accounted: bool = True) -> None:
        """Count a run that is over, whose table of results is `results`."""
        deadline = time.monotonic() + 15.0
        while (left := in_queue(slurm, run)) and time.monotonic() < deadline:
            time.sleep(0.2)  # what has ended is on its way out
        self.orphans += len(left)
        if left:
            self.told.append(f"{run.id}: {sorted(left)} are in the queue, and the run is over")
        said = _settled(slurm, run) if accounted else {}
        began, done = starts(self.words, run), set(starts(self.words, run, "ended"))
        by_trial: dict[int, list[Start]] = defaultdict(list)
        for each in began:
            by_trial[each.trial].append(each)
        path = results or run.files.results
        ours = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        self.expected += run.trials
        for trial in range(run.trials):
            tried = by_trial[trial]
            ended = [each for each in tried if each in done]
            self.ran += bool(ended)
            self.lost += not ended
            if why := _twice(tried, ended, said):
                self.twice += 1
                self.told.append(f"{run.id}: trial {trial} ran twice, {why}: {tried}, {_of(tried, said)}")
            true = "completed" if ended else _true(tried, said)
            state, attempt = (ours[trial]["state"], int(ours[trial]["attempt"])) if trial < len(ours) else ("none", 0)
            newest = max((each.attempt for each in tried), default=0)
            if (state, attempt) != (true, newest):
                self.wrong += 1
                self.told.append(
                    f"{run.id}: trial {trial} is {true} in attempt {newest}, and is told as {state} in {attempt}: "
                    f"{_of(tried, said)}"
                )
            if not ended:
                self.told.append(f"{run.id}: trial {trial} did not run to its end: {tried}, {_of(tried, said)}")

    def close(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Print the line, and see that nothing is lost, twice, left behind or wrong."""
        show(capfd, str(self))
        assert not self.told, "\n".join([str(self), *self.told])
        assert (self.twice, self.lost, self.orphans, self.wrong) == (0, 0, 0, 0)


def show(capfd: pytest.CaptureFixture[str], text: str) -> None:
    """Print something that is to be seen whether a test passes or not, and keep it where NEXA_CHAOS_OUT says."""
    with capfd.disabled():
        sys.stdout.write(f"\n{text}\n")
        sys.stdout.flush()
    if OUT:
        with Path(OUT).open("a") as stream:
            stream.write(f"{text}\n")


def _settled(slurm: SlurmRig, run: Run) -> dict[str, list[Row]]:
    """What sacct says once it has caught up with the queue, or 20 seconds later."""
    deadline = time.monotonic() + 20.0
    while True:
        said = rows(slurm, run)
        states = {row.state for each in said.values() for row in each}
        if (states and not states & {"PENDING", "RUNNING", "COMPLETING"}) or time.monotonic() > deadline:
            return said
        time.sleep(0.3)


def _of(tried: Iterable[Start], said: dict[str, list[Row]]) -> list[str]:
    return [f"{each.task} {row.state if (row := _row(each, said)) else '?'}" for each in tried]


def _row(start: Start, said: dict[str, list[Row]]) -> Row | None:
    told = said.get(start.task, [])
    return told[start.restart] if start.restart < len(told) else None


def _twice(tried: Sequence[Start], ended: Sequence[Start], said: dict[str, list[Row]]) -> str:
    """Say in what way a trial ran twice; starts that were broken off are no crime."""
    if len(ended) > 1:
        return "to its end"
    if len({each.attempt for each in tried}) < len(tried):
        return "as the same attempt"
    if ended and tried[-1] != ended[0]:
        return "after it had ended"
    for each in tried:
        row = _row(each, said)
        if row is not None and row.state == "COMPLETED" and each not in ended:
            return "though Slurm calls the first one completed"
    spans = sorted((row.began, row.ended) for each in tried if (row := _row(each, said)) and row.began and row.ended)
    if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
        return "at the same time"
    return ""


def _true(tried: Sequence[Start], said: dict[str, list[Row]]) -> str:
    """What became of a trial that did not come to its end."""
    if not tried:
        return "pending"
    row = _row(tried[-1], said)
    return _TRUE.get(row.state, "cancelled" if row.state == "CANCELLED" else "interrupted") if row else "interrupted"

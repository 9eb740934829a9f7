"""How often a scheduler was asked about a run: a line of JSON for each client that has followed it."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.scheduling.base import Scheduler


@dataclass(frozen=True)
class Polls:
    """What following a run has asked of its scheduler, by all its clients together."""

    period: float  # the shortest time between two polls, seconds
    calls: dict[str, int]  # polls, and how often squeue, sacct, … were called; `shared` are other runs' answers


class Counting:
    """Counts one client's questions from when it began to follow a run."""

    def __init__(self, run: Run, scheduler: Scheduler, period: float, path: Path | None = None) -> None:
        self._run, self._scheduler, self._period = run, scheduler, period
        self._path = path or run.files.polls
        self._since, self._before = datetime.now(timezone.utc), Counter(scheduler.counts(run))

    def close(self) -> None:
        """Add the client's line; where the disk is full, its questions are not counted."""
        calls = Counter(self._scheduler.counts(self._run))
        calls.subtract(self._before)
        if not any(calls.values()):
            return
        line = {"since": self._since.isoformat(timespec="seconds"), "period": self._period, "calls": dict(calls)}
        with suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def polls_of(run: Run) -> Polls | None:
    """Return how often the run's scheduler was asked about it; None where nobody has followed it to an end."""
    lines: list[dict[str, Any]] = []
    for path in (run.files.polls, run.files.path / "steward" / "polls.jsonl"):
        with suppress(OSError, ValueError):
            lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    total: Counter[str] = Counter()
    for line in lines:
        total.update(line["calls"])
    return Polls(min(line["period"] for line in lines), dict(total)) if lines else None

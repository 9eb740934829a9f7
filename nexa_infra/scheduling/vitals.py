"""A training's metrics, as they come: how far it is, and whether they are what they should be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from nexa_infra.runs.attempts import Attempt, TaskState
from nexa_infra.runs.record import Run
from nexa_infra.runs.series import LogReader, Progress
from nexa_infra.scheduling.decide import Policy, Vitals, stalled
from nexa_infra.spec.policy import Health
from nexa_infra.spec.run import TrainingConfig


class MetricsWatch:
    """Follows the metrics of a run that is a training; of a sweep there is nothing to follow."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.health = health_of(run)
        self.reader = LogReader(run.files.metrics_log(0))
        self.progress: Progress | None = None
        self._attempt = 0
        self._over: int | None = None  # the last attempt that had ended, not well, before this follower came
        self._moved: float | None = None  # when a new line, or the attempt, was first seen here; of a clock of its own
        self._said: set[tuple[object, ...]] = set()

    def read(self) -> bool:
        """Read what is new in the log; say whether there was anything."""
        if self.health is None or not self.reader.read():
            return False
        self._moved = time.monotonic()
        self.progress = self.reader.progress()
        return True

    def vitals(
        self, states: Sequence[str], attempts: Mapping[int, Sequence[Attempt]], tasks: Mapping[int, TaskState]
    ) -> Vitals:
        """Say how the newest attempt is, by what was read before the states were."""
        if self.health is None or not attempts.get(0):
            return Vitals()
        newest = attempts[0][-1]
        if 0 in tasks and tasks[0].attempt > newest.number:
            return Vitals()  # the next one has not started
        now = time.monotonic()
        if self._over is None:
            self._over = 0 if states[0] in {"running", "completed"} else newest.number
        if newest.number != self._attempt or self._moved is None:
            self._attempt, self._moved = newest.number, now
        unsound = {
            one.metric: str(one)
            for one in self.reader.recorder.unsound(newest.logged)
            if newest.number > self._over and self.health.nan != "ignore" and self.health.watches(one.metric)
        }
        # Of a log that is read no further, nobody knows whether it stands still.
        running = states[0] == "running" and not self.reader.full
        if not running:
            self._moved = now
        place = self.progress.place if self.progress is not None else ""
        return Vitals(unsound, now - self._moved if running else None, place)

    def warnings(self, vitals: Vitals, policy: Policy) -> tuple[str, ...]:
        """Return what a person should know and was not told yet; stalls are kept, for the log does not show them."""
        found: dict[tuple[object, ...], str] = {(self._attempt, one): told for one, told in vitals.unsound.items()}
        if (stall := stalled(vitals, policy)) is not None:
            found[self._attempt, self._moved] = stall
        new = {key: told for key, told in found.items() if key not in self._said}
        self._said.update(new)
        if stall in new.values():
            with self.run.files.stalls.open("a", encoding="utf-8") as stream:
                stream.write(f"{stall}\n")
        return tuple(new.values())


def health_of(run: Run) -> Health | None:
    """Return what a training's config says of its health; None is a sweep."""
    return run.config.health if isinstance(run.config, TrainingConfig) else None

"""A run's steward: short lives of a small job that follow the run in place of a client. The standard library alone.

Each life looks at the run, does what `decide` says, as a client does, under the same intents and claims, and lets the
rest of its own array wait for what comes next. There is no process between two lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from nexa_infra.errors import HostError, NexaError, QueueFullError, RunCancelledError, UnknownStateError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.shell import join
from nexa_infra.runs.plain import PlainRun, read_plain
from nexa_infra.scheduling.act import carry_out, stop
from nexa_infra.scheduling.counts import Counting
from nexa_infra.scheduling.decide import Policy, State, decide
from nexa_infra.scheduling.recorded import read_state, throttled
from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler
from nexa_infra.scheduling.slurm.steward_array import submit_steward

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

# How long one life goes on while there is something to do, seconds.
LIFE_SECONDS = 120.0
# The next array of lives is asked for this many lives before the last.
SPARE_LIVES = 3
# A run's age over the longest sensible time between two looks at it.
GROWTH = 30


def main(directory: str, finish: Callable[[PlainRun, dict[str, Any], SlurmScheduler], None]) -> int:
    """Live one life; `finish` writes the report of a run that is over."""
    place = Path(directory) / "steward"
    brief = json.loads((place / "brief.json").read_bytes())
    array, life = os.environ["NEXA_STEWARD_ARRAY"], int(os.environ["NEXA_STEWARD_LIFE"])
    with (place / ".lock").open("a") as lock:
        if not _alone(lock):
            # Slurm may start a life while one that it has preempted still ends.
            time.sleep(30)
            return 0
        run = read_plain(Path(directory), brief)
        steward = Steward(run, brief, array, life)
        steward.note("begin")
        counting = Counting(cast("Run", run), steward.scheduler, brief["period"], place / "polls.jsonl")
        over = False
        # Whatever a life meets, the next one comes later: one that begins at once would meet it again.
        try:
            over = steward.live()
        except Exception as error:  # noqa: BLE001
            steward.trouble(error)
        # Before the report, which tells of it.
        counting.close()
        steward.note("end")
        try:
            if over:
                finish(run, brief, steward.scheduler)
                steward.end()
        except Exception as error:  # noqa: BLE001
            steward.trouble(error)
    return 0


def _alone(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Steward:
    """One life: `array` and `life` are its job's id and its place in it."""

    def __init__(self, run: PlainRun, brief: dict[str, Any], array: str, life: int) -> None:
        """Take a run, and what its client has left for whoever follows it."""
        self._run = cast("Run", run)
        self._brief = brief
        self._array, self._life = array, life
        self._place = run.files.path / "steward"
        self.scheduler = SlurmScheduler(LocalHost(), min(brief["patience"], LIFE_SECONDS), brief["grace"])

    def live(self) -> bool:
        """Follow the run for a while; say whether it is over."""
        run, deadline = self._run, time.monotonic() + LIFE_SECONDS
        if (self._place / "over").exists():
            return True
        while True:
            try:
                queue = self.scheduler.poll(run, fresh=True)
                state = read_state(run, self._policy(), self.scheduler, queue)
                actions = decide(state, time.time())
                if carry_out(run, self.scheduler, actions):
                    return True
            except (HostError, UnknownStateError, RunCancelledError, QueueFullError) as error:
                self.log(f"{error}")
                actions = ()
                state = None
                time.sleep(min(5.0, self._brief["period"]))
            if state is not None and not actions:
                self._rest(state)
                return False
            if time.monotonic() > deadline:
                self._rest(state)
                return False
            # What was done shows at the next look.
            time.sleep(min(1.0, self._brief["period"]))

    def end(self) -> None:
        """Let no more lives of this run begin."""
        (self._place / "over").touch()
        self._client(["scancel", "--state=PENDING", self._array])

    def trouble(self, error: Exception) -> None:
        """Tell of what a life met, and let the next one come later; a run that is refused for hours is given up."""
        self.log("".join(traceback.format_exception_only(type(error), error)).strip())
        since = self._place / "trouble"
        if not since.exists():
            since.write_text(f"{time.time():.0f} {error}\n")
        elif time.time() - float(since.read_text().split(" ")[0]) > self._brief["patience"]:
            with suppress(NexaError):
                stop(self._run, self.scheduler, f"its steward could not go on: {error}", by="policy")
        self._later(max(60.0, self._brief["period"]))

    def note(self, word: str) -> None:
        """Note when a life begins or ends: it is paid for."""
        with suppress(OSError), (self._place / "lives").open("a") as stream:
            stream.write(f"{word}\t{self._array}\t{self._life}\t{time.time():.3f}\n")

    def log(self, line: str) -> None:
        """Leave a line in the steward's log."""
        print(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {self._array}_{self._life}: {line}", flush=True)

    def _policy(self) -> Policy:
        told = self._brief["policy"]
        policy = Policy(**{**told, "retry_on": frozenset(told["retry_on"])})
        return replace(policy, parallelism=throttled(self._run, policy.parallelism))

    def _rest(self, state: State | None) -> None:
        """Let the next life wait for what happens next, or for a while where that can be anything."""
        since = datetime.now(timezone.utc) - self._run.created_at
        period = min(max(self._brief["period"], since.total_seconds() / GROWTH), self._brief["ceiling"])
        self._trouble_is_over()
        arrays = [array.id for array in state.arrays] if state is not None else []
        if state is None or not arrays or _needs_looks(state):
            self._later(period)
        else:
            self._move(f"Dependency=afterany:{':'.join(arrays)}")

    def _trouble_is_over(self) -> None:
        with suppress(FileNotFoundError):
            (self._place / "trouble").unlink()

    def _later(self, seconds: float) -> None:
        self._move(f"StartTime=now+{max(1, round(seconds))}")

    def _move(self, what: str) -> None:
        """Move the lives that are left; where few are, those of a new array."""
        array = self._array
        lives = int(os.environ.get("NEXA_STEWARD_LIVES", "1"))
        if self._life >= lives - min(SPARE_LIVES, lives - 1):
            array = self._renewed(last=self._life == lives - 1) or array
        said = self._client(["scontrol", "update", f"JobId={array}", what])
        # It ends with 1 where a task is no longer pending, as this one is; of the others it says `No error`.
        if said.strip() and "No error" not in said:
            self.log(f"{what}: {said.strip()}")
            # Whatever it is, the next life begins at once: not at once again.
            time.sleep(min(30.0, 10 * self._brief["period"]))
        if array != self._array:
            self._client(["scancel", "--state=PENDING", self._array])

    def _renewed(self, *, last: bool) -> str | None:
        """Ask for the next array of lives; the last life, with nobody behind it, goes on asking while it may."""
        limit = time.monotonic() + (LIFE_SECONDS if last else 0.0)
        while True:
            try:
                return submit_steward(self.scheduler, self._run, self._brief, after=self._array)
            except NexaError as error:
                self.log(f"the next lives could not be asked for: {error}")
            if time.monotonic() >= limit:
                return None
            time.sleep(min(10.0, self._brief["period"]))

    def _client(self, argv: list[str]) -> str:
        done = self.scheduler.client.script(join(argv))
        return done.stdout + done.stderr


def _needs_looks(state: State) -> bool:
    """Say whether something may have to be done before the arrays have ended."""
    policy = state.policy
    waits = state.asked is not None and len(state.asked) < len(state.states)
    first = policy.breaker is not None and len(state.early) < policy.breaker and "pending" in state.states
    shares = policy.parallelism is not None and len(state.arrays) > 1
    return waits or first or shares or policy.max_failures is not None

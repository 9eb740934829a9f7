"""Stewards that are killed as they submit: each attempt runs once, and the run comes to its end.

Their trials fail until the last retry, so that every run is submitted again and again by lives of its steward alone.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from deployments.processes import Process
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.budget import LIVES_AHEAD
from tests.chaos.tally import FULL, SEED, Tally, in_queue, only_in_full, starts, sweep
from tests.chaos.test_submission import PHASES, Site, at_work, site, submit, there, wait
from tests.rig.daemons import end

__all__ = ["site"]

RUNS, RETRIES, FEW = (14, 6, 3) if FULL else (2, 2, 2)
# Lives of one array, so few that another array of them is asked for, too.
LIVES = 12
PATIENCE = 180.0
# What a life is killed at: the phase, and whose submission it is.
AIMS = ("between", "between", "before", "between", "between", "after")


@dataclass
class Followed:
    """A run that its steward alone follows."""

    run: Run
    chance: random.Random
    tally: Tally
    site: Site

    def over(self) -> bool:
        return there(self.run, "steward/over").exists()

    def newest(self) -> int:
        """The number of the last submission that was meant."""
        return max((int(path.stem) for path in there(self.run, "submissions").glob("*.json")), default=0)

    def has_intent(self, number: int, folder: str = "submissions") -> bool:
        return there(self.run, f"{folder}/{number}.json").exists()

    def has_id(self, number: int, folder: str = "submissions") -> bool:
        return there(self.run, f"{folder}/{number}.answer").exists()

    def phase(self, number: int, folder: str = "submissions") -> str:
        if self.has_id(number, folder):
            return "after"
        return "between" if self.has_intent(number, folder) else "before"

    def life(self) -> Process | None:
        """The process of the life that there is."""
        return next((each for each in at_work(self.run) if b"steward/steward.pyz" in command_line(each)), None)

    def kill(self) -> str:
        """Kill the life that there is: its program, all that it has set going, or its job; say which."""
        way = self.chance.choice(("alone", "all", "scancel"))
        if way == "all":
            end(at_work(self.run))
        elif way == "alone":
            if life := self.life():
                end([life])
        else:
            told = self.site.slurm.run(["squeue", "-h", "-r", "-t", "running", "-o", "%i|%j"]).stdout
            lives = [job for job, _, name in (line.partition("|") for line in told.splitlines())
                     if name.startswith(f"steward-{self.run.id}-")]  # fmt: skip
            if lives:
                self.site.slurm.run(["scancel", "--full", "--signal=KILL", *lives])
        return way

    def strike(self, aim: str) -> bool:
        """Kill a life as it submits what comes next; say whether there was one."""
        number = self.newest() + 1
        hold = there(self.run, self.chance.choice((f"held-nexa-{self.run.id}-{number}", "mute")))
        if aim == "between":
            hold.touch()
        try:
            if aim == "before":
                # The trials of the last array have ended, so the next life has something to do.
                wait(lambda: self.over() or (self.life() and self.idle()), PATIENCE)
                time.sleep(self.chance.uniform(0, 0.3))
            else:
                if hold.name == "mute":
                    # One that was on its way before would be muted as well, and keep the lock until this has an end.
                    wait(lambda: self.over() or self.has_intent(number) or self.asking(), PATIENCE)
                    if not self.has_intent(number):
                        hold.unlink(missing_ok=True)
                        hold = there(self.run, f"held-nexa-{self.run.id}-{number}")
                        if aim == "between":
                            hold.touch()
                reached = self.has_id if aim == "after" else self.has_intent
                wait(lambda: self.over() or reached(number), PATIENCE)
                time.sleep(self.chance.uniform(0, 0.25 if aim == "between" else 0.1))
            if self.over():
                return False
            phase = self.phase(number)
            self.kill()
            if phase == self.phase(number):
                self.tally.killed[phase] += 1
            time.sleep(self.chance.uniform(0, 0.3))
        finally:
            hold.unlink(missing_ok=True)
        # The next strike is to hold its own sbatch, and not this one again.
        wait(lambda: not self.asking(), PATIENCE)
        return True

    def asking(self) -> bool:
        """Whether an sbatch is on its way."""
        return any(b"sbatch\0--parsable" in command_line(each) for each in at_work(self.run))

    def idle(self) -> bool:
        """Whether no trial of the run waits or runs."""
        return not any("steward" not in each for each in queued_names(self.site, self.run))

    def strike_successor(self) -> bool:
        """Kill a life as it asks for the next array of lives."""
        hold = there(self.run, f"held-steward-{self.run.id}-2")
        hold.touch()
        try:
            wait(lambda: self.over() or self.has_intent(2, "steward"), PATIENCE)
            if self.over():
                return False
            time.sleep(self.chance.uniform(0, 0.25))
            self.kill()
            self.tally.killed[self.phase(2, "steward")] += 1
            time.sleep(self.chance.uniform(0, 0.3))
        finally:
            hold.unlink(missing_ok=True)
        return True


def command_line(process: Process) -> bytes:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return b""


def queued_names(site: Site, run: Run) -> list[str]:
    told = site.slurm.run(["squeue", "-h", "-o", "%j"]).stdout
    return [name for name in told.split() if run.id in name]


def play(each: Followed, aims: tuple[str, ...]) -> None:
    """Submit a run, leave it for good, and kill its steward's lives."""
    run = each.run
    client = each.site.client(submit, run)
    wait(there(run, "steward/1.answer").exists, 90.0)
    client.kill_all(run)
    try:
        for aim in aims:
            if not (each.strike_successor() if aim == "successor" else each.strike(aim)):
                break
        wait(lambda: each.over() and not in_queue(each.site.slurm, run), PATIENCE)
    except AssertionError:
        said = [there(run, f"steward/{name}") for name in ("lives", "log")]
        told = "\n".join(path.read_text() for path in said if path.exists())
        each.tally.told.append(f"{run.id}: its steward has not ended it: {in_queue(each.site.slurm, run)}\n{told}")


def few_lives(run: Run) -> None:
    brief = there(run, "steward/brief.json")
    told = json.loads(brief.read_bytes())
    brief.write_text(json.dumps({**told, "lives": LIVES}))


def report(site: Site, tally: Tally, runs: list[Run], capfd: pytest.CaptureFixture[str]) -> None:
    meant = sum(len(list(there(run, "submissions").glob("*.json"))) for run in runs)
    lives = [line for run in runs for line in there(run, "steward/lives").read_text().splitlines()]
    begun = sum(line.startswith("begin") for line in lives)
    stewards = sum(len(list(there(run, "steward").glob("[0-9]*.json"))) for run in runs)
    for run in runs:
        tally.add(site.slurm, run, results=there(run, "results.csv"))
    began = sum(len(starts(tally.words, run)) for run in runs)
    tally.notes.append(
        f"runs {len(runs)}, starts {began}, intents {meant}, arrays {sum(len(site.arrays(run)) for run in runs)}, "
        f"arrays of lives {stewards}, "
        f"lives {begun}, of them with an end of their own {len(lives) - begun}"
    )
    tally.close(capfd)


def test_a_steward_killed_as_it_submits_retries(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    tally = Tally("a steward killed as it submits retries", site.folder / "words")
    overrides = [*sweep(tally.words, FEW, f"[ $NEXA_ATTEMPT = {RETRIES + 1} ]"), "unattended=true"]
    overrides += [f"retry.times={RETRIES}", "retry.breaker=null"]
    runs: list[Run] = []
    for number in range(RUNS):
        runs.append(site.run(*overrides, over_ssh=number % 2 == 1, snapshot=runs[0] if runs else None))
        if FULL:
            few_lives(runs[-1])
    rounds = [Followed(run, random.Random(f"{SEED} steward {n}"), tally, site) for n, run in enumerate(runs)]

    def aims(number: int) -> tuple[str, ...]:
        if not FULL:
            return (AIMS[number % 3 + 1], "between")
        turned = AIMS[number % 6 :] + AIMS[: number % 6]
        return (*turned[:3], "successor", *turned[3:]) if number % 2 else turned

    with ThreadPoolExecutor(5) as pool:
        for _ in pool.map(lambda pair: play(pair[1], aims(pair[0])), enumerate(rounds)):
            pass
    report(site, tally, runs, capfd)
    assert all(tally.killed[phase] for phase in PHASES if FULL)
    assert tally.killed["between"] >= (30 if FULL else 2)


@only_in_full
def test_a_steward_killed_as_it_submits_waves(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    tally = Tally("a steward killed as it submits waves of a budget", site.folder / "words")
    # Four attempts fit, of half an hour on two cores, and lives of ten minutes, of which a killed one may have had all.
    limit = (LIVES_AHEAD + 3) / Decimal(6) + Decimal("4.3")
    overrides = [*sweep(tally.words, 12, "sleep 1"), "unattended=true", "job.cost_per_core_hour=1", "job.time=30"]
    overrides += ["job.cpus_per_task=2", f"budget.limit_usd={limit:.4f}"]
    runs: list[Run] = []
    for number in range(3):
        runs.append(site.run(*overrides, over_ssh=number % 2 == 1, snapshot=runs[0] if runs else None))
    rounds = [Followed(run, random.Random(f"{SEED} wave {n}"), tally, site) for n, run in enumerate(runs)]
    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda each: play(each, ("between", "between")), rounds):
            pass
    report(site, tally, runs, capfd)
    assert tally.killed["between"] >= 3

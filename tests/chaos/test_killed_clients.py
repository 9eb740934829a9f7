"""Clients killed at random instants, then resumed: every trial completes, and none runs again once it has."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexa_infra.operations import manage, steps
from nexa_infra.runs.attempts import Attempt, read_attempts
from nexa_infra.runs.index import known_runs
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.local import is_supervised
from nexa_infra.settings import settings
from tests.conftest import processes_of

# More by `make chaos`. Read here: a test's own environment has no NEXA_* variables.
ROUNDS = int(os.environ.get("NEXA_CHAOS_ROUNDS", "6"))
SEED = int(os.environ.get("NEXA_CHAOS_SEED", "20261124"))
TRIALS = 16
PAUSES = [f"{50 + 100 * n // (TRIALS - 1):03}" for n in range(TRIALS)]  # 50 to 150 ms
PATIENCE = 60.0  # seconds

# Each trial leaves a process of another session behind, which has no parent and does not hear TERM: it must end with
# the trial, or with the client.
TRIAL = """
echo "start $NEXA_ATTEMPT" >> "$NEXA_RUN_DIR/own-$1"
(trap "" TERM; setsid sleep 97 &)
sleep "0.$2"
echo "done $NEXA_ATTEMPT" >> "$NEXA_RUN_DIR/own-$1"
"""


@dataclass
class Tally:
    """What was seen over all rounds."""

    rounds: int = 0
    without_run: int = 0  # the client ended before its run was recorded
    in_mid_run: int = 0  # it ended when some trials had succeeded and some had not
    expected: int = 0
    completed: int = 0
    run_twice: int = 0
    lost: int = 0
    orphans: int = 0
    wrong: int = 0
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds ({self.without_run} before the run's record, {self.in_mid_run} in mid-run): "
            f"trials expected {self.expected}, completed {self.completed}, run twice after success {self.run_twice}, "
            f"lost {self.lost}, orphan processes {self.orphans}, wrong states {self.wrong}"
        )


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in: a little code, and the sweep."""
    folder = tmp_path / "project"
    folder.mkdir()
    config = {
        "job": {"name": "chaos", "array_parallelism": 4},
        "launcher": {"type": "command", "command": ["bash", "-c", TRIAL, "trial", "{n}", "{pause}"]},
        "sweep": {"zip": {"n": list(map(str, range(TRIALS))), "pause": PAUSES}},
    }
    (folder / "chaos.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(folder)
    return folder


def verb(*words: str) -> subprocess.Popen[str]:
    """Start a verb, so that it hears SIGINT as it does in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "nexa_infra", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def end_at_random(client: subprocess.Popen[str], number: signal.Signals, chance: random.Random) -> None:
    """End a client: at any instant of its life, or of its run."""
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0.0, 1.5))
    else:
        deadline = time.monotonic() + PATIENCE
        while not known_runs(manage.home()) and client.poll() is None:
            assert time.monotonic() < deadline, "the run never came"
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.9))
    client.send_signal(number)
    client.communicate(timeout=PATIENCE)


def succeeded(attempt: Attempt) -> bool:
    return attempt.ended is not None and attempt.exit_code == 0 and attempt.signal is None


def own_lines(run: Run, trial: int) -> list[str]:
    path = run.files.path / f"own-{trial}"
    return path.read_text().splitlines() if path.exists() else []


def look(run: Run, tally: Tally) -> None:
    """Look at a run whose client has ended: nothing of it lives, and no trial counts as completed that is not."""
    deadline = time.monotonic() + 15
    while (left := processes_of(run)) or is_supervised(run.files):
        if time.monotonic() > deadline:
            tally.orphans += len(left)
            tally.told.append(f"{run.id}: processes {left} are left")
            break
        time.sleep(0.02)
    attempts = read_attempts(run.files)
    for trial in steps.look(run):
        good = any(succeeded(each) for each in attempts.get(trial.index, []))
        own = any(line.startswith("done") for line in own_lines(run, trial.index))
        if (trial.state == "completed") != good or (good and not own):
            tally.wrong += 1
            tally.told.append(f"{run.id}: trial {trial.index} is {trial.state}, its attempts are {trial.attempts}")


def judge(run: Run, tally: Tally) -> None:
    """Judge a run that was resumed to its end."""
    attempts = read_attempts(run.files)
    states = Counter(trial.state for trial in steps.look(run))
    tally.expected += TRIALS
    tally.completed += states["completed"]
    tally.wrong += TRIALS - states["completed"]
    for trial in range(TRIALS):
        tried, lines = attempts.get(trial, []), own_lines(run, trial)
        good = [each.number for each in tried if succeeded(each)]
        started = [int(line.split()[1]) for line in lines if line.startswith("start")]
        # The trial's own file and the status lines must tell the same: no attempt unrecorded, none twice.
        again = bool(good) and (max(started, default=0) > good[0] or started.count(good[0]) > 1)
        if again or len(good) > 1 or len(started) != len(set(started)):
            tally.run_twice += 1
            tally.told.append(f"{run.id}: trial {trial} succeeded in {good}, and started {started}")
        if not good or f"done {good[0]}" not in lines:
            tally.lost += 1
            tally.told.append(f"{run.id}: trial {trial} has {lines}, its attempts are {tried}")


@pytest.mark.parametrize(
    ("number", "rounds"),
    [(signal.SIGKILL, ROUNDS), (signal.SIGTERM, -(-ROUNDS // 3)), (signal.SIGINT, -(-ROUNDS // 3))],
    ids=["kill", "term", "int"],
)
def test_clients_that_are_ended_at_random_lose_no_trial_and_run_none_twice(
    number: signal.Signals,
    rounds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tally = Tally()
    # Long enough for another client to come while the last one's trials are being ended.
    monkeypatch.setenv("NEXA_KILL_WAIT", "0.7")
    for turn in range(rounds):
        chance = random.Random(f"{SEED} {number.name} {turn}")
        monkeypatch.setenv("NEXA_HOME", str(tmp_path / f"home-{turn}"))
        settings.cache_clear()
        tally.rounds += 1
        end_at_random(verb("sweep", "chaos.yaml"), number, chance)
        if not known_runs(manage.home()):
            tally.without_run += 1
            continue
        run = manage.find("latest")
        # Now and then the next client comes at once, while the last one's trials are still being ended.
        if not (at_once := chance.random() < 0.5):
            look(run, tally)
        tried = read_attempts(run.files)
        tally.in_mid_run += 0 < sum(any(map(succeeded, each)) for each in tried.values()) < TRIALS
        if chance.random() < 0.4:
            end_at_random(verb("resume", run.id), number, chance)
            if not at_once:
                look(run, tally)
        last = verb("resume", run.id)
        _, said = last.communicate(timeout=PATIENCE)
        if last.returncode != 0:
            tally.told.append(f"{run.id}: resume ended with {last.returncode}: {said}")
        look(run, tally)
        judge(run, tally)
    with capfd.disabled():
        sys.stderr.write(f"\n{number.name}, seed {SEED}: {tally}\n")
    assert not tally.told, "\n".join(tally.told)
    assert tally.completed == tally.expected
    assert (tally.run_twice, tally.lost, tally.orphans, tally.wrong) == (0, 0, 0, 0)
    assert tally.expected, "no run was recorded in any round, so nothing is tested"

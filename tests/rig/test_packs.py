"""Several trials in one array task, as real job steps; and logs that have a limit."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.runs.attempts import Attempt, read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.scheduling.script import render_script
from nexa_infra.spec.run import SweepConfig
from tests.rig.slurm import SlurmRig


class Pack:
    """A run directory whose script is submitted by hand: a task of all its trials."""

    def __init__(self, slurm: SlurmRig, folder: Path, program: str, trials: int, **job: Any) -> None:
        self.slurm = slurm
        self.files = RunDirectory(folder)
        for place in ("status", "trials", "claims", "code"):
            (folder / place).mkdir()
        given = {
            "job": {"time": "5", "trials_per_task": trials, **job},
            "launcher": {"type": "command", "command": ["bash", "-c", program, "trial", "{n}"]},
            "sweep": {"parameters": {"n": [str(number) for number in range(trials)]}},
        }
        script = render_script(SweepConfig.model_validate(given), run_id="r", run_dir=str(folder))
        self.files.script.write_text(script.text)
        options = ["--parsable", "--array=0-0", f"--output={self.files.log}"]
        done = slurm.run(["sbatch", *options, str(self.files.script), "0", "1", "", str(trials)])
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.strip()

    @property
    def attempts(self) -> dict[int, list[Attempt]]:
        return read_attempts(self.files)

    def out(self, trial: int) -> str:
        path = self.files.stdout(trial, 1)
        return path.read_text() if path.exists() else ""

    def until(self, true: Any) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, (self.files.log.read_text(), self.slurm.states(self.job), self.attempts)
            time.sleep(0.1)

    def over(self) -> None:
        self.until(lambda: not set(self.slurm.states(self.job)) & {"PENDING", "RUNNING", "COMPLETING"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "it's a run"
    place.mkdir()
    return place


@pytest.mark.parametrize("memory", [{"memory": "200M"}, {}])
def test_trials_of_a_task_run_side_by_side_each_on_its_share(
    slurm: SlurmRig, folder: Path, memory: dict[str, Any]
) -> None:
    program = 'echo "$SLURM_STEP_ID $SLURM_CPUS_PER_TASK $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES"; sleep 4; exit "$1"'
    job = {"cpus_per_task": 2, "trials_at_once": 2, "gpus_per_node": 2, "partition": "gpu", "nodelist": "n1", **memory}
    pack = Pack(slurm, folder, program, 3, **job)
    pack.over()
    ended = {trial: each[0] for trial, each in pack.attempts.items()}
    assert {trial: each.exit_code for trial, each in ended.items()} == {0: 0, 1: 1, 2: 2}, pack.files.log.read_text()
    one, two, three = (ended[trial] for trial in range(3))
    assert abs(one.started - two.started) < 2 and one.ended is not None and two.ended is not None
    assert max(one.seconds, two.seconds) < 7, "neither waited for the other's cores, GPUs or memory"
    assert three.started >= min(one.ended, two.ended)
    words = [pack.out(trial).split() for trial in range(3)]
    assert {step for step, *_ in words} == {"0", "1", "2"}
    assert all(rest[:2] == ["1", "1"] for _, *rest in words)
    assert all(len(rest[2].split(",")) == 1 for _, *rest in words)
    assert not list(folder.glob("trials/*/*.step"))


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_ends_the_task_reaches_every_trial_and_no_other_starts(
    slurm: SlurmRig, folder: Path, at_once: int
) -> None:
    program = "trap 'echo told; exit 9' TERM; echo up; while :; do sleep 0.1; done"
    pack = Pack(slurm, folder, program, 4, cpus_per_task=2, trials_at_once=at_once)
    pack.until(lambda: all("up" in pack.out(trial) for trial in range(at_once)))
    slurm.run(["scancel", f"{pack.job}_0"])
    pack.over()
    # Slurm tells the steps before it tells the script: one that ends at once may do so before the script has heard.
    assert all(each[0].signal in {"TERM", None} for each in pack.attempts.values()), pack.attempts
    assert {trial: each[0].exit_code for trial, each in pack.attempts.items()} == dict.fromkeys(range(at_once), 9)
    assert all(pack.out(trial) == "up\ntold\n" for trial in range(at_once))


def test_a_trial_that_starts_while_the_controller_is_away_waits_for_it(slurm: SlurmRig, folder: Path) -> None:
    up, gate = (shlex.quote(str(folder / name)) for name in ("up", "gate"))
    lines = [f"touch {up}", f"until [ -e {gate} ]; do sleep 0.1; done"]
    pack = Pack(slurm, folder, "echo ran", 1, setup={"lines": lines})
    pack.until((folder / "up").exists)
    slurm.stop_controller()
    (folder / "gate").touch()
    limit = time.monotonic() + 120
    while "srun: error: Unable to" not in pack.files.stderr(0, 1).read_text():
        assert time.monotonic() < limit
        time.sleep(0.2)
    slurm.start_controller()
    pack.over()
    (tried,) = pack.attempts[0]
    assert (tried.exit_code, pack.out(0)) == (0, "ran\n"), pack.files.stderr(0, 1).read_text()


def test_a_trial_whose_time_is_up_leaves_its_place_to_the_next(slurm: SlurmRig, folder: Path) -> None:
    program = "test $1 != 1 || exec sleep 300; test $1 != 0 || sleep 8"
    pack = Pack(slurm, folder, program, 3, time="0:12", cpus_per_task=2, trials_at_once=2)
    pack.slurm.run(["scontrol", "update", f"JobId={pack.job}", "TimeLimit=5"])
    pack.over()
    ended = {trial: each[0] for trial, each in pack.attempts.items()}
    assert {trial: each.cause for trial, each in ended.items()} == {0: None, 1: "timeout", 2: None}
    assert 11 < ended[1].seconds < 25
    assert (ended[0].exit_code, ended[2].exit_code) == (0, 0)


def test_a_log_has_its_limit_under_srun(slurm: SlurmRig, folder: Path) -> None:
    pack = Pack(slurm, folder, "seq -f %09.0f 2000000; exit 3", 1, log_limit="1M")
    pack.over()
    assert pack.attempts[0][0].exit_code == 3
    kept = {path.name: path.read_text() for path in folder.glob("trials/0/attempt-1.out*")}
    assert sum(map(len, kept.values())) <= 2**20
    assert kept["attempt-1.out"].startswith("000000001\n") and kept["attempt-1.out.last"].endswith("\n002000000\n")

"""Several trials in one array task: the real script, under real bash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import ConfigError
from nexa_infra.operations import launch, steps
from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.scheduling.arguments import pack_minutes
from nexa_infra.scheduling.script import render_script
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.load import load_config
from nexa_infra.spec.run import SweepConfig


class Task:
    """A run directory, whose array tasks are started by hand."""

    def __init__(self, folder: Path, program: str, trials: int = 4, **config: Any) -> None:
        self.folder = folder
        for place in ("status", "trials", "claims", "code"):
            (folder / place).mkdir(parents=True)
        job = {"trials_per_task": trials, **config.pop("job", {})}
        given = {
            "job": job,
            "launcher": {"type": "command", "command": ["bash", "-c", program, "trial", "{n}"]},
            "sweep": {"parameters": {"n": [str(number) for number in range(trials)]}},
            **config,
        }
        script = render_script(SweepConfig.model_validate(given), run_id="r", run_dir=str(folder))
        (folder / "job.sbatch").write_text(script.text)

    def start(self, *arguments: str, task: int = 0, **environment: str) -> subprocess.Popen[bytes]:
        base = {"PATH": os.environ["PATH"], "NEXA_SCHEDULER": "local", "HOSTNAME": "n1"}
        base |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        argv = ["bash", str(self.folder / "job.sbatch"), *arguments]
        return subprocess.Popen(argv, env=base | environment)

    def run(self, *arguments: str, task: int = 0, **environment: str) -> int:
        with self.start(*arguments, task=task, **environment) as process:
            return process.wait(60)

    def lines(self, word: str, task: int = 0) -> list[list[str]]:
        """The lines of a task's status file that begin with a word, without it."""
        path = self.folder / "status" / f"7_{task}"
        found = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
        return [words[1:] for words in found if words[0] == word]

    def ran(self, task: int = 0) -> list[tuple[int, int]]:
        """The trials and attempts that a task has started, in order."""
        return [(int(words[0]), int(words[1])) for words in self.lines("start", task)]

    def until(self, count: int, word: str = "start") -> None:
        deadline = time.monotonic() + 15
        while len(self.lines(word)) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.lines(word)) >= count

    def out(self, trial: int, attempt: int = 1) -> str:
        return (self.folder / "trials" / str(trial) / f"attempt-{attempt}.out").read_text()


@pytest.mark.parametrize(
    ("trials", "chunks", "pack"), [(7, 1, 1), (7, 1, 3), (10, 2, 3), (4, 3, 1), (5, 1, 8), (6, 2, 2)]
)
def test_every_trial_is_run_once_by_the_task_that_is_meant_to(
    tmp_path: Path, trials: int, chunks: int, pack: int
) -> None:
    task = Task(tmp_path, "true", trials)
    groups = -(-trials // pack)
    for chunk in range(chunks):
        for number, group in enumerate(range(chunk, groups, chunks)):
            (tmp_path / "status" / f"7_{number}").unlink(missing_ok=True)
            assert task.run(str(chunk), str(chunks), "", str(pack), task=number) == 0
            assert task.ran(number) == [(trial, 1) for trial in range(group, trials, groups)]
    assert task.run("0", "1", "", str(pack), task=groups) == 2, "there is no such pack"
    assert task.ran(groups) == []


@pytest.mark.parametrize(("count", "pack"), [(5, 1), (5, 2), (6, 4), (3, 7)])
def test_a_list_is_shared_out_as_well_with_its_attempts(tmp_path: Path, count: int, pack: int) -> None:
    task = Task(tmp_path, "true", 9)
    listed = [(8 - number, number + 2) for number in range(count)]
    (tmp_path / "retry").write_text("".join(f"{trial} {attempt}\n" for trial, attempt in listed))
    groups = -(-count // pack)
    for number in range(groups):
        assert task.run("0", "1", "retry", str(pack), task=number) == 0
        assert task.ran(number) == listed[number::groups]
    assert task.run("0", "1", "retry", str(pack), task=groups) == 2


@pytest.mark.parametrize("line", ["4 1", "", "1"])
def test_a_list_that_names_no_trial_is_refused_before_any_starts(tmp_path: Path, line: str) -> None:
    task = Task(tmp_path, "true", 4)
    (tmp_path / "retry").write_text(f"0 2\n{line}\n")
    assert task.run("0", "1", "retry", "4") == 2
    assert task.ran() == []


def test_one_that_fails_does_not_stop_the_next_and_the_first_bad_code_is_the_task_s(tmp_path: Path) -> None:
    task = Task(tmp_path, 'echo "$1 $NEXA_TRIAL $NEXA_ATTEMPT"; case $1 in 1) exit 3 ;; 2) exit 4 ;; esac')
    assert task.run("0", "1", "", "4") == 3
    assert [int(words[3]) for words in task.lines("end")] == [0, 3, 4, 0]
    assert [task.out(trial) for trial in range(4)] == [f"{trial} {trial} 1\n" for trial in range(4)]
    assert all(words[4] == "0" for words in task.lines("start")), "how often Slurm has restarted it"


def test_a_task_that_is_restarted_goes_on_where_it_was(tmp_path: Path) -> None:
    task = Task(tmp_path, "test $1 != 1 || exit 3")
    lines = ["start\t0\t1\t1.5\tn1\t0", "code\t0\t1\t0", "end\t0\t1\t2.5\t0\t", "start\t1\t1\t3.5\tn1\t0"]
    lines += ["end\t1\t1\t4.5\t3\t", "start\t2\t1\t5.5\tn1\t0"]
    # The node died in trial 2, in the middle of a line: the next one stands behind it.
    (tmp_path / "status" / "7_0").write_text("\n".join(lines) + "\nwhy\t2\t")
    assert task.run("0", "1", "", "4", SLURM_RESTART_COUNT="1") == 3
    attempts = read_attempts(RunDirectory(tmp_path))
    told = {trial: [(each.number, each.restart, each.exit_code) for each in attempts[trial]] for trial in attempts}
    assert told == {0: [(1, 0, 0)], 1: [(1, 0, 3), (2, 1, 3)], 2: [(1, 0, None), (2, 1, 0)], 3: [(1, 1, 0)]}


def test_what_was_told_to_end_has_not_completed(tmp_path: Path) -> None:
    """Trial 1 heard TERM, trial 2 a warning alone, and trial 3 saved itself after one."""
    task = Task(tmp_path, "true")
    ends = ["end\t0\t1\t2.5\t0\t", "end\t1\t1\t2.5\t0\tTERM", "end\t2\t1\t2.5\t0\tUSR1"]
    ends += ["why\t3\t1\ttimeout\nend\t3\t1\t2.5\t0\tUSR1"]
    lines = [f"start\t{trial}\t1\t1.5\tn1\t0\n{end}\n" for trial, end in enumerate(ends)]
    (tmp_path / "status" / "7_0").write_text("".join(lines))
    assert task.run("0", "1", "", "4", SLURM_RESTART_COUNT="1") == 0
    assert task.ran()[4:] == [(1, 2), (3, 2)]


def test_a_restarted_task_of_one_trial_counts_as_it_always_did(tmp_path: Path) -> None:
    task = Task(tmp_path, "true")
    assert task.run("0", "1", "", "1", task=2, SLURM_RESTART_COUNT="3") == 0
    assert task.ran(2) == [(2, 4)] and task.lines("start", 2)[0][4] == "3"
    assert task.run("0", "1", task=3) == 0, "as a config without packs is started"
    assert task.ran(3) == [(3, 1)]


@pytest.mark.parametrize("deaf", [False, True])
def test_each_trial_has_the_walltime_of_one(tmp_path: Path, deaf: bool) -> None:
    sleeping = "trap '' TERM; while :; do sleep 0.1; done" if deaf else "exec sleep 100"
    task = Task(tmp_path, f"test $1 = 1 || exit 0; {sleeping}", 3, job={"time": "0:02"})
    if deaf:
        script = tmp_path / "job.sbatch"
        script.write_text(script.read_text().replace("nexa_age < 32", "nexa_age < 4"))
    before = time.monotonic()
    assert task.run("0", "1", "", "3") == (137 if deaf else 143)
    assert 2 <= time.monotonic() - before < 20
    assert task.lines("why") == [["1", "1", "timeout"]]
    assert [words[4] for words in task.lines("end")] == ["", "TERM", ""]
    assert task.ran() == [(0, 1), (1, 1), (2, 1)]


def test_a_trial_of_a_pack_is_warned_of_its_own_walltime(tmp_path: Path) -> None:
    program = "trap 'sleep 0.05; touch $NEXA_CHECKPOINT_DIR/saved; exit 0' USR2; while test $1 = 0; do sleep 0.1; done"
    task = Task(tmp_path, program, 2, job={"time": "0:12", "signal": "USR2", "signal_before_end": 10})
    before = time.monotonic()
    assert task.run("0", "1", "", "2") == 143
    assert 2 <= time.monotonic() - before < 11
    assert task.lines("why") == [["0", "1", "timeout"]], "it has saved itself, to go on"
    assert [words[3:] for words in task.lines("end")] == [["0", "USR2"], ["0", ""]]


def test_term_reaches_the_running_trial_and_no_other_starts(tmp_path: Path) -> None:
    task = Task(tmp_path, "trap 'echo told; exit 9' TERM; echo up; while :; do sleep 0.05; done")
    with task.start("0", "1", "", "4") as process:
        task.until(1)
        while not (tmp_path / "trials/0/attempt-1.out").exists() or "up" not in task.out(0):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 9
    assert task.ran() == [(0, 1)] and task.out(0) == "up\ntold\n"
    assert task.lines("end")[0][3:] == ["9", "TERM"]


def test_int_can_be_the_warning(tmp_path: Path) -> None:
    program = "trap 'echo warned' INT; echo up; for ((n = 0; n < 20; n++)); do sleep 0.05; done"
    task = Task(tmp_path, program, 2, job={"signal": "INT"})
    with task.start("0", "1", "", "2") as process:
        task.until(1)
        while not (tmp_path / "trials/0/attempt-1.out").exists() or "up" not in task.out(0):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 143, "it ended well, and yet was told of its end"
    assert [words[3:] for words in task.lines("end")] == [["0", "INT"], ["0", ""]]
    assert "warned" in task.out(0) and "warned" not in task.out(1)


def test_a_run_that_is_cancelled_starts_no_other_trial(tmp_path: Path) -> None:
    task = Task(tmp_path, "test $1 != 1 || touch $NEXA_RUN_DIR/cancelled")
    assert task.run("0", "1", "", "4") == 143
    assert task.ran() == [(0, 1), (1, 1)]


def test_side_by_side_trials_overlap_each_with_its_share(tmp_path: Path) -> None:
    job = {"trials_at_once": 2, "cpus_per_task": 4, "gpus_per_node": 2}
    program = 'echo "$CUDA_VISIBLE_DEVICES $SLURM_CPUS_PER_TASK $OMP_NUM_THREADS"; sleep 1'
    task = Task(tmp_path, program, 4, job=job)
    assert task.run("0", "1", "", "4", CUDA_VISIBLE_DEVICES="5,7") == 0
    spans = {int(words[0]): float(words[2]) for words in task.lines("start")}
    ends = {int(words[0]): float(words[2]) for words in task.lines("end")}
    for moment in spans.values():
        assert sum(spans[trial] <= moment < ends[trial] for trial in spans) <= 2
    assert sum(spans[one] < ends[two] for one, two in ((0, 1), (1, 0), (2, 3), (3, 2))) == 4
    told = [task.out(trial).split() for trial in range(4)]
    assert {words[0] for words in told[:2]} == {words[0] for words in told[2:]} == {"5", "7"}
    assert all(words[1:] == ["2", "2"] for words in told)


def test_many_short_trials_side_by_side_keep_their_codes(tmp_path: Path) -> None:
    task = Task(tmp_path, "exit $(($1 % 7))", 60, job={"trials_at_once": 6, "cpus_per_task": 6})
    task.run("0", "1", "", "60")
    assert {int(words[0]): int(words[3]) for words in task.lines("end")} == {trial: trial % 7 for trial in range(60)}


def test_a_job_step_is_signalled_by_its_own_number(tmp_path: Path) -> None:
    """What stands in for srun gives out numbers in no order, by which what stands in for scancel finds its step."""
    (tmp_path / "bin").mkdir()
    srun = f"""#!/bin/bash
echo "$@" >>{tmp_path}/asked
while [[ $1 != -- ]]; do shift; done
shift
SLURM_STEP_ID=$((40 - NEXA_TRIAL)) exec "$@"
"""
    scancel = f"""#!/bin/bash
echo "$@" >>{tmp_path}/signalled
for each in /proc/[0-9]*; do
  grep -qz "^SLURM_STEP_ID=${{3#*.}}$" $each/environ 2>/dev/null &&
    grep -qz "^NEXA_RUN_DIR={tmp_path}$" $each/environ && kill -s $2 ${{each#/proc/}}
done
true
"""
    for name, text in (("srun", srun), ("scancel", scancel)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    task = Task(
        tmp_path,
        "exec sleep 30",
        job={"trials_at_once": 2, "cpus_per_task": 4, "gpus_per_node": 4, "memory": "1G"},
    )
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    given = task.start("0", "1", "", "4", NEXA_SCHEDULER="", PATH=path, SLURM_JOB_ID="99", SLURM_MEM_PER_NODE="1024")
    with given as process:
        task.until(2)
        steps_of = [tmp_path / "trials" / str(trial) / "attempt-1.step" for trial in (0, 1)]
        while not all(path.exists() and path.read_text() for path in steps_of):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 143
    assert sorted((tmp_path / "signalled").read_text().splitlines()) == ["-s TERM 99.39", "-s TERM 99.40"]
    asked = (tmp_path / "asked").read_text().splitlines()[0]
    assert asked.startswith(
        "--kill-on-bad-exit=1 --exact --nodes=1 --ntasks=1 --cpus-per-task=2 --gpus-per-node=2 --mem=512M -- sh -c"
    )
    assert not any(path.exists() for path in steps_of)


@pytest.mark.parametrize(
    ("job", "pack", "text"),
    [
        ({"time": "10:00"}, 1, None),
        ({"time": "10:00"}, 6, "01:01:00"),
        ({"time": "1-0", "trials_at_once": 4, "cpus_per_task": 4, "trials_per_task": 9}, 9, "3-00:01:00"),
        ({"time": "UNLIMITED"}, 6, None),
    ],
)
def test_a_pack_has_the_time_of_its_rounds_and_a_minute(job: dict[str, Any], pack: int, text: str | None) -> None:
    assert pack_minutes(SlurmJob.model_validate(job), pack) == text


PACKED = """
job: {{trials_per_task: 4{job}}}
launcher: {launcher}
sweep: {{parameters: {{n: [1, 2]}}}}
{more}
"""


@pytest.mark.parametrize(
    ("job", "launcher", "more", "told"),
    [
        (", trials_at_once: 5", "", "", "job.trials_at_once: is 5, but a task has 4: raise trials_per_task"),
        (", trials_at_once: 2, cpus_per_task: 3", "", "", "job.trials_at_once: is 2, but a task has 3 cores: set cpus"),
        (", trials_at_once: 2", "", "", "is 2, but a task has 1 core: set cpus_per_task to 2"),
        (
            ", trials_at_once: 2, cpus_per_task: 2, gpus_per_node: 3",
            "",
            "",
            "job.trials_at_once: is 2, but the task's 3 GPUs are no multiple of it",
        ),
        (", nodes: 2", "", "", "job.trials_per_task: is 4, but a trial takes 2 nodes"),
        (", ntasks_per_node: 2", "", "", "job.trials_per_task: is 4, but ntasks_per_node is 2"),
        ("", "{type: torchrun, script: train.py}", "", "job.trials_per_task: is 4, but the launcher is torchrun"),
        ("", "", "checkpoint: {requeue: 2}", "does not put itself back: remove checkpoint.requeue, and use retry"),
        ("", "", "checkpoint: {chain_until_done: true}", "remove checkpoint.chain_until_done, and use retry"),
    ],
)
def test_what_a_pack_cannot_do_is_refused(tmp_path: Path, job: str, launcher: str, more: str, told: str) -> None:
    path = tmp_path / "config.yaml"
    (tmp_path / "train.py").touch()
    path.write_text(PACKED.format(job=job, launcher=launcher or "{script: train.py}", more=more))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1, caught.value


@pytest.mark.parametrize("word", ["auto", "1", "12"])
def test_a_task_has_a_number_of_trials_or_auto(word: str) -> None:
    assert str(SlurmJob.model_validate({"trials_per_task": word}).trials_per_task) == word


def test_the_local_default_runs_packs(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").touch()
    monkeypatch.chdir(project)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    program = 'echo "{\\"n\\": $1}" >"$NEXA_METRICS"'
    config = SweepConfig.model_validate(
        {
            "job": {"trials_per_task": 3, "trials_at_once": 2, "cpus_per_task": 2, "array_parallelism": 1},
            "launcher": {"type": "command", "command": ["bash", "-c", program, "trial", "{n}"]},
            "sweep": {"parameters": {"n": [str(number) for number in range(7)]}},
        }
    )
    run = launch.plan_sweep(config)
    launch.follow_run(run)
    assert [trial.state for trial in steps.look(run)] == ["completed"] * 7
    assert [json.loads(run.files.metrics(number).read_text()) for number in range(7)] == [{"n": n} for n in range(7)]
    assert len(list(run.files.status.iterdir())) == 3

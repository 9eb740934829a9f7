"""Runs on this machine, with real processes: what becomes of trials, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_slurm_sweep, launch_training_job
from nexa_infra.errors import BudgetError, ConfigError, NexaError, RunCancelledError, RunFailedError
from nexa_infra.operations import manage, steps
from nexa_infra.operations.launch import follow_run
from nexa_infra.runs.index import known_runs
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial, read_results
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.local import is_supervised
from nexa_infra.spec.run import SweepConfig, TrainingConfig
from tests.conftest import processes_of


def a_sweep(script: str, count: int = 4, **more: Any) -> SweepConfig:
    """A sweep of `count` trials of a line of shell, in which $1 is the trial's number."""
    job = {"name": "test", "array_parallelism": 2, **more.pop("job", {})}
    return SweepConfig.model_validate(
        {
            "job": job,
            "launcher": {"type": "command", "command": ["bash", "-c", script, "trial", "{n}"]},
            "sweep": {"parameters": {"n": list(range(count))}},
            **more,
        }
    )


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little code in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)
    return folder


def latest() -> Run:
    return manage.find("latest")


def trials_of(run: Run) -> tuple[Trial, ...]:
    return steps.collect(run)


def states(run: Run) -> Counter[str]:
    return Counter(trial.state for trial in trials_of(run))


def wait_for(what: Any, seconds: float = 15.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_every_trial_runs_once_and_is_counted(project: Path) -> None:
    script = 'echo "{\\"loss\\": 0.$1}" > "$NEXA_METRICS"; echo out; echo err >&2'
    done = launch_slurm_sweep(a_sweep(script), submit=True)
    run = latest()
    assert done.submitted and done.run_id == run.id
    assert states(run) == {"completed": 4}
    table = read_results(run.files.results)
    assert list(table["loss"]) == [0.0, 0.1, 0.2, 0.3]
    assert list(table["n"]) == [0, 1, 2, 3]
    assert run.files.stdout(3, 1).read_text() == "out\n"
    assert run.files.stderr(3, 1).read_text() == "err\n"
    assert all(trial.usd and trial.usd > 0 for trial in trials_of(run))
    assert not processes_of(run)


def test_trials_run_in_a_copy_of_the_code(project: Path) -> None:
    script = 'pwd > "$NEXA_TRIAL_DIR/where"; cp code.txt "$NEXA_TRIAL_DIR"'
    launch_slurm_sweep(a_sweep(script, 1), submit=True)
    run = latest()
    assert run.snapshot is not None
    assert Path((run.files.trial(0) / "where").read_text().strip()).resolve() == Path(run.snapshot.path)
    assert run.snapshot.path != str(project)
    assert (run.files.trial(0) / "code.txt").read_text() == "code\n"


def test_a_failed_trial_never_stops_the_others_and_is_named_with_its_last_words() -> None:
    with pytest.raises(RunFailedError) as failed:
        launch_slurm_sweep(a_sweep('[ "$1" != 1 ] || { echo "no such layer" >&2; exit 3; }'), submit=True)
    run = latest()
    assert states(run) == {"completed": 3, "failed": 1}
    assert "trial 1 ended as failed with exit code 3" in str(failed.value)
    assert "no such layer" in str(failed.value)
    assert f"nexa-infra retry {run.id}" in str(failed.value)
    assert json.loads(run.files.report_json.read_text())["end"] == "failed"


def test_a_failed_trial_is_retried_alone_as_often_as_its_policy_says() -> None:
    script = 'echo ran >> "$NEXA_RUN_DIR/ran-$1"; [ "$1" != 2 ] || [ "$NEXA_ATTEMPT" = 3 ]'
    launch_slurm_sweep(a_sweep(script, retry={"times": 2}), submit=True)
    run = latest()
    assert states(run) == {"completed": 4}
    assert [len((run.files.path / f"ran-{n}").read_text().split()) for n in range(4)] == [1, 1, 3, 1]
    trial = trials_of(run)[2]
    assert trial.attempt == 3
    assert trial.wasted_usd and trial.usd and 0 < trial.wasted_usd < trial.usd
    assert [each.trials for each in read_submissions(run.files)] == [4, 1, 1]


def test_a_run_stops_at_its_most_failures() -> None:
    config = a_sweep("sleep 0.2; exit 1", 40, retry={"max_failures": 3})
    with pytest.raises(RunFailedError, match="retry.max_failures is 3"):
        launch_slurm_sweep(config, submit=True)
    found = states(latest())
    assert 3 <= found["failed"] <= 6
    assert found["cancelled"] >= 30


def test_a_trial_that_outlives_its_walltime_is_ended() -> None:
    config = a_sweep("sleep 300 & sleep 301", 1, job={"time": "0:01"})
    with pytest.raises(RunFailedError, match="trial 0 ended as timeout"):
        launch_slurm_sweep(config, submit=True)
    run = latest()
    assert states(run) == {"timeout": 1}
    assert not processes_of(run)
    assert 0.9 < trials_of(run)[0].seconds < 3


def test_a_trial_hears_term_before_it_is_killed() -> None:
    script = "trap 'echo saved > \"$NEXA_TRIAL_DIR/checkpoint\"; exit 0' TERM; sleep 300 & wait"
    with pytest.raises(RunFailedError, match="timeout"):
        launch_slurm_sweep(a_sweep(script, 1, job={"time": "0:01"}), submit=True)
    run = latest()
    assert (run.files.trial(0) / "checkpoint").read_text() == "saved\n"
    assert states(run) == {"timeout": 1}, "a program that exits 0 because it was told to end has not finished"


def test_what_a_trial_leaves_running_is_ended_with_it() -> None:
    script = "setsid sh -c 'trap \"\" TERM HUP; sleep 300 & sleep 301' & sleep 0.3"
    launch_slurm_sweep(a_sweep(script, 2), submit=True)
    assert not processes_of(latest())


def test_a_command_that_is_not_there_says_so() -> None:
    config = SweepConfig.model_validate(
        {"launcher": {"type": "command", "command": ["no-such-program"]}, "sweep": {"parameters": {"a": ["1"]}}}
    )
    with pytest.raises(RunFailedError, match="exit code 127"):
        launch_slurm_sweep(config, submit=True)
    assert "no-such-program: not found" in latest().files.stderr(0, 1).read_text()


def test_a_preview_writes_nothing(home: Path) -> None:
    made = launch_slurm_sweep(a_sweep("true", 4))
    assert not home.exists()
    assert made.directory is None and not made.submitted
    assert made.trials == 4 and made.array == "0-3%2"
    assert made.shown[0] == (0, "bash -c true trial 0")
    assert made.estimate is not None and made.estimate.ceiling_usd is not None
    assert "#SBATCH --job-name=test" in made.script_text


def test_a_run_over_its_budget_is_refused_and_has_a_report() -> None:
    with pytest.raises(BudgetError, match=r"nothing was started.*raise budget.limit_usd"):
        launch_slurm_sweep(a_sweep("true"), submit=True, budget_usd=0.0001)
    run = latest()
    assert json.loads(run.files.report_json.read_text())["end"] == "refused"
    assert not run.files.script.exists()
    with pytest.raises(NexaError, match="refused"):
        manage.prepare_resume(run.id)


def test_a_run_without_a_ceiling_is_refused_where_it_has_a_budget() -> None:
    with pytest.raises(BudgetError, match="no ceiling"):
        launch_slurm_sweep(a_sweep("true", job={"time": "UNLIMITED"}), submit=True, budget_usd=100)


def test_retry_runs_only_what_failed() -> None:
    script = 'echo ran >> "$NEXA_RUN_DIR/ran-$1"; [ "$1" = 0 ] || [ -e "$NEXA_RUN_DIR/mended" ]'
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(a_sweep(script, 3), submit=True)
    run = latest()
    (run.files.path / "mended").touch()
    follow_run(manage.prepare_retry(run.id))
    assert states(run) == {"completed": 3}
    assert [len((run.files.path / f"ran-{n}").read_text().split()) for n in range(3)] == [1, 2, 2]
    with pytest.raises(NexaError, match="no trial of run .* failed"):
        manage.prepare_retry(run.id)


def test_a_training_is_one_run_and_returns_what_it_made() -> None:
    script = 'echo "{\\"accuracy\\": 0.5}" > "$NEXA_METRICS"; echo model > "$NEXA_TRIAL_DIR/model.bin"'
    config = TrainingConfig.model_validate(
        {"job": {"name": "one"}, "launcher": {"type": "command", "command": ["bash", "-c", script]}}
    )
    made = launch_training_job(config)
    run = latest()
    assert made.metrics == {"accuracy": 0.5}
    assert made.uri == run.files.trial(0).as_uri()
    assert "model.bin" in (run.files.path / "manifest.txt").read_text()


def test_a_training_config_is_no_sweep() -> None:
    config = TrainingConfig.model_validate({"launcher": {"type": "command", "command": ["true"]}})
    with pytest.raises(ConfigError, match="launch_training_job"):
        launch_slurm_sweep(config, submit=True)  # type: ignore[arg-type]


def test_it_works_inside_a_running_event_loop() -> None:
    import asyncio

    async def notebook() -> str:
        return launch_slurm_sweep(a_sweep("true", 2), submit=True).run_id

    assert asyncio.run(notebook()) == latest().id


# ---- clients that end early ----

CLIENT = """
import sys
from nexa_infra import launch_slurm_sweep
from nexa_infra.spec.run import SweepConfig
launch_slurm_sweep(SweepConfig.model_validate_json(sys.stdin.read()), submit=True)
"""


def a_client(config: SweepConfig) -> subprocess.Popen[str]:
    """A client of its own, started from Python so that it hears SIGINT."""
    started = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdin is not None
    with started.stdin:
        started.stdin.write(config.model_dump_json(exclude_defaults=True))
    return started


STUBBORN = "(trap '' TERM INT HUP; setsid sleep 300) & echo $1 >> \"$NEXA_RUN_DIR/started\"; sleep 301"


def running(count: int) -> Run:
    """Wait until so many trials have started."""
    wait_for(lambda: known_runs(manage.home()))
    run = latest()
    started = run.files.path / "started"
    wait_for(lambda: started.exists() and len(started.read_text().split()) >= count)
    return run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_client_that_ends_leaves_no_process_behind(number: signal.Signals) -> None:
    client = a_client(a_sweep(STUBBORN))
    run = running(2)
    client.send_signal(number)
    client.wait(15)
    wait_for(lambda: not processes_of(run) and not is_supervised(run.files))
    expected = {"cancelled": 4} if number == signal.SIGINT else {"interrupted": 2, "pending": 2}
    assert states(run) == expected
    if number != signal.SIGKILL:
        assert run.files.report_json.exists(), "a client that could still act has written the report"


def test_a_killed_supervisor_is_swept_up_after_by_resume() -> None:
    script = STUBBORN.replace("sleep 301", '[ -e "$NEXA_RUN_DIR/again" ] || sleep 301')
    client = a_client(a_sweep(script))
    run = running(2)
    os.kill(client.pid, signal.SIGSTOP)  # it must not notice, and sweep up itself
    supervisor = int(subprocess.check_output(["pgrep", "-P", str(client.pid)], text=True))
    os.kill(supervisor, signal.SIGKILL)
    os.kill(client.pid, signal.SIGKILL)
    client.wait(15)
    assert processes_of(run), "nothing was left, so nothing is tested"
    (run.files.path / "again").touch()
    follow_run(manage.prepare_resume(run.id))
    assert states(run) == {"completed": 4}
    wait_for(lambda: not processes_of(run))


def test_a_cancelled_run_goes_on_when_it_is_resumed() -> None:
    script = 'echo $1 >> "$NEXA_RUN_DIR/started"; [ "$NEXA_ATTEMPT" = 2 ] || [ $1 -gt 1 ] || sleep 300'
    client = a_client(a_sweep(script))
    run = running(2)
    manage.cancel(run.id)
    client.wait(15)
    assert client.stderr is not None
    assert "was cancelled (cancelled by hand)" in client.stderr.read()
    assert not processes_of(run)
    assert states(run) == {"cancelled": 4}
    with pytest.raises(NexaError, match="already ended"):
        manage.cancel(run.id)
    follow_run(manage.prepare_resume(run.id))
    assert states(run) == {"completed": 4}
    assert [trial.attempt for trial in trials_of(run)] == [2, 2, 1, 1]


def test_two_clients_of_one_run_run_each_trial_once() -> None:
    client = a_client(a_sweep('echo $1 >> "$NEXA_RUN_DIR/started"; sleep 0.5', 6))
    run = running(1)
    follow_run(manage.prepare_resume(run.id))
    client.wait(15)
    assert states(run) == {"completed": 6}
    assert sorted((run.files.path / "started").read_text().split()) == list("012345")


def test_a_run_cancelled_from_elsewhere_is_told_as_such() -> None:
    client = a_client(a_sweep(STUBBORN))
    run = running(2)
    manage.cancel(run.id)
    client.wait(15)
    with pytest.raises(RunCancelledError):
        steps.conclude(run, trials_of(run))


def test_a_second_client_that_is_stopped_leaves_the_first_one_s_trials_alone() -> None:
    first = a_client(a_sweep('echo $1 >> "$NEXA_RUN_DIR/started"; sleep 1', 4))
    run = running(1)
    script = (
        "import sys; from nexa_infra.operations import manage; from nexa_infra.operations.launch import follow_run\n"
    )
    second = subprocess.Popen([sys.executable, "-c", f"{script}follow_run(manage.prepare_resume({run.id!r}))"])
    time.sleep(1)
    second.send_signal(signal.SIGINT)
    assert second.wait(15) != 0
    assert first.wait(15) == 0
    assert states(run) == {"completed": 4}

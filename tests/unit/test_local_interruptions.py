"""Trials that are interrupted, or whose needs are not met, on this machine: real processes, without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import BudgetError, RunFailedError, SubmitError
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.spec.run import TrainingConfig

# Counts to a number, a step of 0.1 s each; told to end, it saves where it is and exits with the given code.
PROGRAM = """
import os, pathlib, signal, sys, time

last, code = int(sys.argv[1]), int(sys.argv[2])
kept = pathlib.Path(os.environ["NEXA_CHECKPOINT_DIR"], "step")
step = int(kept.read_text()) if kept.exists() else 0
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
while step < last and not told:
    time.sleep(0.1)
    step += 1
if told and code >= 0:
    kept.write_text(str(step))
    sys.exit(code)
print("done at", step, "after", len(told), "warnings")
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "count.py").write_text(PROGRAM)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    return folder


def a_run(*args: str, **more: Any) -> Run:
    config = {"launcher": {"script": "count.py"}, "training": {"args": list(args)}, **more}
    return launch.plan_training(TrainingConfig.model_validate(config))


def followed(run: Run) -> Trial:
    launch.follow_run(run)
    return steps.look(manage.find("latest"))[0]


def refused(run: Run, home: Path) -> str:
    """Return why a run cannot be started; it leaves nothing."""
    with pytest.raises(SubmitError) as caught:
        launch.follow_run(run)
    assert not (home / "snapshots").exists() and not Path(run.directory).exists()
    assert "nothing was copied or started" in str(caught.value)
    return str(caught.value)


def test_a_program_that_saves_itself_when_warned_goes_on_in_another_attempt() -> None:
    trial = followed(a_run("70", "143", job={"time": "0:14", "signal_before_end": 10}, checkpoint={"requeue": 5}))
    assert trial.state == "completed" and trial.attempt >= 2
    assert [each.cause for each in trial.attempts] == ["timeout"] * (trial.attempt - 1) + [None]
    assert all(each.signal == "USR1" for each in trial.attempts[:-1])
    assert 143 in {each.exit_code for each in trial.attempts}
    assert trial.usd is not None and trial.wasted_usd is not None and trial.usd > trial.wasted_usd > 0


def test_a_program_that_saves_itself_and_exits_well_goes_on_as_well() -> None:
    trial = followed(a_run("70", "0", job={"time": "0:14", "signal_before_end": 10}, checkpoint={"requeue": 5}))
    assert trial.state == "completed" and trial.attempt >= 2
    assert [each.cause for each in trial.attempts] == ["timeout"] * (trial.attempt - 1) + [None]


@pytest.mark.parametrize("code", ["0", "143"])
def test_a_program_that_is_warned_and_saves_itself_goes_on_by_a_retry(code: str) -> None:
    trial = followed(a_run("70", code, job={"time": "0:14", "signal_before_end": 10}, retry={"times": 5}))
    assert trial.state == "completed" and trial.attempt >= 2
    assert [each.cause for each in trial.attempts] == ["timeout"] * (trial.attempt - 1) + [None]


def test_no_more_attempts_are_made_than_may_be() -> None:
    with pytest.raises(RunFailedError, match=r"ended after the warning that its walltime would soon be over"):
        launch.follow_run(a_run("999", "9", job={"time": "0:11", "signal_before_end": 10}, checkpoint={"requeue": 1}))
    trial = steps.look(manage.find("latest"))[0]
    assert (trial.state, trial.attempt) == ("timeout", 2)
    assert [each.cause for each in trial.attempts] == ["timeout", "timeout"]


@pytest.mark.parametrize("checkpoint", [{"requeue": 1}, {"chain_until_done": True}])
def test_a_program_that_is_done_although_it_was_warned_has_completed(checkpoint: dict[str, Any]) -> None:
    trial = followed(a_run("999", "-1", job={"time": "0:14", "signal_before_end": 10}, checkpoint=checkpoint))
    assert (trial.state, trial.attempt, trial.attempts[0].signal) == ("completed", 1, "USR1")
    assert trial.attempts[0].cause is None


def test_a_chain_that_makes_no_checkpoint_ends() -> None:
    launcher = {"type": "command", "command": ["sleep", "60"]}
    run = launch.plan_training(
        TrainingConfig.model_validate(
            {
                "job": {"time": "0:11", "signal_before_end": 10},
                "launcher": launcher,
                "checkpoint": {"chain_until_done": True},
            }
        )
    )
    with pytest.raises(RunFailedError, match=r"trial 0 came to its walltime twice without a new checkpoint: chained"):
        launch.follow_run(run)
    trial = steps.look(run)[0]
    assert (trial.state, trial.attempt) == ("failed", 2)
    assert [each.cause for each in trial.attempts] == ["timeout", "stuck"]
    assert json.loads(run.files.report_json.read_text())["end"] == "failed"


def test_an_environment_without_torchrun_is_refused(tmp_path: Path, home: Path) -> None:
    venv = tmp_path / "it's bare" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("PATH=/usr/bin:/bin\n")
    launcher = {"type": "torchrun", "script": "count.py"}
    told = refused(a_run(launcher=launcher, job={"setup": {"venv": str(venv.parent)}}), home)
    assert f"torchrun is not installed in {venv.parent} (job.setup.venv), asked on " in told
    (venv / "activate").write_text("PATH=/nowhere\n")
    lines = [f". '{tmp_path}/it'\"'\"'s bare/bin/activate'"]
    told = refused(a_run(launcher=launcher, job={"setup": {"lines": lines}}), home)
    assert "torchrun is not installed on this machine (" in told and "asked in what job.setup makes" in told


def test_checkpoints_that_can_never_be_written_are_refused(tmp_path: Path, home: Path) -> None:
    (tmp_path / "a file").touch()
    told = refused(a_run("1", "0", checkpoint={"dir": f"{tmp_path}/a file/checkpoints"}), home)
    assert f"checkpoint.dir: {tmp_path}/a file/checkpoints lies below {tmp_path}/a file, which is no folder" in told


def test_checkpoints_that_cannot_be_written_once_it_starts_are_told(tmp_path: Path) -> None:
    run = a_run(
        "1",
        "0",
        checkpoint={"dir": f"{tmp_path}/kept"},
        job={"setup": {"lines": [f"touch '{tmp_path}/kept'"]}},
    )
    told = f"checkpoints cannot be written into {tmp_path}/kept/{run.id}/0 on "
    with pytest.raises(RunFailedError, match=told):
        launch.follow_run(run)
    assert steps.look(run)[0].exit_code == 73


def test_checkpoints_are_kept_where_the_config_says(tmp_path: Path) -> None:
    run = a_run(
        "999",
        "143",
        job={"time": "0:13", "signal_before_end": 10},
        checkpoint={"dir": f"{tmp_path}/it's kept", "requeue": 1},
    )
    with pytest.raises(RunFailedError):
        launch.follow_run(run)
    assert int((tmp_path / "it's kept" / run.id / "0" / "step").read_text()) > 1


def test_a_chain_without_an_end_is_held_against_no_budget() -> None:
    run = a_run("1", "0", checkpoint={"chain_until_done": True}, budget={"limit_usd": 100})
    with pytest.raises(
        BudgetError, match=r"chain_until_done has no end, so no ceiling .*; set checkpoint\.requeue to the"
    ):
        launch.follow_run(run)
    assert json.loads(run.files.report_json.read_text())["end"] == "refused"
    followed(a_run("1", "0", checkpoint={"chain_until_done": True, "requeue": 2}, budget={"limit_usd": 100}))


def test_every_time_that_a_trial_may_go_on_counts_against_the_budget() -> None:
    told = r"the projected cost is up to .*, over the budget of "
    budget = {"limit_usd": 0.1}  # a core for an hour is 0.0529 USD
    followed(a_run("1", "0", budget=budget))
    with pytest.raises(BudgetError, match=told):
        launch.follow_run(a_run("1", "0", checkpoint={"requeue": 1}, budget=budget))

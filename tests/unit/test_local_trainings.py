"""Trainings on this machine that say how they are while they run, with real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_training_job
from nexa_infra.errors import RunFailedError
from nexa_infra.monitoring.report import to_json
from nexa_infra.operations import launch, manage
from nexa_infra.operations.status_text import status_page
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.watch import Poll
from nexa_infra.spec.run import TrainingConfig
from tests.conftest import processes_of

# Each word is a line: a loss, or `wait`. The first attempt takes the first argument, the second the second.
PROGRAM = """
import json, os, sys, time

words = sys.argv[int(os.environ["NEXA_ATTEMPT"])].split(",")
log = open(os.environ["NEXA_METRICS_LOG"], "a")
step = 0
for word in words:
    if word == "wait":
        time.sleep(600)
    step += 1
    log.write(json.dumps({"step": step, "total_steps": 8, "train": {"loss": float(word)}, "lr": 0.1}) + "\\n")
    log.flush()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    return folder


def a_training(*attempts: str, **more: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"job": {"name": "test"}, "launcher": {"script": "train.py"}, "training": {"args": list(attempts)}, **more}
    )


def latest() -> Run:
    return manage.find("latest")


def report(run: Run) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run.files.report_json.read_text())
    return data


def test_the_verb_shows_how_far_it_is_and_the_report_has_figures_and_pictures(project: Path) -> None:
    (project / "t.yaml").write_text("job: {name: t}\nlauncher: {script: train.py}\ntraining: {args: ['3,2,1,1.5']}\n")
    done = subprocess.run([sys.executable, "-m", "nexa_infra", "train", "t.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 completed; step 4/8, train.loss 1.5, lr 0.1" in done.stderr
    assert re.search(r"3 +1\.5 +1 +3 \(best\) +3 +1 +train\.loss", done.stdout)
    run = latest()
    (loss, rate) = report(run)["measured"]["metrics"]
    assert (loss["name"], loss["first"], loss["last"], loss["min"], loss["best_step"]) == ("train.loss", 3, 1.5, 1, 3)
    for metric in (loss, rate):
        ET.parse(run.files.path / metric["plot"])
        assert f"]({metric['plot']})" in run.files.report_markdown.read_text()
    assert "Metrics     step 4/8 (50%)" in status_page(manage.status(run))


def test_a_training_without_a_log_has_a_report_as_before() -> None:
    launch_training_job(TrainingConfig.model_validate({"launcher": {"type": "command", "command": ["true"]}}))
    run = latest()
    assert "measured" not in report(run)
    assert "Metrics" not in run.files.report_markdown.read_text() + status_page(manage.status(run))
    assert not run.files.plots.exists()


def test_a_nan_ends_the_run_where_its_config_says_so_and_the_next_attempt_is_not_blamed_for_it() -> None:
    config = a_training("3,2,nan,wait", "1,0.5", health={"nan": "stop"})
    polls: list[Poll] = []
    with pytest.raises(RunFailedError, match=r"train\.loss is NaN at step 3, and health\.nan is stop\n.*resume"):
        launch_training_job(config, tell=polls.append)
    run = latest()
    assert not processes_of(run)
    assert [told for poll in polls for told in poll.warnings] == ["train.loss is NaN at step 3"]
    assert report(run)["end"] == "failed"
    assert report(run)["measured"]["warnings"] == ["train.loss is NaN at step 3"]
    assert manage.status(run).end == "failed"

    launch.follow_run(manage.prepare_resume(run.id))
    assert report(run)["end"] == "done"
    picture = (run.files.plots / "train.loss.svg").read_text()
    assert "stroke-dasharray" in picture, "where the second attempt began"


def test_a_nan_is_warned_of_once() -> None:
    polls: list[Poll] = []
    launch_training_job(a_training("1,nan,nan,2"), tell=polls.append)
    assert [told for poll in polls for told in poll.warnings] == ["train.loss is NaN at step 2"]
    run = latest()
    assert "**Warning:** train.loss is NaN at step 2" in run.files.report_markdown.read_text()
    assert " NaN</text>" in (run.files.plots / "train.loss.svg").read_text()


def test_a_nan_may_be_ignored() -> None:
    polls: list[Poll] = []
    launch_training_job(a_training("1,nan,2", health={"nan": "ignore"}), tell=polls.append)
    assert not any(poll.warnings for poll in polls)
    assert report(latest())["measured"]["warnings"] == []


def test_a_training_that_stands_still_is_ended_where_its_config_says_so() -> None:
    health = {"stalled_after": "00:00:02", "stalled": "stop"}
    with pytest.raises(RunFailedError, match=r"no new line of metrics since .*, for 2 s, and health\.stalled is stop"):
        launch_training_job(a_training("1,wait", health=health))
    run = latest()
    assert not processes_of(run)
    (told,) = report(run)["measured"]["warnings"]
    assert told.startswith("no new line of metrics since ")
    assert json.loads(to_json(manage.report_of(run))) == report(run), "it is the same to whoever reads it later"

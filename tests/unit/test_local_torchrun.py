"""Trainings under real torchrun on this machine: what they make, how they fail, and how they go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_training_job
from nexa_infra.errors import RunFailedError
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.ranks import Gang, read_gang, read_records
from nexa_infra.runs.record import Run
from nexa_infra.spec.run import TrainingConfig
from tests.conftest import ROOT, processes_of

pytest.importorskip("torch", reason="PyTorch is not installed: make torch brings it")

HOST = socket.gethostname()
STEPS = 60  # of the training that is interrupted
PATIENCE = 120.0

# An all-reduce, and then a fault of the rank that is named.
FAULT = """
import os, sys, time
import torch
from torch import distributed
rank = int(os.environ["RANK"])
distributed.init_process_group("gloo")
distributed.all_reduce(torch.ones(1))
if str(rank) == sys.argv[1]:
    raise ValueError(f"no such layer: {rank + 6}")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "deployments" / "examples" / "ddp" / "train.py", folder)
    (folder / "fault.py").write_text(FAULT)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def a_training(launcher: dict[str, Any], parameters: dict[str, Any], **more: Any) -> TrainingConfig:
    asked = {"epochs": 2, "steps_per_epoch": 10, **parameters} if launcher["script"] == "train.py" else {}
    return TrainingConfig.model_validate(
        {"job": {"name": "test"}, "launcher": launcher, "training": {"parameters": asked}, **more}
    )


TWO = {"type": "torchrun", "script": "train.py", "nproc_per_node": 2}


def made(run: Run, name: str) -> Path:
    return run.files.trial(0) / name


def printed(run: Run, attempt: int = 1) -> str:
    return made(run, f"attempt-{attempt}.out").read_text()


def gang(run: Run, attempt: int = 1) -> Gang:
    return read_gang(read_records(run.files.ranks(0, attempt)))


def loss(run: Run) -> float:
    found: dict[str, float] = json.loads(made(run, "metrics.json").read_text())
    return found["loss"]


def alone(project: Path, folder: Path, epochs: int) -> Path:
    """Train in one process, never interrupted."""
    folder.mkdir()
    names = {"METRICS": "metrics.json", "CHECKPOINT_DIR": "kept", "TRIAL_DIR": "."}
    environment = {**os.environ, **{f"NEXA_{name}": str(folder / file) for name, file in names.items()}}
    argv = [sys.executable, str(project / "train.py"), f"--epochs={epochs}", "--steps-per-epoch=10"]
    subprocess.run(argv, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    return folder


def difference(one: Path, other: Path) -> float:
    import torch

    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def wait(true: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_two_processes_make_the_model_of_one(project: Path, tmp_path: Path) -> None:
    launch.follow_run(launch.plan_training(a_training(TWO, {})))
    run = manage.find("latest")
    said = [re.findall(r"node (\S+) pid (\d+) rank (\d) of 2", path.read_text())[0] for path in logs(run)]
    assert [(node, rank) for node, _, rank in said] == [(HOST, "0"), (HOST, "1")] and said[0][1] != said[1][1]
    assert "rank 0 of 2" in printed(run) and "rank 1 of 2" not in printed(run)
    assert difference(made(run, "model.pt"), alone(project, tmp_path / "alone", 2) / "model.pt") <= 1e-6
    assert gang(run).nodes == (HOST,) and gang(run).started == {0, 1} and not gang(run).failures


def logs(run: Run) -> list[Path]:
    return sorted(run.files.ranks(0, 1).glob("rank-*.log"))


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    run = launch.plan_training(a_training(TWO, {"step_seconds": 0.2, "epochs": 100}))
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(launch.follow_run, run)
        try:
            wait(lambda: made(run, "metrics.jsonl").exists() or following.done())
            (line,) = (
                line.split("\t")
                for line in (run.files.ranks(0, 1) / "node-0").read_text().splitlines()
                if line.startswith("start\t1\t")
            )
            os.kill(int(line[3]), signal.SIGKILL)
            with pytest.raises(RunFailedError) as caught:
                following.result(PATIENCE)
        except BaseException:
            steps.scheduler_of(run).cancel(run)
            raise
    told = f"rank 1 on {HOST} was ended by SIGKILL"
    assert told in str(caught.value) and told in run.files.report_markdown.read_text()
    assert not processes_of(run)


def test_an_exception_on_one_rank_is_told_with_its_traceback() -> None:
    launcher = {**TWO, "script": "fault.py"}
    config = a_training(launcher, {}).model_dump(exclude_unset=True)
    config["training"] = {"args": ["1"]}
    with pytest.raises(RunFailedError) as caught:
        launch.follow_run(launch.plan_training(TrainingConfig.model_validate(config)))
    told = str(caught.value)
    assert f"rank 1 on {HOST} failed: ValueError: no such layer: 7" in told
    run = manage.find("latest")
    markdown = run.files.report_markdown.read_text()
    assert 'raise ValueError(f"no such layer: {rank + 6}")' in markdown
    assert "ChildFailedError" not in markdown + told, "the launcher's last line says nothing"


def test_distributed_without_a_gpu_is_one_process_under_torchrun(project: Path) -> None:
    (project / "c.yaml").write_text(
        "launcher: {script: train.py}\ntraining: {parameters: {epochs: 1, steps_per_epoch: 5}}\n"
    )
    launch_training_job("c.yaml", distributed=True)
    run = manage.find("latest")
    assert run.config.launcher.type == "torchrun" and gang(run).started == {0}
    assert "rank 0 of 1" in printed(run)


def test_a_torchrun_config_that_is_not_distributed_runs_plainly() -> None:
    launch_training_job(a_training(TWO, {"epochs": 1}), distributed=False)
    run = manage.find("latest")
    assert run.config.launcher.type == "python" and not run.files.ranks(0, 1).exists()
    assert "rank 0 of 1" in printed(run)


def test_a_training_that_reaches_its_walltime_goes_on_from_its_checkpoint(project: Path, tmp_path: Path) -> None:
    whole = alone(project, tmp_path / "alone", STEPS // 10)
    config = a_training(
        TWO,
        {"epochs": STEPS // 10, "step_seconds": 0.35},
        job={"name": "test", "time": "0:30", "signal_before_end": 10},
        checkpoint={"requeue": 8},
    )
    launch.follow_run(launch.plan_training(config))
    run = manage.find("latest")
    trial = steps.look(run)[0]
    assert trial.attempt >= 2 and [each.cause for each in trial.attempts] == ["timeout"] * (trial.attempt - 1) + [None]
    assert any("warned that time is up" in printed(run, each.number) for each in trial.attempts[:-1])
    (_, began, executed), *_ = re.findall(
        r"attempt (\d+) resumed at step (\d+) of 60, steps executed in all (\d+)", printed(run, trial.attempt)
    )
    assert int(began) > 0 and int(executed) <= STEPS + trial.attempt - 1, "at most one step is lost at each"
    found: dict[str, float] = json.loads((whole / "metrics.json").read_text())
    assert loss(run) == pytest.approx(found["loss"], abs=1e-6)
    assert trial.usd is not None and trial.wasted_usd is not None and trial.usd > trial.wasted_usd > 0
    assert json.loads(run.files.report_json.read_text())["end"] == "done"

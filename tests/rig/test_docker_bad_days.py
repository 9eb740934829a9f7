"""What goes wrong with trials in Docker: clients killed, programs that end badly, an engine that goes away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nexa_infra.containers import credentials
from nexa_infra.containers.credentials import Credentials
from nexa_infra.errors import ContainerError, NexaError, RunFailedError
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from tests.rig.boxed import boxed_project, left_of, pushed
from tests.rig.daemons import environments, put
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.proxy import wait
from tests.rig.registry import RegistryRig

# A program that hears no TERM, and leaves another behind that hears none either.
DEAF = "trap '' TERM HUP; (setsid sleep 1101 &); echo up; while :; do sleep 0.2; done"


@pytest.fixture(autouse=True)
def _own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own, and no login that another test has left."""
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    monkeypatch.setenv("NEXA_KILL_WAIT", "0.7")


def failed(config: Path) -> tuple[Run, str]:
    """Run a sweep to its bad end; return its run, and what is said of it."""
    run = launch.plan_sweep(config)
    with pytest.raises(RunFailedError) as error:
        launch.follow_run(run)
    return manage.find(run.id), str(error.value)


def up(run: Run, docker: DockerRig) -> bool:
    return "up\n" in (run.files.stdout(0, 1).read_text() if run.files.stdout(0, 1).exists() else "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_client_that_is_ended_leaves_no_container(
    number: signal.Signals, docker: DockerRig, busybox_image: Image, tmp_path: Path, home: Path
) -> None:
    config = boxed_project(
        tmp_path / "p", {"image": docker.load(busybox_image)}, command=["sh", "-c", DEAF, "trial"], seeds=[1, 2]
    )
    client = subprocess.Popen([sys.executable, "-m", "nexa_infra", "sweep", str(config)], stderr=subprocess.DEVNULL)
    wait(lambda: list(home.glob("runs/*/trials/1/attempt-1.out")), within=30)
    run = manage.find("latest")
    wait(lambda: up(run, docker) and len(docker.containers(run.id)) == 2)
    client.send_signal(number)
    client.wait(30)
    wait(lambda: left_of(docker, run.id, run.directory) == [], within=30)
    assert [
        process
        for process, _ in environments()
        if b"sleep\0001101\0" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    ] == []


def test_a_container_that_was_made_and_not_started_goes_with_its_client(
    docker: DockerRig, busybox_image: Image, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = boxed_project(tmp_path / "p", {"image": docker.load(busybox_image)}, command=["true"], seeds=[1])
    # A docker that is slow between the two things that `docker run` asks for.
    (slow := tmp_path / "slow").mkdir()
    real = shutil.which("docker")
    put(
        slow / "docker",
        f'#!/bin/sh\n[ "$1" != run ] || {{ shift; {real} create "$@"; exec sleep 1108; }}\nexec {real} "$@"\n',
        mode=0o755,
    )
    monkeypatch.setenv("PATH", str(slow), prepend=os.pathsep)
    client = subprocess.Popen([sys.executable, "-m", "nexa_infra", "sweep", str(config)], stderr=subprocess.DEVNULL)
    wait(lambda: docker.must("ps", "-aq"), within=30)
    client.kill()
    client.wait(30)
    run = manage.find("latest")
    wait(lambda: left_of(docker, run.id, run.directory) == [], within=30)


def test_exit_code_memory_and_time_are_told_apart(docker: DockerRig, busybox_image: Image, tmp_path: Path) -> None:
    script = f"""
case $1 in
  1) echo "no such layer" >&2; exit 3 ;;
  2) dd if=/dev/zero of=/dev/null bs=200M count=1 ;;
  3) {DEAF} ;;
  4) kill -KILL $$ ;;
esac"""
    run, told = failed(
        boxed_project(
            tmp_path / "p",
            {"image": docker.load(busybox_image), "memory": "32M"},
            command=["sh", "-c", script, "trial"],
            seeds=[1, 2, 3, 4, 5],
            job={"time": "0:12", "array_parallelism": 5},
        )
    )
    trials = steps.look(run)
    assert [trial.state for trial in trials] == ["failed", "out_of_memory", "timeout", "failed", "completed"]
    assert [trials[0].exit_code, trials[3].exit_code] == [3, 137]
    assert "no such layer" in told
    assert "the kernel ended" in told and "for its memory: it was given 32 MiB" in told
    report = run.files.report_markdown.read_text()
    for word in ("out of memory", "timeout"):
        assert word in report.replace("_", " ").replace("\\", "")
    wait(lambda: left_of(docker, run.id, run.directory) == [])


def test_a_warning_reaches_the_program_in_its_container(
    docker: DockerRig, busybox_image: Image, tmp_path: Path
) -> None:
    script = """
[ "$NEXA_ATTEMPT" = 1 ] || { cat "$NEXA_CHECKPOINT_DIR/kept"; exit 0; }
trap 'echo saved > "$NEXA_CHECKPOINT_DIR/kept"; exit 0' USR1
while :; do sleep 0.1; done"""
    config = boxed_project(
        tmp_path / "p",
        {"image": docker.load(busybox_image)},
        command=["sh", "-c", script, "trial"],
        seeds=[1],
        job={"time": "0:12", "signal_before_end": 10},
        checkpoint={"requeue": 2},
    )
    run = launch.plan_sweep(config)
    launch.follow_run(run)
    (trial,) = steps.look(run)
    assert [(each.signal, each.cause) for each in trial.attempts] == [("USR1", "timeout"), (None, None)]
    assert run.files.stdout(0, 2).read_text() == "saved\n"


@pytest.mark.parametrize("abruptly", [False, True], ids=["stopped", "killed"])
def test_an_engine_that_goes_away_is_named_and_the_run_can_be_retried(
    abruptly: bool, docker: DockerRig, busybox_image: Image, tmp_path: Path, home: Path
) -> None:
    script = '[ "$NEXA_ATTEMPT" != 1 ] || { echo up; exec sleep 1102; }'
    config = boxed_project(
        tmp_path / "p", {"image": docker.load(busybox_image)}, command=["sh", "-c", script, "trial"], seeds=[1]
    )
    client = subprocess.Popen(
        [sys.executable, "-m", "nexa_infra", "sweep", str(config)], stderr=subprocess.PIPE, text=True
    )
    wait(lambda: list(home.glob("runs/*/trials/0/attempt-1.out")), within=30)
    run = manage.find("latest")
    wait(lambda: up(run, docker))
    if abruptly:
        docker.kill()
    else:
        docker.dockerd.stop()
    _, said = client.communicate(timeout=60)
    assert client.returncode != 0
    assert "Docker's engine does not answer" in said
    (trial,) = steps.look(run)
    assert trial.state == "failed"

    docker.start()
    launch.follow_run(manage.prepare_retry(run.id))
    assert [trial.state for trial in steps.look(run)] == ["completed"]
    wait(lambda: left_of(docker, run.id, run.directory) == [], within=60)


def test_an_engine_that_cannot_be_reached_is_one_error_before_anything_is_started(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path, home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    registry.push(docker, docker.load(busybox_image), "away:1")
    credentials.remember(Credentials(registry.address, registry.user, registry.password))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    container = {"image": f"{registry.address}/away:1", "runtime": "docker"}
    with pytest.raises(NexaError, match="the engine of Docker does not answer") as refused:
        launch.launch_slurm_sweep(boxed_project(tmp_path / "p", container, command=["true"]), submit=True)
    told = str(refused.value)
    assert "nothing was copied or started" in told and "/nowhere/docker.sock" in told
    assert [line for line in told.splitlines() if not line.strip()] == []
    assert not list(home.glob("runs/*/trials/*"))


def test_a_full_disk_is_said_and_nothing_that_is_half_there_is_used(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, rig_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    digest = pushed(docker, registry, busybox_image, "large:1", "full", mib=40)
    credentials.remember(Credentials(registry.address, registry.user, registry.password))
    config = boxed_project(
        tmp_path / "p",
        {"image": f"{registry.address}/large:1"},
        command=["sh", "-c", "ls -l /full", "trial"],
        seeds=[1],
    )
    with DockerRig(rig_folder / "d", disk_mib=32) as small:
        monkeypatch.setenv("DOCKER_HOST", small.host)
        run = launch.plan_sweep(config)
        for _ in range(2):
            with pytest.raises(ContainerError, match="the disk of Docker's engine is full"):
                launch.follow_run(run)
            assert small.must("images", "-aq") == "" and small.must("ps", "-aq") == ""
            run = manage.prepare_resume(run.id)
        assert not list(run.files.path.glob("trials/*/attempt-*"))
    monkeypatch.setenv("DOCKER_HOST", docker.host)
    launch.follow_run(manage.prepare_resume(run.id))
    assert run.container is not None and run.container.digest == digest
    assert run.files.stdout(0, 1).read_text().split()[4] == str(40 << 20)

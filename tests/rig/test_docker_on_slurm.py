"""Trials in Docker on a cluster's nodes: bounded as their job is, and gone with it, however it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nexa_infra.errors import NexaError
from nexa_infra.operations import launch, manage
from nexa_infra.runs.record import Run
from nexa_infra.spec.cluster import Cluster
from tests.rig.boxed import boxed_project, left_of, pushed
from tests.rig.daemons import environments
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig
from tests.rig.slurm import SlurmRig

# What bounds the program, as the program itself sees it; the kernel's second version has other names for it.
BOUNDS = """
memory=$(cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max)
interfaces=$(ls /sys/class/net | wc -l)
printf '{"memory": %s, "uid": %s, "interfaces": %s}' "$memory" "$(id -u)" "$interfaces" >"$NEXA_METRICS"
echo "node $SLURMD_NODENAME, job $SLURM_JOB_ID"
"""
# It hears no TERM, and leaves another behind that hears none either.
DEAF = "trap '' TERM HUP USR1; (sleep 1102 &); echo up; while :; do sleep 0.2; done"


def until(true: Callable[[], object], what: str, within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def image(docker: DockerRig, registry: RegistryRig, busybox_image: Image, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small image that only the registry has, to which this account is logged in."""
    pushed(docker, registry, busybox_image, "small:1", "here")
    monkeypatch.setenv("DOCKER_CONFIG", registry.login["DOCKER_CONFIG"])
    return f"{registry.address}/small:1"


def test_trials_in_docker_have_their_job_s_memory_no_network_and_the_user_s_id(
    image: str, docker: DockerRig, login_node: Cluster, tmp_path: Path, home: Path
) -> None:
    config = boxed_project(
        tmp_path / "p", {"image": image, "runtime": "docker"}, command=["sh", "-c", BOUNDS, "trial"], seeds=range(4),
        job={"memory": "64M", "time": "00:05:00"},
    )  # fmt: skip
    run = launch.plan_sweep(config, cluster=login_node)
    batch = launch.follow_run(run)
    assert batch.report is not None
    assert batch.report.end == "done"
    assert batch.report.image is not None
    assert batch.report.image.asked == image
    for trial in range(4):
        found = json.loads((Path(run.directory) / "trials" / str(trial) / "metrics.json").read_text())
        assert found == {"memory": 64 << 20, "uid": os.getuid(), "interfaces": 1}
    assert left_of(docker, run.id, run.directory) == []


def follow(run: Run) -> threading.Thread:
    def go() -> None:
        with suppress(NexaError):
            launch.follow_run(run)

    thread = threading.Thread(target=go)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["cancelled", "killed outright"])
def test_a_job_that_is_ended_leaves_no_container_on_its_node(
    how: str, image: str, docker: DockerRig, slurm: SlurmRig, login_node: Cluster, tmp_path: Path, home: Path
) -> None:
    config = boxed_project(
        tmp_path / "p", {"image": image, "runtime": "docker"}, command=["sh", "-c", DEAF, "trial"], seeds=[1, 2],
        job={"memory": "64M", "time": "00:05:00"},
    )  # fmt: skip
    run = launch.plan_sweep(config, cluster=login_node)
    following = follow(run)
    logs = [Path(run.directory) / "trials" / str(trial) / "attempt-1.out" for trial in (0, 1)]
    until(lambda: all(log.exists() and log.read_text() == "up\n" for log in logs), "the trials have not started")
    assert len(docker.containers(run.id)) == 2
    if how == "cancelled":
        manage.cancel(run.id)
    else:
        # As a node does that has lost its patience: everything of the job at once, without a word before.
        for process, found in environments():
            if found.get("SLURM_JOB_NAME", "").startswith(f"nexa-{run.id}") and "NEXA_GUARDED" not in found:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
    until(lambda: left_of(docker, run.id, run.directory) == [], f"left: {left_of(docker, run.id, run.directory)}")
    following.join(60)
    assert not following.is_alive()

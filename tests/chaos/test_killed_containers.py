"""Clients of run_container killed at random instants: no container is left, no process, no mount."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nexa_infra.containers.catalog import Catalog
from tests.rig.daemons import environments
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.proxy import wait

# Half as many as of whole runs; a hundred by `make chaos`. Read here: a test's own environment has no NEXA_* variables.
ROUNDS = int(os.environ.get("NEXA_CHAOS_ROUNDS", "16")) // 2
SEED = int(os.environ.get("NEXA_CHAOS_SEED", "20261124"))

# Containers one after the other: some end at once, and some hear no TERM and have a child that hears none either.
CLIENT = """
import sys
from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.runner import run_container
catalog = Catalog.model_validate_json(sys.argv[1])
print("ready", flush=True)
for turn in range(1000):
    deaf = "trap '' TERM; (setsid sleep 98 &); sleep 0.5"
    run_container("shell", command=["sh", "-c", deaf if turn % 3 == 2 else "true"], catalog=catalog)
"""


def mounts_of(docker: DockerRig) -> set[str]:
    """Return where the engine has something mounted."""
    process = docker.dockerd.process
    assert process
    return {line.split()[4] for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()}


def processes_of(docker: DockerRig, home: Path) -> list[str]:
    """Return what runs for containers: their programs, what reaps them, and what the engine keeps beside each."""
    found = []
    for process, environment in environments():
        try:
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        shim = b"containerd-shim" in words and bytes(docker.folder) in words
        if shim or environment.get("NEXA_RUN_DIR", "").startswith(str(home)) or b"containers/reaper.py" in words:
            found.append(words.decode(errors="replace"))
    return found


def test_clients_that_are_killed_at_random_leave_nothing_of_their_containers(
    docker: DockerRig, busybox_image: Image, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    catalog = Catalog.model_validate({"targets": {"shell": {"image": docker.load(busybox_image)}}})
    before = mounts_of(docker)
    in_mid_run = 0
    for turn in range(ROUNDS):
        chance = random.Random(f"{SEED} {turn}")
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, catalog.model_dump_json(exclude_defaults=True)], stdout=subprocess.PIPE
        )
        with client:
            assert client.stdout is not None and client.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 2.5))
            assert client.poll() is None
            in_mid_run += docker.must("ps", "-aq") != ""
            client.kill()
    wait(lambda: not docker.must("ps", "-aq") and not processes_of(docker, home), within=30)
    wait(lambda: mounts_of(docker) <= before)
    with capfd.disabled():
        sys.stderr.write(f"\nseed {SEED}: {ROUNDS} clients killed, {in_mid_run} with a container: 0 are left\n")
    assert in_mid_run, "no container was there in any round, so nothing is tested"

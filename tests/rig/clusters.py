"""The rig as the clusters that a user has: over SSH, or the login node one stands on; and a project to run there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexa_infra.hosts import connections
from nexa_infra.runs.record import Run
from nexa_infra.spec.cluster import Cluster
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

ROOT = Path(__file__).resolve().parents[2]

# What a trial of `shell_config` gets as $2 is the value of its one parameter.
_CONFIG = """\
job: {{name: {name}, time: "00:05:00", memory: 50M{job}}}
launcher:
  type: command
  command:
    - bash
    - -c
    - |
{script}
    - trial
sweep: {{parameters: {{n: {values}}}}}
{more}
"""


def cluster_at(sshd: SshRig, workdir: Path | str, *, user: str = "root", **more: object) -> Cluster:
    """Return the rig as a cluster that is logged in to."""
    given = {
        "name": "rig",
        "host": sshd.host,
        "port": sshd.port,
        "user": user,
        "key_file": str(sshd.key),
        "known_hosts": str(sshd.known_hosts),
        "workdir": str(workdir),
        "poll_floor": 0.3,
    }
    return Cluster.model_validate({**given, **more})


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A workdir whose name is as hostile as a name can be; it is not made."""
    folder = Path(tempfile.mkdtemp(prefix="nexa-workdir-"))
    folder.chmod(0o755)
    yield folder / 'it\'s "$HOME" `id`\n\\ -rf *'
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(sshd: SshRig, workdir: Path) -> Iterator[Cluster]:
    """The rig, over SSH, whose connections end with the test."""
    yield cluster_at(sshd, workdir)
    connections.close_all()


@pytest.fixture
def login_node(slurm: SlurmRig, workdir: Path) -> Cluster:
    """The rig, as the login node that one stands on."""
    return Cluster(name="here", workdir=str(workdir), poll_floor=0.3)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of one's own that holds this project's example."""
    folder = tmp_path / "my project"
    shutil.copytree(ROOT / "deployments" / "examples", folder / "deployments" / "examples")
    shutil.copytree(ROOT / "deployments" / "configs", folder / "deployments" / "configs")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "All"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


# The digits need scikit-learn, which this environment has, and little memory.
ON_THE_RIG = [f"job.setup.venv={Path(sys.prefix)}", "job.memory=500M"]


def digits(project: Path) -> Path:
    """Return the example sweep's config."""
    return project / "deployments" / "configs" / "digits.yaml"


def shell_config(
    folder: Path, script: str, values: list[object], *, name: str = "shell", job: str = "", more: str = ""
) -> Path:
    """Write the config of a sweep whose trials run a bash script with `--n` and a value as $1 and $2."""
    path = folder / f"{name}.yaml"
    indented = "\n".join(f"      {line}" for line in script.strip().splitlines())
    path.write_text(_CONFIG.format(name=name, job=job, script=indented, values=values, more=more))
    return path


def states_by_sacct(slurm: SlurmRig, run: Run | str, number: int = 1) -> list[str]:
    """Return what sacct says of the tasks of a submission, an attempt each, once it has caught up with their ends."""
    name = run if isinstance(run, str) else run.id
    limit = time.monotonic() + 20.0
    while True:
        done = slurm.run(["sacct", "-XnPD", "--format=State", f"--name=nexa-{name}-{number}", "-S", "now-1hour"])
        states = done.stdout.split()
        if not {"RUNNING", "PENDING"} & set(states) or time.monotonic() > limit:
            return states
        time.sleep(0.5)

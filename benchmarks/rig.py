"""What the benchmarks on the test rig's own Slurm share: the rig, and the words of a process that speaks to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import BenchmarkError, Place, say
from deployments.environment import SetupError
from nexa_infra.hosts import connections
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.spec.cluster import Cluster
from tests.rig.fixtures import why_not
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

_CALLS = "calls"
# Stands before each of these on the PATH of a login, and notes down that it was called.
_COUNTED = ("sbatch", "scancel", "sacct", "sacctmgr", "scontrol", "sdiag", "sinfo", "squeue", "sstat")
_COUNTING = """\
#!/bin/sh
echo {name} >>{calls}
exec {command} "$@"
"""


@contextmanager
def rig(
    here: Place, make_repository: Callable[[Place], None], settings: Mapping[str, str] | None = None
) -> Iterator[tuple[SlurmRig, SshRig]]:
    """Start a Slurm, whose slurm.conf has these settings too, and an sshd to its login node; and make a repository.

    Raises:
        BenchmarkError: there can be none here, or something does not start.
    """
    if reason := why_not():
        raise BenchmarkError(f"no Slurm to submit to: {reason}")
    make_repository(here)
    here.folder.chmod(0o755)
    say("starting a Slurm and an sshd")
    try:
        with SlurmRig(here.folder / "slurm", settings=settings) as cluster, _sshd(here, cluster, "sshd") as sshd:
            yield cluster, sshd
    except SetupError as error:
        raise BenchmarkError(str(error)) from error


@contextmanager
def counted(here: Place, cluster: SlurmRig) -> Iterator[SshRig]:
    """Start an sshd whose sessions find Slurm's commands behind scripts that note down every call."""
    folder, calls = here.folder / "counting", here.folder / _CALLS
    folder.mkdir()
    calls.touch()
    path = cluster.environment()["PATH"]
    for name in _COUNTED:
        if command := shutil.which(name, path=path):
            (folder / name).write_text(_COUNTING.format(name=name, calls=calls, command=command))
            (folder / name).chmod(0o755)
    with _sshd(here, cluster, "sshd-counted", PATH=f"{folder}:{path}") as sshd:
        yield sshd


def _sshd(here: Place, cluster: SlurmRig, name: str, **more: str) -> SshRig:
    environment = {"SLURM_CONF": str(cluster.conf), **more}
    return SshRig(here.folder / name, environment=environment, accounts=cluster.accounts)


def environment_on(here: Place, cluster: SlurmRig) -> dict[str, str]:
    """Return the environment of a process that speaks to the rig, and remembers nothing of other clusters."""
    clean = cluster.environment()
    own = {name: clean[name] for name in ("PATH", "SLURM_CONF")} | {"XDG_CACHE_HOME": str(here.folder / "cache")}
    return {name: value for name, value in here.environment.items() if name in clean or name not in os.environ} | own


# -- in a process that speaks to the rig


def cluster_of(sshd: SshRig, workdir: Path, **more: Any) -> Cluster:
    """Return the rig as a cluster that is reached over SSH."""
    return Cluster(
        name="rig",
        host=sshd.host,
        port=sshd.port,
        user="root",
        key_file=str(sshd.key),
        known_hosts=str(sshd.known_hosts),
        workdir=str(workdir),
        **more,
    )


def host_of(cluster: Cluster) -> SshHost:
    """Return the open connection to a cluster."""
    host = connections.host_of(cluster)
    if not isinstance(host, SshHost):
        raise SystemExit(f"{host.name} is reached without SSH")
    return host


def cancel_all() -> None:
    """Take everything out of the queue."""
    subprocess.run(["scancel", "--user=root"], stdin=subprocess.DEVNULL, check=True)


def forget_calls(folder: Path) -> Path:
    """Return where the calls of Slurm's commands are noted down, which is empty now; some have been made before."""
    calls = folder / _CALLS
    if not calls.read_text():
        raise SystemExit("Slurm's commands were not counted: the sessions there have another PATH than their sshd's")
    calls.write_text("")
    return calls

"""The rig as fixtures: started when the first test asks for it, once a session, and stopped at its end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from deployments.environment import SetupError
from deployments.processes import Process
from tests.rig import packages
from tests.rig.accounts import can_enter
from tests.rig.slurm import SlurmRig
from tests.rig.slurm_parts import clean_environment
from tests.rig.ssh import SshRig

# Short, because a socket's path may have 107 characters, and open to every user: pytest's own folders are neither.
_PREFIX = "nexa-rig-"
FIXTURES = {"slurm", "sshd", "started_slurm", "started_sshd", "rig_folder"}


@functools.cache
def why_not() -> str:
    """Say why there can be no rig here; empty where there can. As root, install what is missing first."""
    if os.geteuid() != 0:
        lacking = packages.missing()
        return "this is not root" + (f", and the machine lacks {', '.join(lacking)}" if lacking else "")
    try:
        packages.ensure()
    except SetupError as error:
        return str(error)
    return "" if can_enter() else "mount namespaces are refused here (CAP_SYS_ADMIN)"


def _needs_rig() -> None:
    if reason := why_not():
        # Continuous integration must not pass by leaving tests out.
        refuse = pytest.fail if os.environ.get("CI", "").lower() in {"1", "true"} else pytest.skip
        refuse(f"no rig: {reason}")


@pytest.fixture(scope="session")
def _session_folder() -> Iterator[Path]:
    """The folder of this session's rigs, with a note of whose it is."""
    _needs_rig()
    _stop_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o755)
    if owner := Process.of(os.getpid()):
        (folder / "owner.json").write_text(json.dumps(asdict(owner)))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _stop_abandoned() -> None:
    """Stop the rigs of sessions that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if Process(**json.loads((folder / "owner.json").read_text())).alive:
                continue
            for rig in [path.parent for path in folder.rglob("slurm.conf")]:
                SlurmRig(rig).stop()
            for rig in [path.parent for path in folder.rglob("sshd_config")]:
                SshRig(rig).stop()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def started_slurm(_session_folder: Path) -> Iterator[SlurmRig]:
    """The session's Slurm; tests ask for `slurm`."""
    rig = SlurmRig(_session_folder / "slurm")
    try:
        rig.start()
        yield rig
    finally:
        rig.stop()


@pytest.fixture(scope="session")
def started_sshd(_session_folder: Path, started_slurm: SlurmRig) -> Iterator[SshRig]:
    """The session's sshd; tests ask for `sshd`."""
    environment = {"SLURM_CONF": str(started_slurm.conf)}
    rig = SshRig(_session_folder / "sshd", environment=environment, accounts=started_slurm.accounts)
    try:
        rig.start()
        yield rig
    finally:
        rig.stop()


@pytest.fixture
def slurm(started_slurm: SlurmRig, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmRig]:
    """The session's Slurm, all of it up and without jobs, to which this process and its children speak."""
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(started_slurm.conf))
    started_slurm.start()
    yield started_slurm
    started_slurm.reset()


@pytest.fixture
def sshd(started_sshd: SshRig, slurm: SlurmRig) -> Iterator[SshRig]:
    """The session's sshd, whose sessions speak to the session's Slurm; no login is counted yet."""
    started_sshd.start()
    started_sshd.forget_logins()
    yield started_sshd
    started_sshd.sshd.send(signal.SIGCONT)
    started_sshd.cut()


@pytest.fixture
def rig_folder(_session_folder: Path) -> Iterator[Path]:
    """A folder for one test's own rig: short, and open to every user."""
    folder = Path(tempfile.mkdtemp(dir=_session_folder))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)

"""The rig as fixtures: started when the first test asks for it, once a session, and stopped at its end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from deployments.environment import SetupError
from deployments.processes import Process
from tests.rig import images, packages, slurm_new
from tests.rig.accounts import can_enter
from tests.rig.apptainer import ApptainerRig
from tests.rig.daemons import put
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig
from tests.rig.slurm import SlurmRig
from tests.rig.slurm_parts import clean_environment
from tests.rig.ssh import LOGIN_PATH, SshRig

# Short, because a socket's path may have 107 characters, and open to every user: pytest's own folders are neither.
_PREFIX = "nexa-rig-"
FIXTURES = {
    "slurm", "sshd", "started_slurm", "started_sshd", "rig_folder",
    "docker", "registry", "apptainer", "busybox_image", "python_image", "container_packages",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which Slurm the rig is made of."""
    parser.addoption(
        "--slurm", choices=["machine", "new"], default=os.environ.get("NEXA_RIG_SLURM", "machine"),
        help="the machine's own Slurm, or a newer Debian's, for the tests that speak to it (also by NEXA_RIG_SLURM)",
    )  # fmt: skip


def pytest_report_header(config: pytest.Config) -> str:
    """Say it of the run."""
    return f"slurm: {config.getoption('--slurm')}"


@functools.cache
def why_not(*, containers: bool = False) -> str:
    """Say why there can be no rig here; empty where there can. As root, install what is missing first."""
    needed = packages.NEEDED | packages.CONTAINERS if containers else packages.NEEDED
    if os.geteuid() != 0:
        lacking = packages.missing(needed)
        return "this is not root" + (f", and the machine lacks {', '.join(lacking)}" if lacking else "")
    try:
        packages.ensure(needed)
    except SetupError as error:
        return str(error)
    return "" if can_enter() else "mount namespaces are refused here (CAP_SYS_ADMIN)"


def _needs_rig(*, containers: bool = False) -> None:
    if reason := why_not(containers=containers):
        # Continuous integration must not pass by leaving tests out.
        refuse = pytest.fail if os.environ.get("CI", "").lower() in {"1", "true"} else pytest.skip
        refuse(f"no rig: {reason}")


@pytest.fixture(scope="session")
def _chosen_slurm(request: pytest.FixtureRequest) -> Iterator[None]:
    """The Slurm that was asked for, first on the PATH of this process and so of all that it starts."""
    _needs_rig()
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--slurm") == "new":
            patch.setenv("PATH", str(slurm_new.install()), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def _session_folder(_chosen_slurm: None) -> Iterator[Path]:
    """The folder of this session's rigs, with a note of whose it is."""
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
            for record in [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/daemons/*.json")]:
                if record.name == "dockerd.json":
                    DockerRig(record.parents[1]).stop()
                elif record.name == "registry.json":
                    RegistryRig(record.parents[1]).stop()
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
    path = f"{_session_folder / 'tools'}:{slurm_new.path(LOGIN_PATH)}"
    environment = {"SLURM_CONF": str(started_slurm.conf), "PATH": path}
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


@pytest.fixture(scope="session")
def container_packages(_session_folder: Path) -> None:
    """What the rig of containers needs of Debian, which the other tests do not wait for."""
    _needs_rig(containers=True)


@pytest.fixture(scope="session")
def _started_docker(_session_folder: Path, container_packages: None) -> Iterator[DockerRig]:
    rig = DockerRig(_session_folder / "docker")
    try:
        rig.start()
        yield rig
    finally:
        rig.stop()


@pytest.fixture(scope="session")
def _started_registry(_session_folder: Path, container_packages: None) -> Iterator[RegistryRig]:
    rig = RegistryRig(_session_folder / "registry")
    try:
        rig.start()
        yield rig
    finally:
        rig.stop()


@pytest.fixture(scope="session")
def _written_apptainer(_session_folder: Path, container_packages: None) -> ApptainerRig:
    rig = ApptainerRig(_session_folder / "apptainer")
    rig.write()
    return rig


@pytest.fixture
def _tools(_session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is first on the PATH of this process, of its jobs and of the rig's logins.

    Jobs have the PATH of whoever submits them, this process or a login, so that neither slurmd nor a config
    need know of it; between tests it is empty, and nobody finds a docker or an apptainer there.
    """
    folder = _session_folder / "tools"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def docker(_started_docker: DockerRig, _tools: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerRig]:
    """The session's dockerd, without containers, to which `docker` speaks here, in jobs and in logins."""
    _started_docker.start()
    program = shlex.quote(shutil.which("docker") or "docker")
    host = shlex.quote(_started_docker.host)
    put(_tools / "docker", f'#!/bin/sh\nDOCKER_HOST=${{DOCKER_HOST:-{host}}} exec {program} "$@"\n', mode=0o755)
    monkeypatch.setenv("DOCKER_HOST", _started_docker.host)
    monkeypatch.setenv("DOCKER_CONFIG", str(_started_docker.config))
    yield _started_docker
    _started_docker.dockerd.send(signal.SIGCONT)
    _started_docker.remove_containers()


@pytest.fixture
def registry(_started_registry: RegistryRig) -> RegistryRig:
    """The session's registry of images, which asks for a password."""
    _started_registry.start()
    return _started_registry


@pytest.fixture
def apptainer(_written_apptainer: ApptainerRig, _tools: Path, monkeypatch: pytest.MonkeyPatch) -> ApptainerRig:
    """A real Apptainer, which is `apptainer` here, in jobs and in logins."""
    (_tools / "apptainer").symlink_to(_written_apptainer.program)
    monkeypatch.setenv("APPTAINER_CACHEDIR", str(_written_apptainer.cache))
    return _written_apptainer


@pytest.fixture(scope="session")
def busybox_image(container_packages: None) -> Image:
    """A small image: a shell and its tools."""
    return images.busybox()


@pytest.fixture(scope="session")
def python_image(container_packages: None) -> Image:
    """An image with bash and Python."""
    return images.python()

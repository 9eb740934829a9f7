"""What is wrong with this machine, and what to do about it, for runs of the local default."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from nexa_infra.containers.docker import SOCKET, connect
from nexa_infra.errors import ContainerError, HostError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.provisioning.check import FEW_INODES, GIB, Check, numbers


def check_here(home: Path) -> Iterator[Check]:
    """Look at this machine, as the local default needs it; `home` is where its runs are kept."""
    yield _tool("bash", ["bash", "--version"], r"version (\d+\.\d+)", "install bash 4.2 or newer", least=(4, 2))
    yield _tool("rsync", ["rsync", "--version"], r"version (\d+\.\d+)", "apt-get install rsync, or your system's own")
    yield _tool("git", ["git", "--version"], r"version (\d+\.\d+)", "apt-get install git, or your system's own")
    yield _sure("pidfd", _pidfd, "a kernel of 5.3 or newer is needed, so that trials end with their client")
    yield _sure("/proc", _proc, "mount /proc: it is how leftover processes are found")
    yield _writable(home)
    yield _space(home)
    yield Check("cores", True, f"{len(os.sched_getaffinity(0))} usable")
    yield _containers()
    gpus = sorted(Path("/dev").glob("nvidia[0-9]*"))
    yield Check("GPUs", True, f"{len(gpus)} NVIDIA" if gpus else "none: jobs that ask for GPUs run without them here")


def _tool(name: str, argv: list[str], pattern: str, remedy: str, least: tuple[int, int] = (0, 0)) -> Check:
    try:
        found = re.search(pattern, LocalHost().run(argv, timeout=10).stdout)
    except HostError:
        return Check(name, False, "not installed", remedy)
    if found is None:
        return Check(name, False, "its version cannot be read", remedy)
    fine = numbers(found[1]) >= least
    return Check(name, fine, found[1], "" if fine else remedy)


def _containers() -> Check:
    """Say what runs containers here; without a socket, the SDK of Docker is not even looked at."""
    ready, silent, named = [], "", os.environ.get("DOCKER_HOST")
    if named or SOCKET.exists():
        try:
            with closing(connect()) as client:
                ready.append(f"docker {client.version()['Version']}")
        except (ContainerError, OSError):
            silent = f"docker gives no answer at {named or SOCKET}"
    for name in ("apptainer", "singularity"):
        with suppress(HostError):
            if found := re.search(r"\d+\.\d+(\.\d+)?", LocalHost().run([name, "--version"], timeout=10).stdout):
                ready.append(f"{name} {found[0]}")
    told = ", ".join([*ready, *([silent] if silent else [])])
    if silent and named:
        return Check("containers", False, told, "start Docker's engine, or correct or unset DOCKER_HOST")
    if not ready:
        return Check("containers", True, f"{silent or 'neither Docker nor Apptainer is here'}: trials run without")
    return Check("containers", True, told)


def _sure(name: str, look: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, True, look())
    except OSError as error:
        return Check(name, False, str(error), remedy)


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "works"


def _proc() -> str:
    Path("/proc/self/environ").read_bytes()
    return "readable"


def _writable(home: Path) -> Check:
    """Say whether runs can be made in their home: files in it, and the locks that two clients need."""
    remedy = "set NEXA_HOME to another folder"
    try:
        nearest = _nearest(home)
        with tempfile.TemporaryFile(dir=nearest) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Check("home", False, f"{home}: {error.strerror}", remedy)
    return Check("home", True, str(home))


def _space(home: Path) -> Check:
    try:
        disk = os.statvfs(_nearest(home))
    except OSError as error:
        return Check("space", False, f"{home}: {error.strerror}", "set NEXA_HOME to another folder")
    free = disk.f_bavail * disk.f_frsize / GIB
    # Some file systems do not count inodes, and say 0 of 0.
    few = disk.f_files > 0 and disk.f_favail < FEW_INODES
    inodes = f", {disk.f_favail:,} inodes" if disk.f_files else ""
    fine = free >= 1 and not few
    return Check("space", fine, f"{free:.1f} GiB{inodes} free", "" if fine else "free some: `nexa-infra clean`")


def _nearest(home: Path) -> Path:
    """Return the home, or the folder above it that is there."""
    return next(place for place in (home, *home.parents) if place.exists())

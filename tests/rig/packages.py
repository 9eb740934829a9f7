"""The Debian packages that the rig is made of: which are missing, and how they come without their daemons."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from deployments.environment import SetupError, install_packages

# A package, and the commands any of which shows that it is there (daemons are found in /usr/sbin as well).
NEEDED: dict[str, tuple[str, ...]] = {
    "slurm-client": ("sbatch",),
    "slurmctld": ("slurmctld",),
    "slurmd": ("slurmd",),
    "slurmdbd": ("slurmdbd",),
    "munge": ("munged",),
    "mariadb-server": ("mariadbd",),
    "openssh-server": ("sshd",),
    "openssh-client": ("ssh",),
    "rsync": ("rsync",),
    "csh": ("csh",),
}
# What the rig of containers needs besides; Debian's docker.io brings containerd, runc and docker-init.
CONTAINERS: dict[str, tuple[str, ...]] = {
    "docker.io": ("dockerd",),
    "docker-registry": ("docker-registry",),
    "busybox-static": ("busybox",),
    "debootstrap": ("debootstrap",),
}
# What a new package would start at the machine's next boot; the rig starts its own, with its own configuration.
_UNITS: dict[str, tuple[str, ...]] = {
    "slurmctld": ("slurmctld",),
    "slurmd": ("slurmd",),
    "slurmdbd": ("slurmdbd",),
    "munge": ("munge",),
    "mariadb-server": ("mariadb",),
    "openssh-server": ("ssh",),
    "docker.io": ("docker.service", "docker.socket", "containerd"),
    "docker-registry": ("docker-registry",),
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = "#!/bin/sh\n# Nexa Infra's test rig: new packages start no daemon. Safe to remove.\nexit 101\n"


def path_with_sbin() -> str:
    """Return PATH with the folders of the daemons, which a session's may lack."""
    present = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*present, *(folder for folder in ("/usr/sbin", "/sbin") if folder not in present)])


def missing(needed: Mapping[str, tuple[str, ...]] = NEEDED) -> list[str]:
    """Return the packages, by default those of Slurm and SSH, that this machine lacks."""
    path = path_with_sbin()
    return [name for name, commands in needed.items() if not any(shutil.which(each, path=path) for each in commands)]


def ensure(needed: Mapping[str, tuple[str, ...]] = NEEDED) -> None:
    """Install what is missing; costs next to nothing where all is there.

    Raises:
        SetupError: this is not root, or not a Debian, or apt-get failed; the message names the packages.
    """
    if not (packages := missing(needed)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        install_packages(packages)  # refuses, and says which
    with _alone(), _no_daemons(packages):
        if packages := missing(needed):  # unless another process has brought them meanwhile
            install_packages(packages)
    if still := missing(needed):
        raise SetupError(f"apt-get succeeded, and yet these are missing: {', '.join(still)}")


@contextmanager
def _alone() -> Iterator[None]:
    """Wait for what another process is installing."""
    handle = os.open(_POLICY.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _no_daemons(packages: Sequence[str]) -> Iterator[None]:
    """Keep the packages' own scripts from starting what they bring, now and at the next boot."""
    ours = not _POLICY.exists() or _POLICY.read_text() == _POLICY_TEXT
    if ours:
        _POLICY.write_text(_POLICY_TEXT)
        _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            _POLICY.unlink(missing_ok=True)
        if Path("/run/systemd/system").is_dir():
            units = [unit for name in packages for unit in _UNITS.get(name, ())]
            subprocess.run(["systemctl", "--quiet", "disable", "--now", *units], check=False)


if __name__ == "__main__":
    try:
        ensure()
    except SetupError as error:
        sys.exit(str(error))

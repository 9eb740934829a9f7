"""A real dockerd of the rig's own, with its images, its containers and its mounts to itself."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

from deployments.environment import SetupError
from deployments.processes import MARK, Process
from tests.rig.daemons import Daemon, end, sweep
from tests.rig.images import Image
from tests.rig.slurm_parts import clean_environment

_LONGEST_SOCKET = 107
# Mounts of the machine come in, those of dockerd stay inside: they end with the last process that sees them.
_UNSHARE = ["unshare", "--mount", "--propagation", "slave", "--"]
# What dockerd keeps outside the folders that it is told: its key and its settings, and the sockets of containers.
_INSIDE = """\
set -e
mkdir -p /etc/docker /run/containerd
mount --bind "$1/etc" /etc/docker
mount --bind "$1/run" /run/containerd
if test -e "$1/disk"; then mount -o loop "$1/disk" "$1/data"; fi
shift
exec "$@"
"""


class DockerRig:
    """Starts, finds and stops a dockerd in `folder`, which may have been started by another process.

    Args:
        folder: where everything lives; its path must be short.
        disk_mib: the size of a disk of its own for images and containers, by default the folder's.
    """

    def __init__(self, folder: Path, *, disk_mib: int | None = None) -> None:
        self.folder = folder.resolve()
        self.disk_mib = disk_mib
        self.socket = self.folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.config = self.folder / "client"

    @cached_property
    def group(self) -> str:
        """The control group within which every container has its own."""
        return f"nexa-rig-{hashlib.sha256(bytes(self.folder)).hexdigest()[:12]}"

    @cached_property
    def dockerd(self) -> Daemon:
        """The daemon itself, whose child is a containerd of its own; containers outlive both."""
        argv = [
            "sh", "-c", _INSIDE, "sh", str(self.folder),
            "dockerd", "-H", self.host, "--data-root", str(self.folder / "data"), "--pidfile", str(self.folder / "pid"),
            "--exec-root", str(self.folder / "exec"), "--cgroup-parent", self.group, "--storage-driver=overlay2",
            "--iptables=false", "--bridge=none",
        ]  # fmt: skip
        return Daemon("dockerd", self.folder / "daemons", [*_UNSHARE, *argv], clean_environment())

    # -- up and down

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemon, unless it runs, and wait until it answers.

        Raises:
            SetupError: it does not start; the message ends with its last words.
        """
        if len(str(self.socket)) > _LONGEST_SOCKET:
            raise SetupError(f"{self.folder} is no place for a rig: its path must be short")
        for name in ("client", "data", "etc", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        disk = self.folder / "disk"
        if self.disk_mib and not disk.exists():
            draft = disk.with_name("disk.new")
            subprocess.run(["/sbin/mkfs.ext4", "-qF", "-m0", str(draft), f"{self.disk_mib}M"], check=True)
            draft.replace(disk)
        if not self.dockerd.process:
            for name in ("pid", "exec/containerd/containerd.pid"):
                (self.folder / name).unlink(missing_ok=True)  # of one that was killed, and may still be a zombie
        self.dockerd.start()
        self.await_ready()

    def await_ready(self, *, patience: float = 30.0) -> None:
        """Wait until the daemon answers.

        Raises:
            SetupError: it ended, or `patience` seconds went by; the message ends with its last words.
        """
        self.dockerd.await_ready(lambda: self.run(["version"]).returncode == 0, patience=patience)

    def stop(self) -> None:
        """End the containers, the daemon and whatever they left; the folder stays."""
        self.dockerd.send(signal.SIGCONT)
        self.remove_containers()
        self.dockerd.stop()
        while left := self._contained():
            end(left)
        sweep(lambda environment: environment.get(MARK) == self.dockerd.mark)
        deadline = time.monotonic() + 2.0  # a group goes only when the last process in it has quite gone
        while self._remove_groups() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _remove_groups(self) -> bool:
        """Remove the control groups that are empty, and say whether there were any."""
        found = list(Path("/sys/fs/cgroup").rglob(self.group))
        for top in found:
            for group, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    Path(group).rmdir()
        return bool(found)

    def kill(self) -> None:
        """End the daemon, and its containerd with it, by SIGKILL; containers go on."""
        self.dockerd.kill()

    def remove_containers(self) -> None:
        """End and forget every container, as far as the daemon answers."""
        with suppress(subprocess.TimeoutExpired):
            if self.dockerd.process and (found := self.run(["ps", "-aq"], timeout=10).stdout.split()):
                self.run(["rm", "--force", "--volumes", *found])

    def _contained(self) -> list[Process]:
        """Return the processes of containers, which inherit nothing else by which to know them."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it ended meanwhile
                if entry.name.isdigit() and f"/{self.group}/" in (entry / "cgroup").read_text():
                    found.append(Process.of(int(entry.name)))
        return [process for process in found if process]

    # -- use

    def environment(self) -> dict[str, str]:
        """Return the environment in which docker speaks to this daemon, and keeps its passwords here."""
        return clean_environment() | {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.config)}

    def run(
        self, argv: Sequence[str], *, more: Mapping[str, str] | None = None, script: str = "", timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a docker command such as `["ps"]`, with `script` on its standard input and `more` in its environment.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        return subprocess.run(
            ["docker", *argv], env=self.environment() | dict(more or {}), input=script,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def must(self, *argv: str, more: Mapping[str, str] | None = None) -> str:
        """Run a docker command, and return what it prints.

        Raises:
            SetupError: it fails; the message holds its words.
        """
        done = self.run(argv, more=more)
        if done.returncode:
            raise SetupError(
                f"docker {' '.join(argv)} failed (exit code {done.returncode}):\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def load(self, image: Image) -> str:
        """Load an image, unless it is there, and return its name."""
        if self.run(["image", "inspect", image.name]).returncode:
            self.must("load", "--quiet", "--input", str(image.archive))
        return image.name

    def containers(self, run: str) -> list[str]:
        """Return the ids of a run's containers, running or not."""
        return self.must("ps", "-aq", "--filter", f"label=nexa.run={run}").split()

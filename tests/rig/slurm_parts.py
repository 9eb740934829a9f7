"""What the rig's Slurm is made of: its folder, its files and its daemons."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from deployments.environment import SetupError
from deployments.processes import MARK
from tests.rig import slurm_files as files
from tests.rig import slurm_new
from tests.rig.accounts import Accounts
from tests.rig.daemons import Daemon, free_ports, put
from tests.rig.packages import path_with_sbin

# Those by which Slurm's commands take options from the environment, or believe themselves inside a job.
_SLURM_NAMES = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURMD_", "SPRIO_")
_LONGEST_SOCKET = 107
_MEMORY = Path("/sys/fs/cgroup/memory")


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what another Slurm, or another service, has put there."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith((*_SLURM_NAMES, MARK))}
    return passed | {"PATH": path_with_sbin()}


class SlurmParts:
    """The parts of a Slurm in `folder`, running or not.

    Args:
        folder: where everything lives; it must be reachable by every user, and its path short and plain.
        accounting: without it there is no database, no slurmdbd, and sacct has nothing to say.
        settings: lines of slurm.conf that replace the rig's, such as `{"MaxArraySize": "20"}`.
    """

    def __init__(self, folder: Path, *, accounting: bool = True, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.accounting = accounting
        self.settings = dict(settings or {})
        self.accounts = Accounts(self.folder)
        self.conf = self.folder / "slurm.conf"

    @cached_property
    def ports(self) -> files.Ports:
        """The daemons' ports: chosen once, the same after a restart."""
        record = self.folder / "ports.json"
        if not record.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(asdict(files.Ports(*free_ports(5)))))
        return files.Ports(**json.loads(record.read_text()))

    def environment(self) -> dict[str, str]:
        """Return the environment in which Slurm's commands speak to this rig."""
        return clean_environment() | {"SLURM_CONF": str(self.conf)}

    def _daemon(self, name: str, *argv: str) -> Daemon:
        return Daemon(name, self.folder / "daemons", self.accounts.enter(argv), self.environment())

    @cached_property
    def munged(self) -> Daemon:
        """Who says whose a request is."""
        place = self.folder / "munge"
        options = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        argv = [f"--{name}{'' if name == 'socket' else '-file'}={place / file}" for name, file in options.items()]
        return self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=4", *argv)

    @cached_property
    def database(self) -> Daemon:
        """MariaDB, with its data in the rig."""
        place = self.folder / "mariadb"
        return self._daemon(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={place / 'data'}",
            f"--socket={place / 'socket'}", f"--pid-file={place / 'pid'}", f"--init-file={place / 'init.sql'}",
            "--bind-address=127.0.0.1", f"--port={self.ports.database}", "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900", f"--tmpdir={place}",
        )  # fmt: skip

    @cached_property
    def dbd(self) -> Daemon:
        """slurmdbd, which keeps the accounts and what sacct tells."""
        conf = self.folder / "slurmdbd.conf"
        daemon = self._daemon("slurmdbd", "slurmdbd", "-D")
        return Daemon(daemon.name, daemon.folder, daemon.argv, {**daemon.environment, "SLURM_CONF": str(conf)})

    @cached_property
    def controller(self) -> Daemon:
        """slurmctld, to which sbatch and squeue speak."""
        return self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))

    def node(self, name: str) -> Daemon:
        """A node's slurmd: `n1` or `n2`."""
        argv = ["slurmd", "-D", "-N", name, "-f", str(self.conf), *slurm_new.slurmd_options()]
        if self.memory_limits:  # every Slurm calls its group slurm_n1: this one's is within the rig's own
            within = f'mount --bind "$1" {_MEMORY} && shift && exec "$@"'
            argv = ["sh", "-c", within, "sh", str(self.memory_group), *argv]
        return self._daemon(name, *argv)

    @property
    def memory_limits(self) -> bool:
        """Whether a job that takes more memory than it asked for ends as OUT_OF_MEMORY (cgroup v1 alone, here)."""
        return os.access(_MEMORY / "cgroup.procs", os.W_OK)

    @property
    def memory_group(self) -> Path:
        """The rig's own control group, within which its nodes make theirs."""
        return _MEMORY / f"nexa-rig-{self.ports.controller}"

    def write(self) -> None:
        """Write what is not there yet, or would now be other.

        Raises:
            SetupError: a Slurm cannot live in this folder.
        """
        for name in ("munge", "state", "log", "spool", "mariadb", "daemons", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        longest = self.folder / "mariadb" / "socket"
        if len(str(longest)) > _LONGEST_SOCKET or any(letter in str(self.folder) for letter in " ,=#\"'\\%"):
            raise SetupError(f"{self.folder} is no place for a rig: its path must be short and plain")
        for secret in (self.folder / "munge" / "key", self.password):
            if not secret.exists():
                put(secret, secrets.token_hex(64), mode=0o600)
        for name in files.NODES:
            (self.folder / "spool" / name).mkdir(exist_ok=True)
        if self.memory_limits:
            self.memory_group.mkdir(exist_ok=True)
        self.accounts.write()
        for kinds in files.devices(self.folder).values():
            for device in [device for _, devices in kinds for device in devices if not device.exists()]:
                device.parent.mkdir(parents=True, exist_ok=True)
                os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as harmless as /dev/null
        limits = self.memory_limits
        options = files.slurm_conf(
            self.folder,
            self.ports,
            {**slurm_new.settings(), **self.settings},
            accounting=self.accounting,
            memory_limits=limits,
        )
        put(self.conf, options)
        put(self.folder / "gres.conf", files.gres_conf(self.folder))
        put(self.folder / "cgroup.conf", files.cgroup_conf(memory_limits=limits))
        dbd = files.slurmdbd_conf(self.folder, self.ports, self.password.read_text(), slurm_new.settings())
        put(self.folder / "slurmdbd.conf", dbd, mode=0o600)

    @property
    def password(self) -> Path:
        """The file with the database's password."""
        return self.folder / "mariadb" / "password"

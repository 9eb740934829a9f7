"""A real sshd of the rig's own, on the loopback, with its own keys and its own users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from deployments.environment import SetupError
from deployments.processes import MARK, Process
from tests.rig import accounts as users
from tests.rig import slurm_new
from tests.rig.accounts import Account, Accounts
from tests.rig.daemons import Daemon, command_of, descendants, end, free_ports, listens, put, sweep
from tests.rig.packages import path_with_sbin
from tests.rig.slurm_parts import clean_environment

HOST = "127.0.0.1"
# What sshd gives root by itself.
LOGIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SshRig:
    """Starts, finds and stops an sshd in `folder`, which may have been started by another process.

    Args:
        folder: where everything lives; it must be reachable by every user.
        environment: what every session finds in its environment, such as SLURM_CONF; a Slurm that is newer
            than the machine's comes first in its PATH, unless that is among it.
        banner: text that the server sends before asking who it is.
        second_factor: after the key, ask for a code by keyboard-interactive (`accounts.CODE`).
        settings: lines of sshd_config that replace the rig's, such as `{"MaxSessions": "1"}`.
        accounts: who there is, by default users with homes in `folder`; a Slurm's have theirs there.
    """

    def __init__(
        self, folder: Path, *, environment: Mapping[str, str] | None = None, banner: str = "",
        second_factor: bool = False, settings: Mapping[str, str] | None = None,
        accounts: Accounts | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder.resolve()
        self.host = HOST
        newer = {"PATH": slurm_new.path(LOGIN_PATH)} if slurm_new.in_use() else {}
        self.environment = {**newer, **(environment or {})}
        self.banner = banner
        self.second_factor = second_factor
        self.settings = dict(settings or {})
        self.accounts = accounts or Accounts(self.folder)
        self.key = self.folder / "client" / "id_ed25519"
        self.known_hosts = self.folder / "client" / "known_hosts"
        self.log = self.folder / "sshd.log"

    @cached_property
    def port(self) -> int:
        """The port on the loopback: chosen once, the same after a restart."""
        record = self.folder / "port.json"
        if not record.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(free_ports(1)))
        return int(json.loads(record.read_text())[0])

    @cached_property
    def sshd(self) -> Daemon:
        """The server itself; each connection is a child of it."""
        program = (
            shutil.which("sshd", path=path_with_sbin()) or "/usr/sbin/sshd"
        )  # it starts itself again, and wants to know its place
        argv = [program, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.log)]
        return Daemon("sshd", self.folder / "daemons", self.accounts.enter(argv), clean_environment())

    # -- up and down

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            SetupError: it does not start; the message ends with its last words.
        """
        self._write()
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's own place, shared with any other on the machine
        self.sshd.start()
        self.sshd.await_ready(lambda: listens(self.port))

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("client", "server"):
            (self.folder / name).mkdir(exist_ok=True, mode=0o700 if name == "client" else 0o755)
        self.accounts.write()
        if not self._host_key.exists():
            _keygen(self._host_key)
        if not (ca := self.folder / "server" / "ca").exists():
            _keygen(ca)
        if not self.key.exists():
            self.new_key(self.key.name)
        self.trust_host_key()
        put(self.folder / "server" / "banner", self.banner)
        lines = [f"{name} {value}" for name, value in {**self._options(), **self.settings}.items()]
        if self.environment:
            pairs = [f'"{name}={value}"' for name, value in self.environment.items()]
            lines.append(f"SetEnv {' '.join(pairs)}")
        put(self.folder / "sshd_config", "\n".join(lines) + "\n")

    def _options(self) -> dict[str, str]:
        place = self.folder / "server"
        options = {
            "ListenAddress": HOST,
            "Port": str(self.port),
            "PidFile": str(self.folder / "daemons" / "sshd.pid"),
            "HostKey": str(self._host_key),
            "AuthorizedKeysFile": str(place / "authorized_keys"),
            "TrustedUserCAKeys": str(place / "ca.pub"),
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "UseDNS": "no",
            "PrintMotd": "no",
            "PrintLastLog": "no",
            "LogLevel": "INFO",  # VERBOSE says "Accepted key" as well, twice a login
            "MaxSessions": "64",
            "MaxStartups": "64",
            "Subsystem": "sftp /usr/lib/openssh/sftp-server",
        }
        if self.banner:
            options["Banner"] = str(place / "banner")
        if self.second_factor:
            options |= {
                "UsePAM": "yes",
                "KbdInteractiveAuthentication": "yes",
                "AuthenticationMethods": "publickey,keyboard-interactive:pam",
            }
        return options

    def stop(self) -> None:
        """End the server, its connections and whatever they left."""
        self._end(kill=False)
        tail = f" {HOST} {self.port}"
        mark = self.sshd.mark
        sweep(
            lambda found: (
                found.get(MARK) == mark
                or ("SLURM_JOB_ID" not in found and found.get("SSH_CONNECTION", "").endswith(tail))
            )  # jobs are Slurm's
        )

    # -- bad days

    def kill(self) -> None:
        """End the server and its connections by SIGKILL; commands that run in them are left."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        connections = self._connections()
        (self.sshd.kill if kill else self.sshd.stop)()
        end([*connections, *self._connections()])

    def cut(self) -> int:
        """End every connection by SIGKILL, and return how many there were; the server goes on."""
        connections = self._connections()
        end(connections)
        leader = self.sshd.process
        return sum(leader is not None and process.parent == leader.pid for process in connections)

    def _connections(self) -> list[Process]:
        """Return the server's processes that serve a connection."""
        leader = self.sshd.process
        return [process for process in descendants(leader) if command_of(process) == "sshd"] if leader else []

    def change_host_key(self) -> None:
        """Start again with another host key, of which the client's known_hosts does not know."""
        self.stop()
        for path in (self._host_key, self._host_key.with_suffix(".pub")):
            path.unlink()
        known = self.known_hosts.read_text()
        self.start()
        self.known_hosts.write_text(known)

    def logins(self) -> int:
        """Return how many times the server has let somebody in."""
        return sum("Accepted " in line and " for " in line for line in self.log.read_text().splitlines())

    def forget_logins(self) -> None:
        """Empty the log: sshd goes on at its start."""
        if self.log.exists():
            os.truncate(self.log, 0)

    # -- keys

    @property
    def _host_key(self) -> Path:
        return self.folder / "server" / "host_ed25519"

    def trust_host_key(self) -> None:
        """Let the client know the host key that the server has now."""
        kind, key, *_ = self._host_key.with_suffix(".pub").read_text().split()
        self.known_hosts.write_text(f"[{HOST}]:{self.port} {kind} {key}\n")

    def new_key(self, name: str, *, passphrase: str = "", authorized: bool = True) -> Path:
        """Make a client's key, which the server takes for every user if it is authorized."""
        key = self.folder / "client" / name
        _keygen(key, passphrase)
        if authorized:
            with (self.folder / "server" / "authorized_keys").open("a") as stream:
                stream.write(key.with_suffix(".pub").read_text())
        return key

    def certify(self, key: Path, *accounts: Account) -> Path:
        """Return a certificate for a key, of an authority that the server trusts."""
        names = ",".join(account.name for account in accounts or (users.ROOT,))
        argv = ["ssh-keygen", "-q", "-s", str(self.folder / "server" / "ca"), "-I", "rig", "-n", names, "-V", "+1d"]
        _run([*argv, f"{key}.pub"])
        return key.with_name(f"{key.name}-cert.pub")

    # -- use

    def command(
        self, *remote: str, user: Account = users.ROOT, key: Path | None = None, options: Sequence[str] = ()
    ) -> list[str]:
        """Return the ssh command that runs `remote` here, with no configuration but the rig's."""
        return [
            "ssh", "-F", "none", "-p", str(self.port), "-i", str(key or self.key), "-o", "IdentitiesOnly=yes",
            "-o", "IdentityAgent=none", "-o", f"UserKnownHostsFile={self.known_hosts}",
            "-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes", *options,
            f"{user.name}@{HOST}", *remote,
        ]  # fmt: skip

    def run(
        self, *remote: str, user: Account = users.ROOT, script: str = "", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line over ssh, with `script` on its standard input.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        argv = self.command(*remote, user=user, options=["-o", "BatchMode=yes"])
        return subprocess.run(argv, input=script, capture_output=True, text=True, timeout=timeout, check=False)


def _keygen(path: Path, passphrase: str = "") -> None:
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", f"rig-{path.name}", "-f", str(path)])


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{argv[0]} failed (exit code {done.returncode}):\n{done.stdout}{done.stderr}")

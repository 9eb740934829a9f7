"""How one logs in to a host: keys, agents, certificates, a jump host; and why it did not work."""

from __future__ import annotations

import getpass
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa_infra.errors import HostError

if TYPE_CHECKING:
    import fabric
    import paramiko

    from nexa_infra.spec.cluster import Cluster

# How long a host may take to answer a connection, seconds.
CONNECT_SECONDS = 20.0
# How long a login may take: a person may be asked for a second factor, seconds.
LOGIN_SECONDS = 90.0

# What opens locked keys, by the key's path: told by whoever holds it, and kept in this process alone.
_passphrases: dict[str, str] = {}


def remember_passphrase(key_file: str, passphrase: str) -> None:
    """Keep what opens a locked key, for this process's logins."""
    _passphrases[str(Path(key_file).expanduser())] = passphrase


@dataclass(frozen=True)
class Login:
    """How one logs in; it holds no secret."""

    host: str
    user: str | None = None
    port: int = 22
    key_file: str | None = None
    known_hosts: str | None = None
    jump_host: str | None = None
    keyboard_interactive: bool = False

    @classmethod
    def of(cls, cluster: Cluster) -> Login:
        """Return how one logs in to a cluster that has a host."""
        if cluster.host is None:
            raise ValueError(f"cluster {cluster.name} has no host to log in to")
        return cls(
            host=cluster.host,
            user=cluster.user,
            port=cluster.port,
            key_file=cluster.key_file,
            known_hosts=cluster.known_hosts,
            jump_host=cluster.jump_host,
            keyboard_interactive=cluster.keyboard_interactive,
        )

    def __str__(self) -> str:
        where = f"{self.user}@{self.host}" if self.user else self.host
        return where if self.port == 22 else f"{where}:{self.port}"


def connect(login: Login) -> tuple[fabric.Connection, paramiko.Transport]:
    """Log in; the host's key, and a jump host's, must be known.

    Raises:
        HostError: it did not work; the message says why, and what to do.
    """
    import paramiko

    connection = _connection(login)
    try:
        try:
            connection.open()
        except paramiko.AuthenticationException:
            if not _second_factor(login, connection):
                raise
        transport = connection.client.get_transport()
        if transport is None or not transport.is_authenticated():
            raise paramiko.SSHException("the connection ended while logging in")
    except Exception as error:
        connection.close()
        raise HostError(_complaint(login, error)) from error
    connection.transport = transport
    transport.set_keepalive(15)
    return connection, transport


def _connection(login: Login) -> fabric.Connection:
    import fabric

    settings: dict[str, Any] = {"banner_timeout": CONNECT_SECONDS, "auth_timeout": LOGIN_SECONDS}
    if login.key_file:
        path = str(Path(login.key_file).expanduser())
        if not Path(path).is_file():
            raise HostError(
                f"the key {login.key_file} for {login} is not there: check key_file, a path on this machine"
            )
        settings["key_filename"] = path
        if path in _passphrases:
            settings["passphrase"] = _passphrases[path]
    connection = fabric.Connection(
        login.host,
        user=login.user or None,
        port=login.port if login.port != 22 else None,
        gateway=_jump(login, settings),
        connect_timeout=int(CONNECT_SECONDS),
        connect_kwargs=settings,
    )
    # A gateway may have come from ~/.ssh/config, too.
    link: Any = connection
    while isinstance(link, fabric.Connection):
        _verify(link.client, login.known_hosts)
        link = link.gateway
    return connection


def _jump(login: Login, settings: dict[str, Any]) -> fabric.Connection | None:
    import fabric

    if not login.jump_host:
        return None
    return fabric.Connection(login.jump_host, connect_timeout=int(CONNECT_SECONDS), connect_kwargs=dict(settings))


def _verify(client: paramiko.SSHClient, known_hosts: str | None) -> None:
    """Let a client connect only to hosts whose keys are known: Fabric by itself takes any."""
    import paramiko

    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    for path in _known_hosts(known_hosts):
        try:
            client.load_system_host_keys(str(path))
        except OSError as error:
            raise HostError(f"the known hosts file {path} cannot be read: {error.strerror}") from error


def _known_hosts(named: str | None) -> Iterator[Path]:
    if named:
        yield Path(named).expanduser()
        return
    for path in (Path("/etc/ssh/ssh_known_hosts"), Path("~/.ssh/known_hosts").expanduser()):
        if path.is_file():
            yield path


def _second_factor(login: Login, connection: fabric.Connection) -> bool:
    """Log in by keyboard-interactive, where the block says so; False where nobody can be asked."""
    transport = connection.client.get_transport()
    if not login.keyboard_interactive or transport is None or not transport.is_active() or not sys.stdin.isatty():
        return False
    transport.auth_interactive_dumb(login.user or connection.user)
    return True


def _complaint(login: Login, error: Exception) -> str:
    """Say why a host was not reached, and what to do."""
    import paramiko

    where = str(login)
    file = login.known_hosts or "~/.ssh/known_hosts"
    by_hand = (
        f"ssh {'' if login.port == 22 else f'-p {login.port} '}{login.user + '@' if login.user else ''}{login.host}"
    )
    match error:
        case HostError():
            return str(error)
        case paramiko.BadHostKeyException():
            place = error.hostname
            return (
                f"the host key of {where} is not the one in {file}: somebody may be in between, or the host was set up "
                f"anew. Ask its administrators; if the new key is right, `ssh-keygen -R '{place}' -f {file}`, and log "
                f"in once by `{by_hand}`"
            )
        case paramiko.SSHException() if "not found in known_hosts" in str(error):
            return (
                f"the host key of {where} is not known in {file}: log in once by `{by_hand}`, compare its fingerprint "
                "with the one that the site publishes, or name another file in known_hosts"
            )
        case EOFError():
            return (
                f"{where} asks for a second factor, and there is no terminal to ask in: start from one, or use an agent"
            )
        case paramiko.AuthenticationException() | paramiko.PasswordRequiredException() | paramiko.SSHException() if (
            _is_locked(login)
        ):
            return (
                f"the key {login.key_file} for {where} has a passphrase: `ssh-add {login.key_file}` gives it to an "
                "agent; or save the passphrase in the cluster's block"
            )
        case paramiko.AuthenticationException():
            user = login.user or getpass.getuser()
            factor = (
                "" if login.keyboard_interactive else "; where the site asks for a second factor, say so in the block"
            )
            tried = f"the key {login.key_file}" if login.key_file else "the keys of the agent and of ~/.ssh"
            return (
                f"{where} does not let {user} in with {tried}: check user and key_file, and that `{by_hand}` works by "
                f"itself{factor} ({error})"
            )
        case socket.gaierror():
            return f"there is no host called {login.host}: check its name, and the VPN ({error.strerror})"
        case TimeoutError():
            return f"{where} does not answer within {CONNECT_SECONDS:g} s: check host and port, and the VPN"
        case paramiko.ssh_exception.NoValidConnectionsError() | ConnectionRefusedError():
            return f"{where} refuses connections: check the port ({login.port}), and whether its sshd runs"
    return f"{where} cannot be reached: {str(error) or type(error).__name__}"


def _is_locked(login: Login) -> bool:
    """Say whether the key needs a passphrase that is not known here, or is wrong."""
    import paramiko

    if not login.key_file:
        return False
    path = str(Path(login.key_file).expanduser())
    try:
        paramiko.PKey.from_path(path, _passphrases.get(path))
    except paramiko.PasswordRequiredException:
        return True
    except (ValueError, TypeError, paramiko.SSHException):
        # cryptography says TypeError where a key is locked and there is no passphrase, ValueError where it is wrong.
        return True
    except OSError:
        return False
    return False

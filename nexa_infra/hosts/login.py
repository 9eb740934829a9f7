"""How one logs in to a host: keys, agents, certificates, a jump host; and why it did not work."""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import UnreachableError
from nexa_infra.hosts.shell import join

if TYPE_CHECKING:
    import fabric
    import paramiko

    from nexa_infra.spec.cluster import Cluster

# How long a host may take to answer a connection, seconds.
CONNECT_SECONDS = 20.0
# How long a login may take: a person may be asked for a second factor, seconds.
LOGIN_SECONDS = 90.0
# How long what was sent may go unacknowledged before the connection is given up, seconds.
UNACKNOWLEDGED_SECONDS = 60.0
# The fast one first: where both sides have AES-GCM, a copy is bound by it.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

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

    @property
    def by_hand(self) -> str:
        """The command that logs in, for a person to paste."""
        options = [
            *(["-p", str(self.port)] if self.port != 22 else []),
            *(["-i", self.key_file] if self.key_file else []),
            *(["-o", f"UserKnownHostsFile={self.known_hosts}"] if self.known_hosts else []),
            *(["-J", self.jump_host] if self.jump_host else []),
        ]
        return join(["ssh", *options, f"{self.user}@{self.host}" if self.user else self.host])


def connect(login: Login) -> tuple[fabric.Connection, paramiko.Transport]:
    """Log in; the host's key, and a jump host's, must be known.

    Raises:
        UnreachableError: the host, or the way to it, is away.
        HostError: it did not work for another reason; the message says why, and what to do.
    """
    # paramiko logs tracebacks of what is raised as well, and they reach a person's terminal.
    if (log := logging.getLogger("paramiko")).level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)
    connection: fabric.Connection | None = None
    place, port = login, login.port
    try:
        connection = _connection(login)
        for link in reversed(links(connection)):
            place, port = login if link is connection else _of_link(link, login), int(link.port)
            transport = _enter(link, place)
        return connection, transport
    except BaseException as error:
        if connection is not None:
            close(connection)
        if not isinstance(error, Exception):
            raise
        raise _complaint(place, port, error) from error


def links(connection: fabric.Connection) -> list[fabric.Connection]:
    """Return a connection and those that it goes through, the nearest last."""
    import fabric

    found: list[fabric.Connection] = []
    link: Any = connection
    while isinstance(link, fabric.Connection):
        found.append(link)
        link = link.gateway
    return found


def close(connection: fabric.Connection) -> None:
    """End a connection and those that it goes through, however far it has come."""
    for link in links(connection):
        with contextlib.suppress(OSError, EOFError):
            link.client.close()


def _connection(login: Login) -> fabric.Connection:
    import fabric

    # Longer than the connection itself may take, so that silence and what is no sshd end differently.
    settings: dict[str, Any] = {"banner_timeout": CONNECT_SECONDS + 5.0, "auth_timeout": LOGIN_SECONDS}
    if login.key_file:
        settings |= {"pkey": _key(login), "look_for_keys": False}
    connection = fabric.Connection(
        login.host,
        user=login.user or None,
        port=login.port if login.port != 22 else None,
        gateway=fabric.Connection(login.jump_host) if login.jump_host else None,
    )
    # A gateway may have come from ~/.ssh/config, too.
    for link in links(connection):
        place = login if link is connection else _of_link(link, login)
        link.connect_timeout = int(CONNECT_SECONDS)
        link.connect_kwargs = {**link.connect_kwargs, **settings, "transport_factory": _transports(place)}
        _verify(link.client, login.known_hosts)
    return connection


def _of_link(link: fabric.Connection, login: Login) -> Login:
    return Login(
        link.host, link.user, int(link.port), login.key_file, login.known_hosts, None, login.keyboard_interactive
    )


def _key(login: Login) -> paramiko.PKey | None:
    """Return a login's key, with its certificate if one lies beside it; None where only an agent can open it.

    Raises:
        HostError: it is not there, or cannot be used.
    """
    import paramiko

    name = f"the key {login.key_file} for {login}"
    path = str(Path(login.key_file or "").expanduser())
    if not Path(path).is_file():
        raise HostError(f"{name} is not there: check key_file, a path on this machine")
    passphrase = _passphrases.get(path)
    try:
        if not is_locked(path):
            return paramiko.PKey.from_path(path)
        if passphrase is None:
            return None
        # Its type says text, cryptography wants bytes.
        return paramiko.PKey.from_path(path, passphrase.encode())  # type: ignore[arg-type]
    except OSError as error:
        raise HostError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
        if passphrase is not None:
            raise HostError(f"{name} is not opened by the passphrase that the cluster's block holds") from None
        raise HostError(f"{name} is no private key that can be used here: check key_file") from error


def is_locked(path: str) -> bool:
    """Say whether a private key's file needs a passphrase, in OpenSSH's format or an older one."""
    from cryptography.hazmat.primitives import serialization

    data = Path(path).read_bytes()
    for load in (serialization.load_ssh_private_key, serialization.load_pem_private_key):
        try:
            load(data, password=None)
        except TypeError:
            return True  # the one sign that cryptography gives
        except ValueError:
            continue
        return False
    return False


def _transports(place: Login) -> Callable[..., paramiko.Transport]:
    """Return what makes a client's transports: quick ones, which ask a person for a second factor."""
    import paramiko

    class Transport(paramiko.Transport):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.channel_timeout = CONNECT_SECONDS
            security = self.get_security_options()
            known = security.ciphers
            fast = tuple(cipher for cipher in _CIPHERS if cipher in known)
            security.ciphers = (*fast, *(cipher for cipher in known if cipher not in fast))
            if isinstance(self.sock, socket.socket) and self.sock.family in {socket.AF_INET, socket.AF_INET6}:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    self.sock.setsockopt(
                        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED_SECONDS * 1000)
                    )

        def auth_interactive_dumb(self, username: str, *_: Any) -> list[str]:
            # paramiko calls this by itself where a key was only the first factor; its own prints, and reads stdin.
            _check_terminal(place)
            return self.auth_interactive(username, lambda title, words, prompts: _ask(place, title, words, prompts))

    return Transport


def _check_terminal(place: Login) -> None:
    asks = f"{place} asks for a second factor"
    if not place.keyboard_interactive:
        raise HostError(
            f"{asks}: set keyboard_interactive in the cluster's block and start from a terminal, or use a key "
            "or an agent that the site lets in without one"
        )
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise HostError(f"{asks}, and there is no terminal to ask in: start from one") from None


def _ask(place: Login, title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
    """Put a host's questions to the person at the terminal, and return the answers."""
    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    try:
        words = [word.strip() for word in (title, instructions) if word.strip()]
        if prompts:
            os.write(terminal, "\n".join([f"{place} asks:", *words, ""]).encode())
        answers = []
        for prompt, shown in prompts:
            if shown:
                os.write(terminal, prompt.encode())
                answers.append(os.read(terminal, 4096).decode(errors="replace").rstrip("\n"))
            else:
                answers.append(getpass.getpass(prompt))
        return answers
    finally:
        os.close(terminal)


def _enter(link: fabric.Connection, place: Login) -> paramiko.Transport:
    """Connect to one host and be let in."""
    import paramiko

    transport: paramiko.Transport | None
    try:
        link.open()
    except paramiko.SSHException as error:
        # Only these two come after the host's key was verified, and only then may anything be told to it.
        refused = isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error)
        transport = link.client.get_transport()
        if not refused or not place.keyboard_interactive or transport is None or not transport.is_active():
            raise
        transport.auth_interactive_dumb(link.user)
    transport = link.client.get_transport()
    if transport is None or not transport.is_authenticated():
        raise EOFError("the connection ended while logging in")
    link.transport = transport
    transport.set_keepalive(15)
    return transport


def _verify(client: paramiko.SSHClient, known_hosts: str | None) -> None:
    """Let a client connect only to hosts whose keys are known: Fabric by itself takes any."""
    import paramiko

    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    for path in _known_hosts(known_hosts):
        try:
            client.load_system_host_keys(str(path))
        except OSError as error:
            raise HostError(
                f"the known_hosts file {path} cannot be read ({error.strerror}): check known_hosts, a path on this "
                "machine"
            ) from error


def _known_hosts(named: str | None) -> Iterator[Path]:
    if named:
        yield Path(named).expanduser()
        return
    for path in (Path("/etc/ssh/ssh_known_hosts"), Path("~/.ssh/known_hosts").expanduser()):
        if path.is_file():
            yield path


def _complaint(place: Login, port: int, error: Exception) -> HostError:
    """Say why a host was not reached, and what to do."""
    import paramiko

    file = place.known_hosts or "~/.ssh/known_hosts"
    match error:
        case HostError():
            return error
        case paramiko.BadHostKeyException():
            entry = error.hostname if port == 22 else f"[{error.hostname}]:{port}"
            forget = f"{join(['ssh-keygen', '-R', entry])} -f {file}"
            return HostError(
                f"the host key of {place} is not the one in {file}: somebody may be in between, or the host was set up "
                f"anew. Ask its administrators; if the new key is right, `{forget}`, and log in once by "
                f"`{place.by_hand}`"
            )
        case paramiko.SSHException() if "not found in known_hosts" in str(error):
            return HostError(
                f"the host key of {place} is not known in {file}: log in once by `{place.by_hand}`, compare its "
                "fingerprint with the one that the site publishes, or name another file in known_hosts"
            )
        case paramiko.ChannelException():
            return UnreachableError(f"{place} cannot be reached through its jump host ({error.text}): check host, port")
        case paramiko.AuthenticationException() if "transport shut down or saw EOF" in str(error):
            # paramiko calls a connection that was cut while it logged in a refusal; it is none.
            hint = "where it always is, too many keys may have been offered: name one in key_file"
            return UnreachableError(f"the connection to {place} was cut while it logged in: try again; {hint}")
        case paramiko.AuthenticationException() | paramiko.SSHException() if isinstance(
            error, paramiko.AuthenticationException
        ) or "No authentication methods" in str(error):
            return HostError(_refusal(place, error))
        case socket.gaierror():
            return UnreachableError(
                f"there is no host called {place.host}: check its name, and the VPN ({error.strerror})"
            )
        # Where the first words do not come in time, paramiko goes on, and fails so.
        case TimeoutError() | paramiko.SSHException() if isinstance(
            error, TimeoutError
        ) or "No existing session" in str(error):
            return UnreachableError(
                f"{place} does not answer within {CONNECT_SECONDS:g} s: check host and port, and the VPN"
            )
        case paramiko.ssh_exception.NoValidConnectionsError() | ConnectionRefusedError():
            errors = getattr(error, "errors", {}) or {"": error}
            if any(each.errno == errno.ECONNREFUSED for each in errors.values()):
                return UnreachableError(
                    f"{place} refuses connections: check the port ({port}), and whether its sshd runs"
                )
            return UnreachableError(f"there is no way to {place}: check the network, and the VPN")
        case OSError() if error.filename:
            return HostError(f"{place} cannot be reached: {error.filename} cannot be read ({error.strerror})")
        case EOFError() | paramiko.SSHException() | OSError():
            words = str(error) or "the connection ended while logging in"
            return UnreachableError(f"{place} cannot be reached: {words}; check that an sshd listens on port {port}")
    return HostError(f"{place} cannot be reached: {str(error) or type(error).__name__}")


def _refusal(place: Login, error: Exception) -> str:
    """Say why a host that was reached did not let one in."""
    import paramiko

    path = str(Path(place.key_file).expanduser()) if place.key_file else None
    if isinstance(error, paramiko.PasswordRequiredException) or (path and path not in _passphrases and is_locked(path)):
        named = place.key_file or "PATH"
        which = f"the key {place.key_file} for {place}" if path else f"a key of ~/.ssh for {place}"
        return (
            f"{which} has a passphrase, and no agent that holds it was found: `ssh-add {named}` gives it to one; or "
            "save the passphrase in the cluster's block"
        )
    if "timeout" in str(error).lower():
        return f"{place} did not end the login within {LOGIN_SECONDS:g} s: start again, and answer in time"
    tried = f"the key {place.key_file}" if path else "the keys of the agent and of ~/.ssh"
    factor = "" if place.keyboard_interactive else "; where it asks for a second factor, set keyboard_interactive"
    return (
        f"{place} does not let {place.user or getpass.getuser()} in with {tried}: check user and key_file, and that "
        f"`{place.by_hand}` works by itself{factor} ({error})"
    )

"""A host over SSH: one verified connection for commands, streams and rsync alike."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed, ConnectionLostError
from nexa_infra.hosts.framing import PIECE, Framed, command, framed
from nexa_infra.hosts.login import CONNECT_SECONDS, Login, connect
from nexa_infra.hosts.transfer import RsyncBridge

if TYPE_CHECKING:
    import fabric
    import paramiko

# Waits between tries to reach a host that was reached before, seconds.
BACKOFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
# How long a script may be silent, unless its caller says otherwise, seconds.
PATIENCE = 300.0


class SshHost:
    """Commands, streams and rsync over one connection; it is made when it is first needed.

    Scripts go to shells that stay open: the far side starts a session, and a login shell, once and
    not a script. `round_trips` counts the scripts sent, `sessions` the channels opened.
    """

    remote = True

    def __init__(self, login: Login) -> None:
        self.login = login
        self.name = str(login)
        self.round_trips = 0
        self.sessions = 0
        self._lock = threading.RLock()
        self._connection: fabric.Connection | None = None
        self._transport: paramiko.Transport | None = None
        self._reached = False
        self._shells: list[paramiko.Channel] = []
        self._bridge: RsyncBridge | None = None

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float | None = None,
    ) -> Completed:
        """Run a command to its end; see `Host.run`."""
        script = command(list(argv), cwd=str(cwd) if cwd else None, env=dict(env or {}), stdin=stdin or "")
        done = self.script(script, timeout=timeout)
        return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script: one round trip, whatever the login shell is; see `Host.script`."""
        asked = framed(text)
        shell = self._shell()
        whole = False
        try:
            with self._lock:
                self.round_trips += 1
            printed, complaints = _converse(shell, asked, PATIENCE if timeout is None else timeout)
            whole = True
        except TimeoutError as error:
            raise ConnectionLostError(f"{self.name} has not answered for {timeout or PATIENCE:g} s") from error
        except (OSError, EOFError, _ssh_error()) as error:
            raise ConnectionLostError(f"the connection to {self.name} was cut before it answered: {error}") from error
        finally:
            if whole:
                with self._lock:
                    self._shells.append(shell)
            else:
                shell.close()
        (told, code), (complained, _) = printed, complaints
        return Completed(
            ("sh", "-s"),
            code,
            told.decode("utf-8", "surrogateescape"),
            complained.decode("utf-8", "surrogateescape"),
        )

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Iterator[bytes]:
        """Yield what a long-lived command prints, and nothing at least `every` seconds; see `Host.stream`."""
        channel = self._channel()
        try:
            channel.exec_command("exec /bin/sh -s")
            begin = framed("").mark
            # The shell ends its command when the channel closes: it reads that as the end of its input.
            script = f"{{ printf '\\n%s\\n' {begin}; {command(list(argv))} & nexa_child=$!\n"
            script += "cat >/dev/null; kill $nexa_child 2>/dev/null; exit; }\n"
            channel.sendall(script.encode("utf-8", "surrogateescape"))
            yield from _past(_pieces(channel, every), f"\n{begin}\n".encode())
        except (EOFError, _ssh_error()) as error:
            raise ConnectionLostError(f"the connection to {self.name} was cut: {error}") from error
        finally:
            channel.close()

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy between here and there; a path that begins with `REMOTE:` is there; see `Host.rsync`."""
        with self._lock:
            if self._bridge is None:
                self._bridge = RsyncBridge(self._channel)
        self._bridge.rsync(source, destination, options=options, stdin=stdin)

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""
        return f"REMOTE:{path}"

    def close(self) -> None:
        """End the connection; it is made again if it is needed again."""
        with self._lock:
            self._drop()
            if self._bridge is not None:
                self._bridge.close()
                self._bridge = None

    def _drop(self) -> None:
        self._shells.clear()
        self._transport = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _shell(self) -> paramiko.Channel:
        """Take a shell that waits for work, or start one."""
        with self._lock:
            while self._shells:
                shell = self._shells.pop()
                if not (shell.closed or shell.eof_received or shell.exit_status_ready()):
                    return shell
                shell.close()
        shell = self._channel()
        shell.exec_command("exec /bin/sh -s")
        return shell

    def _channel(self) -> paramiko.Channel:
        """Open a channel on the connection, which is made, or made again, where there is none.

        Nothing has been sent yet, so that trying again is safe.
        """
        waits = iter(BACKOFF if self._reached else ())
        while True:
            try:
                with self._lock:
                    transport = self._connected()
                    channel = transport.open_session(timeout=CONNECT_SECONDS)
                    self.sessions += 1
                    return channel
            except (HostError, OSError, EOFError, _ssh_error()) as error:
                with self._lock:
                    self._drop()
                wait = next(waits, None)
                if wait is None:
                    if isinstance(error, HostError):
                        raise
                    raise HostError(f"{self.name} cannot be reached: {str(error) or 'it opens no session'}") from error
                time.sleep(wait)

    def _connected(self) -> paramiko.Transport:
        if self._transport is None or not self._transport.is_active():
            self._drop()
            self._connection, self._transport = connect(self.login)
            self._reached = True
        return self._transport


def _converse(channel: paramiko.Channel, asked: Framed, patience: float) -> tuple[tuple[bytes, int], tuple[bytes, int]]:
    """Send a script to a shell, and read both streams until its answer is whole.

    Raises:
        TimeoutError: nothing came for `patience` seconds.
        EOFError: the shell has ended before.
    """
    channel.settimeout(patience)
    # The shell runs nothing before it has read everything, so that nothing can be held up by unread output.
    channel.sendall(asked.text.encode("utf-8", "surrogateescape"))
    stdout, stderr = bytearray(), bytearray()
    heard = time.monotonic()
    while True:
        select.select([channel.fileno()], [], [], 1.0)
        ended = channel.closed or channel.eof_received or channel.exit_status_ready()
        before = len(stdout) + len(stderr)
        while channel.recv_ready():
            stdout += channel.recv(PIECE)
        while channel.recv_stderr_ready():
            stderr += channel.recv_stderr(PIECE)
        if len(stdout) + len(stderr) > before:
            heard = time.monotonic()
            printed = asked.answer(stdout)
            complaints = asked.answer(stderr) if printed is not None else None
            if printed is not None and complaints is not None:
                return printed, complaints
        elif ended:
            said = bytes(stderr or stdout).decode("utf-8", "replace").strip()[-500:]
            raise EOFError(said or "its shell has ended")
        elif time.monotonic() - heard > patience:
            raise TimeoutError


def _pieces(channel: paramiko.Channel, every: float) -> Iterator[bytes]:
    channel.settimeout(every)
    while True:
        try:
            piece = channel.recv(PIECE)
        except TimeoutError:
            yield b""
            continue
        if not piece:
            return
        yield piece


def _past(pieces: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
    """Yield what comes after a mark: banners and start-up files print before it."""
    before: bytearray | None = bytearray()
    for piece in pieces:
        if before is None:
            yield piece
            continue
        before += piece
        at = before.find(mark)
        if at >= 0:
            rest, before = bytes(before[at + len(mark) :]), None
            yield rest


def _ssh_error() -> type[Exception]:
    import paramiko

    return paramiko.SSHException

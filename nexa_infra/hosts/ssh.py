"""A host over SSH: one verified connection for commands, streams and rsync alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed, ConnectionLostError, UnreachableError, check_started, check_streamed
from nexa_infra.hosts.framing import Listener, command, framed, streamed
from nexa_infra.hosts.login import LOGIN_SECONDS, Login, connect
from nexa_infra.hosts.transfer import REMOTE, rsync_over

if TYPE_CHECKING:
    from nexa_infra.hosts.line import Line, Shell

# Waits between tries to reach a host that was reached before, seconds.
BACKOFF = (1.0, 2.0, 4.0, 8.0)
# How long a script may be silent, unless its caller says otherwise, seconds.
PATIENCE = 300.0


class SshHost:
    """Commands, streams and rsync over one connection; it is made when it is first needed.

    Scripts go to shells that stay open: the far side starts a session, and a login shell, once and
    not a script. `round_trips` counts the scripts sent, `sessions` the shells started.
    """

    remote = True

    def __init__(self, login: Login) -> None:
        self.login = login
        self.name = str(login)
        self.round_trips = 0
        self.sessions = 0
        self._lock = threading.RLock()
        self._line: Line | None = None
        self._reached = False
        self._shells: list[Shell] = []

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
        check_started(argv[0], done.returncode, done.stderr, f"on {self.name}", cwd)
        return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script: one round trip, whatever the login shell is; see `Host.script`."""
        asked = framed(text)
        patience = PATIENCE if timeout is None else timeout
        shell = self._shell()
        free = False
        try:
            with self._lock:
                self.round_trips += 1
            told, complained, free = shell.converse(asked, patience)
        except TimeoutError as error:
            shell.line.doubtful = True
            raise ConnectionLostError(
                f"{self.name} has not answered for {patience:g} s: whether the script was run is not known"
            ) from error
        except (OSError, EOFError, _ssh_error()) as error:
            raise ConnectionLostError(
                f"the connection to {self.name} was cut before the answer was whole "
                f"({str(error) or type(error).__name__}): whether the script was run is not known"
            ) from error
        finally:
            if free:
                with self._lock:
                    self._shells.append(shell)
            else:
                shell.close()
        return Completed(
            ("sh", "-s"),
            told.code or 0,
            told.answer.decode("utf-8", "surrogateescape"),
            complained.answer.decode("utf-8", "surrogateescape"),
        )

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Generator[bytes, None, None]:
        """Yield what a long-lived command prints, and nothing at least `every` seconds; see `Host.stream`."""
        asked = streamed(list(argv))
        told, complained = Listener(asked), Listener(asked)
        shell = self._shell()
        try:
            shell.send(asked.text.encode("utf-8", "surrogateescape"), PATIENCE)
            while (printed := shell.hear_pulse(every)) is not None:
                told.hear(printed[0])
                complained.hear(printed[1])
                if complained.begun:
                    del complained.answer[:-2000]
                if told.begun and (told.answer or printed == (b"", b"")):
                    yield bytes(told.answer)
                    told.answer.clear()
            code = shell.code(5.0)
        except (OSError, EOFError, _ssh_error()) as error:
            raise ConnectionLostError(f"the connection to {self.name} was cut: {error}") from error
        finally:
            shell.close()
        if code is None:
            raise ConnectionLostError(f"the connection to {self.name} was cut, or its shell was killed")
        check_streamed(argv[0], code, complained.answer.decode("utf-8", "replace"), f"on {self.name}")

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy between here and there; a path that `there` gave is there; see `Host.rsync`."""
        rsync_over(self._shell, self.name, source, destination, options=options, stdin=stdin)

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""
        return f"{REMOTE}{path}"

    def close(self) -> None:
        """End the connection; it is made again if it is needed again."""
        with self._lock:
            self._drop(self._line)

    def _drop(self, line: Line | None) -> None:
        """End a connection, unless another has taken its place already."""
        with self._lock:
            if line is None or line is not self._line:
                return
            self._line = None
        line.close()
        self._close_waiting(line)

    def _shell(self) -> Shell:
        """Take a shell that waits for work, or start one on the connection, which is made again if it was cut.

        Nothing has been sent yet, so that trying again is safe.

        Raises:
            HostError: there is none to be had.
        """
        import paramiko

        waits = iter(BACKOFF if self._reached else ())
        while True:
            line: Line | None = None
            try:
                line = self._connected()
                if shell := self._waiting(line):
                    return shell
                shell = line.shell()
                self._greet(shell)
                return shell
            except UnreachableError as error:
                problem: HostError = error
            except paramiko.ChannelException as error:
                # Shells that wait for work count against what it allows.
                self._close_waiting(line)
                problem = HostError(
                    f"{self.name} opens no more sessions on one connection: its sshd's MaxSessions is too low for what "
                    f"runs at once ({error.text})"
                )
            except (OSError, EOFError, paramiko.SSHException) as error:
                self._drop(line)
                problem = UnreachableError(f"{self.name} cannot be reached: {str(error) or 'it opens no session'}")
            wait = next(waits, None)
            if wait is None:
                raise problem
            time.sleep(wait)

    def _connected(self) -> Line:
        from nexa_infra.hosts.line import Line

        with self._lock:
            line = self._line
        if line is not None and not line.fresh():
            self._drop(line)
        with self._lock:
            if self._line is None:
                self._line = Line(*connect(self.login))
                self._reached = True
            return self._line

    def _waiting(self, line: Line) -> Shell | None:
        with self._lock:
            while self._shells:
                shell = self._shells.pop()
                if shell.line is line and not shell.ended:
                    return shell
                shell.close()
        return None

    def _close_waiting(self, line: Line | None) -> None:
        with self._lock:
            ended = [shell for shell in self._shells if shell.line is line]
            self._shells = [shell for shell in self._shells if shell.line is not line]
        for shell in ended:
            shell.close()

    def _greet(self, shell: Shell) -> None:
        """Wait until a new shell's start-up files have run; only then is anything sent that must not run twice."""
        try:
            shell.greet(LOGIN_SECONDS)
        except TimeoutError as error:
            shell.close()
            if not shell.line.alive():
                raise EOFError("it gives no sign of life") from error
            raise HostError(
                f"the login shell on {self.name} has not started for {LOGIN_SECONDS:g} s: look at its start-up files "
                f"(`{self.login.by_hand} true` must end by itself)"
            ) from error
        except EOFError as error:
            if not shell.line.alive():
                raise
            raise HostError(
                f"{self.name} lets one in but starts no shell ({error}): `{self.login.by_hand} /bin/sh -c true` must "
                "work by itself"
            ) from error
        with self._lock:
            self.sessions += 1


def _ssh_error() -> type[Exception]:
    import paramiko

    return paramiko.SSHException

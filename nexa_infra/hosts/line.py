"""An open connection and the shells on it: what is sent, what is heard, whether the far side is still there."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from typing import TYPE_CHECKING

from nexa_infra.hosts.framing import Framed, Listener, framed, is_free
from nexa_infra.hosts.login import CONNECT_SECONDS, close, links

if TYPE_CHECKING:
    import fabric
    import paramiko

# How much is read or sent at once, bytes.
PIECE = 1 << 17
# After this long without a sign of life the far side is asked for one, and how long it may take to give it, seconds.
PULSE = 15.0
ANSWER_SECONDS = 10.0
# How long a shell may take to say that it is free, once it has answered, seconds.
FREE_SECONDS = 0.25
# What a broken connection raises, beside paramiko's own.
_BROKEN = (OSError, EOFError)


class Line:
    """A connection that was verified and let in."""

    def __init__(self, connection: fabric.Connection, transport: paramiko.Transport) -> None:
        self._connection = connection
        self._transport = transport
        self._asking = threading.Lock()
        self.heard = time.monotonic()
        # Whether somebody has waited in vain: before anything else is sent, the far side is asked.
        self.doubtful = False

    @property
    def open(self) -> bool:
        """Whether nobody has noticed its end."""
        return self._transport.is_active()

    def shell(self) -> Shell:
        """Start a `/bin/sh` of its own, whatever the login shell is.

        Raises:
            paramiko.ChannelException: the far side opens no more sessions on this connection.
            paramiko.SSHException, OSError, EOFError: the connection has ended.
        """
        channel = self._transport.open_session(timeout=CONNECT_SECONDS)
        # paramiko would wait for the answer for ever.
        giving_up = threading.Timer(CONNECT_SECONDS, channel.close)
        giving_up.daemon = True
        giving_up.start()
        try:
            channel.exec_command("exec /bin/sh -s")
        finally:
            giving_up.cancel()
        return Shell(self, channel)

    def alive(self) -> bool:
        """Ask the far side for a sign of life; without one, close the connection."""
        import paramiko

        wanted = time.monotonic()
        with self._asking:
            if self.open and not self.doubtful and self.heard > wanted:
                return True  # another thread has asked meanwhile
            asked = time.monotonic()
            answered = self.open
            try:
                if answered:
                    self._transport.open_session(timeout=ANSWER_SECONDS).close()
            except paramiko.ChannelException:
                pass  # a refusal is a sign of life
            except (*_BROKEN, paramiko.SSHException):
                # A line that is slow because it is full has moved something meanwhile.
                answered = self.open and self.heard > asked
            if answered:
                self.heard, self.doubtful = time.monotonic(), False
                return True
        self.close()
        return False

    def fresh(self) -> bool:
        """Say whether it may be used: it was heard of lately, or is now."""
        if not self.open:
            return False
        return (not self.doubtful and time.monotonic() - self.heard < PULSE) or self.alive()

    def close(self) -> None:
        """End the connection and those that it goes through; whoever waits on it is told."""
        transports = [transport for link in links(self._connection) if (transport := link.client.get_transport())]
        close(self._connection)
        for transport in transports:
            if transport is not threading.current_thread():
                transport.join(2.0)


class Shell:
    """A shell on the far side that waits for a script."""

    def __init__(self, line: Line, channel: paramiko.Channel) -> None:
        self.line = line
        self._channel = channel

    def send(self, data: bytes, patience: float) -> None:
        """Send bytes to its standard input.

        Raises:
            TimeoutError: none were taken for `patience` seconds.
            EOFError, OSError: the connection or the shell has ended.
        """
        view = memoryview(data)
        self._channel.settimeout(min(patience, PULSE))
        moved = time.monotonic()
        while view:
            try:
                sent = self._channel.send(bytes(view[:PIECE]))
            except TimeoutError:
                if time.monotonic() - moved >= patience:
                    raise
                self._check()
                continue
            if not sent:
                raise EOFError("its shell has ended")
            view = view[sent:]
            moved = self.line.heard = time.monotonic()

    def end_input(self) -> None:
        """Tell it that nothing more comes."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def hear(self, within: float) -> tuple[bytes, bytes] | None:
        """Return what it printed on its two streams, at the latest after `within` seconds; `None` at their end."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.poll(within * 1000)
        ended = self._channel.closed or self._channel.eof_received
        stdout = self._channel.recv(PIECE) if self._channel.recv_ready() else b""
        stderr = self._channel.recv_stderr(PIECE) if self._channel.recv_stderr_ready() else b""
        if stdout or stderr:
            self.line.heard = time.monotonic()
        elif ended:
            return None
        return stdout, stderr

    def hear_pulse(self, within: float) -> tuple[bytes, bytes] | None:
        """Hear, and where the line has been silent for long, ask whether somebody is there still.

        Raises:
            EOFError: nobody is.
        """
        printed = self.hear(within)
        if printed == (b"", b""):
            self._check()
        return printed

    def _check(self) -> None:
        if time.monotonic() - self.line.heard >= PULSE and not self.line.alive():
            raise EOFError("it gives no sign of life")

    def code(self, within: float) -> int | None:
        """Return its exit code; `None` where it has none to give: it was killed, or the connection was cut."""
        until = time.monotonic() + within
        while not self._channel.exit_status_ready() and time.monotonic() < until:
            time.sleep(0.01)
        code = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        return code if code >= 0 else None

    @property
    def ended(self) -> bool:
        """Whether it cannot be sent anything."""
        return bool(self._channel.closed or self._channel.eof_received or self._channel.exit_status_ready())

    def close(self) -> None:
        """End it; a script that runs in it may go on."""
        with contextlib.suppress(*_BROKEN):
            self._channel.close()

    def converse(self, asked: Framed, patience: float) -> tuple[Listener, Listener, bool]:
        """Send a script, and return its whole answer on both streams, and whether another may be sent.

        Raises:
            TimeoutError: nothing was heard for `patience` seconds.
            EOFError, OSError: the shell or the connection has ended before.
        """
        stdout, stderr = Listener(asked), Listener(asked)
        # It runs nothing before it has read everything: nothing can be held up by output that is not read yet.
        self.send(asked.text.encode("utf-8", "surrogateescape"), patience)
        heard = time.monotonic()
        while stdout.code is None or stderr.code is None:
            ended = self.ended
            printed = self.hear_pulse(min(1.0, patience))
            if printed is None or (ended and printed == (b"", b"")):
                said = bytes(stderr.answer or stdout.answer).decode("utf-8", "replace").strip()[-500:]
                raise EOFError(f"its shell has ended{': ' + said if said else ''}")
            stdout.hear(printed[0])
            stderr.hear(printed[1])
            now = time.monotonic()
            if printed != (b"", b""):
                heard = now
            elif now - heard >= patience:
                raise TimeoutError
        return stdout, stderr, self._freed(asked, stdout)

    def _freed(self, asked: Framed, stdout: Listener) -> bool:
        until = time.monotonic() + FREE_SECONDS
        while not is_free(asked, stdout.after):
            left = until - time.monotonic()
            if left <= 0 or (printed := self.hear(left)) is None:
                return False
            stdout.hear(printed[0])
        return True

    def greet(self, patience: float) -> None:
        """Wait until its start-up files have run: what they print is no answer; see `converse`."""
        self.converse(framed(":"), patience)

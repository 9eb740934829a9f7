"""rsync over a connection that is open already: its remote shell is a small bridge to a shell of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import ConnectionLostError
from nexa_infra.hosts.framing import Listener, replaced
from nexa_infra.hosts.shell import quote

if TYPE_CHECKING:
    from nexa_infra.hosts.line import Shell

_PIECE = 1 << 17
# How long the far side may take to begin, seconds.
_BEGIN_SECONDS = 60.0
# A path that begins with this is on the far side.
REMOTE = "REMOTE:"

# What rsync runs in place of ssh: over the socket that it has inherited it hands over rsync's words and its own three
# streams, and waits for the exit code. It imports nothing that takes time.
_CLIENT = """\
import _socket, sys
s = _socket.socket(fileno=int(sys.argv[1]))
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
words = chr(0).join(sys.argv[3:]).encode("utf-8", "surrogateescape")
s.sendmsg([words], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
code = s.recv(1)
sys.exit(code[0] if code else 255)
"""

# What rsync's exit codes mean, for those that a person meets.
_MEANINGS = {
    11: "could not read or write a file",
    12: "lost the other side",
    20: "was interrupted",
    23: "could not copy everything",
    24: "found that files had vanished while it copied",
    30: "waited too long",
}


def complaint(code: int, said: str) -> str:
    """Say in a sentence why rsync failed, with its own words but without its closing lines."""
    lines = [line for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("rsync error:")] or lines
    words = "; ".join(lines[-6:])[-2000:] or "it said nothing"
    return f"rsync {_MEANINGS.get(code, f'ended with {code}')}: {words} (exit code {code})"


def rsync_over(
    open_shell: Callable[[], Shell],
    name: str,
    source: str,
    destination: str,
    *,
    options: Sequence[str] = (),
    stdin: str | None = None,
) -> None:
    """Run rsync with a far side called `name`, on a shell of which it takes possession.

    Raises:
        ConnectionLostError: the connection was cut meanwhile.
        HostError: rsync is missing on either side, or failed.
    """
    bridge = _Bridge(open_shell)
    with bridge:
        # rsync's own rules for quoting are these as well. -s keeps paths from every shell.
        words = [sys.executable, "-I", "-S", "-c", _CLIENT, str(bridge.theirs.fileno())]
        argv = ["rsync", "-s", *options, "-e", " ".join(map(quote, words)), "--", source, destination]
        try:
            done = subprocess.run(
                argv,
                input=(stdin or "").encode("utf-8", "surrogateescape"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[bridge.theirs.fileno()],
                check=False,
            )
        except FileNotFoundError as error:
            raise HostError("rsync is not installed here: apt-get install rsync (or your system's own)") from error
    if isinstance(bridge.failed, HostError):
        raise bridge.failed
    if not done.returncode:
        return
    said = done.stderr.decode("utf-8", "replace").strip()
    if bridge.failed is not None:
        raise ConnectionLostError(f"the connection to {name} was cut while rsync copied: {bridge.failed}")
    if bridge.code == 127:
        raise HostError(f"rsync is not installed on {name}: ask its administrators for it ({said[:300]})")
    raise HostError(complaint(done.returncode, said))


class _Bridge:
    """Carries one rsync's streams over a shell; `code` is the far side's exit code, `failed` why there is none."""

    def __init__(self, open_shell: Callable[[], Shell]) -> None:
        self._open_shell = open_shell
        self._ours, self.theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="nexa-rsync", daemon=True)
        self._sender: threading.Thread | None = None
        self.code: int | None = None
        self.failed: Exception | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        # rsync has ended: where it never asked for a far side, nothing more comes.
        self.theirs.close()
        self._thread.join()
        self._ours.close()

    def _serve(self) -> None:
        import paramiko

        message, descriptors, _, _ = socket.recv_fds(self._ours, 1 << 16, 3)
        if not message:
            return
        stdin, stdout, stderr = descriptors
        for descriptor in descriptors:
            os.set_blocking(descriptor, True)  # rsync makes them such that they do not wait
        try:
            self.code = self._carry(message.decode("utf-8", "surrogateescape").split("\0"), *descriptors)
        except (HostError, OSError, EOFError, paramiko.SSHException) as error:
            self.failed = error
        finally:
            os.close(stdout)
            os.close(stderr)
        with contextlib.suppress(OSError):
            self._ours.send(bytes([255 if self.code is None else self.code & 0xFF]))
        # Its input ends with rsync.
        if self._sender is not None:
            self._sender.join()
        os.close(stdin)

    def _carry(self, words: list[str], stdin: int, stdout: int, stderr: int) -> int:
        shell = self._open_shell()
        asked = replaced(words)
        listener = Listener(asked)
        try:
            shell.send(asked.text.encode("utf-8", "surrogateescape"), _BEGIN_SECONDS)
            while (printed := shell.hear_pulse(1.0)) is not None:
                told, complained = printed
                _write(stderr, complained)
                if self._sender is None:
                    listener.hear(told)
                    told = b""
                    if listener.begun:
                        # Not before: the shell would read what is meant for rsync.
                        told = bytes(listener.answer)
                        self._sender = threading.Thread(
                            target=_send, args=(shell, stdin), name="nexa-rsync-send", daemon=True
                        )
                        self._sender.start()
                _write(stdout, told)
            code = shell.code(10.0)
            if code is None:
                raise EOFError("its rsync was killed, or the connection ended")
            return code
        except BrokenPipeError:
            return 255  # rsync here has ended, and says why
        finally:
            shell.close()


def _send(shell: Shell, stdin: int) -> None:
    """Send what rsync says to its far side, for as long as there is one."""
    with contextlib.suppress(OSError, EOFError):
        while piece := os.read(stdin, _PIECE):
            shell.send(piece, float("inf"))
        shell.end_input()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

"""rsync over a connection that is open already: its remote shell is a small bridge to a channel of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.hosts.shell import quote

if TYPE_CHECKING:
    import paramiko

_PIECE = 1 << 17
# A socket's path may have 107 bytes.
_LONGEST = 90

# What rsync runs in place of ssh: it hands its own three streams over, and waits for the exit code.
_CLIENT = """
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
socket.send_fds(s, [json.dumps(sys.argv[3:]).encode()], [0, 1, 2])
code = s.recv(1)
sys.exit(code[0] if code else 255)
"""


class RsyncBridge:
    """Serves rsync's connections over channels of one SSH connection.

    `open_channel` returns a new channel. The socket lies in a folder that only its owner can enter.
    """

    def __init__(self, open_channel: Callable[[], paramiko.Channel]) -> None:
        self._open_channel = open_channel
        self._folder = Path(tempfile.mkdtemp(prefix="nexa-ssh-"))
        if len(os.fsencode(self._folder)) > _LONGEST:
            self._folder.rmdir()
            self._folder = Path(tempfile.mkdtemp(prefix="nexa-ssh-", dir="/tmp"))
        self._client = self._folder / "bridge.py"
        self._client.write_text(_CLIENT, encoding="utf-8")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._folder / "socket"))
        self._socket.listen()
        threading.Thread(target=self._serve, name="nexa-rsync-bridge", daemon=True).start()

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Run rsync; a path that begins with `REMOTE:` is on the far side.

        Raises:
            HostError: rsync is missing on either side, or failed.
        """
        shell = f"{quote(sys.executable)} -I -S {quote(str(self._client))} {quote(str(self._folder / 'socket'))}"
        argv = ["rsync", "-s", *options, "-e", shell, "--", source, destination]
        try:
            done = subprocess.run(
                argv,
                input=(stdin or "").encode("utf-8", "surrogateescape"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except FileNotFoundError as error:
            raise HostError("rsync is not installed here: apt-get install rsync (or your system's own)") from error
        if done.returncode:
            words = done.stderr.decode("utf-8", "replace").strip()
            if (
                "rsync" in words
                and any(said in words.lower() for said in ("not found", "no such file"))
                and (done.returncode in {12, 127})
            ):
                raise HostError(
                    f"rsync is not installed on the far side: ask its administrators for it ({words[-300:]})"
                )
            raise HostError(f"rsync ended with {done.returncode}: {words[-2000:]}")

    def close(self) -> None:
        """Stop serving, and remove the socket."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._carry, args=(accepted,), daemon=True).start()

    def _carry(self, accepted: socket.socket) -> None:
        """Carry one rsync's streams over a channel, and hand its exit code back."""
        with accepted:
            message, descriptors, _, _ = socket.recv_fds(accepted, 1 << 16, 3)
            try:
                code = self._pump(json.loads(message), *descriptors)
            except (HostError, OSError, EOFError, ValueError) as error:
                with contextlib.suppress(OSError):
                    os.write(descriptors[2], f"{error}\n".encode())
                code = 255
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            with contextlib.suppress(OSError):
                accepted.send(bytes([code & 0xFF]))

    def _pump(self, words: list[str], stdin: int, stdout: int, stderr: int) -> int:
        channel = self._open_channel()
        # With -s no path is among rsync's words: they need no quoting, whatever the login shell is.
        channel.exec_command(" ".join(words))

        def send() -> None:
            with contextlib.suppress(OSError):
                while piece := os.read(stdin, _PIECE):
                    channel.sendall(piece)
                channel.shutdown_write()

        def complain() -> None:
            with contextlib.suppress(OSError):
                while piece := channel.recv_stderr(_PIECE):
                    os.write(stderr, piece)

        threads = [threading.Thread(target=target, daemon=True) for target in (send, complain)]
        for thread in threads:
            thread.start()
        try:
            while piece := channel.recv(_PIECE):
                view = memoryview(piece)
                while view:
                    view = view[os.write(stdout, view) :]
            return channel.recv_exit_status()
        finally:
            channel.close()
            threads[1].join(timeout=5)

"""A TCP proxy that delays, stalls and cuts what goes through it, and the hosts of the tests that are reached by one."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
from tests.rig.accounts import ROOT, Account
from tests.rig.ssh import SshRig

_PIECE = 1 << 16


class Proxy:
    """Listens on a port of the loopback, and forwards to another.

    `delay` is how long each piece waits, in seconds, on its way in either direction.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay = 0.0
        self._flows = threading.Event()
        self._flows.set()
        self._left: int | None = None
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.connections = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def stall(self) -> None:
        """Forward nothing more, and keep every connection open."""
        self._flows.clear()

    def flow(self) -> None:
        """Forward again; connections that were stalled have lost nothing."""
        self._flows.set()

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        with self._lock:
            sockets, self._sockets, self._left = self._sockets, [], None
        for each in sockets:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._flows.set()

    def cut_after(self, count: int) -> None:
        """Let `count` bytes more through to the server, and then cut."""
        with self._lock:
            self._left = count

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self.connections += 1
                self._sockets += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(*pair, pair[0] is client), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, upward: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                time.sleep(self.delay)
                self._flows.wait()
                if upward and self._left is not None:
                    piece, last = piece[: self._left], len(piece) >= self._left
                    target.sendall(piece)
                    self._left -= len(piece)
                    if last:
                        # What was forwarded arrives: a reset would throw it away.
                        target.shutdown(socket.SHUT_WR)
                        time.sleep(0.2)
                        self.cut()
                        return
                else:
                    target.sendall(piece)
        # Either end's end is the other's.
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def login_to(sshd: SshRig, account: Account = ROOT, **changes: Any) -> Login:
    """How one logs in to the rig's sshd."""
    login = Login(sshd.host, account.name, sshd.port, key_file=str(sshd.key), known_hosts=str(sshd.known_hosts))
    return dataclasses.replace(login, **changes)


@contextmanager
def reached(sshd: SshRig, account: Account = ROOT, **changes: Any) -> Iterator[SshHost]:
    """The rig's sshd as a host, closed at the end."""
    host = SshHost(login_to(sshd, account, **changes))
    try:
        yield host
    finally:
        host.close()


@contextmanager
def through_proxy(sshd: SshRig, folder: Path) -> Iterator[tuple[SshHost, Proxy]]:
    """The rig's sshd as a host behind a proxy, whose key is known."""
    with Proxy(sshd.port) as proxy:
        known = folder / "known_hosts"
        known.write_text(sshd.known_hosts.read_text().replace(f"]:{sshd.port}", f"]:{proxy.port}"))
        with reached(sshd, port=proxy.port, known_hosts=str(known)) as host:
            yield host, proxy


def wait(true: Callable[[], object], within: float = 10.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + within
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()

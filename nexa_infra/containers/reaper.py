"""Removes a container whose client was killed before it was started; the standard library alone.

Started by `containers.docker` as a script, in a session of its own: SOCKET NAME. It lives as long as its standard
input: a byte there says that the container runs, and has a lease of its own; an end without one, that whoever asked
for it is dead. What the engine was asked for it may still be making, so it is looked for a little longer.
"""

from __future__ import annotations

import http
import http.client
import socket
import sys
import time
from urllib.parse import quote

# How long the engine may take to make a container that nobody waits for any more, and between two looks, seconds.
_PATIENCE = 8.0
_PAUSE = 0.2


class _Engine(http.client.HTTPConnection):
    """A connection to Docker's engine by its socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10.0)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def removed(path: str, name: str) -> bool:
    """Remove a container unless it runs, and say whether there was one."""
    engine = _Engine(path)
    try:
        engine.request("DELETE", f"/containers/{quote(name, safe='')}?v=1")
        return engine.getresponse().status in {http.HTTPStatus.NO_CONTENT, http.HTTPStatus.CONFLICT}
    except OSError:
        return False
    finally:
        engine.close()


def main() -> None:
    """Wait for the word, or for the end."""
    path, name = sys.argv[1:]
    if sys.stdin.buffer.read(1):
        return
    deadline = time.monotonic() + _PATIENCE
    while not removed(path, name) and time.monotonic() < deadline:
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()

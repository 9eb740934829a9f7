"""A little HTTP server that says what a test wants said, and keeps what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request that a server was sent."""

    method: str
    path: str
    login: str | None


Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """A server on the loopback, and its answers."""

    answer: Callable[[Asked], Answer]
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        served = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                asked = Asked(self.command, self.path, self.headers.get("Authorization"))
                served.asked.append(asked)
                status, headers, body = served.answer(asked)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = _reply

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def host(self) -> str:
        """Its address, as it stands in an image's name."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def logins(self) -> set[str | None]:
        """Who it was told that we are."""
        return {each.login for each in self.asked}

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()

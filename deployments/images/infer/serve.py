#!/usr/bin/env python3
"""Serve a Python function over HTTP. Standard library alone.

nexa-serve MODULE:FUNCTION   the module is looked for in the working directory first
nexa-serve --check           ask the server that runs here; exit 0 where it answers

POST /predict takes a JSON value, calls the function with it, and answers {"result": …}.
GET /health answers {"status": "ok", …} once the function is loaded.
SERVE_HOST and SERVE_PORT say where it listens: 0.0.0.0 and 8000 in the image.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Far above any single input; what is longer would be read into memory all the same.
MOST_BYTES = 64 * 2**20


class UsageError(Exception):
    """What was asked for cannot be served; the message says why."""


def load(name: str) -> Callable[[Any], Any]:
    """Import `module:function`.

    Raises:
        UsageError: it is no such name, or there is no such function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UsageError(f"{name!r} names no function: write MODULE:FUNCTION, such as model:predict")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the module's own import fails
        raise UsageError(f"there is no module {module!r} in {Path.cwd()}, nor installed") from error
    except AttributeError as error:
        raise UsageError(f"the module {module!r} has no {function!r}") from error
    if not callable(found):
        raise UsageError(f"{name!r} is no function")
    return found  # type: ignore[no-any-return]


def handler_of(name: str, function: Callable[[Any], Any]) -> type[BaseHTTPRequestHandler]:
    """Return the handler that serves a function."""

    class Handler(BaseHTTPRequestHandler):
        # A client that sends nothing must not hold a thread for good, seconds.
        timeout = 60

        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(HTTPStatus.OK, {"status": "ok", "function": name})
            else:
                self.answer(HTTPStatus.NOT_FOUND, {"error": "there is GET /health and POST /predict"})

        def do_POST(self) -> None:
            if self.path != "/predict":
                self.answer(HTTPStatus.NOT_FOUND, {"error": "there is GET /health and POST /predict"})
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                self.answer(HTTPStatus.LENGTH_REQUIRED, {"error": "say Content-Length"})
                return
            if int(length) > MOST_BYTES:
                self.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"at most {MOST_BYTES} bytes are read"})
                return
            try:
                given = json.loads(self.rfile.read(int(length)))
            except ValueError as error:
                self.answer(HTTPStatus.BAD_REQUEST, {"error": f"the body is not JSON: {error}"})
                return
            try:
                self.answer(HTTPStatus.OK, {"result": function(given)})
            except Exception as error:  # noqa: BLE001 - one bad input must not end the server
                self.log_error("%s: %s", type(error).__name__, error)
                self.answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})

        def answer(self, status: HTTPStatus, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def serve(name: str, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = ThreadingHTTPServer((host, port), handler_of(name, load(name)))

    def end(*_: object) -> None:
        # shutdown() waits for the loop that this handler interrupts.
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print(f"serving {name} on {host}:{server.server_port}", flush=True)
    with server:
        server.serve_forever()


def check(port: int) -> int:
    """Ask the server that runs here how it is; return an exit code."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=4) as answer:
            return 0 if answer.status == HTTPStatus.OK else 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="nexa-serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("function", nargs="?", metavar="MODULE:FUNCTION")
    parser.add_argument("--check", action="store_true", help="ask the server that runs here, and exit 0 if it answers")
    arguments = parser.parse_args()
    port = int(os.environ.get("SERVE_PORT", "8000"))
    if arguments.check:
        return check(port)
    if arguments.function is None:
        parser.error("say which function to serve, such as model:predict")
    try:
        serve(arguments.function, os.environ.get("SERVE_HOST", "0.0.0.0"), port)  # noqa: S104 - a container's own
    except UsageError as error:
        print(f"nexa-serve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

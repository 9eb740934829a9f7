"""The project's own Prefect: a server on SQLite in .nexa/prefect, a work pool, a worker, the deployments."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.environment import SetupError
from deployments.processes import Service

HOST = "127.0.0.1"
FIRST_PORT = 4207  # not Prefect's 4200, where a person's own server may listen
WORKER = "project"


@dataclass(frozen=True)
class Pool:
    """A work pool of prefect.yaml, and the deployments there whose runs its worker starts."""

    name: str
    kind: str
    deployments: tuple[str, ...]


LOCAL = Pool("nexa-local", "process", ("*/default", "*/slurm"))
# Their image is built first, which takes minutes and an engine: they are deployed when they are asked for.
DOCKER_HERE = Pool("nexa-docker", "docker", ("sweep/docker-here",))
DOCKER_PUSHED = Pool("nexa-docker", "docker", ("sweep/docker",))

# The service that is each pool's worker.
_WORKERS = {LOCAL.name: "worker", DOCKER_HERE.name: "docker-worker"}

_POINTER = """\
# Written by `make up` and `make run`, removed by `make down`: commands given in this folder
# reach the project's own Prefect server. PREFECT_API_URL in the environment comes first.
[api]
url = "{url}"
"""
# Settings of a person's own Prefect, and what make leaves in the environment, are not for the services.
_NOT_PASSED_ON = ("PREFECT_", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")

# Loopback is reached directly, whatever proxy the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Services:
    """Starts, finds and stops the project's services; `python` is the environment's interpreter.

    `home` is where they keep their database, logs and records, `.nexa/prefect` by default. Services
    with another home, such as those of the tests, leave no pointer to themselves in the project.
    """

    def __init__(self, root: Path, python: Path, *, home: Path | None = None) -> None:
        self.root = root
        self.python = python
        self.home = home or root / ".nexa" / "prefect"
        self._server = Service("server", self.home)
        self._workers = {pool: Service(service, self.home) for pool, service in _WORKERS.items()}
        self._pointer = root / "prefect.toml" if home is None else self.home / "prefect.toml"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one command at a time change the environment and the services."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "services.lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another make in this folder", flush=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @property
    def url(self) -> str | None:
        """The API's address; `None` where no server runs."""
        facts = self._server.running()
        return facts["url"] if facts else None

    def environment(self, url: str) -> dict[str, str]:
        """Return the environment in which Prefect, and what it starts, use the project's server."""
        passed = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
        direct = ",".join(filter(None, [passed.get("NO_PROXY") or passed.get("no_proxy"), HOST, "localhost"]))
        return passed | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": direct,
            "no_proxy": direct,
            "PATH": f"{self.python.parent}{os.pathsep}{passed.get('PATH', os.defpath)}",
            "PWD": str(self.root),  # prefect.yaml takes the project's folder from it
        }

    def start_server(self, *, patience: float = 180.0) -> str:
        """Return the API's address, of the server that runs or of a new one.

        Raises:
            SetupError: the server does not start within `patience` seconds; the message ends with its last words.
        """
        if (url := self.url) and self._answers(url, patience=60.0):
            self._point_to(url)
            return url
        for port in free_ports():
            url = f"http://{HOST}:{port}/api"
            print(f"starting the Prefect server on port {port}", flush=True)
            env = self.environment(url) | {"PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": str(port)}
            self._server.start(self._prefect("server", "start"), cwd=self.root, env=env, facts={"url": url})
            if self._answers(url, patience=patience):
                self._point_to(url)
                return url
            if self._server.running() or is_free(port):
                break  # it hangs, or it ended for a reason of its own
        told = self._server.last_words()
        self._server.stop()
        raise SetupError(f"the Prefect server did not start; {self._server.log} ends with:\n{told}")

    def _answers(self, url: str, *, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while self._server.running() and time.monotonic() < deadline:
            with suppress(OSError, ValueError):  # not yet
                # Two servers that started at once may have chosen one port, and the other one may have got it.
                if _ask(f"{url}/health") is True and Path(_ask(f"{url}/admin/settings")["home"]).samefile(self.home):
                    return True
            time.sleep(0.2)
        return False

    def _point_to(self, url: str) -> None:
        """Let Prefect's own commands in this folder find the server."""
        text = _POINTER.format(url=url)
        if self._owns_pointer() and (not self._pointer.exists() or self._pointer.read_text() != text):
            self._pointer.write_text(text)

    def _owns_pointer(self) -> bool:
        return not self._pointer.exists() or self._pointer.read_text().startswith(_POINTER[:40])

    def deploy(self, pool: Pool = LOCAL) -> str:
        """Start the server and a worker, deploy what prefect.yaml says for its pool, and return the API's address.

        Raises:
            SetupError: a part does not start; the message ends with its last words.
        """
        url = self.start_server()
        env = self.environment(url)
        worker = self._workers[pool.name]
        self._make_pool(pool, url, env)
        running = worker.running()
        since = datetime.now(UTC)
        if running is None or running["url"] != url:
            print("starting a worker" if pool is LOCAL else f"starting a worker for {pool.name}", flush=True)
            argv = self._prefect("worker", "start", "--pool", pool.name, "--type", pool.kind, "--name", WORKER)
            worker.start(argv, cwd=self.root, env=env, facts={"url": url})
        if pool is LOCAL:
            print("deploying what prefect.yaml says", flush=True)
        else:
            print(f"building the image of {' and '.join(pool.deployments)}, and deploying (minutes)", flush=True)
        names = [word for name in pool.deployments for word in ("--name", name)]
        self._run(self._prefect("--no-prompt", "deploy", *names), env)
        if running is None or running["url"] != url:
            self._await_worker(pool, url, since)
        return url

    def _make_pool(self, pool: Pool, url: str, env: Mapping[str, str]) -> None:
        try:
            _ask(f"{url}/work_pools/{pool.name}")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise SetupError(f"the Prefect server refuses to name its work pools: {error}") from error
            self._run(self._prefect("work-pool", "create", pool.name, "--type", pool.kind), env)

    def _await_worker(self, pool: Pool, url: str, since: datetime, *, patience: float = 60.0) -> None:
        worker = self._workers[pool.name]
        deadline = time.monotonic() + patience
        while worker.running() and time.monotonic() < deadline:
            with suppress(OSError):  # the server is busy
                for each in _ask(f"{url}/work_pools/{pool.name}/workers/filter", {}):
                    if each["name"] == WORKER and datetime.fromisoformat(each["last_heartbeat_time"]) >= since:
                        return
            time.sleep(0.2)
        told = worker.last_words()
        worker.stop()
        raise SetupError(f"the worker did not start; {worker.log} ends with:\n{told}")

    def stop(self) -> list[str]:
        """Stop the workers with their runs, then the server; return the names of what was stopped."""
        stopped = [service.name for service in (*self._workers.values(), self._server) if service.stop()]
        if self._pointer.exists() and self._owns_pointer():
            self._pointer.unlink()
        return stopped

    def run_python(self, *words: str) -> bool:
        """Run the environment's Python with the server as its own; `False` where no server runs.

        Raises:
            SetupError: it failed; the message holds what it printed.
        """
        if (url := self.url) is None:
            return False
        self._run([str(self.python), *words], self.environment(url))
        return True

    def _prefect(self, *words: str) -> list[str]:
        return [str(self.python), "-m", "prefect", *words]

    def _run(self, argv: list[str], env: Mapping[str, str]) -> None:
        done = subprocess.run(
            argv, cwd=self.root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SetupError(f"{' '.join(argv[2:])} failed:\n{done.stdout}{done.stderr}".rstrip())


def free_ports() -> Iterator[int]:
    """Yield ports of the loopback on which nothing listens, the project's own first."""
    return (port for port in range(FIRST_PORT, FIRST_PORT + 100) if is_free(port))


def is_free(port: int) -> bool:
    """Say whether a server could listen on this port of the loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _ask(url: str, body: object = None) -> Any:
    """Ask the API, and return what it answers: GET, or POST where there is a body.

    Raises:
        OSError: no answer, or one that refuses (`urllib.error.HTTPError`).
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - http on loopback
    with _opener.open(request, timeout=10) as answer:
        return json.load(answer)

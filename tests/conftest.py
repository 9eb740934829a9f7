"""What tests share: a home of their own, and a real Prefect server that is started once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.services import Services
from nexa_infra.runs.record import Run
from nexa_infra.settings import settings

# The rig's fixtures: session-wide, so that every folder's tests share one Slurm and one sshd.
pytest_plugins = ["tests.rig.fixtures"]

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say where screenshots go that are to be kept."""
    parser.addoption("--screenshots", metavar="DIR", help="keep the screenshots of the UI tests in this folder")


def processes_of(run: Run) -> list[int]:
    """Every process that carries the run's directory in its environment."""
    mark = f"NEXA_RUN_DIR={run.directory}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep a person's NEXA_* variables and cache, and an earlier test's, out of every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in [name for name in os.environ if name.startswith("NEXA_")]:
        monkeypatch.delenv(name)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local default's workdir, empty, for one test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("NEXA_HOME", str(folder))
    settings.cache_clear()
    return folder


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server that runs; `environment` makes a subprocess use it."""

    url: str
    environment: dict[str, str]
    services: Services

    @property
    def ui(self) -> str:
        """The address of its pages."""
        return self.url.removesuffix("/api")


@pytest.fixture(scope="session")
def started_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """The session's server, on a port and in a home of its own."""
    services = Services(ROOT, Path(sys.executable), home=tmp_path_factory.mktemp("prefect"))
    try:
        url = services.start_server()
        yield PrefectServer(url, services.environment(url), services)
    finally:
        try:
            _drain()
        finally:
            services.stop()


def _drain() -> None:
    """Let Prefect's clients in this process send what they still hold, while there is a server to send it to."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


@pytest.fixture
def prefect_server(started_server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrefectServer]:
    """The session's server, as the one that this test's process and its children use."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    for name, value in started_server.environment.items():
        if name.startswith("PREFECT_") or name.lower() in {"no_proxy", "do_not_track"}:
            monkeypatch.setenv(name, value)
    home = Path(started_server.environment["PREFECT_HOME"])
    with temporary_settings({PREFECT_API_URL: started_server.url, PREFECT_HOME: home}):
        yield started_server

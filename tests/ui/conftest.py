"""A worker with the project's deployments, and a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, Route, sync_playwright

from deployments.environment import NEEDED_BY_TESTS
from nexa_infra.blocks import SlurmCluster

if TYPE_CHECKING:
    from tests.conftest import PrefectServer
    from tests.rig.ssh import SshRig


@dataclass(frozen=True)
class Deployed:
    """A server whose worker runs the deployments; the runs are kept in `home`."""

    server: PrefectServer
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a subprocess use the server, and see the worker's runs."""
        return {**self.server.environment, "NEXA_HOME": str(self.home)}

    def start(self) -> None:
        """Deploy, and start a worker unless one runs, as `make up` does."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NEXA_HOME", str(self.home))
            self.server.services.deploy()


@pytest.fixture(scope="session")
def deployed(
    request: pytest.FixtureRequest, started_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> Deployed:
    """The session's server with a worker, as `make up` makes it."""
    home = Path("/tmp/nexa") if request.config.getoption("--screenshots") else tmp_path_factory.mktemp("home")
    found = Deployed(started_server, home)
    found.start()
    return found


@pytest.fixture
def saved_cluster(prefect_server: PrefectServer, sshd: SshRig, tmp_path: Path) -> SlurmCluster:
    """The rig, saved as the block `rig`; made before the browser, in whose event loop its calls would be coroutines."""
    block = SlurmCluster(
        workdir=str(tmp_path / "cluster"),
        host=sshd.host,
        port=sshd.port,
        user="root",
        key_file=str(sshd.key),
        known_hosts=str(sshd.known_hosts),
        poll_floor=1,
        poll_ceiling=5,
    )
    block.save("rig", overwrite=True)
    return block


@pytest.fixture
def page(started_server: PrefectServer, tmp_path: Path) -> Iterator[Page]:
    """A page of a new browser that reaches the server and nothing else."""

    def only_the_server(route: Route) -> None:
        if route.request.url.startswith(started_server.ui):
            route.continue_()
        else:
            route.abort()

    browser = next(filter(None, map(shutil.which, NEEDED_BY_TESTS["chromium"])))
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "browser",
            executable_path=browser,
            headless=True,
            viewport={"width": 1280, "height": 900},
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        context.set_default_timeout(30_000)
        context.route("**/*", only_the_server)
        yield context.pages[0]
        context.close()


@pytest.fixture
def screenshot(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Page, str], None]:
    """Take a screenshot of a whole page: into --screenshots where that is given, else to be thrown away."""
    folder = request.config.getoption("--screenshots") or tmp_path

    def take(page: Page, name: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # A window as high as the page: its side bar then reaches down to the end.
        page.set_viewport_size({"width": 1280, "height": page.evaluate("document.documentElement.scrollHeight")})
        page.screenshot(path=Path(folder) / f"{name}.png")

    return take

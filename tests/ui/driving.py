"""What drives the deployments in these tests: Prefect's own command line, and the Run form in a browser."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

if TYPE_CHECKING:
    from tests.ui.conftest import Deployed

FLOW_RUN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def prefect(deployed: Deployed, *words: str, timeout: float = 180) -> str:
    """Give a `prefect` command that must succeed, and return what it prints."""
    done = try_prefect(deployed, *words, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def try_prefect(deployed: Deployed, *words: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Give a `prefect` command, whatever comes of it."""
    command = [sys.executable, "-m", "prefect", *words]
    return subprocess.run(command, env=deployed.environment, capture_output=True, text=True, timeout=timeout)


def flow_run_in(text: str) -> str:
    """Read a flow run's id off what `prefect deployment run` has printed."""
    found = FLOW_RUN.search(text)
    assert found is not None, text
    return found[0]


def runs(deployed: Deployed, name: str) -> list[Path]:
    """Return the run directories, or the copies of them, that the worker has made under a job's name."""
    return sorted((deployed.home / "runs").glob(f"*-{name}-*"))


def eventually(true: Callable[[], object], seconds: float) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def open_form(page: Page, deployed: Deployed, flow: str, deployment: str) -> None:
    """Go to a deployment's Run form from the first page."""
    page.goto(deployed.server.ui)
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("row").filter(has_text=flow).get_by_role("link", name=deployment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    expect(page.get_by_role("heading", name="Parameters")).to_be_visible()


def submit(page: Page) -> None:
    """Press Submit until the page has asked for the run, and go to the run's own page.

    The page checks its fields a moment after they were filled, and a press in that moment does nothing: whether a
    press counted is read off the request that it made, never off how long the next page takes.
    """
    pages = page.url.partition("/deployments/")[0]
    for _ in range(3):
        with suppress(PlaywrightTimeoutError):
            with page.expect_request(re.compile("/create_flow_run$"), timeout=10_000) as asked:
                page.get_by_role("button", name="Submit", exact=True).click()
            break
    answer = asked.value.response()
    assert answer is not None
    assert answer.status == 201, answer.text()
    # The list of the deployment's runs is asked for anew every half minute only, and the notice with the link may go.
    page.goto(f"{pages}/runs/flow-run/{answer.json()['id']}")
    page.get_by_role("tab", name="Logs").wait_for()


def add_overrides(page: Page, *overrides: str) -> None:
    """Add items to the form's list of overrides."""
    group = page.get_by_role("group").filter(has=page.get_by_role("button", name="Add item")).last
    for number, text in enumerate(overrides):
        page.get_by_role("button", name="Add item").click()
        group.get_by_role("textbox").nth(number).fill(text)

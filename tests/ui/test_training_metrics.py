"""A training's metrics on Prefect's pages: while it runs, and in its report."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.conftest import PrefectServer
from tests.ui.driving import eventually

PROGRAM = """
import json, math, os
with open(os.environ["NEXA_METRICS_LOG"], "a") as log:
    for step in range(1, 201):
        loss = 2.4 * math.exp(-step / 50) + 0.06 * math.sin(step)
        line = {"step": step, "total_steps": 200, "train_loss": loss, "accuracy": 1 - math.exp(-step / 60)}
        log.write(json.dumps(line) + "\\n")
"""
CONFIG = """
job: {name: pictured}
launcher: {script: train.py}
training: {}
"""
FLOW = """
import asyncio
from nexa_infra.flows import training
asyncio.run(training(config_file="train.yaml", submit=True))
"""


def open_artifact(page: Page, server: PrefectServer, key: str, pages: str = "") -> None:
    """Go to the newest artifact of a key."""
    page.goto(f"{server.ui}{pages}/artifacts/key/{key}")
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}")).first.click()


def shows_pictures(page: Page) -> None:
    """Check that both metrics are seen as pictures."""
    for name in ("train_loss", "accuracy"):
        picture = page.get_by_role("img", name=f"{name} by step")
        expect(picture).to_be_visible(timeout=30_000)
        picture.scroll_into_view_if_needed()
        eventually(lambda: picture.evaluate("image => image.complete && image.naturalWidth > 300"), 30)  # noqa: B023


def test_the_report_of_a_training_shows_its_metrics_by_step(
    prefect_server: PrefectServer, home: Path, tmp_path: Path, page: Page, screenshot: Callable[[Page, str], None]
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(textwrap.dedent(PROGRAM))
    (folder / "train.yaml").write_text(CONFIG)
    # The browser's own event loop is this process's.
    subprocess.run([sys.executable, "-c", FLOW], cwd=folder, check=True, timeout=300)

    open_artifact(page, prefect_server, "cost-report-pictured")
    shows_pictures(page)
    screenshot(page, "training-report")
    # Prefect's newer pages, which a person may have chosen.
    page.get_by_text("Switch to V2 UI").click()
    expect(page.get_by_text("Switch to V1 UI")).to_be_visible()
    open_artifact(page, prefect_server, "cost-report-pictured", "/v2")
    shows_pictures(page)
    screenshot(page, "training-report-v2")
    open_artifact(page, prefect_server, "metrics-pictured", "/v2")
    expect(page.get_by_role("cell", name="train_loss")).to_be_visible()
    expect(page.get_by_role("paragraph").filter(has_text="step 200/200 (100%)")).to_be_visible()
    screenshot(page, "training-metrics")

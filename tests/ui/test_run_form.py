"""The Run form of Prefect's own UI, in a real browser, by what a person sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from nexa_infra.blocks import PriceList
from tests.ui.driving import add_overrides, open_form, submit

if TYPE_CHECKING:
    from tests.conftest import PrefectServer
    from tests.ui.conftest import Deployed

pytestmark = [pytest.mark.server, pytest.mark.ui]

PARAMETERS = ("config_file", "submit", "cluster", "prices", "budget_usd", "overrides", "resume", "extend")


@pytest.fixture
def price_list(prefect_server: PrefectServer) -> str:
    """A saved price list; made before the browser, in whose event loop Prefect's calls would be coroutines."""
    PriceList(rows=[{"gpu_type": "cpu", "usd_per_hour": 3.6, "date": "2026-11-23"}]).save("by-hand", overwrite=True)
    return "by-hand"


def test_a_sweep_is_started_from_the_form_and_its_report_read_on_its_page(
    deployed: Deployed, price_list: str, page: Page, screenshot: Callable[[Page, str], None]
) -> None:
    open_form(page, deployed, "sweep", "default")
    for name in PARAMETERS:
        expect(page.get_by_text(re.compile(rf"^{name}( \(Optional\))?$"))).to_be_visible()
    expect(page.get_by_role("textbox", name="config_file")).to_have_value("deployments/configs/digits.yaml")
    expect(page.get_by_role("switch", name="submit")).to_be_checked()
    screenshot(page, "form")

    page.get_by_role("tab", name="PriceList").click()
    page.get_by_role("button", name="Select a block").click()
    page.get_by_role("option", name=price_list).click()
    add_overrides(page, "job.array_parallelism=2")
    submit(page)
    expect(page.get_by_role("main").get_by_text("Completed", exact=True).first).to_be_visible(timeout=120_000)
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name=re.compile("cost-report-digits")).click()
    main = page.get_by_role("main")
    main.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()  # the newest of this key
    expect(main.get_by_text("12 of 12 trials completed").first).to_be_visible()
    expect(main.get_by_text("learning_rate").first).to_be_visible()
    screenshot(page, "report")

    run = re.search(r"\d{8}-\d{6}-digits-[0-9a-f]+", main.inner_text())
    assert run is not None
    report = json.loads((deployed.home / "runs" / run[0] / "cost_report.json").read_text())
    assert report["prices"][0]["provider"] == "own"
    assert report["prices"][0]["usd_per_hour"] == "3.6"

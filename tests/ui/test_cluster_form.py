"""The Run form of the deployments for clusters, in a real browser, down to the jobs on a real Slurm."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from tests.ui.driving import add_overrides, open_form, submit

if TYPE_CHECKING:
    from nexa_infra.blocks import SlurmCluster
    from tests.rig.slurm import SlurmRig
    from tests.ui.conftest import Deployed

pytestmark = [pytest.mark.server, pytest.mark.ui, pytest.mark.rig]


def test_a_sweep_is_sent_to_a_cluster_that_is_chosen_in_the_form_and_its_job_is_named_on_its_page(
    deployed: Deployed,
    saved_cluster: SlurmCluster,
    slurm: SlurmRig,
    page: Page,
    screenshot: Callable[[Page, str], None],
) -> None:
    open_form(page, deployed, "sweep", "slurm")
    expect(page.get_by_text(re.compile(r"^cluster( \(Optional\))?$"))).to_be_visible()
    page.get_by_role("tab", name="SlurmCluster").click()
    page.get_by_role("button", name="Select a block").click()
    page.get_by_role("option", name="rig", exact=True).click()
    add_overrides(page, "job.memory=500M", f"job.setup.venv={Path(sys.prefix)}", "sweep.parameters.epochs=[1, 2]")
    screenshot(page, "cluster-form")
    submit(page)

    main = page.get_by_role("main")
    expect(main.get_by_text("Completed", exact=True).first).to_be_visible(timeout=120_000)
    told = main.get_by_text(re.compile(r"^Submission 1: array 0-11, job \d+$"))
    expect(told).to_be_visible()
    job = told.inner_text().rpartition(" ")[2]
    screenshot(page, "cluster-run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name=re.compile("cost-report-digits")).click()
    main.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()  # the newest of this key
    expect(main.get_by_text("12 of 12 trials completed").first).to_be_visible()
    screenshot(page, "cluster-report")

    run = re.search(r"\d{8}-\d{6}-digits-[0-9a-f]+", main.inner_text())
    assert run is not None
    by_id = ["sacct", "-XnP", "--starttime=now-2hours", "--format=JobName,State", f"--jobs={job}"]
    assert Counter(slurm.run(by_id).stdout.split()) == {f"nexa-{run[0]}-1|COMPLETED": 12}


def test_a_form_in_which_no_cluster_was_chosen_starts_nothing_and_says_so(
    deployed: Deployed, saved_cluster: SlurmCluster, page: Page
) -> None:
    before = list(deployed.home.glob("runs/*"))
    open_form(page, deployed, "training", "slurm")
    page.get_by_role("tab", name="SlurmCluster").click()
    submit(page)

    main = page.get_by_role("main")
    expect(main.get_by_text("Failed", exact=True).first).to_be_visible(timeout=60_000)
    page.get_by_role("tab", name="Details").click()
    expect(main.get_by_text("this deployment runs on a Slurm cluster only, and none was chosen").first).to_be_visible()
    assert list(deployed.home.glob("runs/*")) == before

"""Real Slurm and real SSH for the tests of this folder that ask for them; the others do without."""

from __future__ import annotations

import pytest

from tests.rig.clusters import cluster, login_node, project, workdir
from tests.rig.fixtures import FIXTURES

__all__ = ["cluster", "login_node", "project", "workdir"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need the rig, wherever they stand; a newer Slurm is for those alone that speak to it."""
    if config.getoption("--slurm") == "new":
        others = [item for item in items if "started_slurm" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        if FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("rig")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line which tests were left out for want of a rig."""
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if "rig" in report.keywords]
    if left_out:
        reason = left_out[0].longrepr[2].removeprefix("Skipped: ")
        terminalreporter.write_line(f"{len(left_out)} tests with real Slurm and SSH were left out: {reason}")

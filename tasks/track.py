"""track: the run's trials in MLflow, where its config asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task

from nexa_infra.monitoring.report import CostReport
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial


@task(name="track", description="Logs every trial's parameters, metrics and cost to MLflow, where the config says so.")
async def track(run: Run, trials: Sequence[Trial], report: CostReport) -> None:
    """Log the run's trials to MLflow; a tracker that is away is a warning, and ends nothing."""
    tracked = await steps.track(run, trials, report)
    if tracked is None:
        return
    get_run_logger().info("%s", tracked)
    if tracked.warning:
        get_run_logger().warning("%s", tracked.warning)

"""collect: what became of every trial, as a table."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial


@task(name="collect", description="Reads every trial's state and metrics into results.csv.")
async def collect(run: Run) -> tuple[Trial, ...]:
    """Collect the run's results."""
    trials = await asyncio.to_thread(steps.collect, run)
    get_run_logger().info("Results of %d trials in %s", len(trials), run.files.results)
    return trials

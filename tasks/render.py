"""render-slurm-array: one script for the whole sweep."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run


@task(name="render-slurm-array", description="Renders the job array's script into the run directory.")
async def render_slurm_array(run: Run) -> Run:
    """Make the run directory, with the script in it."""
    run = await asyncio.to_thread(steps.render, run)
    get_run_logger().info("Run directory %s", run.directory)
    return run

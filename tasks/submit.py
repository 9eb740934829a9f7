"""sbatch-submit: the array, submitted exactly once."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission


@task(name="sbatch-submit", description="Submits the array, once: called again, only what is unfinished.")
async def sbatch_submit(run: Run) -> Submission:
    """Submit the run's trials."""
    submission = await asyncio.to_thread(steps.submit, run)
    get_run_logger().info("Submission %d: array %s, job %s", submission.number, submission.array, submission.job_id)
    return submission

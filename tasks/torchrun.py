"""torchrun-launch: the job of a training that torchrun starts, submitted exactly once."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.torchrun import placement_of


@task(name="torchrun-launch", description="Submits the job that starts torchrun on each of its nodes, once.")
async def torchrun_launch(run: Run) -> Submission:
    """Submit the run's job, and say where its processes run."""
    submission = await asyncio.to_thread(steps.submit, run)
    get_run_logger().info("Submission %d: job %s, %s", submission.number, submission.job_id, placement_of(run))
    return submission

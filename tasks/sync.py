"""sync: the code, brought over as a snapshot."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run


@task(name="sync", description="Copies the code to where the run executes, named by its content.")
async def sync(run: Run) -> Run:
    """Bring the code over; a run that has its snapshot keeps it."""
    if run.snapshot is not None:
        return run
    run = await asyncio.to_thread(steps.sync, run)
    if run.snapshot is not None:
        get_run_logger().info(
            "Code %s from %s: %d files, commit %s%s",
            run.snapshot.hash,
            run.snapshot.root,
            run.snapshot.files,
            (run.snapshot.commit or "none")[:12],
            ", with uncommitted changes" if run.snapshot.dirty else "",
        )
    return run

"""watch: the run, followed to its end."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run

from nexa_infra.operations import steps
from nexa_infra.operations.progress import listener
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.watch import Poll
from nexa_infra.tasks.names import artifact_key

# Prefect's server is asked and told no oftener than this, whatever the poll's period, in seconds.
TELL_SECONDS = 1.0
ASK_SECONDS = 2.0


@task(name="watch", description="Follows the run to its end; a progress artifact shows how far it is.")
async def watch(run: Run) -> Poll | None:
    """Follow the run; return its last poll.

    A flow that is called directly is not ended by Prefect when it is cancelled: its state is asked
    for here, and the run ended then.
    """
    logger = get_run_logger()
    progress = await acreate_progress_artifact(
        progress=0.0, key=artifact_key("progress", run), description=f"Run {run.id}"
    )
    watcher = asyncio.create_task(_cancelled_in_prefect(run))
    last: Poll | None = None
    shown: Poll | None = None
    moment = 0.0
    try:
        async with aclosing(steps.watch(run)) as polls:
            async for last in polls:
                if (tell := listener.get()) is not None:
                    tell(last)
                if time.monotonic() - moment >= TELL_SECONDS:
                    moment, shown = time.monotonic(), last
                    logger.info("%s", last)
                    await _show(progress, run, last)
    finally:
        watcher.cancel()
    if last is not None and last is not shown:
        logger.info("%s", last)
        await _show(progress, run, last)
    return last


async def _show(progress: UUID, run: Run, poll: Poll) -> None:
    share = 100.0 * poll.over / poll.total
    await aupdate_progress_artifact(progress, progress=share, description=f"Run {run.id}: {poll}")


async def _cancelled_in_prefect(run: Run) -> None:
    """Wait until the flow run is cancelled in Prefect, then end the run by that word."""
    if not flow_run.id:
        return
    identifier = UUID(flow_run.id)
    async with get_client() as client:
        while True:
            await asyncio.sleep(ASK_SECONDS)
            try:
                state = (await client.read_flow_run(identifier)).state
            except Exception as error:  # noqa: BLE001 - whatever ails the server, it is no word
                get_run_logger().debug("the flow run's state cannot be read: %s", error)
                continue
            if state is not None and state.type in {StateType.CANCELLING, StateType.CANCELLED}:
                await asyncio.to_thread(steps.cancel, run, "cancelled in Prefect")
                return

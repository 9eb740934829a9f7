"""Prefect's cancel, for flows that Prefect does not end by itself: those that a person's own process runs."""

from __future__ import annotations

import asyncio
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run

# Prefect's server is asked no oftener than this, seconds.
ASK_SECONDS = 2.0


async def cancelled_in_prefect() -> None:
    """Wait until the flow run is cancelled in Prefect; for ever, where there is no flow run."""
    if not flow_run.id:
        await asyncio.Event().wait()
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
                return

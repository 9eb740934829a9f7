"""watch: the run, followed to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from nexa_infra.monitoring.report_markdown import metrics_markdown
from nexa_infra.operations import steps
from nexa_infra.operations.progress import listener
from nexa_infra.operations.voice import Say, heard, speaker
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.watch import Poll
from nexa_infra.tasks.cancelled import cancelled_in_prefect
from nexa_infra.tasks.names import artifact_key

# Prefect's server is told no oftener than this, whatever the poll's period, in seconds.
TELL_SECONDS = 1.0
METRICS_SECONDS = 5.0
# Lines that a training may print at a time and have in Prefect's log.
MOST_LINES = 100


@task(name="watch", description="Follows the run to its end; artifacts show how far it is.")
async def watch(run: Run) -> Poll | None:
    """Follow the run; return its last poll.

    A flow that is called directly is not ended by Prefect when it is cancelled: its state is asked
    for here, and the run ended then.
    """
    logger = get_run_logger()
    progress = await acreate_progress_artifact(
        progress=0.0, key=artifact_key("progress", run), description=f"Run {run.id}"
    )
    shown = _Shown(run, progress)
    beside = [asyncio.create_task(_end_when_cancelled(run)), asyncio.create_task(shown.keep_up())]
    last: Poll | None = None
    try:
        async with heard(run, _say_to(logger), speaker.get()), aclosing(steps.watch(run)) as polls:
            async for last in polls:
                if (tell := listener.get()) is not None:
                    tell(last)
                for warning in last.warnings:
                    logger.warning("Run %s: %s", run.id, warning)
                shown.hear(last)
    finally:
        for each in beside:
            each.cancel()
    await shown.show()
    await shown.show_metrics()
    return last


def _say_to(logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> Say:
    """Return what writes a training's own lines into Prefect's log; of a flood, its two ends."""

    def say(lines: Sequence[str]) -> None:
        left = len(lines) - MOST_LINES
        if left > 0:
            half = MOST_LINES // 2
            lines = [*lines[:half], f"… {left:,} lines more, which `nexa-infra logs` shows …", *lines[-half:]]
        logger.info("%s", "\n".join(lines))

    return say


class _Shown:
    """What Prefect's pages show of a run: its last poll, and the latest metrics of a training."""

    def __init__(self, run: Run, progress: UUID) -> None:
        self.run = run
        self.progress = progress  # an artifact
        self.metrics: UUID | None = None  # likewise, once there are any
        self.last: Poll | None = None
        self.warnings: list[str] = []
        self._shown: Poll | None = None
        self._text = ""

    def hear(self, poll: Poll) -> None:
        """Take a poll, to be shown in time."""
        self.last = poll
        self.warnings += poll.warnings

    async def keep_up(self) -> None:
        """Show what is new, now and then; a server that cannot be told now is told another time."""
        moment = 0.0
        while True:
            try:
                await self.show()
                if time.monotonic() - moment >= METRICS_SECONDS:
                    moment = time.monotonic()
                    await self.show_metrics()
            except Exception as error:  # noqa: BLE001 - whatever ails the server, the run goes on
                get_run_logger().debug("how the run is cannot be shown: %s", error)
            await asyncio.sleep(TELL_SECONDS)

    async def show(self) -> None:
        """Show the last poll, as a line of the log and a share of the whole."""
        poll = self.last
        if poll is None or poll is self._shown:
            return
        self._shown = poll
        get_run_logger().info("%s", poll)
        share = poll.over / poll.total
        if not poll.over and poll.progress is not None and poll.progress.share is not None:
            share = poll.progress.share
        description = f"Run {self.run.id}: {poll}"
        await aupdate_progress_artifact(self.progress, progress=100.0 * share, description=description)

    async def show_metrics(self) -> None:
        """Show a training's latest metrics, in one Markdown artifact."""
        if self.last is None or self.last.progress is None:
            return
        text = metrics_markdown(self.last.progress, self.warnings)
        if text == self._text:
            return
        if self.metrics is None:
            key = artifact_key("metrics", self.run)
            self.metrics = await acreate_markdown_artifact(text, key=key, description=f"Run {self.run.id}")
        else:
            async with get_client() as client:
                await client.update_artifact(self.metrics, ArtifactUpdate(data=text))
        self._text = text


async def _end_when_cancelled(run: Run) -> None:
    """Wait until the flow run is cancelled in Prefect, then end the run by that word."""
    await cancelled_in_prefect()
    await asyncio.to_thread(steps.cancel, run, "cancelled in Prefect")

"""cost-report: what it was going to cost, what it did cost, and what the money bought."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prefect import task
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact

from nexa_infra.monitoring.report import CostReport, to_markdown, to_table
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.tasks.names import artifact_key


@task(name="cost-report", description="Writes the cost report, and shows it as artifacts.")
async def cost_report(run: Run, trials: Sequence[Trial]) -> CostReport:
    """Write the run's report; it is a Markdown artifact and a table artifact, too."""
    report = await asyncio.to_thread(steps.report, run, trials)
    await publish(run, report, trials)
    return report


async def publish(run: Run, report: CostReport, trials: Sequence[Trial]) -> None:
    """Show a report as artifacts of the flow run."""
    await acreate_markdown_artifact(
        to_markdown(report), key=artifact_key("cost-report", run), description=f"Run {run.id}"
    )
    await acreate_table_artifact(to_table(report, trials), key=artifact_key("trials", run), description=f"Run {run.id}")

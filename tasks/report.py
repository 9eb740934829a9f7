"""cost-report: what it was going to cost, what it did cost, and what the money bought."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from uuid import UUID

from prefect import runtime, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from nexa_infra.monitoring.report import CostReport, to_markdown, to_table
from nexa_infra.operations import steps
from nexa_infra.operations.measured import pictures_of
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.tasks.names import artifact_key


@task(name="cost-report", description="Writes the cost report, and shows it as artifacts.")
async def cost_report(run: Run, trials: Sequence[Trial]) -> CostReport:
    """Write the run's report; it is a Markdown artifact and a table artifact, too."""
    report = await asyncio.to_thread(steps.report, run, trials)
    await publish(run, report, trials, runtime.flow_run.id, runtime.task_run.id)
    return report


async def publish(
    run: Run, report: CostReport, trials: Sequence[Trial], flow_run_id: str | None, task_run_id: str | None = None
) -> None:
    """Show a report as artifacts of a flow run, from inside it or, once it has ended, from outside."""
    pictures = await asyncio.to_thread(pictures_of, run, report)
    shown = {
        "cost-report": ("markdown", to_markdown(report, pictures)),
        "trials": ("table", json.dumps(to_table(report, trials))),
    }
    async with get_client() as client:
        for kind, (form, data) in shown.items():
            artifact = ArtifactCreate(
                key=artifact_key(kind, run),
                type=form,
                description=f"Run {run.id}",
                data=data,
                flow_run_id=UUID(flow_run_id) if flow_run_id else None,
                task_run_id=UUID(task_run_id) if task_run_id else None,
            )
            await client.create_artifact(artifact)

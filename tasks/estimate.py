"""estimate-cost: what the run will cost, and whether its budget admits it."""

from __future__ import annotations

import asyncio

from prefect import get_run_logger, task

from nexa_infra.monitoring.costs import CostEstimate
from nexa_infra.monitoring.report_text import money
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run


@task(name="estimate-cost", description="Projects the run's cost and holds it against the budget.")
async def estimate_cost(run: Run, submit: bool = True) -> CostEstimate:
    """Project the run's cost; one that is to be submitted is refused where it is over its budget."""
    estimate = steps.estimate_cost(run)
    ceiling = "no ceiling" if estimate.ceiling_usd is None else f"at most {money(estimate.ceiling_usd)}"
    get_run_logger().info("Run %s: %d trials, projected %s", run.id, run.trials, ceiling)
    if submit and not run.files.record.exists():
        said = await asyncio.to_thread(steps.admit, run, estimate)
        for note in said.notes:
            get_run_logger().warning("%s", note)
    return estimate

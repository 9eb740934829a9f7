"""pull-image: the image of a run's trials, brought before they start."""

from __future__ import annotations

from prefect import get_run_logger, task

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run


@task(name="pull-image", description="Brings the image of the trials, by its digest, where it is missing.")
async def pull_image(run: Run) -> None:
    """Bring the run's image; a run without a container has none."""
    if run.container is None:
        return
    container, logger = run.container, get_run_logger()
    await steps.fetch_image(run, logger.info)
    logger.info("Image %s, asked for as %s, run by %s", container.image, container.asked, container.runtime)

"""The sweep flow."""

from __future__ import annotations

from typing import Annotated

from prefect import State, flow
from prefect_docker import DockerRegistryCredentials  # type: ignore[import-untyped]
from pydantic import Field

from nexa_infra.blocks import ImageCatalog, PriceList, SlurmCluster
from nexa_infra.flows import road
from nexa_infra.monitoring.report import CostReport


@flow(
    name="sweep",
    flow_run_name=lambda: road.run_name("sweep"),
    description="Runs every trial of a sweep, and says what it was going to cost, did cost, and what it bought.",
    on_cancellation=[road.end_run],
    on_crashed=[road.close_run],
)
async def sweep(
    config_file: Annotated[str, Field(title="Config file", json_schema_extra={"position": 0})] = (
        "deployments/configs/digits.yaml"
    ),
    submit: Annotated[bool, Field(title="Submit", json_schema_extra={"position": 1})] = False,
    cluster: Annotated[SlurmCluster | str | None, Field(title="Cluster", json_schema_extra={"position": 2})] = None,
    prices: Annotated[PriceList | str | None, Field(title="Prices", json_schema_extra={"position": 3})] = None,
    budget_usd: Annotated[float | None, Field(title="Budget, USD", ge=0, json_schema_extra={"position": 4})] = None,
    overrides: Annotated[list[str], Field(title="Overrides", json_schema_extra={"position": 5})] = [],  # noqa: B006
    resume: Annotated[str, Field(title="Resume", json_schema_extra={"position": 6})] = "",
    catalog: Annotated[
        ImageCatalog | str | None, Field(title="Image catalog", json_schema_extra={"position": 7})
    ] = None,
    registry: Annotated[
        DockerRegistryCredentials | str | None, Field(title="Registry", json_schema_extra={"position": 8})
    ] = None,
    extend: Annotated[str, Field(title="Extend", json_schema_extra={"position": 9})] = "",
) -> CostReport | State[None] | None:
    """Run a sweep along the road: cost, code, script, submission, results, report.

    Args:
        config_file: The sweep's YAML file, from the project's folder.
        submit: Run it. Off, it is a preview: the script, the first and last trials and the cost, nothing started.
        cluster: A saved Slurm cluster, or its name; none runs the trials on the worker's own machine.
        prices: A saved price list, in place of the bundled price book.
        budget_usd: Refuse the run if its projected cost is over this; empty for the config's own limit.
        overrides: Changes to the config file, each as key.path=value, such as job.time=00:10:00.
        resume: A run's id, to run what is unfinished of it; the other fields are then left aside. Empty for a new run.
        catalog: A saved image catalog, or its name, for the config's container; none is the project's own.
        registry: Saved Docker registry credentials, or their name, where the image is in a private registry.
        extend: An earlier run's id, to run only what of this sweep it has not finished. Empty for all of it.
    """
    run = await road.planned(
        config_file,
        cluster=cluster,
        prices=prices,
        budget_usd=budget_usd,
        overrides=overrides,
        resume=resume,
        catalog=catalog,
        registry=registry,
        extend=extend,
    )
    if submit or resume:
        return await road.take_the_road(run)
    await road.preview(run)
    return None

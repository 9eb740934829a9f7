"""The road, as both flows take it: one line a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from prefect import Flow, State, get_run_logger, runtime
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelled
from prefect_docker import DockerRegistryCredentials  # type: ignore[import-untyped]

from nexa_infra.blocks import ImageCatalog, PriceList, SlurmCluster
from nexa_infra.blocks.docker import credentials_of
from nexa_infra.blocks.saved import catalog_of
from nexa_infra.containers.credentials import remember
from nexa_infra.errors import ConfigError, NexaError, Problem, RunCancelledError
from nexa_infra.hosts.connections import kept_open
from nexa_infra.monitoring.report import CostReport, to_terminal
from nexa_infra.operations import launch, steps
from nexa_infra.operations.endings import ending
from nexa_infra.operations.extend import finished_in
from nexa_infra.operations.launch import reported
from nexa_infra.operations.manage import find, find_by_token, prepare_resume
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import preview_markdown
from nexa_infra.spec.cluster import Cluster
from nexa_infra.tasks import (
    collect,
    cost_report,
    estimate_cost,
    pull_image,
    render_slurm_array,
    sbatch_submit,
    sync,
    torchrun_launch,
    track,
    watch,
)
from nexa_infra.tasks.names import artifact_key
from nexa_infra.tasks.report import publish

# A deployment with this tag runs on a cluster, or not at all.
CLUSTER_REQUIRED = "cluster-required"


async def take_the_road(run: Run) -> CostReport | State[None]:
    """Take a run along the road, to its report; a run that ends early has one too."""
    with kept_open(run.cluster):
        async with shown(run):
            await estimate_cost(run)
            run = await sync(run)
            run = await render_slurm_array(run)
            await pull_image(run)
            for _ in range(2 if run.cluster else 1):
                await (torchrun_launch if run.config.launcher.type == "torchrun" else sbatch_submit)(run)
                await watch(run)
                trials = await collect(run)
                # What a cluster has forgotten is submitted again, once.
                if ending(run, trials)[0] != "unfinished":
                    break
        report = await cost_report(run, trials)
        await track(run, trials, report)
        get_run_logger().info("\n%s", to_terminal(report))
        try:
            await asyncio.to_thread(steps.conclude, run, trials)
        except RunCancelledError as word:
            return Cancelled(message=str(word))
    return report


async def preview(run: Run) -> None:
    """Show what a run would submit, for how much, and what its cluster says; nothing is written or started."""
    await estimate_cost(run, submit=False)
    text = preview_markdown(await asyncio.to_thread(launch.preview, run))
    await acreate_markdown_artifact(text, key=artifact_key("preview", run), description=f"Preview of {run.config_file}")
    get_run_logger().info("Nothing was submitted: this is the preview; set submit to run it")


async def planned(
    config_file: str,
    *,
    cluster: SlurmCluster | str | None,
    prices: PriceList | str | None,
    budget_usd: float | None,
    overrides: Sequence[str],
    resume: str,
    catalog: ImageCatalog | str | None = None,
    registry: DockerRegistryCredentials | str | None = None,
    distributed: bool | None = None,
    extend: str = "",
) -> Run:
    """Plan the flow run's own run, or find the one that it goes on with.

    A flow run that Prefect starts again plans the same run, and goes on with it.
    """
    if registry is not None and registry != "":
        remember(await asyncio.to_thread(credentials_of, registry))
    if resume.strip():
        await unlock(await asyncio.to_thread(find, resume.strip()))
        return await asyncio.to_thread(prepare_resume, resume.strip())
    where = await chosen(cluster)
    token = run_token(runtime.flow_run.id)
    if token and (earlier := await asyncio.to_thread(find_by_token, token)) is not None:
        return earlier
    before = None
    if extend.strip():
        extended = await asyncio.to_thread(find, extend.strip())
        await unlock(extended)
        before = await asyncio.to_thread(finished_in, extended)
    price_block = await PriceList.aload(prices) if isinstance(prices, str) and prices else prices or None
    known = await asyncio.to_thread(catalog_of, catalog)
    return await asyncio.to_thread(
        lambda: steps.plan(
            config_file,
            cluster=where,
            book=price_block.to_book() if isinstance(price_block, PriceList) else None,
            budget_usd=budget_usd,
            overrides=[word for word in overrides if word.strip()],
            labels={**labels(), **(before.labels if before else {})},
            distributed=distributed,
            catalog=known,
            moment=datetime.now(UTC),
            token=token,
            narrowed=(lambda read: before.left_of(read, config_file)) if before else None,
        )
    )


async def chosen(cluster: SlurmCluster | str | None) -> Cluster | None:
    """Return the cluster that a flow run was given; None is the machine that it runs on.

    Raises:
        ConfigError: none is saved under this name, or none was given to a deployment that needs one.
    """
    if isinstance(cluster, str) and cluster.strip():
        name = cluster.strip().removeprefix(f"{SlurmCluster.get_block_type_slug()}/")
        try:
            cluster = await SlurmCluster.aload(name)
        except ValueError as error:
            message = f"there is no saved cluster {name!r}: `prefect block ls` lists them; the UI saves one (Blocks)"
            raise ConfigError(Problem("cluster", message, file="Prefect")) from error
    if isinstance(cluster, SlurmCluster):
        return cluster.to_cluster()
    if CLUSTER_REQUIRED in (runtime.flow_run.tags or ()):
        message = (
            "this deployment runs on a Slurm cluster only, and none was chosen: choose a saved one (SlurmCluster in "
            "the form, -p cluster=NAME on the command line), or run the deployment called default here"
        )
        raise ConfigError(Problem("cluster", message, file="Prefect"))
    return None


async def unlock(run: Run) -> None:
    """Tell this process's logins what opens the key to a run's cluster, where the cluster's saved block says it."""
    if run.cluster is not None and run.cluster.key_file:
        with suppress(ValueError):  # it is saved no more, or never was
            block: object = await SlurmCluster.aload(run.cluster.name)
            if isinstance(block, SlurmCluster):
                block.to_cluster()


@asynccontextmanager
async def shown(run: Run) -> AsyncIterator[None]:
    """Write the report where the road ends early, and show it in Prefect."""
    try:
        async with reported(run):
            yield
    except NexaError:
        if run.files.record.exists():
            await report_to_prefect(run, runtime.flow_run.id)
        raise


def labels() -> dict[str, str]:
    """Return what ties a run to its flow run."""
    if not runtime.flow_run.id:
        return {}
    address = PREFECT_UI_URL.value()
    found = {"flow_run_id": str(runtime.flow_run.id)}
    return {**found, "flow_run_url": f"{address.rstrip('/')}/runs/flow-run/{runtime.flow_run.id}"} if address else found


def run_token(flow_run_id: str | None) -> str | None:
    """Return the part of a run's id that names its flow run."""
    return str(flow_run_id).replace("-", "")[:12] if flow_run_id else None


def run_name(verb: str) -> str:
    """Return a telling name for a flow run: what is run, from which file."""
    given: dict[str, Any] = runtime.flow_run.parameters or {}
    if given.get("resume"):
        return f"{verb} {given['resume']}, resumed"
    name = str(given.get("config_file", "")).rpartition("/")[2].rsplit(".", 1)[0]
    return f"{verb} {name}" if given.get("submit") else f"{verb} {name}, preview"


async def end_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect names them
    """End the run of a cancelled flow run: Prefect calls this in another process, so it is found by its id."""
    if (run := await asyncio.to_thread(run_of, flow_run)) is not None:
        await unlock(run)
        with kept_open(run.cluster):
            await asyncio.to_thread(steps.cancel, run, "cancelled in Prefect")
            await report_to_prefect(run, str(flow_run.id))


async def close_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - likewise
    """Show the report of a run whose flow run has crashed."""
    if (run := await asyncio.to_thread(run_of, flow_run)) is not None:
        await unlock(run)
        with kept_open(run.cluster):
            await report_to_prefect(run, str(flow_run.id))


def run_of(flow_run: FlowRun) -> Run | None:
    """Find the run that a flow run has made, or goes on with."""
    token = run_token(str(flow_run.id))
    found = find_by_token(token) if token else None
    name = (flow_run.parameters or {}).get("resume")
    return found or (find(name) if name else None)


async def report_to_prefect(run: Run, flow_run_id: str | None) -> None:
    """Write a run's report as it stands, and show it as artifacts."""
    trials = await asyncio.to_thread(steps.collect, run)
    await publish(run, await asyncio.to_thread(steps.report, run, trials), trials, flow_run_id)

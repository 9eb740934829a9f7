"""container-run: a target of the image catalog, run to its end; what it says is in Prefect's log."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect_docker import DockerHost, DockerRegistryCredentials  # type: ignore[import-untyped]

from nexa_infra.blocks import ImageCatalog
from nexa_infra.blocks.docker import credentials_of, docker_client
from nexa_infra.blocks.saved import catalog_of
from nexa_infra.containers.credentials import remember
from nexa_infra.containers.runner import ContainerResult, run_container
from nexa_infra.errors import NexaError
from nexa_infra.tasks.cancelled import cancelled_in_prefect


@task(name="container-run", description="Runs a target of the image catalog in a container, to its end.")
async def container_run(
    target: str,
    *,
    override_image: str | None = None,
    extra_env: Mapping[str, str] | None = None,
    bootstrap_args: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    host: DockerHost | str | None = None,
    registry: DockerRegistryCredentials | str | None = None,
    catalog: ImageCatalog | str | None = None,
    check: bool = True,
    **more: Any,
) -> ContainerResult:
    """Run a container as `run_container` does; cancelled, or ended by an error, it leaves none behind.

    Args:
        target: A target of the catalog.
        override_image: An image in place of the target's.
        extra_env: Environment variables besides the target's.
        bootstrap_args: Arguments after the command.
        command: What runs in place of the target's own command.
        host: A saved `DockerHost`, or its name; unset, this machine's runtime.
        registry: Saved `DockerRegistryCredentials`, or their name, for a private registry.
        catalog: A saved `ImageCatalog`, or its name; unset, the project's own.
        check: Whether an end other than exit code 0 is an error.
        more: What else `run_container` takes.

    Raises:
        ContainerError: it did not end well, or could not be run.
    """
    logger = get_run_logger()
    stop = threading.Event()
    if registry is not None:
        remember(await asyncio.to_thread(credentials_of, registry))
    known = await asyncio.to_thread(catalog_of, catalog)
    client = await asyncio.to_thread(docker_client, host) if host is not None else None

    def tell(_: Literal["stdout", "stderr"], line: str) -> None:
        logger.info("%s", line)

    def go() -> ContainerResult:
        return run_container(
            target, override_image=override_image, extra_env=extra_env, bootstrap_args=bootstrap_args,
            command=command, catalog=known, client=client, tell=tell, stop=stop, **more,
        )  # fmt: skip

    with closing(client) if client is not None else nullcontext():
        running = asyncio.ensure_future(asyncio.to_thread(go))
        word = asyncio.create_task(_stop_when_cancelled(stop))
        try:
            result = await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            with suppress(NexaError):
                await running
            raise
        finally:
            word.cancel()
    logger.info(
        "Container of %s (%s): %s, exit code %d, %.1f s", target, result.image, result.ended, result.exit_code,
        result.seconds,
    )  # fmt: skip
    return result.check() if check else result


async def _stop_when_cancelled(stop: threading.Event) -> None:
    await cancelled_in_prefect()
    stop.set()

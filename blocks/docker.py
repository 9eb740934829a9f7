"""Docker's engine and registries, as prefect-docker's blocks have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_docker import DockerHost, DockerRegistryCredentials  # type: ignore[import-untyped]

from nexa_infra.blocks.saved import saved
from nexa_infra.containers.credentials import Credentials, host_of_registry
from nexa_infra.errors import NexaError

if TYPE_CHECKING:
    from docker import DockerClient


def docker_client(
    host: DockerHost | str | None = None, registry: DockerRegistryCredentials | str | None = None
) -> DockerClient:
    """Return a client of an engine that answers, logged in to a registry where one is given.

    Args:
        host: A `DockerHost`, or the name that one was saved under; unset, the engine that the environment
            names (DOCKER_HOST), else this machine's.
        registry: Likewise, a `DockerRegistryCredentials`.

    Raises:
        ConfigError: no block is saved under a name; the message names the nearest.
        NexaError: the engine cannot be reached, or the registry refuses the login.
    """
    from docker.errors import DockerException

    block = saved(DockerHost, host, key="docker_host", what="Docker host") if isinstance(host, str) else host
    login = credentials_of(registry) if registry is not None else None
    found = block or DockerHost()
    try:
        client = found.get_client()
        client.ping()
    except DockerException as error:
        where = found.base_url or "this machine's, or DOCKER_HOST's"
        raise NexaError(
            f"the Docker engine cannot be reached ({where}): {error}; is it running, and may this user speak to it?"
        ) from error
    if login is not None:
        try:
            client.login(login.username, login.password, registry=login.registry)
        except DockerException as error:
            client.close()
            told = str(error).replace(login.password, "…") if login.password else str(error)
            raise NexaError(f"the registry {login.registry} refuses the login of {login.username!r}: {told}") from None
    return client


def credentials_of(registry: DockerRegistryCredentials | str) -> Credentials:
    """Return what a registry asks of who pulls from it, out of a block or of the name that one was saved under.

    Raises:
        ConfigError: no block is saved under the name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    block = registry
    if isinstance(block, str):
        block = saved(DockerRegistryCredentials, block, key="registry", what="Docker registry's credentials")
    # A block that was loaded without validation holds plain text.
    secret = block.password
    return Credentials(
        registry=host_of_registry(block.registry_url),
        username=block.username,
        password=secret if isinstance(secret, str) else secret.get_secret_value(),
    )

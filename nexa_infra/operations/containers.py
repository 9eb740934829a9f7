"""The containers of a run: their image brought, and what a crash left of them swept up."""

from __future__ import annotations

import base64
import json

from nexa_infra.containers.credentials import remembered
from nexa_infra.containers.script import CONTAINER_SCRIPT
from nexa_infra.errors import ContainerError
from nexa_infra.hosts.base import Host
from nexa_infra.runs.record import Run

# How long bringing an image may say nothing, seconds.
MOST_SECONDS = 3600.0


def bring_image(run: Run, host: Host) -> None:
    """Bring a run's image before its trials: to this machine, where they run; to a cluster's, where only we may pull.

    A login that this process was given reaches the other side on the standard input of one command: an argument would
    be seen by others.

    Raises:
        ContainerError: it cannot be had; the message holds the runtime's words.
    """
    container = run.container
    if container is None or container.runtime == "pyxis":
        return
    registry = container.image.partition("/")[0]
    login = remembered(registry) if container.source == "registry" else None
    if run.cluster is not None and login is None:
        return  # its nodes bring it, one for all
    env, said = {}, ""
    if login is not None:
        word = base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
        env["NEXA_REGISTRY_LOGIN"] = "-"
        said = json.dumps({"auths": {registry: {"auth": word}}})
    argv = ["bash", f"{run.directory}/{CONTAINER_SCRIPT}", "fetch"]
    done = host.run(argv, env=env, stdin=said, timeout=MOST_SECONDS)
    if done.returncode:
        words = done.stderr.strip().removeprefix("container.sh: ")
        raise ContainerError(f"the image of run {run.id} could not be brought: {words[-2000:] or 'nothing says why'}")

"""The containers of a run: their image brought, and what a crash left of them swept up."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from nexa_infra.containers.command import fetch_by_script
from nexa_infra.containers.credentials import Credentials, remembered
from nexa_infra.containers.docker import connect
from nexa_infra.containers.images import HUB
from nexa_infra.containers.pull import bring
from nexa_infra.containers.script import CONTAINER_SCRIPT
from nexa_infra.errors import ContainerError
from nexa_infra.hosts.base import Host
from nexa_infra.runs.record import Run

# How container.sh ends where nothing there runs containers.
NOT_HERE = 69
# How long bringing an image may say nothing, seconds.
MOST_SECONDS = 3600.0


def bring_image(
    run: Run, host: Host, tell: Callable[[str], None] | None = None, stop: threading.Event | None = None
) -> None:
    """Bring a run's image before its trials: to this machine, where they run; to a cluster's, where only we may pull.

    A login that this process was given reaches the other side on the standard input of one command: an argument would
    be seen by others. `tell` hears how far it is; `stop`, once set, gives it up where that is here.

    Raises:
        ContainerError: it cannot be had; the message holds the runtime's words.
    """
    container = run.container
    if container is None or container.runtime == "pyxis":
        return
    if run.cluster is None and container.runtime == "docker":
        with closing(connect()) as client:
            bring(client, container, tell, stop)
        return
    login = remembered(container.image.partition("/")[0]) if container.source == "registry" else None
    if run.cluster is not None and (login is None or container.runtime == "docker"):
        return  # its nodes bring it, a SIF one for all
    said = _login_file(login) if login is not None else ""
    if run.cluster is None:
        code, words = fetch_by_script(Path(run.directory), stdin=said.encode(), stop=stop)
    else:
        argv = ["bash", f"{run.directory}/{CONTAINER_SCRIPT}", "fetch"]
        done = host.run(argv, env={"NEXA_REGISTRY_LOGIN": "-"}, stdin=said, timeout=MOST_SECONDS)
        code, words = done.returncode, done.stderr
        if code == NOT_HERE:
            return  # only its nodes have what builds it: they use the account's own login
    if code:
        words = words.strip().removeprefix("container.sh: ")
        raise ContainerError(f"the image of run {run.id} could not be brought: {words[-2000:] or 'nothing says why'}")


def _login_file(login: Credentials) -> str:
    """Return a login as Docker's config.json has it."""
    word = base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
    names = [login.registry, *(["https://index.docker.io/v1/"] if login.registry == HUB else [])]
    return json.dumps({"auths": {name: {"auth": word} for name in names}})

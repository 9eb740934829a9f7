"""What containers have left on this machine: containers of runs that are over, and SIFs that no run uses."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import ContainerError, NexaError
from nexa_infra.operations.manage import home
from nexa_infra.runs.index import known_runs, run_at

if TYPE_CHECKING:
    import docker

    from nexa_infra.runs.record import Run

# Folders of the home that hold what containers need.
IMAGES = "images"
CONTAINERS = "containers"
# What may belong to a build or a container that is just being started, seconds.
_GRACE = 300.0
_SIF = re.compile(r"([0-9a-f]{64})\.(?:sif|log|sif\..+)")


def left_containers(in_use: Callable[[Run], bool]) -> Iterator[tuple[str, float]]:
    """Yield the name and the time of containers whose run is over, or unknown and whose program has ended.

    Where no engine answers there are none.
    """
    with _engine() as client:
        if client is None:
            return
        runs = {entry.id: entry.directory for entry in known_runs(home())}
        for each in client.api.containers(all=True, filters={"label": "nexa.run"}):
            made = float(each["Created"])
            if made > time.time() - _GRACE:
                continue
            directory = runs.get(each["Labels"]["nexa.run"])
            over = each["State"] != "running"
            if directory is not None:
                with suppress(NexaError, OSError):
                    over = not in_use(run_at(directory))
            if over:
                yield str(each["Names"][0]).lstrip("/"), made


def remove_container(name: str) -> None:
    """End and remove a container that `left_containers` has named."""
    from nexa_infra.containers.docker import remove

    with _engine() as client:
        if client is None:
            raise ContainerError("Docker's engine does not answer any more")
        remove(client, name)


@contextmanager
def _engine() -> Iterator[docker.DockerClient | None]:
    """Find this machine's engine, without a look at the SDK where there is none."""
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        yield None
        return
    from nexa_infra.containers.docker import connect

    try:
        client = connect()
    except ContainerError:
        yield None
        return
    with closing(client):
        yield client


def left_images(base: Path, older: float) -> Iterator[tuple[Path, int, float]]:
    """Yield what lies among the SIFs, its size and when it was last read: of images that no run here may ask for."""
    used = set()
    for entry in known_runs(base):
        with suppress(NexaError, OSError):
            container = run_at(entry.directory).container
            if container is not None:
                used.add(container.digest.removeprefix("sha256:"))
    with suppress(FileNotFoundError):
        for each in os.scandir(base / IMAGES):
            found = _SIF.fullmatch(each.name)
            state = each.stat(follow_symlinks=False)
            last = max(state.st_mtime, state.st_atime)
            limit = time.time() - max(older, _GRACE)
            if found is not None and found[1] not in used and last < limit:
                yield Path(each.path), state.st_size, last

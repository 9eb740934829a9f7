"""What a run directory holds for its containers: the script that starts one, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from nexa_infra.hosts.shell import quote_line, quote_path
from nexa_infra.runs.record import Container
from nexa_infra.spec.container import size_bytes

CONTAINER_SCRIPT = "container.sh"
CONTAINER_CONF = "container.conf"
GUARD = "guard.sh"


@cache
def shell_text(name: str) -> str:
    """Return one of this room's shell programs: `container.sh`, or the guard that is a Docker container's first."""
    return (files("nexa_infra.containers") / name).read_text(encoding="utf-8")


def container_conf(
    container: Container,
    *,
    run_id: str,
    cache: str,
    gpus: int = 0,
    memory: str | None = None,
    network: str | None = None,
) -> Iterator[str]:
    """Yield the lines of bash that tell the script what to run.

    `cache` is the folder of SIFs where it runs; `gpus` and `memory` are the job's, `memory` as Slurm has it, and
    `network` stands in where neither target nor config says one.
    """
    settings = container.settings
    most = settings.memory or (memory if memory != "0" else None)
    plain = {
        "image": container.image,
        "digest": container.digest,
        "runtime": container.runtime,
        "source": container.source,
        "file": container.file,
        "stamp": container.stamp,
        "network": settings.network or network,
        "shm": settings.shm_size and size_bytes(settings.shm_size),
        "memory": most and size_bytes(most),
        # What it grows with, where a retry asks for more: its own settings say how much it is to have.
        "asked": size_bytes(memory) if memory and memory != "0" and not settings.memory else None,
        "cpus": settings.cpus,
        "processes": settings.processes,
        "gpus": gpus or None,
        "run": run_id,
    }
    yield from (f"{name}={quote_line(str(value))}" for name, value in plain.items() if value is not None)
    for name, path in {"cache": cache, "auth_file": container.auth_file}.items():
        if path is not None:
            yield f"{name}={quote_path(path)}"
    for mount in container.mounts:
        mode = "ro" if mount.read_only else "''"
        yield f"mounts+=({quote_path(mount.source)} {quote_line(mount.target)} {mode})"
    for name, value in settings.env.items():
        yield f"inside+=({name} {quote_line(value)})"

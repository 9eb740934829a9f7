"""What containers have left on this machine: containers of runs that are over, and SIFs that no run uses."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.containers.docker import LABEL, SOCKET, connect, remove
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
        for each in client.api.containers(all=True, filters={"label": LABEL}):
            made = float(each["Created"])
            if made > time.time() - _GRACE:
                continue
            directory = runs.get(each["Labels"][LABEL])
            over = each["State"] != "running"
            if directory is not None:
                with suppress(NexaError, OSError):
                    over = not in_use(run_at(directory))
            if over:
                yield str(each["Names"][0]).lstrip("/"), made


def remove_container(name: str) -> None:
    """End and remove a container that `left_containers` has named."""
    with _engine() as client:
        if client is None:
            raise ContainerError("Docker's engine does not answer any more")
        remove(client, name)


@contextmanager
def _engine() -> Iterator[docker.DockerClient | None]:
    """Find this machine's engine, without a look at the SDK where there is none."""
    if not os.environ.get("DOCKER_HOST") and not SOCKET.exists():
        yield None
        return
    try:
        client = connect()
    except ContainerError:
        yield None
        return
    with closing(client):
        yield client


def left_folders(base: Path, older: float) -> Iterator[tuple[Path, float]]:
    """Yield the folders of `run_container` whose containers have ended, and when each was last used."""
    limit = time.time() - max(older, _GRACE)
    with suppress(FileNotFoundError):
        for each in os.scandir(base / CONTAINERS):
            if each.name.startswith(".") or not each.is_dir(follow_symlinks=False):
                continue
            path = Path(each.path)
            logs = [path / f"{name}.log" for name in ("stdout", "stderr")]
            used = max(place.lstat().st_mtime for place in (path, *logs) if place.exists())
            if used < limit and not is_heard(path):
                yield path, used


def is_heard(folder: Path) -> bool:
    """Say whether a process of `run_container` still writes down there what its container says."""
    try:
        with (folder / "stdout.log").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Sif:
    """A SIF, and what lies beside it by its name: its log, and what its builder needs."""

    path: Path
    size: int  # bytes, of all
    files: int
    used: float  # when any of it was last read or written, seconds since the epoch


def left_images(base: Path, older: float, *, except_for: Set[Path] = frozenset()) -> Iterator[Sif]:
    """Yield the SIFs of images that no run here may ask for, other than the runs `except_for`, which are going."""
    used = _digests_in_use(base, except_for)
    limit = time.time() - max(older, _GRACE)
    states: dict[str, list[os.stat_result]] = defaultdict(list)
    with suppress(FileNotFoundError):
        for each in os.scandir(base / IMAGES):
            if (found := _SIF.fullmatch(each.name)) and not each.is_dir(follow_symlinks=False):
                states[found[1]].append(each.stat(follow_symlinks=False))
    for digest, told in states.items():
        # A builder's lock is as old as its build: the heartbeat beside it says that it goes on.
        last = max(max(state.st_mtime, state.st_atime) for state in told)
        if digest not in used and last < limit:
            path = base / IMAGES / f"{digest}.sif"
            yield Sif(path, sum(state.st_size for state in told), len(told), last)


def remove_image(path: Path) -> None:
    """Delete a SIF that `left_images` has named, with all that is called after it.

    Raises:
        NexaError: a run asks for it again; it stays.
    """
    if path.stem not in {each.path.stem for each in left_images(path.parent.parent, 0.0)}:
        raise NexaError(f"{path} is in use again: it stays")
    for each in path.parent.iterdir():
        if (found := _SIF.fullmatch(each.name)) and found[1] == path.stem:
            each.unlink(missing_ok=True)


def _digests_in_use(base: Path, except_for: Set[Path]) -> set[str]:
    used = set()
    for entry in known_runs(base):
        if entry.directory not in except_for:
            with suppress(NexaError, OSError):
                container = run_at(entry.directory).container
                if container is not None:
                    used.add(container.digest.removeprefix("sha256:"))
    return used

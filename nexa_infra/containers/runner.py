"""run_container: a curated image, run with workspace and data mounted, by whatever runs containers here."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from nexa_infra.containers import docker as engine
from nexa_infra.containers.catalog import Catalog, load_catalog, target_of
from nexa_infra.containers.chosen import catalog_file
from nexa_infra.containers.command import run_by_script
from nexa_infra.containers.pin import pin
from nexa_infra.containers.pull import bring
from nexa_infra.errors import ConfigError, ContainerError, Problem
from nexa_infra.hosts.local import LocalHost
from nexa_infra.runs.record import Container
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSpec, Mount, Network, RuntimeName
from nexa_infra.spec.fields import key_text
from nexa_infra.spec.load import code_root

if TYPE_CHECKING:
    import docker

# What a result keeps of each stream, bytes; all of it is in the run directory.
MOST_TAIL = 64 * 1024

Tell = Callable[[Literal["stdout", "stderr"], str], None]


@dataclass(frozen=True)
class ContainerResult:
    """What became of a container."""

    run_id: str
    target: str
    image: str  # by its digest
    digest: str
    runtime: RuntimeName
    exit_code: int  # 128 + N for signal N
    ended: engine.Ended
    seconds: float
    directory: Path  # the run directory: stdout.log, stderr.log, and what the program wrote
    stdout: str  # its end, at most 64 KiB
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.ended == "exited" and self.exit_code == 0

    def check(self) -> ContainerResult:
        """Return this, or raise what it ended as.

        Raises:
            ContainerError: it did not end well; the message holds its last words.
        """
        if self.ok:
            return self
        how = {
            "exited": f"ended with {self.exit_code}",
            "out_of_memory": "was ended by the kernel for its memory: give it more, container.memory or memory=",
            "timeout": f"was ended after its {self.seconds:.0f} s: give it a longer timeout",
            "cancelled": "was cancelled",
        }[self.ended]
        last = (self.stderr.strip() or self.stdout.strip() or "it said nothing")[-2000:]
        raise ContainerError(f"the container of {self.target} {how} (run {self.run_id}, {self.directory}): {last}")


def run_container(
    target: str,
    *,
    override_image: str | None = None,
    extra_env: Mapping[str, str] | None = None,
    bootstrap_args: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    workspace: str | Path | None = None,
    output_dir: str | Path | None = None,
    mounts: Sequence[Mount] = (),
    volumes: Sequence[str] = (),
    network: Network | None = None,
    gpus: int = 0,
    memory: str | None = None,
    cpus: float | None = None,
    timeout: float | None = None,
    runtime: RuntimeName | None = None,
    cluster: Cluster | None = None,
    catalog: Catalog | str | Path | None = None,
    client: docker.DockerClient | None = None,
    tell: Tell | None = None,
    stop: threading.Event | None = None,
    run_id: str | None = None,
) -> ContainerResult:
    """Run a target of the image catalog to its end; leaving this call, however, leaves no container behind.

    What runs is `command`, or the target's own, and then `bootstrap_args`. The code around the working directory, or
    `workspace`, is seen read-only where it is, and is where the program starts; the run directory, `output_dir` or a
    new one under NEXA_HOME, is seen there too, and can be written: NEXA_RUN_DIR names it. `extra_env`, `mounts`,
    `volumes` (names of the cluster's), `network`, `memory` and `cpus` stand over the target's settings. `timeout` is
    in seconds; `stop`, once set, ends the container; `tell` hears each line. `client` is an engine of Docker other
    than DOCKER_HOST's: of one on another machine, mounts are paths there, and neither workspace nor run directory
    is seen.

    Raises:
        ConfigError: an unknown target, or settings that make no sense.
        ContainerError: the image cannot be had, nothing runs it, or what runs it went away.
    """
    known = _catalog(catalog)
    chosen = target_of(known.model_copy(update={"require_digest": False}), target)
    argv = [*(command if command is not None else chosen.command), *(bootstrap_args or ())]
    if not argv:
        raise ConfigError(Problem("command", f"the target {target} has no command of its own: give one, command=[…]"))
    asked = _asked(
        target=target, image=override_image, runtime=runtime or ("docker" if client is not None else None),
        env=dict(extra_env or {}), mounts=tuple(mounts), volumes=tuple(volumes), network=network, memory=memory,
        cpus=cpus,
    )  # fmt: skip
    root = Path(workspace).resolve() if workspace is not None else code_root(Path.cwd() / "-")
    if not root.is_dir() or len(root.parts) == 1:
        why = "is the whole machine" if root.is_dir() else "is no folder"
        raise ConfigError(Problem("workspace", f"{root} {why}: name the folder of the code"))
    with _engine(asked, cluster, client) as found:
        container = pin(asked, LocalHost(), cluster=cluster, catalog=known, client=found, here=True)
        if container is None:
            raise ConfigError(Problem("runtime", "is none: run the program itself, without run_container"))
        if container.runtime == "pyxis":
            message = "Pyxis starts containers as a part of srun: give a job's config container:, or choose another"
            raise ConfigError(Problem("runtime", message))
        _check_sources(container, remote=found is not None and engine.is_remote(found))
        identity = run_id or _new_id(target)
        directory = Path(output_dir or settings().home / "containers" / identity).expanduser().resolve()
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        with _Heard(directory, tell) as heard:
            begun = time.monotonic()
            ending = _run(
                container, argv, root, directory, identity,
                client=found, gpus=gpus, timeout=timeout, stop=stop, heard=heard,
            )  # fmt: skip
    return ContainerResult(
        run_id=identity,
        target=target,
        image=container.image,
        digest=container.digest,
        runtime=container.runtime,
        exit_code=ending.exit_code,
        ended=ending.ended,
        seconds=time.monotonic() - begun,
        directory=directory,
        stdout=heard.tail("stdout"),
        stderr=heard.tail("stderr"),
    )


def _asked(**given: Any) -> ContainerSpec:
    try:
        return ContainerSpec.model_validate(given)
    except ValidationError as error:
        raise ConfigError(
            *(
                Problem(key_text(each["loc"]), each["msg"].removeprefix("Value error, "), file="run_container")
                for each in error.errors()
            )
        ) from error


@contextmanager
def _engine(
    asked: ContainerSpec, cluster: Cluster | None, client: docker.DockerClient | None
) -> Iterator[docker.DockerClient | None]:
    """Find the engine that is to be used: the caller's, or this machine's where one answers and is not ruled out."""
    runtime = asked.runtime or (cluster.runtime if cluster else "auto")
    if client is not None or runtime not in {"auto", "docker"}:
        yield client
        return
    try:
        own = engine.connect()
    except ContainerError:
        if runtime == "docker":
            raise
        yield None  # Apptainer may be here
        return
    with closing(own):
        yield own


def _run(
    container: Container,
    argv: Sequence[str],
    root: Path,
    directory: Path,
    identity: str,
    *,
    client: docker.DockerClient | None,
    gpus: int,
    timeout: float | None,
    stop: threading.Event | None,
    heard: _Heard,
) -> engine.Ending:
    env = {"NEXA_RUN_ID": identity, "NEXA_RUN_DIR": str(directory), "NEXA_METRICS": str(directory / "metrics.json")}
    if container.runtime != "docker":
        return run_by_script(
            container, argv, workdir=root, directory=directory, identity=identity, env=env,
            gpus=gpus, timeout=timeout, stop=stop, hear=heard.hear,
        )  # fmt: skip
    if client is None:
        raise ContainerError("there is no engine of Docker")
    bring(client, container, heard.progress)
    seen = list(container.mounts)
    workdir = "/"
    if not engine.is_remote(client):
        seen = [
            Mount(source=str(root), target=str(root)),
            Mount(source=str(directory), target=str(directory), read_only=False),
            *(each.model_copy(update={"source": str(Path(each.source).expanduser())}) for each in seen),
        ]
        workdir = str(root)
    return engine.run(
        client, container, argv,
        mounts=seen, workdir=workdir,
        # A container of Docker's has room of its own in /tmp.
        env={"HOME": "/tmp", **env, **container.settings.env},  # noqa: S108
        labels={engine.LABEL: identity}, name=f"nexa-{identity}",
        hear=heard.hear, gpus=gpus, timeout=timeout, stop=stop,
    )  # fmt: skip


def _check_sources(container: Container, *, remote: bool) -> None:
    if remote:
        return
    gone = [each.source for each in container.mounts if not Path(each.source).expanduser().exists()]
    if gone:
        raise ConfigError(
            *(Problem("container.mounts", f"{source} is not there: make it, or name another") for source in gone)
        )


def _new_id(target: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", target.lower()).strip("-") or "container"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(2)}"


def _catalog(given: Catalog | str | Path | None) -> Catalog:
    if isinstance(given, Catalog):
        return given
    return load_catalog(given if given is not None else catalog_file(code_root(Path.cwd() / "-")))


class _Heard:
    """What a container says: kept in its files, told line by line, its end remembered."""

    def __init__(self, directory: Path, tell: Tell | None) -> None:
        self._directory, self._tell = directory, tell
        self._tails: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._open: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Heard:
        for name in self._tails:
            number = os.open(self._directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._files[name] = os.fdopen(number, "wb", buffering=0)
            with suppress(OSError):  # a file system may have no locks
                fcntl.flock(number, fcntl.LOCK_SH)  # so that `clean` sees that it is in use
        return self

    def __exit__(self, *_: object) -> None:
        for name, file in self._files.items():
            if self._open[name] and self._tell is not None:
                self._tell(name, self._open[name].decode(errors="replace"))  # type: ignore[arg-type]
            file.close()

    def hear(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Take what a stream says."""
        self._files[stream].write(data)
        tail = self._tails[stream]
        tail += data
        del tail[:-MOST_TAIL]
        if self._tell is None:
            return
        rest = self._open[stream]
        rest += data
        *lines, last = rest.split(b"\n")
        for line in lines:
            self._tell(stream, line.decode(errors="replace"))
        # A line without an end is told in pieces, so that it fills no memory.
        if len(last) > MOST_TAIL:
            self._tell(stream, last.decode(errors="replace"))
            last = bytearray()
        self._open[stream] = bytearray(last)

    def progress(self, text: str) -> None:
        """Tell how far a pull is."""
        if self._tell is not None:
            self._tell("stderr", text)

    def tail(self, stream: Literal["stdout", "stderr"]) -> str:
        """Return the end of a stream."""
        return self._tails[stream].decode(errors="replace")

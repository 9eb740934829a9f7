"""From what a config asks for to a container that stays the same: the image by its digest, and what it sees."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.containers.docker import connect, own_image
from nexa_infra.containers.images import Reference, file_named, parse_reference
from nexa_infra.containers.mounts import merged, mounts_of
from nexa_infra.containers.pyxis import misfit_of_path
from nexa_infra.containers.registry import RegistryUnreachableError, resolve
from nexa_infra.errors import ConfigError, ContainerError, HostError, Problem
from nexa_infra.hosts.shell import quote, quote_path
from nexa_infra.runs.record import Container
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSpec, RuntimeName

if TYPE_CHECKING:
    import docker

    from nexa_infra.containers.catalog import Catalog, Target
    from nexa_infra.hosts.base import Host

# A digest is read of a whole .sif file, however large, seconds.
_READING = 1800.0
# An image's id is the digest of its configuration, whatever an archive calls that.
_ARCHIVE_DIGEST = r"""
config=$(tar -xOf "$file" manifest.json | grep -o '"Config" *: *"[^"]*"' | head -n 1)
config=${config%\"} config=${config##*\"}
[ -n "$config" ] && tar -xOf "$file" -- "$config" >/dev/null || exit 1
tar -xOf "$file" -- "$config" | sha256sum"""
_WITHOUT_ENGINE: tuple[RuntimeName, ...] = ("apptainer", "singularity")


def pin(
    asked: ContainerSpec,
    host: Host,
    *,
    cluster: Cluster | None = None,
    catalog: Catalog | None = None,
    client: docker.DockerClient | None = None,
    here: bool | None = None,
) -> Container | None:
    """Return the container that is asked for, its image by digest; None where it is to run as it is.

    `host` is where it will run, or its login node: it is asked for files, and for what runs containers; `client` is
    this machine's engine of Docker, where it is known already. `here` says whether it runs on this
    machine; unset, it does where there is no cluster.

    Raises:
        ConfigError: the target, the image or a mount makes no sense.
        ContainerError: there is no such image, or nothing to run it with.
        HostError: the host cannot be asked.
    """
    runtime = _runtime(asked, cluster)
    if runtime == "none":
        return None
    here = cluster is None if here is None else here
    if here and runtime in _WITHOUT_ENGINE and shutil.which(runtime) is None:
        raise ContainerError(f"{runtime} is not installed on this machine: install it, or choose another runtime")
    target = _target(asked, catalog)
    image = asked.image or (_image_of(target) if target else None)
    if image is None:
        raise ConfigError(Problem("container", "names no image: set container.target, or container.image"))
    if catalog is not None and catalog.require_digest and file_named(image) is None and "@" not in image:
        message = f"{image} has no digest, and the catalog demands one: write {_parsed(image).name}@sha256:…"
        raise ConfigError(Problem("container.image", message))
    settings = merged(target, asked)
    mounts = mounts_of(settings, cluster)
    file = file_named(image)
    reference = _parsed(image) if file is None else None
    if runtime == "auto" and here:
        runtime = "docker" if client is not None else runtime_here()
    elif runtime == "auto" and cluster is not None and _has_pyxis(host):
        runtime = "pyxis"
    if runtime == "pyxis":
        places = [place for each in mounts for place in (each.source, each.target)]
        if wrong := [why for place in places if (why := misfit_of_path(place))]:
            raise ConfigError(*(Problem("container.mounts", why) for why in wrong))
    found: Mapping[str, str | None] = (
        _of_registry(reference, client, own=here and runtime == "docker")
        if reference is not None
        else _of_file(file or image, host, runtime)
    )
    return Container.model_validate(
        {
            "target": asked.target,
            "asked": image,
            "runtime": runtime,
            "settings": settings,
            "mounts": mounts,
            "auth_file": asked.auth_file,
            **found,
        }
    )


def _runtime(asked: ContainerSpec, cluster: Cluster | None) -> RuntimeName:
    if asked.runtime is not None:
        return asked.runtime
    if cluster is None:
        return "auto"
    if cluster.runtime == "none":
        message = (
            f"the cluster {cluster.name} runs no containers (its runtime is none): remove the key, set "
            "container.runtime: none to run the trials as they are, or set the cluster's runtime"
        )
        raise ConfigError(Problem("container", message))
    return cluster.runtime


def _target(asked: ContainerSpec, catalog: Catalog | None) -> Target | None:
    if asked.target is None:
        return None
    from nexa_infra.containers.catalog import Catalog, target_of

    known = catalog or Catalog(targets={})
    # Where another image stands in, it is that which needs the digest.
    return target_of(
        known.model_copy(update={"require_digest": known.require_digest and not asked.image}), asked.target
    )


def _image_of(target: Target) -> str:
    """Return a target's image, by its digest where it has one."""
    if target.digest is None or file_named(target.image) is not None:
        return target.image
    return f"{target.image.partition('@')[0]}@{target.digest}"


def _parsed(image: str) -> Reference:
    try:
        return parse_reference(image)
    except ValueError as error:
        raise ConfigError(Problem("container.image", str(error))) from error


def _of_registry(reference: Reference, client: docker.DockerClient | None, *, own: bool) -> dict[str, str | None]:
    if own and (found := _local_image(reference, client)):
        return {"image": found, "digest": found, "source": "local"}
    try:
        digest = resolve(reference)
    except RegistryUnreachableError:
        # Where the trials run it may answer; what they run is said already.
        if reference.digest is None:
            raise
        digest = reference.digest
    return {"image": reference.at(digest), "digest": digest, "source": "registry"}


def _local_image(reference: Reference, client: docker.DockerClient | None) -> str | None:
    """Return the id of an image that was built on this machine, and that no registry is named for.

    Raises:
        ContainerError: Docker's engine does not answer.
    """
    if not reference.bare or reference.digest is not None:
        return None
    name = reference.repository.removeprefix("library/") + (f":{reference.tag}" if reference.tag else "")
    if client is not None:
        return own_image(client, name)
    with closing(connect()) as found:
        return own_image(found, name)


def _of_file(path: str, host: Host, runtime: RuntimeName) -> dict[str, str | None]:
    where = "on this machine" if not host.remote else f"on {host.name}"
    absolute = path if path.startswith(("/", "~/")) else None
    if absolute is None and host.remote:
        message = f"{path} is a file on {host.name}, whose folder is not known: write its absolute path"
        raise ConfigError(Problem("container.image", message))
    archived = not path.endswith((".sif", ".sqsh"))
    if archived or host.remote:
        lines = _asked_of(host, absolute or str(Path(path).resolve()), path, where, archived=archived)
    else:
        lines = _looked_at(Path(path).expanduser())
    if len(lines) < 3:
        raise ConfigError(Problem("container.image", f"{path} is not there, {where}"))
    digest = f"sha256:{lines[2].split()[0]}"
    if not archived:
        runs = ("pyxis",) if path.endswith(".sqsh") else ("apptainer", "singularity", "auto")
        if runtime not in runs:
            kind = "a squashfs image of enroot" if path.endswith(".sqsh") else "a SIF"
            message = f"{path} is {kind}, which {runtime} does not run: set container.runtime: {runs[0]}"
            raise ConfigError(Problem("container.image", message))
        return {"image": lines[0], "digest": digest, "source": "sif", "file": lines[0], "stamp": lines[1]}
    if runtime == "pyxis":
        message = f"{path} is an archive, which Pyxis does not run: push it to a registry"
        raise ConfigError(Problem("container.image", message))
    return {"image": digest, "digest": digest, "source": "archive", "file": lines[0], "stamp": lines[1]}


def _asked_of(host: Host, place: str, path: str, where: str, *, archived: bool) -> list[str]:
    """Return a file's resolved path, its stamp and its digest, as its host says in one round trip."""
    read = _ARCHIVE_DIGEST if archived else 'sha256sum < "$file"'
    done = host.script(
        f"""
file=$(readlink -f -- {quote_path(place, by=quote)}) && [ -f "$file" ] || {{ echo no; exit 0; }}
printf '%s\\n' "$file"
stat -c '%s %Y' -- "$file"
{read}""",
        timeout=_READING,
    )
    if done.returncode:
        told = f"{path} is no archive of `docker save`: {done.stderr.strip()}, {where}"
        raise ConfigError(Problem("container.image", told))
    return done.stdout.splitlines()


def _looked_at(path: Path) -> list[str]:
    """Return the same of a file here, which a process that runs many containers of it reads once."""
    try:
        file = path.resolve(strict=True)
        found = file.stat()
        digest = _digest_of(str(file), found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        return []
    return [str(file), f"{found.st_size} {int(found.st_mtime)}", digest]


@cache
def _digest_of(file: str, *_identity: int) -> str:
    with open(file, "rb") as stream:  # noqa: PTH123
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _has_pyxis(host: Host) -> bool:
    """Say whether srun there knows Pyxis; a host that cannot say is one without."""
    try:
        done = host.script("srun --help 2>&1 | grep -q -e --container-image")
    except HostError:
        return False
    return done.returncode == 0


def runtime_here() -> RuntimeName:
    """Return what runs containers on this machine: Docker where its engine answers, else Apptainer or Singularity.

    Raises:
        ContainerError: nothing does; the message says what was looked for.
    """
    try:
        connect().close()
    except ContainerError as error:
        silent = str(error).partition(": start it")[0]
    else:
        return "docker"
    for name in _WITHOUT_ENGINE:
        if shutil.which(name):
            return name
    raise ContainerError(
        "nothing on this machine runs containers: install Docker, or Apptainer, or set container.runtime: none; "
        + silent
    )

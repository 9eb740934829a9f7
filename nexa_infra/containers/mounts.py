"""What a container sees: a target's settings under a config's, and data by the cluster's own names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSettings, Mount
from nexa_infra.spec.fields import suggestion

# Where a volume of the cluster's is seen.
DATA = "/data"
SCRATCH = "/scratch"


def merged(under: ContainerSettings | None, over: ContainerSettings) -> ContainerSettings:
    """Return a target's settings with a config's over them; variables, mounts and volumes are joined."""
    base = under or ContainerSettings()
    names = ContainerSettings.model_fields
    given = {name: getattr(over, name) for name in names if getattr(over, name) is not None}
    kept = {name: getattr(base, name) for name in names}
    return ContainerSettings.model_validate(
        {
            **kept,
            **given,
            "env": {**base.env, **over.env},
            "mounts": tuple({mount.target: mount for mount in (*base.mounts, *over.mounts)}.values()),
            "volumes": tuple(dict.fromkeys((*base.volumes, *over.volumes))),
        }
    )


def mounts_of(settings: ContainerSettings, cluster: Cluster | None) -> tuple[Mount, ...]:
    """Return what the container sees besides the run's own: mounts, and volumes by name.

    Raises:
        ConfigError: a volume is not known, a place is taken twice, or the cluster does not allow a source.
    """
    found = list(settings.mounts)
    known = cluster.volumes if cluster else {}
    for name in settings.volumes:
        if name not in known:
            where = f"the cluster {cluster.name}" if cluster else "this machine"
            instead = f"there are {', '.join(sorted(known))}"
            if not known:
                block = ", or name it under volumes in the cluster's block" if cluster else ""
                instead = f"it has none: mount a folder (container.mounts){block}"
            told = f"{where} knows no volume {name!r}{suggestion(name, known)}: {instead}"
            raise ConfigError(Problem("container.volumes", told))
        found.append(Mount(source=known[name], target=f"{DATA}/{name}"))
    if wrong := [*_taken_twice(found), *_forbidden(settings.mounts, cluster)]:
        raise ConfigError(*(Problem("container.mounts", why) for why in wrong))
    return tuple(found)


def _taken_twice(mounts: Sequence[Mount]) -> Iterator[str]:
    seen: dict[PurePosixPath, Mount] = {}
    for mount in mounts:
        place = PurePosixPath(mount.target)
        if place == PurePosixPath(SCRATCH):
            yield f"{mount.source} is to be seen as {SCRATCH}, the container's scratch folder: choose another target"
        if place in seen and seen[place] != mount:
            yield f"{mount.target} is taken twice, by {seen[place].source} and {mount.source}: change one target"
        seen[place] = mount


def _forbidden(mounts: Sequence[Mount], cluster: Cluster | None) -> Iterator[str]:
    """Yield the mounts outside what a cluster allows; its volumes are its own word.

    Where a link or a home leads only the cluster knows: it is asked before anything is submitted.
    """
    if cluster is None or not cluster.allowed_mounts:
        return
    for mount in mounts:
        source = PurePosixPath(mount.source)
        if mount.source.startswith("/") and not any(source.is_relative_to(each) for each in cluster.allowed_mounts):
            allowed = ", ".join(cluster.allowed_mounts)
            yield f"{mount.source} lies outside what the cluster {cluster.name} lets containers mount: {allowed}"

"""Pyxis and enroot: a container as options of srun.

Source: Pyxis' own `srun --help`, and the form of an image in enroot's `import`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nexa_infra.containers.images import HUB
from nexa_infra.hosts.shell import quote_line, quote_path
from nexa_infra.runs.record import Container


@dataclass(frozen=True)
class Pyxis:
    """How srun is told of a container, as words of bash; `mounts` and `names` make variables in them."""

    mounts: tuple[str, ...]
    names: str
    options: tuple[str, ...]


def pyxis_of(container: Container, names: Iterable[str], *, own: Iterable[tuple[str, str]]) -> Pyxis:
    """Return how Pyxis runs a container.

    `names` are the job's variables that stand over the image's own; `own` the places that are seen where they are,
    each a variable of the script and `ro` or `rw`. Pyxis has no way to write a comma or a colon in a path.
    """
    image = container.image
    if container.source == "registry":
        registry, _, rest = container.image.partition("/")
        image = rest if registry == HUB else f"{registry}#{rest}"
    seen = ",".join(f"${name}:${name}:{mode}" for name, mode in own)
    mounts = [f'"{seen}"']
    for mount in container.mounts:
        mode = "ro" if mount.read_only else "rw"
        mounts.append(f",{quote_path(mount.source)}:{quote_line(mount.target)}:{mode}")
    told = ",".join(dict.fromkeys(names))
    options = [
        f"--container-image={quote_line(image)}",
        "--no-container-mount-home",
        '--container-mounts="$nexa_mounts"',
        '--container-workdir="$nexa_code_dir"',
        *(['--container-env="$nexa_names"'] if told else []),
    ]
    return Pyxis(tuple(mounts), told, tuple(options))


def misfit_of_path(path: str) -> str | None:
    """Say why Pyxis cannot mount a path; None where it can."""
    if "," in path or ":" in path:
        return f"{path} holds a comma or a colon, which Pyxis has no way to write: choose a path without"
    return None

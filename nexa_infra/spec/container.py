"""In which image a trial runs, and what it sees there."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from nexa_infra.spec.fields import Count, Line, Lines, Misfit, Spec, Truth, Variables, Word, shown

# What can run a container; `auto` looks, `none` runs the program as it is.
RuntimeName = Literal["auto", "docker", "apptainer", "singularity", "pyxis", "none"]

_SIZE = re.compile(r"(?P<count>\d+)\s*(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)


def _size(text: object) -> object:
    """Refuse what is no size; a number alone is MiB, as in job.memory."""
    if isinstance(text, bool) or not (found := _SIZE.fullmatch(str(text).strip())) or not int(found["count"]):
        raise ValueError(f"{shown(text)} is no size: write a number with K, M, G or T, such as 8G")
    return f"{found['count']}{found['unit'].upper() or 'M'}"


def _cores(value: object) -> object:
    try:
        cores = float(str(value))
    except ValueError:
        cores = 0.0
    if isinstance(value, bool) or not 0 < cores < float("inf"):
        raise ValueError(f"{shown(value)} is no number of cores: write one above 0, such as 2 or 0.5")
    return cores


def size_bytes(text: str) -> int:
    """Return a size such as `8G` in bytes; units are powers of 1024, and M where there is none."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{shown(text)} is no size")
    return int(found["count"]) << 10 * " KMGT".index(found["unit"].upper() or "M")


def _straight(path: str) -> None:
    if ".." in PurePosixPath(path).parts:
        raise ValueError(f"{shown(path)} leads up by '..': write the absolute path that is meant")


def _inside(path: str) -> str:
    """Refuse a place in a container that is not absolute, or that the container itself needs."""
    parts = PurePosixPath(path).parts
    _straight(path)
    if not path.startswith("/"):
        raise ValueError(f"{shown(path)} is no absolute path: write where it is seen in the container, such as /data")
    if len(parts) == 1 or parts[1] in {"proc", "sys", "dev"}:
        raise ValueError(f"{shown(path)} is the container's own: choose another place, such as /data")
    return str(PurePosixPath("/", *parts[1:]))


def _outside(path: str) -> str:
    _straight(path)
    if not path.startswith(("/", "~/")):
        raise ValueError(f"{shown(path)} is no absolute path: name the folder or file where the trials run")
    return path


Size = Annotated[str, BeforeValidator(_size)]
Cores = Annotated[float, BeforeValidator(_cores)]
Network = Literal["none", "host"]


class Mount(Spec):
    """A folder or file of the machine, as the container sees it."""

    source: Annotated[Word, AfterValidator(_outside)] = Field(description="an absolute path where the trials run")
    target: Annotated[Word, AfterValidator(_inside)] = Field(description="where the container sees it")
    read_only: Truth = Field(default=True, description="whether the container may not write there")


class ContainerSettings(Spec):
    """What a target of the catalog and a config may both say; a config's word stands over its target's."""

    env: Variables = Field(default={}, description="environment variables in the container")
    mounts: tuple[Mount, ...] = Field(default=(), description="what else the container sees")
    volumes: Lines = Field(default=(), description="names of the cluster's data volumes, seen under /data/NAME")
    network: Network | None = Field(default=None, description="none, or host: the machine's own; unset, none")
    shm_size: Size | None = Field(default=None, description="shared memory, such as 8G")
    memory: Size | None = Field(default=None, description="the most memory; unset, what the job is granted")
    cpus: Cores | None = Field(default=None, description="the most cores; unset, what the job is granted")
    processes: Count | None = Field(default=None, description="the most processes and threads")

    @field_validator("env")
    @classmethod
    def _spare_ours(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if name in {"HOME", "TMPDIR"}]:
            raise Misfit(*(((name,), "is the container's scratch folder: set another variable") for name in wrong))
        return env


class ContainerSpec(ContainerSettings):
    """In which image a trial runs."""

    target: Line | None = Field(default=None, description="a target of the image catalog")
    image: Line | None = Field(
        default=None, description="an image in place of the target's: a registry's, a .sif file, or a docker archive"
    )
    catalog: Line | None = Field(
        default=None, description="a catalog file, from beside the config; unset, deployments/images/catalog.yaml"
    )
    runtime: RuntimeName | None = Field(default=None, description="what runs it; unset, as the cluster says")
    auth_file: Line | None = Field(
        default=None,
        description="a Docker config.json with the registry's login, where the trials run; mode 600",
    )

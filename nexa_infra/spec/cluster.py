"""A cluster, as plain data: where it is, what it allows, how patient to be; no secrets."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from nexa_infra.spec.container import RuntimeName
from nexa_infra.spec.fields import Count, Line, Spec, Usd, Word, shown


def _absolute(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{shown(path)} is no absolute path")
    return path


def _volume(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith((".", "-")):
        raise ValueError(f"{shown(name)} is no volume's name: use letters, digits, '.', '_' and '-'")
    return name


AbsolutePath = Annotated[Word, AfterValidator(_absolute)]
VolumeName = Annotated[Line, AfterValidator(_volume)]


class ClusterLimits(Spec):
    """What a site allows, where it is known beforehand; the rest is asked of the cluster."""

    max_array_size: Count | None = Field(default=None, description="Slurm's MaxArraySize")
    max_submit: Count | None = Field(default=None, description="array tasks that may be queued at once")


class Cluster(Spec):
    """A Slurm cluster. Without `host`, the machine at hand is its login node."""

    name: Line = Field(description="the name that it is known by")
    host: Line | None = Field(default=None, description="the login node's address")
    user: Line | None = Field(default=None, description="the account there")
    port: Count = Field(default=22, description="the port of its sshd")
    key_file: Line | None = Field(default=None, description="a private key's path here; unset, the agent's keys")
    known_hosts: Line | None = Field(default=None, description="a known_hosts file; unset, the user's own")
    jump_host: Line | None = Field(default=None, description="user@host:port to go through")
    keyboard_interactive: bool = Field(default=False, description="whether a second factor is asked for in a terminal")
    workdir: Word = Field(min_length=1, description="an absolute path there, for runs/ and snapshots/")
    partition: Line | None = Field(default=None, description="where a job names no partition")
    account: Line | None = Field(default=None, description="where a job names no account")
    limits: ClusterLimits = Field(default=ClusterLimits(), description="what the site allows")
    runtime: RuntimeName = Field(default="auto", description="what runs containers on its nodes")
    volumes: dict[VolumeName, AbsolutePath] = Field(
        default={}, description="data that containers may ask for by name: NAME: an absolute path there"
    )
    allowed_mounts: tuple[AbsolutePath, ...] = Field(
        default=(), description="folders below which containers may mount; without any, everything"
    )
    cost_per_gpu_hour: Usd | None = Field(default=None, description="USD a GPU-hour here")
    cost_per_core_hour: Usd | None = Field(default=None, description="USD a core-hour here, for jobs without GPUs")
    cost_per_billing_hour: Usd | None = Field(
        default=None,
        description="USD an hour of Slurm's billing units, where the site sells these (TRESBillingWeights)",
    )
    poll_floor: float = Field(default=30.0, gt=0, description="the shortest time between two polls, seconds")
    poll_ceiling: float = Field(default=300.0, gt=0, description="the longest, seconds")

"""run.json and its types: what was asked, what it was priced at, which code ran, what was submitted."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nexa_infra.errors import NexaError
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.prices import Price
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSettings, Mount, RuntimeName
from nexa_infra.spec.run import SweepConfig, TrainingConfig

__all__ = ["Config", "Container", "Price", "Record", "Run", "Snapshot", "read_run", "write_run"]

Config = Annotated[SweepConfig | TrainingConfig, Field(discriminator="kind")]


class Record(BaseModel):
    """A frozen part of a run's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Snapshot(Record):
    """The code that a run executes: a copy named by its content, and where it came from."""

    hash: str = Field(description="16 hex digits of the SHA-256 over every file's path, mode and content")
    path: str = Field(description="where the copy is, on the host that runs it")
    root: str = Field(description="what was copied, on the client")
    files: int
    size: int = Field(description="bytes")
    commit: str | None = None
    branch: str | None = None
    dirty: bool = False
    patch: str | None = Field(default=None, description="SHA-256 of `git diff HEAD`, where the tree is dirty")


class Container(Record):
    """The container that trials run in, furnished and frozen: a tag that moves meanwhile changes nothing."""

    target: str | None = Field(default=None, description="the catalog's target, where one was asked for")
    asked: str = Field(description="the image as it was asked for: by a tag, a digest, or a file")
    image: str = Field(description="what runs: REGISTRY/NAME@sha256:…, an image's id, or a .sif file's path")
    digest: str = Field(description="sha256:…, of the manifest, of the image's configuration, or of the .sif file")
    source: Literal["registry", "local", "archive", "sif"] = Field(default="registry", description="who has it")
    file: str | None = Field(default=None, description="the archive's, or the .sif file's, absolute path")
    stamp: str | None = Field(default=None, description="size and time of the file, `bytes seconds`")
    runtime: RuntimeName = Field(default="auto", description="what runs it; auto is found out where it runs")
    settings: ContainerSettings = Field(default=ContainerSettings(), description="the target's and the config's")
    mounts: tuple[Mount, ...] = Field(default=(), description="volumes and mounts, checked; the run's own come besides")
    auth_file: str | None = Field(default=None, description="a login for the registry, where the trials run")


class Run(Record):
    """A run, as plain data: it travels between steps and processes, connections do not."""

    id: str = Field(description="lower-case letters, digits and dashes: <date>-<time>-<name>-<4 hex>")
    config: Config
    config_file: str | None = Field(default=None, description="where the config was read from, on the client")
    directory: str = Field(description="the run directory, absolute, on the host that runs it")
    workdir: str = Field(description="what holds snapshots/ and, by default, runs/")
    cluster: Cluster | None = Field(default=None, description="None is the local default")
    mirror: str | None = Field(
        default=None, description="where the client keeps its copy of a directory on another host; not recorded"
    )
    price: Price
    container: Container | None = Field(default=None, description="None runs trials as they are")
    snapshot: Snapshot | None = Field(default=None, description="None until the code was brought over")
    created_at: datetime
    versions: dict[str, str] = Field(default={}, description="of nexa-infra and Python")
    labels: dict[str, str] = Field(default={}, description="such as the flow run's id")

    @property
    def files(self) -> RunDirectory:
        """Where the run's files are on this machine: the run directory, or this client's copy of it."""
        return RunDirectory(Path(self.mirror or self.directory))

    @property
    def kind(self) -> Literal["sweep", "training"]:
        """Whether it is a sweep or a training."""
        return self.config.kind

    @property
    def trials(self) -> int:
        """How many trials it has."""
        return len(self.config.trials)


def write_run(run: Run) -> None:
    """Write run.json: the record is frozen from here on."""
    write_atomically(run.files.record, run.model_dump_json(indent=2, exclude={"mirror"}) + "\n")


def read_run(path: Path) -> Run:
    """Read a run directory's run.json.

    Raises:
        NexaError: it is missing, or is not a run's record.
    """
    record = RunDirectory(path).record
    try:
        return Run.model_validate_json(record.read_bytes())
    except OSError as error:
        raise NexaError(f"{record} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise NexaError(f"{record} is not a run's record of this version: {where}: {first['msg']}") from error

"""The block that holds a team's own image catalog."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nexa_infra.blocks.known import KnownFieldsBlock
from nexa_infra.containers.catalog import Catalog, Target, catalog_of, parse_catalog
from nexa_infra.errors import ConfigError, Problem
from nexa_infra.spec.container import Mount

_SOURCE = "the image catalog"


class Variable(BaseModel):
    """An environment variable in the container."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, examples=["OMP_NUM_THREADS"], json_schema_extra={"position": 0})
    value: str = Field(default="", json_schema_extra={"position": 1})


class ImageTarget(BaseModel):
    """An image, what it is for, and how it is run. An empty text is what is not set."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        min_length=1,
        description="What a config's container.target calls it.",
        examples=["train-light"],
        json_schema_extra={"position": 0},
    )
    image: str = Field(
        min_length=1,
        description="The image's name and tag.",
        examples=["registry.example.org/team/train:1.2"],
        json_schema_extra={"position": 1},
    )
    digest: str = Field(
        default="", description="sha256:…, which no later push moves.", json_schema_extra={"position": 2}
    )
    purpose: str = Field(default="", description="What it is for, in a line.", json_schema_extra={"position": 3})
    command: list[str] = Field(
        default=[], description="What it runs where nothing else is said.", json_schema_extra={"position": 4}
    )
    health: list[str] = Field(
        default=[],
        title="Health command",
        description="What prints its versions and devices.",
        json_schema_extra={"position": 5},
    )
    env: list[Variable] = Field(
        default=[],
        title="Environment",
        description="Variables in the container; no secret belongs here.",
        json_schema_extra={"position": 6},
    )
    mounts: list[Mount] = Field(default=[], description="What else it sees.", json_schema_extra={"position": 7})
    volumes: list[str] = Field(
        default=[],
        description="Names of the cluster's data volumes, seen under /data/NAME.",
        json_schema_extra={"position": 8},
    )
    network: Literal["none", "host"] = Field(
        default="none", description="none, or host: the machine's own.", json_schema_extra={"position": 9}
    )
    shm_size: str = Field(
        default="",
        title="Shared memory",
        description="Such as 8G; empty for the runtime's own.",
        json_schema_extra={"position": 10},
    )
    memory: str = Field(
        default="",
        description="The most memory, such as 16G; empty for what the job is granted.",
        json_schema_extra={"position": 11},
    )
    cpus: float | None = Field(
        default=None,
        title="CPUs",
        description="The most cores; empty for what the job is granted.",
        json_schema_extra={"position": 12},
    )
    processes: int | None = Field(
        default=None,
        description="The most processes and threads; empty for no limit of its own.",
        json_schema_extra={"position": 13},
    )


class ImageCatalog(KnownFieldsBlock):
    """A team's images, in place of the project's own catalog.

    Attributes:
        targets: One image a row, by the name that configs use.
        require_digest: Refuse a target whose image has no digest.
    """

    _block_type_name = "Image Catalog"
    _block_type_slug = "image-catalog"
    _description = "Which images are to be used for what, and how they are run."
    # Docker's, as prefect-docker's own blocks show it.
    _logo_url = "https://cdn.sanity.io/images/3ugk85nk/production/14a315b79990200db7341e42553e23650b34bb96-250x250.png"  # type: ignore[assignment]
    _documentation_url = "https://docs.docker.com/reference/cli/docker/image/pull/"  # type: ignore[assignment]

    targets: list[ImageTarget] = Field(min_length=1, title="Targets", json_schema_extra={"position": 0})
    require_digest: bool = Field(default=False, title="Digests only", json_schema_extra={"position": 1})

    @model_validator(mode="after")
    def _readable(self) -> Self:
        try:
            self.to_catalog()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read a catalog file's text, such as that of `deployments/images/catalog.yaml`.

        Raises:
            ConfigError: it is not understood; every complaint names line and key.
        """
        catalog = parse_catalog(text, _SOURCE)
        rows = [_row(name, target) for name, target in catalog.targets.items()]
        return cls(targets=rows, require_digest=catalog.require_digest)

    def to_catalog(self) -> Catalog:
        """Return the engine's catalog.

        Raises:
            ConfigError: a row makes no sense; the message names the target and the key.
        """
        names = [row.name for row in self.targets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(Problem("targets", f"{twice!r} stands twice: keep one of the two", _SOURCE))
        targets = {row.name: _given(row) for row in self.targets}
        return catalog_of({"require_digest": self.require_digest, "targets": targets}, _SOURCE)


def _row(name: str, target: Target) -> ImageTarget:
    set_here = {key: value for key, value in target.model_dump().items() if value is not None}
    env = [Variable(name=key, value=value) for key, value in target.env.items()]
    return ImageTarget.model_validate({**set_here, "name": name, "env": env, "mounts": target.mounts})


def _given(row: ImageTarget) -> dict[str, Any]:
    """Return what is set in a row, as a catalog file has it."""
    given = {key: value for key, value in row.model_dump(exclude={"name"}).items() if value not in ("", None)}
    return {**given, "env": {each.name: each.value for each in row.env}}

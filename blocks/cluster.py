"""The block that holds what a Slurm cluster is, and how one logs in."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from nexa_infra.blocks.known import KnownFieldsBlock
from nexa_infra.hosts.login import remember_passphrase
from nexa_infra.spec.cluster import AbsolutePath, Cluster, ClusterLimits, VolumeName

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@\\-]*")
_VOLUME_NAME: TypeAdapter[str] = TypeAdapter(VolumeName)
_ABSOLUTE_PATH: TypeAdapter[str] = TypeAdapter(AbsolutePath)
_JUMP = re.compile(rf"(?:(?P<user>[^@\s]+)@)?(?P<host>{_HOST.pattern})(?::(?P<port>\d+))?")


class DataVolume(BaseModel):
    """Data on the cluster that containers may ask for by name."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        min_length=1,
        description="What a config's container.volumes calls it; it is seen under /data/NAME.",
        examples=["imagenet"],
        json_schema_extra={"position": 0},
    )
    path: str = Field(
        min_length=1,
        description="Where it is: an absolute path on the cluster.",
        examples=["/data/imagenet"],
        json_schema_extra={"position": 1},
    )


class SlurmCluster(KnownFieldsBlock):
    """A Slurm cluster: where it is, how one logs in, what it allows and what it costs.

    Without a host, the machine that runs the flow is itself the cluster's login node.
    Keys stay where they are: the block holds their paths. Any client of a Prefect server without
    authentication can read a block's secrets, so prefer an agent to a passphrase.
    """

    _block_type_name = "Slurm Cluster"
    _block_type_slug = "slurm-cluster"
    _description = "A Slurm cluster: its login node, where runs are kept on it, its limits and its prices."
    _logo_url = "https://upload.wikimedia.org/wikipedia/commons/3/3a/Slurm_logo.svg"  # type: ignore[assignment]
    _documentation_url = "https://slurm.schedmd.com/quickstart.html"  # type: ignore[assignment]

    # The form has no good widget for text that may be null: an empty text is what is not set.
    workdir: str = Field(
        description="An absolute path on the cluster, shared by its nodes, for runs/ and snapshots/.",
        title="Working directory",
        examples=["/scratch/ada/nexa"],
        json_schema_extra={"position": 0},
    )
    host: str = Field(
        default="",
        description="The login node's address; empty where the flow runs on the login node itself.",
        title="Host",
        json_schema_extra={"position": 1},
    )
    user: str = Field(
        default="",
        description="The account there; empty for the one that the flow runs as.",
        title="User",
        json_schema_extra={"position": 2},
    )
    port: int = Field(
        default=22,
        description="The port of the login node's sshd.",
        ge=1,
        le=65535,
        title="Port",
        json_schema_extra={"position": 3},
    )
    key_file: str = Field(
        default="",
        description="The path of a private key, where the flow runs; empty for the agent's keys and the usual files.",
        title="Private key file",
        json_schema_extra={"position": 4},
    )
    key_passphrase: SecretStr | None = Field(
        default=None,
        description="What opens the private key, if it is locked and no agent holds it.",
        title="Passphrase",
        json_schema_extra={"position": 5},
    )
    keyboard_interactive: bool = Field(
        default=False,
        description="Whether a second factor is asked for, once a session, in a terminal.",
        title="Second factor",
        json_schema_extra={"position": 6},
    )
    known_hosts: str = Field(
        default="",
        description="The path of a known_hosts file; empty for the user's own. Unknown hosts are refused.",
        title="Known hosts file",
        json_schema_extra={"position": 7},
    )
    jump_host: str = Field(
        default="",
        description="A host to go through, as user@host:port; empty for none.",
        title="Jump host",
        json_schema_extra={"position": 8},
    )
    partition: str = Field(
        default="",
        description="The partition of jobs that name none; empty for the cluster's default.",
        title="Partition",
        json_schema_extra={"position": 9},
    )
    account: str = Field(
        default="",
        description="The account of jobs that name none; empty for the user's default.",
        title="Account",
        json_schema_extra={"position": 10},
    )
    limits: ClusterLimits = Field(
        default=ClusterLimits(),
        description="What the site allows, where it is known; the rest is asked of the cluster.",
        title="Limits",
        json_schema_extra={"position": 11},
    )
    runtime: Literal["auto", "docker", "apptainer", "singularity", "pyxis", "none"] = Field(
        default="auto",
        description="What runs containers on the nodes; auto finds out.",
        title="Container runtime",
        json_schema_extra={"position": 12},
    )
    cost_per_gpu_hour: float | None = Field(
        default=None,
        description="USD a GPU-hour; empty for the price book's.",
        ge=0,
        allow_inf_nan=False,
        title="USD a GPU-hour",
        json_schema_extra={"position": 13},
    )
    cost_per_core_hour: float | None = Field(
        default=None,
        description="USD a core-hour of jobs without GPUs; empty for the price book's.",
        ge=0,
        allow_inf_nan=False,
        title="USD a core-hour",
        json_schema_extra={"position": 14},
    )
    cost_per_billing_hour: float | None = Field(
        default=None,
        description="USD an hour of Slurm's billing units, where the site sells these (TRESBillingWeights).",
        ge=0,
        allow_inf_nan=False,
        title="USD a billing-hour",
        json_schema_extra={"position": 17},
    )
    poll_floor: float = Field(
        default=30.0,
        description="The shortest time between two looks at the queue, seconds.",
        gt=0,
        allow_inf_nan=False,
        title="Shortest poll",
        json_schema_extra={"position": 15},
    )
    poll_ceiling: float = Field(
        default=300.0,
        description="The longest time between two looks at the queue, seconds.",
        gt=0,
        allow_inf_nan=False,
        title="Longest poll",
        json_schema_extra={"position": 16},
    )
    volumes: list[DataVolume] = Field(
        default=[],
        description="Data that containers may ask for by name.",
        title="Data volumes",
        json_schema_extra={"position": 18},
    )
    allowed_mounts: list[str] = Field(
        default=[],
        description="Folders below which containers may mount; without any, everything.",
        title="Allowed mounts",
        examples=[["/data", "/scratch"]],
        json_schema_extra={"position": 19},
    )

    @field_validator("host", "user", "key_file", "known_hosts", "jump_host", "partition", "account")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError(f"must be one line without control characters, got {text!r}")
        return text.strip()

    @field_validator("workdir")
    @classmethod
    def _absolute(cls, path: str) -> str:
        # Any directory's name will do, one with a line end in it, too.
        path = path.strip()
        if "\0" in path:
            raise ValueError("holds a NUL character, which no path can")
        if not path.startswith("/"):
            hint = "; ~ and $VARIABLES are not expanded" if path[:1] in {"~", "$"} else ""
            raise ValueError(f"{path!r} is no absolute path on the cluster: write /scratch/you/nexa{hint}")
        if ".." in path.split("/"):
            raise ValueError(f"{path!r} goes up by '..': write the path as it is")
        if not path.strip("/"):
            raise ValueError("'/' is the root of the file system: name a directory of your own")
        return path.rstrip("/")

    @field_validator("host")
    @classmethod
    def _host(cls, text: str) -> str:
        if "@" in text:
            raise ValueError(f"{text!r} holds an account: write it under user, and the address alone here")
        if text and not _HOST.fullmatch(text):
            raise ValueError(f"{text!r} is no address: write a name such as login.example.org, and the port under port")
        return text

    @field_validator("user")
    @classmethod
    def _user(cls, text: str) -> str:
        if text and not _USER.fullmatch(text):
            raise ValueError(f"{text!r} is no account's name")
        return text

    @field_validator("jump_host")
    @classmethod
    def _jump_host(cls, text: str) -> str:
        if text:
            found = _JUMP.fullmatch(text)
            if not found or (found["user"] and not _USER.fullmatch(found["user"])):
                raise ValueError(f"{text!r} is no jump host: write user@host:port, or a part of it that has the host")
            if found["port"] and not 1 <= int(found["port"]) <= 65535:
                raise ValueError(f"{text!r} names port {found['port']}, which is not between 1 and 65535")
        return text

    @field_validator("key_file", "known_hosts", mode="before")
    @classmethod
    def _path(cls, text: object) -> object:
        if isinstance(text, str) and "PRIVATE KEY" in text:
            # The key itself must not be repeated in the message.
            raise ValueError("this is a private key, where the path of its file is meant")
        return text

    @field_validator("volumes")
    @classmethod
    def _known_volumes(cls, volumes: list[DataVolume]) -> list[DataVolume]:
        names = [each.name for each in volumes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} stands twice: keep one of the two")
        for each in volumes:
            _checked(_VOLUME_NAME, each.name)
            _checked(_ABSOLUTE_PATH, each.path)
        return volumes

    @field_validator("allowed_mounts")
    @classmethod
    def _known_folders(cls, folders: list[str]) -> list[str]:
        return [_checked(_ABSOLUTE_PATH, folder.strip()) for folder in folders]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.host:
            named = [name for name in ("user", "key_file", "key_passphrase", "jump_host") if getattr(self, name)]
            if named:
                raise ValueError(f"{named[0]} is for logging in, but there is no host: name the login node under host")
        if self.key_passphrase is not None and not self.key_file:
            raise ValueError("key_passphrase opens a key, but key_file names none")
        if self.poll_floor > self.poll_ceiling:
            raise ValueError(f"poll_floor ({self.poll_floor:g} s) is over poll_ceiling ({self.poll_ceiling:g} s)")
        return self

    def to_cluster(self, name: str | None = None) -> Cluster:
        """Return the engine's plain model of the cluster, which holds no secret.

        What opens a locked key is told to this process's logins, and goes nowhere else.

        Args:
            name: What the cluster is called in records; by default the name that the block was saved under,
                else its host.
        """
        if self.key_passphrase is not None:
            # A block that was loaded without validation holds plain text.
            secret: SecretStr | str = self.key_passphrase
            remember_passphrase(self.key_file, secret if isinstance(secret, str) else secret.get_secret_value())
        return Cluster(
            name=name or self._block_document_name or self.host or "login-node",
            host=self.host or None,
            user=self.user or None,
            port=self.port,
            key_file=self.key_file or None,
            known_hosts=self.known_hosts or None,
            jump_host=self.jump_host or None,
            keyboard_interactive=self.keyboard_interactive,
            workdir=self.workdir,
            partition=self.partition or None,
            account=self.account or None,
            limits=self.limits,
            runtime=self.runtime,
            cost_per_gpu_hour=_usd(self.cost_per_gpu_hour),
            cost_per_core_hour=_usd(self.cost_per_core_hour),
            cost_per_billing_hour=_usd(self.cost_per_billing_hour),
            poll_floor=self.poll_floor,
            poll_ceiling=self.poll_ceiling,
            volumes={each.name: each.path for each in self.volumes},
            allowed_mounts=tuple(self.allowed_mounts),
        )


def _checked(kind: TypeAdapter[str], text: str) -> str:
    """Return a text that the engine's own model takes; its complaint is the field's."""
    try:
        return kind.validate_python(text)
    except ValidationError as error:
        raise ValueError(str(error.errors(include_url=False)[0]["ctx"]["error"])) from None


def _usd(number: float | None) -> Decimal | None:
    # By its text, which is what was typed: 3.25 and not 3.2499…
    return None if number is None else Decimal(str(number))

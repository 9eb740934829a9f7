"""Experiment trackers: where a run's trials are told of, as MLflow and W&B name things."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from nexa_infra.spec.fields import KeyPath, Line, Misfit, Spec, Truth, shown

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# A label of W&B's is one of a list with commas between, and has this many characters at the most.
_MOST_WANDB_TAG = 64


def _uri(text: str) -> str:
    # What is wrong with it is said without showing it: it may hold a password.
    try:
        parts = urlsplit(text)
        secret = parts.password is not None or (parts.scheme in {"http", "https"} and parts.username is not None)
    except ValueError as error:
        raise ValueError(f"is no URI: {error}") from None
    if secret:
        raise ValueError(
            "holds a user or a password, and a config is copied into run.json: take it out, and put "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into the file of job.env_file, for the trials, "
            "and into this client's own environment"
        )
    scheme = parts.scheme.partition("+")[0]
    if text == "databricks" or scheme == "databricks":
        return text
    if scheme in {"http", "https"} and parts.netloc:
        return text
    if scheme == "file" and parts.path.startswith("/") and not parts.netloc:
        return text
    # As SQLAlchemy reads it: three slashes and a path, which begins with a fourth where it is absolute.
    if scheme in _DATABASES and (scheme != "sqlite" or parts.path.startswith("//")):
        return text
    raise ValueError(
        f"{shown(text)} is no tracking URI that means the same from every folder: write https://HOST, "
        "sqlite:////FOLDER/mlflow.db, file:///FOLDER, or databricks"
    )


class MlflowTracking(Spec):
    """An MLflow tracking server, or a store of one's own."""

    uri: Annotated[Line, AfterValidator(_uri)] = Field(
        description="MLFLOW_TRACKING_URI: https://HOST, sqlite:////FOLDER/mlflow.db, file:///FOLDER; no password in it"
    )
    experiment: Line | None = Field(default=None, description="the experiment's name; unset, the job's")
    log: Truth = Field(default=True, description="log parameters, metrics and cost of each trial from here, at the end")
    artifacts: Truth = Field(default=True, description="with log: the report, and each trial's own small files, too")


class WandbTracking(Spec):
    """Where the trials' W&B runs go; the key that opens it, WANDB_API_KEY, belongs in the file of job.env_file."""

    project: Line = Field(description="WANDB_PROJECT")
    entity: Line | None = Field(default=None, description="WANDB_ENTITY: a user or a team; unset, the key's own")
    group: Line | None = Field(default=None, description="WANDB_RUN_GROUP; unset, the run's id")
    mode: Literal["online", "offline", "disabled"] | None = Field(default=None, description="WANDB_MODE")


class Tracking(Spec):
    """Which experiment trackers are told of the trials, and under which labels."""

    mlflow: MlflowTracking | None = Field(default=None, description="an MLflow tracking server or store")
    wandb: WandbTracking | None = Field(default=None, description="a W&B project")
    tags: dict[Line, Line] = Field(default={}, description="MLflow's tags of each run; W&B's are written name:value")

    @model_validator(mode="after")
    def _checked(self) -> Self:
        wrong: list[tuple[KeyPath, str]] = []
        if self.mlflow is None and self.wandb is None:
            wrong.append(((), "names no tracker: add mlflow: {uri: …}, or wandb: {project: …}"))
        for name, value in self.tags.items():
            if name.startswith(("mlflow.", "nexa.")):
                wrong.append(
                    (("tags", name), "is set by the run itself: choose a name without mlflow. or nexa. in front")
                )
            elif self.wandb and (why := misfit_of_label(f"{name}:{value}")):
                wrong.append((("tags", name), why))
        if wrong:
            raise Misfit(*wrong)
        return self

    @property
    def labels(self) -> Iterator[str]:
        """The tags as W&B has them: words."""
        return (f"{name}:{value}" for name, value in self.tags.items())


def misfit_of_label(label: str) -> str | None:
    """Say why W&B would not take a label; None where it does."""
    if "," in label:
        return f"{shown(label)} has a comma, which ends a tag of W&B's: write it without"
    if len(label) > _MOST_WANDB_TAG:
        return f"{shown(label)} is longer than the {_MOST_WANDB_TAG} characters of a tag of W&B's: shorten it"
    return None

"""A run as its record's JSON holds it, for a steward that has the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from nexa_infra.errors import NexaError
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.submissions import read_moment


class Plain:
    """A part of a record: its keys are attributes."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Take a JSON object."""
        for name, value in data.items():
            setattr(self, name, _plain(value))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a key's value, as a dict does."""
        return self.__dict__.get(name, default)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Return the keys and their values, as a dict does."""
        return iter(self.__dict__.items())

    def __iter__(self) -> Iterator[str]:
        """Go through the keys, as a dict does."""
        return iter(self.__dict__)


class PlainRun(Plain):
    """A run, read on the cluster that runs it; it has the attributes of `runs.record.Run`."""

    trials: int
    directory: str

    @property
    def files(self) -> RunDirectory:
        """Where the run's files are."""
        return RunDirectory(Path(self.directory))

    @property
    def kind(self) -> str:
        """Whether it is a sweep or a training."""
        kind: str = self.config.kind  # type: ignore[attr-defined]
        return kind


def read_plain(directory: Path, brief: dict[str, Any]) -> PlainRun:
    """Read run.json, and add what a client has worked out of it.

    Raises:
        NexaError: it is missing, or damaged.
    """
    try:
        data = json.loads((directory / "run.json").read_bytes())
        data.update(trials=brief["trials"], mirror=None, directory=str(directory))
        data["config"]["job"].update(brief["job"])
        data["labels"]["steward"] = "yes"  # it ends its run without ending itself
        run = PlainRun(data)
        limit = brief["job"]["walltime"]
        job: Any = run.config.job  # type: ignore[attr-defined]
        job.walltime = None if limit is None else timedelta(seconds=limit)
        whole: Any = run
        whole.created_at = read_moment(data["created_at"])
        whole.price.usd_per_hour = Decimal(data["price"]["usd_per_hour"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NexaError(f"{directory}/run.json cannot be read: {error}") from error
    return run


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return Plain(value)
    if isinstance(value, list):
        return tuple(_plain(each) for each in value)
    return value

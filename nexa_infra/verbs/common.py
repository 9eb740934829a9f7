"""What the verbs have in common: the program, its words, and how a run or a cluster is found."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter

from nexa_infra.errors import NexaError

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.spec.cluster import Cluster


def _version() -> str:
    from importlib.metadata import version

    return version("nexa-infra")


app = cyclopts.App(
    name="nexa-infra",
    help=(
        "Sweeps and trainings, here or on Slurm: started, followed, and priced.\n\n"
        "A RUN is a run's id, a part of it that only one has, `latest`, or its directory."
    ),
    version=_version,
    version_flags=["--version"],
)

File = Annotated[Path, Parameter(help="the YAML file that says what to run")]
Name = Annotated[str, Parameter(help="an id, a part of one, `latest`, or a directory")]
Overrides = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="KEY.PATH=VALUE, in place of the file's", negative="")
]
Budget = Annotated[float | None, Parameter(name="--budget", help="refuse a run that may cost more than this, USD")]
Where = Annotated[
    str | None, Parameter(name=["--cluster", "-c"], help="a saved cluster's name, or a cluster file (.yaml)")
]


def flag(text: str, *names: str) -> Parameter:
    """Return what makes an option a flag, without a --no- form."""
    return Parameter(name=list(names) or None, help=text, negative="", show_default=False)


Preview = Annotated[bool, flag("show the trials, the cost and the script; start nothing")]


def cluster_named(name: str | None) -> Cluster | None:
    """Find a cluster: in a file, or among Prefect's saved blocks."""
    if name is None:
        return None
    if name.endswith((".yaml", ".yml")) or ("/" in name and not name.startswith("slurm-cluster/")):
        from nexa_infra.spec.load import load_cluster

        return load_cluster(name)
    from nexa_infra.blocks.saved import saved_cluster

    return saved_cluster(name)


def find(name: str) -> Run:
    """Find a run; where the key to its cluster is locked, its saved block may hold what opens it."""
    from nexa_infra.operations import manage

    run = manage.find(name)
    if run.cluster is not None and run.cluster.host is not None and run.cluster.key_file is not None:
        from nexa_infra.hosts.login import is_locked

        if is_locked(run.cluster.key_file):
            from nexa_infra.blocks.saved import saved_cluster

            with suppress(NexaError):  # an agent may have the key all the same
                saved_cluster(run.cluster.name)
    return run


def say(text: str) -> None:
    """Print a line of what was asked for."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Print a line about it, on standard error."""
    with suppress(OSError):  # nobody is there to be told
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def complain(error: Exception) -> int | None:
    """Tell of an error that a person can cause, and return its exit code; None for any other, a fault of ours."""
    from nexa_infra.operations.failures import failure

    told = failure(error)
    if told is None:
        return None
    note(told[0])
    return told[1]

"""Bringing a run's files over from its cluster: logs, metrics, and what the trials wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nexa_infra.errors import NexaError, RunNotFoundError
from nexa_infra.hosts.connections import host_of
from nexa_infra.runs.record import Run

# What is a client's own, or a lock: it does not travel.
_LEFT = ("/submissions/lock", "/submissions/.sbatch.lock", "/claims/", "/tails/", "/code")


def fetch(run: Run, *, to: Path | None = None, trials: Sequence[int] = ()) -> Path:
    """Copy a run's directory, or only some of its trials', to this machine, and return where it is.

    Without `to` it goes into this client's own copy of the run. What is there already is not copied
    again, and what was cut off goes on where it stopped.

    Raises:
        NexaError: the run is on this machine already, and no other place is named.
        RunNotFoundError: there is no such trial.
        HostError: the cluster cannot be reached, or rsync failed.
    """
    for trial in trials:
        if not 0 <= trial < run.trials:
            raise RunNotFoundError(f"run {run.id} has trials 0 to {run.trials - 1}: there is no trial {trial}")
    host = host_of(run.cluster)
    if to is None and not host.remote:
        raise NexaError(f"run {run.id} is on this machine, in {run.directory}: name another place with --to to copy it")
    target = to.expanduser().resolve() / run.id if to is not None else run.files.path
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    options = ["-a", "--no-owner", "--no-group", "--partial", *(f"--exclude={each}" for each in _LEFT)]
    if trials:
        options += ["--include=/trials/", *(f"--include=/trials/{trial}/***" for trial in trials), "--exclude=*"]
    host.rsync(host.there(f"{run.directory}/"), f"{target}/", options=options)
    return target

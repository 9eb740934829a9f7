"""Bringing a run's files over from its cluster: logs, metrics, and what the trials wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nexa_infra.errors import ArtifactError, NexaError, RunNotFoundError
from nexa_infra.hosts.base import Host, retried
from nexa_infra.hosts.connections import host_of
from nexa_infra.runs.artifact import read_artifact
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run

# What has come of a file that was cut off: no half of one stands under its name.
_PARTIAL = ".nexa-partial"
# What is a client's own, or a lock: it does not travel.
_LEFT = ("/submissions/lock", "/submissions/.sbatch.lock", "/claims/", "/tails/", "/code")


def fetch(run: Run, *, to: Path | None = None, trials: Sequence[int] = ()) -> Path:
    """Copy a run's directory, or only some of its trials', to this machine, and return where it is.

    Without `to` it goes into this client's own copy of the run. What is there already is not copied
    again, and what was cut off goes on where it stopped. What a training made is verified once it is here.

    Raises:
        ArtifactError: it is not what the training wrote, there or here.
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
    options = ["-a", "--no-owner", "--no-group", f"--partial-dir={_PARTIAL}", *(f"--exclude={each}" for each in _LEFT)]
    if trials:
        options += ["--include=/trials/", *(f"--include=/trials/{trial}/***" for trial in trials), "--exclude=*"]

    def bring(*more: str) -> None:
        retried(lambda: host.rsync(host.there(f"{run.directory}/"), f"{target}/", options=[*options, *more]))

    bring()
    if RunDirectory(target).artifact.exists() and not trials:
        _verify(run, host, target, bring)
    return target


def _verify(run: Run, host: Host, target: Path, bring: Callable[[str], None]) -> None:
    """Hold a copy against what the training wrote; bring what is damaged again."""
    try:
        read_artifact(run, host, copy=target)
        return
    except ArtifactError:
        # rsync goes by sizes and times, which damage may leave as they were.
        bring("--checksum")
    try:
        read_artifact(run, host, copy=target)
    except ArtifactError:
        read_artifact(run, host)  # it says what is wrong there, if something is
        raise

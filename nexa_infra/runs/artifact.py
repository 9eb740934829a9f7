"""What a training made: ArtifactMeta and the manifest of its files, written last, and verified when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pydantic import Field, JsonValue, ValidationError

from nexa_infra.errors import ArtifactError
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.manifest import Contents, contents_here, contents_of, escaped, from_text, to_text
from nexa_infra.runs.metrics import metrics_of
from nexa_infra.runs.record import Record, Run

if TYPE_CHECKING:
    from nexa_infra.hosts.base import Host

# Files that a message names; of more it says how many.
_MOST_TOLD = 5


class ArtifactMeta(Record):
    """What a run made, by content: enough to find it, to verify it, and to know where it came from."""

    kind: str = Field(description="`training`")
    uri: str = Field(description="file:// and the trial's directory, or ssh:// where that is on another host")
    sha256: str = Field(description="of the manifest, which lists each file's SHA-256, bytes and path")
    bytes: int
    created_at: datetime
    inputs: dict[str, str] = Field(description="hashes of the code snapshot and of the config")
    labels: dict[str, str] = {}
    metrics: dict[str, JsonValue] = {}


def write_artifact(run: Run, host: Host) -> ArtifactMeta:
    """Describe what a training's trial wrote: a manifest of its files, then `artifact.json`, each by rename.

    The files are read where they are. One that is there already stands, whatever has become of the files since:
    `read_artifact` says so.

    Raises:
        HostError: they cannot be read.
        ArtifactError: the one that is there is damaged.
    """
    files = run.files
    if files.artifact.exists():
        return _written(run, files)
    manifest = to_text(contents_of(host, _folder(run)))
    write_atomically(files.manifest, manifest)
    meta = _described(run, host, files, manifest, datetime.now(UTC))
    write_atomically(files.artifact, meta.model_dump_json(indent=2) + "\n")
    return meta


def read_artifact(run: Run, host: Host, *, copy: Path | None = None) -> ArtifactMeta:
    """Read what `write_artifact` has written, and verify it: the record, its manifest, and every file's content.

    The files are read where they are, or, with `copy`, in a copy of the run directory on this machine. Files
    beside those of the manifest are no damage.

    Raises:
        ArtifactError: something is missing, or is not what it was; the message names it.
        HostError: the files cannot be read.
    """
    files = RunDirectory(copy) if copy is not None else run.files
    meta = _written(run, files)
    where = str(copy or (f"{host.name}:{run.directory}" if host.remote else run.directory))
    remedy = (
        f"`nexa-infra fetch {run.id}` brings it again"
        if copy is not None
        else "bring it back from where it was copied to, or run the training again"
    )
    try:
        manifest = files.manifest.read_bytes()
    except OSError as error:
        raise ArtifactError(f"run {run.id}: {files.manifest} cannot be read ({error.strerror}): {remedy}") from error
    if (found := hashlib.sha256(manifest).hexdigest()) != meta.sha256:
        told = f"{files.manifest} is not the one that {files.artifact.name} was written with"
        raise ArtifactError(f"run {run.id}: {told}: its SHA-256 is {found}, not {meta.sha256}; {remedy}")
    try:
        wanted = from_text(manifest.decode())
    except ValueError as error:
        raise ArtifactError(f"run {run.id}: {files.manifest} is no manifest: {error}; {remedy}") from error
    there = contents_here(files.trial(0)) if copy is not None else contents_of(host, _folder(run))
    if wrong := list(_differences(wanted, there)):
        more = [f"and {len(wrong) - _MOST_TOLD} more"] if len(wrong) > _MOST_TOLD else []
        raise ArtifactError(f"run {run.id}: in {where}/trials/0, {'; '.join([*wrong[:_MOST_TOLD], *more])}: {remedy}")
    _hold(run, meta, _described(run, host, files, manifest.decode(), meta.created_at), files)
    return meta


def _folder(run: Run) -> Path:
    return RunDirectory(Path(run.directory)).trial(0)


def _described(run: Run, host: Host, files: RunDirectory, manifest: str, moment: datetime) -> ArtifactMeta:
    """Describe what a manifest lists; all but the moment follows from the run's record and its files."""
    folder = _folder(run)
    metrics: dict[str, Any] = metrics_of(files)(0)
    # The config as it was recorded: a later version may know more keys.
    record = json.loads(files.record.read_bytes())
    config = json.dumps(record["config"], sort_keys=True).encode()
    return ArtifactMeta(
        kind=run.kind,
        uri=f"ssh://{host.name}{quote(str(folder))}" if host.remote else folder.as_uri(),
        sha256=hashlib.sha256(manifest.encode()).hexdigest(),
        bytes=sum(each.size or 0 for each in from_text(manifest).values()),
        created_at=moment,
        inputs={
            "config": hashlib.sha256(config).hexdigest(),
            **({"code": record["snapshot"]["hash"]} if record["snapshot"] else {}),
        },
        labels=record["labels"],
        metrics=metrics,
    )


def _written(run: Run, files: RunDirectory) -> ArtifactMeta:
    try:
        return ArtifactMeta.model_validate_json(files.artifact.read_bytes())
    except FileNotFoundError as error:
        told = f"it is written once a training is done; `nexa-infra status {run.id}` says how the run stands"
        raise ArtifactError(f"run {run.id} has no {files.artifact}: {told}") from error
    except OSError as error:
        raise ArtifactError(f"run {run.id}: {files.artifact} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        told = f"{where}{': ' if where else ''}{first['msg']}"
        raise ArtifactError(
            f"run {run.id}: {files.artifact} is damaged ({told}): once it is removed, `nexa-infra resume {run.id}` "
            "describes the files anew"
        ) from error


def _differences(wanted: Contents, there: Contents) -> Iterator[str]:
    for path, content in sorted(wanted.items()):
        found = there.get(path)
        if found is None:
            yield f"{escaped(path)} is missing: it was {content}"
        elif found != content:
            yield f"{escaped(path)} has changed: it is {found}, and was {content}"


def _hold(run: Run, meta: ArtifactMeta, expected: ArtifactMeta, files: RunDirectory) -> None:
    """Hold what a record says against what follows from the run and from its files."""
    said, right = (json.loads(each.model_dump_json()) for each in (meta, expected))
    for each in (said, right):
        each["uri"] = urlsplit(each["uri"]).path  # a host may have several names
    for name in right:
        if (left := json.dumps(said[name], sort_keys=True)) != (wanted := json.dumps(right[name], sort_keys=True)):
            raise ArtifactError(
                f"run {run.id}: {files.artifact} does not say what was written: {name} is {left[:200]}, and follows "
                f"from the run as {wanted[:200]}; once it is removed, `nexa-infra resume {run.id}` describes the "
                "files anew"
            )

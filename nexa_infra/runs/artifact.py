"""What a training made: ArtifactMeta and the manifest of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import Field, JsonValue

from nexa_infra.hosts.shell import quote as shell_quote
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.record import Record, Run
from nexa_infra.runs.results import read_metrics

if TYPE_CHECKING:
    from nexa_infra.hosts.base import Host


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

    The files are read where they are.

    Raises:
        HostError: they cannot be read.
    """
    folder = RunDirectory(Path(run.directory)).trial(0)
    entries = sorted(_entries(host, folder) if host.remote else _entries_here(folder), key=lambda entry: entry[2])
    manifest = "".join(f"{digest}  {size}  {name}\n" for digest, size, name in entries)
    write_atomically(run.files.path / "manifest.txt", manifest)
    config = json.dumps(run.config.model_dump(mode="json"), sort_keys=True).encode()
    metrics: dict[str, Any] = read_metrics(run.files.metrics(0))
    meta = ArtifactMeta(
        kind=run.kind,
        uri=f"ssh://{host.name}{quote(str(folder))}" if host.remote else folder.as_uri(),
        sha256=hashlib.sha256(manifest.encode()).hexdigest(),
        bytes=sum(size for _, size, _ in entries),
        created_at=datetime.now(UTC),
        inputs={
            "config": hashlib.sha256(config).hexdigest(),
            **({"code": run.snapshot.hash} if run.snapshot else {}),
        },
        labels=run.labels,
        metrics=metrics,
    )
    write_atomically(run.files.path / "artifact.json", meta.model_dump_json(indent=2) + "\n")
    return meta


def read_artifact(run: Run) -> ArtifactMeta:
    """Read what `write_artifact` has written."""
    return ArtifactMeta.model_validate_json((run.files.path / "artifact.json").read_bytes())


def _entries_here(folder: Path) -> Iterator[tuple[str, int, str]]:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            yield digest, path.stat().st_size, path.relative_to(folder).as_posix()


def _entries(host: Host, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the files of a folder on another host, hashed there."""
    script = (
        f"cd -- {shell_quote(str(folder))} && find . -type f -printf '%s %p\\0' && printf '\\0' "
        "&& find . -type f -exec sha256sum -z -b -- {} +"
    )
    done = host.script(script).check()
    sizes, _, hashes = done.stdout.partition("\0\0")
    known = {name: int(size) for size, _, name in (line.partition(" ") for line in sizes.split("\0") if line)}
    for line in hashes.split("\0"):
        digest, _, name = line.partition(" *")
        if name in known:
            yield digest, known[name], name.removeprefix("./")

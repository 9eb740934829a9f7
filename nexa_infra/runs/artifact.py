"""What a training made: ArtifactMeta and the manifest of its files."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Record, Run
from nexa_infra.runs.results import read_metrics


class ArtifactMeta(Record):
    """What a run made, by content: enough to find it, to verify it, and to know where it came from."""

    kind: str = Field(description="`training`")
    uri: str = Field(description="file:// and the trial's directory")
    sha256: str = Field(description="of the manifest, which lists each file's SHA-256, bytes and path")
    bytes: int
    created_at: datetime
    inputs: dict[str, str] = Field(description="hashes of the code snapshot and of the config")
    labels: dict[str, str] = {}
    metrics: dict[str, JsonValue] = {}


def write_artifact(run: Run) -> ArtifactMeta:
    """Describe what a training's trial wrote: a manifest of its files, then `artifact.json`, each by rename."""
    folder = run.files.trial(0)
    entries = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = "".join(f"{digest}  {size}  {name}\n" for digest, size, name in entries)
    write_atomically(run.files.path / "manifest.txt", manifest)
    config = json.dumps(run.config.model_dump(mode="json"), sort_keys=True).encode()
    metrics: dict[str, Any] = read_metrics(run.files.metrics(0))
    meta = ArtifactMeta(
        kind=run.kind,
        uri=folder.as_uri(),
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


def _entry(folder: Path, path: Path) -> tuple[str, int, str]:
    with path.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest(),
            path.stat().st_size,
            path.relative_to(folder).as_posix(),
        )

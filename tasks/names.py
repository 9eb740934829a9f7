"""Names of artifacts: lower-case letters, digits and dashes."""

from __future__ import annotations

import re

from nexa_infra.runs.record import Run


def artifact_key(kind: str, run: Run) -> str:
    """Return an artifact's key: the runs of one job share it, so that Prefect shows their history."""
    name = re.sub(r"[^a-z0-9]+", "-", run.config.job.name.lower()).strip("-")
    return f"{kind}-{name or 'run'}"

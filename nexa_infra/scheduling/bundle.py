"""The package's own modules that a steward runs by, as one zip file for a node's own Python."""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files
from pathlib import Path, PurePosixPath

# What a steward imports: of the standard library alone, and of Python 3.9.
MODULES = (
    "errors",
    "hosts.base",
    "hosts.framing",
    "hosts.local",
    "hosts.shell",
    "hosts.transfer",
    "monitoring.charges",
    "monitoring.estimates",
    "monitoring.json_text",
    "monitoring.measured",
    "monitoring.report",
    "monitoring.report_markdown",
    "monitoring.report_model",
    "monitoring.report_terminal",
    "monitoring.report_text",
    "monitoring.report_words",
    "monitoring.spending",
    "runs.attempts",
    "runs.directory",
    "runs.endings",
    "runs.log",
    "runs.metrics",
    "runs.plain",
    "runs.prices",
    "runs.ranks",
    "runs.results",
    "runs.series",
    "runs.submissions",
    "scheduling.act",
    "scheduling.arguments",
    "scheduling.arrays",
    "scheduling.base",
    "scheduling.budget",
    "scheduling.counts",
    "scheduling.decide",
    "scheduling.history",
    "scheduling.intents",
    "scheduling.recorded",
    "scheduling.slurm.brought",
    "scheduling.slurm.client",
    "scheduling.slurm.mirror",
    "scheduling.slurm.scheduler",
    "scheduling.slurm.seen",
    "scheduling.slurm.steward_array",
    "scheduling.slurm.submission",
    "scheduling.slurm.tasks",
    "scheduling.slurm.text",
    "scheduling.slurm.words",
    "scheduling.steward",
    "scheduling.reported",
    "spec.points",
    "spec.walltime",
)
DATA = ("scheduling/slurm/submit.sh",)


def write_bundle(path: Path, main: str) -> None:
    """Write a zip that Python runs: `main` as its program, the modules beside it; of the same, the same bytes."""
    names = [f"{name.replace('.', '/')}.py" for name in MODULES]
    packages = {PurePosixPath("nexa_infra", name).parent for name in names}
    packages.update(parent for package in tuple(packages) for parent in package.parents[:-1])
    held = {"__main__.py": main} | {f"{package}/__init__.py": "" for package in packages}
    held |= {f"nexa_infra/{name}": (files("nexa_infra") / name).read_text("utf-8") for name in (*names, *DATA)}
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as bundle:
        for name in sorted(held):
            entry = zipfile.ZipInfo(name)  # of 1980, whenever it is written
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            bundle.writestr(entry, held[name])
    staged = path.with_name(f".{path.name}")
    staged.write_bytes(whole.getvalue())
    staged.replace(path)

"""One step of the road each, as a Prefect task: what Prefect adds is logs, progress and artifacts."""

from nexa_infra.tasks.collect import collect
from nexa_infra.tasks.container import container_run
from nexa_infra.tasks.estimate import estimate_cost
from nexa_infra.tasks.image import pull_image
from nexa_infra.tasks.render import render_slurm_array
from nexa_infra.tasks.report import cost_report
from nexa_infra.tasks.submit import sbatch_submit
from nexa_infra.tasks.sync import sync
from nexa_infra.tasks.torchrun import torchrun_launch
from nexa_infra.tasks.track import track
from nexa_infra.tasks.watch import watch

__all__ = [
    "collect",
    "container_run",
    "cost_report",
    "estimate_cost",
    "pull_image",
    "render_slurm_array",
    "sbatch_submit",
    "sync",
    "torchrun_launch",
    "track",
    "watch",
]

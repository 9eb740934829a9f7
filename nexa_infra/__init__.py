"""Machine-learning sweeps and training on Slurm, or on the machine at hand.

The calls that people know are importable from here; each is imported when it is first used, so
that `import nexa_infra` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexa_infra.containers.runner import run_container
    from nexa_infra.monitoring.costs import estimate_batch_cost
    from nexa_infra.operations.extend import extend_sweep
    from nexa_infra.operations.launch import launch_slurm_sweep, launch_training_job
    from nexa_infra.operations.sync import sync_repository
    from nexa_infra.scheduling.slurm import prepare_slurm_batch
    from nexa_infra.spec.load import load_config

_HOMES = {
    "estimate_batch_cost": "nexa_infra.monitoring.costs",
    "extend_sweep": "nexa_infra.operations.extend",
    "launch_slurm_sweep": "nexa_infra.operations.launch",
    "launch_training_job": "nexa_infra.operations.launch",
    "load_config": "nexa_infra.spec.load",
    "prepare_slurm_batch": "nexa_infra.scheduling.slurm",
    "run_container": "nexa_infra.containers.runner",
    "sync_repository": "nexa_infra.operations.sync",
}

__all__ = [
    "estimate_batch_cost",
    "extend_sweep",
    "launch_slurm_sweep",
    "launch_training_job",
    "load_config",
    "prepare_slurm_batch",
    "run_container",
    "sync_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nexa_infra' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

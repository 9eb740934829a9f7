"""The steps composed: sweep and training."""

from nexa_infra.flows.sweep import sweep
from nexa_infra.flows.training import training

__all__ = ["sweep", "training"]

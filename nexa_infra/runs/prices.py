"""A price: the standard library alone, for a steward counts by it too."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal


@dataclass(frozen=True)
class Price:
    """What an hour of something costs, and who says so; a `billing-hour` is Slurm's, by a partition's weights."""

    __pydantic_config__ = {"extra": "forbid"}  # for run.json, which pydantic reads

    item: str  # the GPU's type as the price book spells it, or `cpu`
    unit: Literal["gpu-hour", "core-hour", "billing-hour"]
    usd_per_hour: Decimal
    provider: str
    source: str
    date: str  # the day that the price was read, ISO 8601
    units: int | None = None  # units that one job is billed for, where a cluster weighs what it holds

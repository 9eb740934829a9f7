"""What a batch of jobs will cost, by the price book."""

from __future__ import annotations

import operator
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from nexa_infra.errors import PriceError
from nexa_infra.monitoring.estimates import CostEstimate, EstimateError, amount_of, complaint, estimate_run, projected
from nexa_infra.monitoring.prices import PriceBook, load_price_book
from nexa_infra.monitoring.spending import HOUR
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.prices import Price

__all__ = ["CostEstimate", "EstimateError", "estimate_batch_cost", "estimate_run"]


def estimate_batch_cost(
    *,
    nodes: int,
    gpus_per_node: int,
    duration_hours: float | Decimal | None,
    gpu_type: str | None,
    job_count: int = 1,
    gpu_hour_cost: float | Decimal | None = None,
    run_id: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    cores_per_node: int = 1,
    book: PriceBook | None = None,
) -> CostEstimate:
    """Project the cost of `job_count` jobs, each of `duration_hours` at the most.

    With GPUs it is nodes × GPUs × hours × jobs at `gpu_hour_cost` (USD a GPU-hour), or at the
    price book's price of `gpu_type`. With `gpus_per_node=0` it is priced by core-hour, over
    `cores_per_node`. A duration of None has no ceiling. `output_dir` gets a `cost_estimate.json`.

    Raises:
        EstimateError: a count is below 1, a duration is not above 0, a boolean stands for a number,
            or GPUs are described where none is asked for.
        PriceError: there is no price of this GPU type.
    """
    asked = _count("nodes", nodes), _count("gpus_per_node", gpus_per_node, least=0), _count("job_count", job_count)
    cores = _count("cores_per_node", cores_per_node)
    hours = None if duration_hours is None else amount_of("duration_hours", duration_hours)
    if hours is not None and not hours:
        raise complaint("duration_hours", "must be above 0; None is no limit")
    gpu_usd = None if gpu_hour_cost is None else amount_of("gpu_hour_cost", gpu_hour_cost)
    nodes, gpus, jobs = asked
    if not gpus:
        for name, value in (("gpu_type", gpu_type), ("gpu_hour_cost", gpu_hour_cost)):
            if value is not None:
                raise complaint(name, f"is {value}, but gpus_per_node is 0: pass None, or ask for a GPU")
        price = (book or load_price_book()).find(None)
    elif gpu_usd is not None:
        price = Price(
            item=gpu_type or "gpu",
            unit="gpu-hour",
            usd_per_hour=gpu_usd,
            provider="caller",
            source="gpu_hour_cost",
            date=datetime.now(UTC).date().isoformat(),
        )
    elif gpu_type is None:
        raise PriceError("GPUs are asked for without saying which: set gpu_type, or gpu_hour_cost")
    else:
        price = (book or load_price_book()).find(gpu_type)
    seconds = None if hours is None else hours * HOUR
    estimate = projected(price, nodes=nodes, units=gpus or cores, jobs=jobs, seconds=seconds, run_id=run_id)
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "cost_estimate.json", estimate.to_json())
    return estimate


def _count(name: str, value: Any, *, least: int = 1) -> int:
    if isinstance(value, bool):
        raise complaint(name, f"a number is meant here, not the boolean {value}")
    try:
        count = operator.index(value)
    except TypeError:
        raise complaint(name, f"must be a whole number, not {value!r}") from None
    if count < least:
        raise complaint(name, f"must be at least {least}, not {count}")
    return count

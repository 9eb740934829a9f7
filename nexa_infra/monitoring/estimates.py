"""What a batch of jobs is projected to cost: the standard library alone, for a steward reports it too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.monitoring.json_text import json_text
from nexa_infra.monitoring.spending import HOUR, attempt_cost, exact, units_per_node
from nexa_infra.runs.prices import Price

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.spec.job import SlurmJob


class EstimateError(ConfigError, ValueError):
    """An argument of an estimate makes no sense; the message names it."""


@dataclass(frozen=True)
class CostEstimate:
    """What a batch is projected to cost: price, quantity and cost, each for itself.

    `None` in place of an amount says that it is unknown, or has no bound.
    """

    price: Price
    nodes: int  # nodes a job
    units_per_node: int  # GPUs a node where the price is by GPU-hour, else cores a node
    job_count: int  # jobs; in a sweep, trials
    attempts_per_trial: int  # the first attempt and the retries that are allowed
    duration_hours: Decimal | None  # walltime of one attempt, hours; None is no limit
    unit_hours: Decimal | None  # GPU-hours or core-hours of all jobs, every attempt at the walltime
    ceiling_usd: Decimal | None  # their cost, USD; None where there is no ceiling
    usd_per_job: Decimal | None  # USD of one job, every attempt at the walltime
    expectation_usd: Decimal | None = None  # USD at the median of history, one attempt a job
    run_id: str | None = None

    def to_json(self) -> str:
        """Write it for programs: amounts as text."""
        return json_text(self)


def estimate_run(run: Run, history: Sequence[float] = ()) -> CostEstimate:
    """Project a run's cost at its own price: the ceiling at the walltime, the expectation at the median of history.

    `history` holds the seconds of comparable trials. The ceiling counts every attempt that
    `retry.times`, of each kind of end, or `checkpoint.requeue` allows; the expectation counts one a trial, and no more
    of it than the walltime.

    Raises:
        EstimateError: a duration of the history is negative or not finite.
    """
    job = run.config.job
    limit = job.walltime
    seconds = None if limit is None else Decimal(str(limit.total_seconds()))
    if run.price.unit == "billing-hour" and run.price.units is None:
        seconds = None  # what is billed is not known beforehand, so that nothing bounds it
    requeues = run.config.checkpoint.most_requeues
    if requeues is None:
        seconds = None  # chained until it is done: nothing bounds it
    if seconds is not None and run.cluster is not None:
        seconds = Decimal(60 * math.ceil(seconds / 60))  # Slurm counts in whole minutes, rounded up
    if seconds is not None and job.trials_per_task != 1:
        seconds = _in_a_pack(job, seconds, spare=0 if run.cluster is None else 60)
    estimate = projected(
        run.price,
        nodes=job.nodes,
        units=units_per_node(job, run.price),
        jobs=run.trials,
        seconds=seconds,
        # A job that is submitted anew for a retry may go back into the queue as often as the first.
        attempts=1 + run.config.retry.times * len(set(run.config.retry.on)) + (requeues or 0),
        run_id=run.id,
    )
    if not history:
        return estimate
    median = statistics.median(amount_of("history", past) for past in history)
    if seconds is not None:
        median = min(median, seconds)
    return replace(estimate, expectation_usd=run.trials * attempt_cost(job, run.price, median))


def _in_a_pack(job: SlurmJob, seconds: Decimal, *, spare: int) -> Decimal:
    """Return how long a trial holds an array task that it shares, at the most; `spare` is what the task has besides.

    The last task may have fewer trials than the others, but holds all that it asks for as long.
    """
    pack = job.trials_per_task if isinstance(job.trials_per_task, int) else 2 * job.trials_at_once
    rounds = -(-pack // job.trials_at_once)
    return (rounds * seconds + spare) / pack


def projected(
    price: Price, *, nodes: int, units: int, jobs: int, seconds: Decimal | None, attempts: int = 1, run_id: str | None
) -> CostEstimate:
    """Multiply a projection out; no `seconds` are no limit."""
    held = None if seconds is None else nodes * units * attempts * seconds  # unit-seconds of a job
    return CostEstimate(
        price=price,
        nodes=nodes,
        units_per_node=units,
        job_count=jobs,
        attempts_per_trial=attempts,
        # Divided last, so that what is a round number comes out as one.
        duration_hours=None if seconds is None else seconds / HOUR,
        unit_hours=None if held is None else jobs * held / HOUR,
        ceiling_usd=None if held is None else jobs * held * price.usd_per_hour / HOUR,
        usd_per_job=None if held is None else held * price.usd_per_hour / HOUR,
        run_id=run_id,
    )


def complaint(name: str, message: str) -> EstimateError:
    """Name an argument that makes no sense."""
    return EstimateError(Problem(name, message, file="cost estimate"))


def amount_of(name: str, value: Any) -> Decimal:
    """Read an amount that is not negative; a float is taken as it is written."""
    if isinstance(value, bool):
        raise complaint(name, f"a number is meant here, not the boolean {value}")
    try:
        amount = exact(value)
    except InvalidOperation:
        raise complaint(name, f"must be a number, not {value!r}") from None
    if not amount.is_finite() or amount < 0:
        raise complaint(name, f"must be a number of 0 or more, not {value}")
    return amount

"""What a batch of jobs will cost, and what its attempts did cost."""

from __future__ import annotations

import math
import operator
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer

from nexa_infra.errors import ConfigError, PriceError, Problem
from nexa_infra.monitoring.prices import PriceBook, load_price_book
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Price, Record, Run
from nexa_infra.runs.results import Attempt, Trial, TrialState
from nexa_infra.spec.job import SlurmJob

_HOUR = Decimal(3600)
# States in which a trial without attempts has cost nothing; in any other, nobody saw what it cost.
NEVER_STARTED: frozenset[TrialState] = frozenset({"pending", "cancelled"})


class EstimateError(ConfigError, ValueError):
    """An argument of an estimate makes no sense; the message names it."""


def plain(amount: Decimal) -> str:
    """Write a Decimal without exponent and trailing zeros: `0.0529`, `12`."""
    if not amount:
        return "0"
    return f"{amount:f}".rstrip("0").rstrip(".") if amount.as_tuple().exponent else f"{amount:f}"


# An exact amount, which is text in JSON.
Amount = Annotated[Decimal, PlainSerializer(plain, return_type=str, when_used="json")]


class CostEstimate(Record):
    """What a batch is projected to cost: price, quantity and cost, each for itself.

    `None` in place of an amount says that it is unknown, or has no bound.
    """

    price: Price
    nodes: int = Field(description="nodes a job")
    units_per_node: int = Field(description="GPUs a node where the price is by GPU-hour, else cores a node")
    job_count: int = Field(description="jobs; in a sweep, trials")
    attempts_per_trial: int = Field(default=1, description="the first attempt and the retries that are allowed")
    duration_hours: Amount | None = Field(description="walltime of one attempt, hours; null is no limit")
    unit_hours: Amount | None = Field(description="GPU-hours or core-hours of all jobs, every attempt at the walltime")
    ceiling_usd: Amount | None = Field(description="their cost, USD; null where there is no ceiling")
    usd_per_job: Amount | None = Field(description="USD of one job, every attempt at the walltime")
    expectation_usd: Amount | None = Field(default=None, description="USD at the median of history, one attempt a job")
    run_id: str | None = None


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
    hours = None if duration_hours is None else _amount("duration_hours", duration_hours)
    if hours is not None and not hours:
        raise _complaint("duration_hours", "must be above 0; None is no limit")
    gpu_usd = None if gpu_hour_cost is None else _amount("gpu_hour_cost", gpu_hour_cost)
    nodes, gpus, jobs = asked
    if not gpus:
        for name, value in (("gpu_type", gpu_type), ("gpu_hour_cost", gpu_hour_cost)):
            if value is not None:
                raise _complaint(name, f"is {value}, but gpus_per_node is 0: pass None, or ask for a GPU")
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
    seconds = None if hours is None else hours * _HOUR
    estimate = _estimate(price, nodes=nodes, units=gpus or cores, jobs=jobs, seconds=seconds, run_id=run_id)
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "cost_estimate.json", estimate.model_dump_json(indent=2) + "\n")
    return estimate


def estimate_run(run: Run, history: Sequence[float] = ()) -> CostEstimate:
    """Project a run's cost at its own price: the ceiling at the walltime, the expectation at the median of history.

    `history` holds the seconds of comparable trials. The ceiling counts every attempt that
    `retry.times` or `checkpoint.requeue` allows; the expectation counts one a trial, and no more
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
    estimate = _estimate(
        run.price,
        nodes=job.nodes,
        units=units_per_node(job, run.price),
        jobs=run.trials,
        seconds=seconds,
        # A job that is submitted anew for a retry may go back into the queue as often as the first.
        attempts=1 + run.config.retry.times + (requeues or 0),
        run_id=run.id,
    )
    if not history:
        return estimate
    median = statistics.median(_amount("history", past) for past in history)
    if seconds is not None:
        median = min(median, seconds)
    return estimate.model_copy(update={"expectation_usd": run.trials * attempt_cost(job, run.price, median)})


def units_per_node(job: SlurmJob, price: Price) -> int:
    """Return what a price is counted by, on each of a job's nodes: GPUs, cores, or a share of what is billed."""
    if price.unit == "billing-hour":
        return math.ceil((price.units or 0) / job.nodes)
    return job.gpus if price.unit == "gpu-hour" else job.cores


def attempt_hours(job: SlurmJob, price: Price, seconds: float | Decimal) -> Decimal:
    """Return the GPU-hours or core-hours of one attempt: what it held, for as long as it ran."""
    return job.nodes * units_per_node(job, price) * _exact(seconds) / _HOUR


def attempt_cost(job: SlurmJob, price: Price, seconds: float | Decimal) -> Decimal:
    """Return the USD of one attempt: nodes × GPUs (or cores) × hours × price."""
    return job.nodes * units_per_node(job, price) * _exact(seconds) * price.usd_per_hour / _HOUR


def seconds_of(attempt: Attempt) -> float | None:
    """Return how long an attempt ran, or None where its end was never seen."""
    if attempt.ended is None or attempt.ended < attempt.started:
        return None
    return attempt.ended - attempt.started


@dataclass(frozen=True)
class Charge:
    """What an attempt held, by the scheduler's accounting, and for how long, in seconds."""

    seconds: int
    cores: int
    gpus: int
    billing: int | None = None  # Slurm's billing TRES, by the partition's TRESBillingWeights
    earlier: Charge | None = None  # what it held before, by another row of accounting

    def unit_seconds(self, price: Price) -> int | None:
        """Return how many unit-seconds of a price that is, in all; None where accounting does not say."""
        units = self.billing if price.unit == "billing-hour" else self.gpus if price.unit == "gpu-hour" else self.cores
        before = self.earlier.unit_seconds(price) if self.earlier is not None else 0
        return None if units is None or before is None else units * self.seconds + before


def price_trials(
    run: Run, trials: Iterable[Trial], charges: Mapping[tuple[int, int], Charge] | None = None
) -> tuple[Trial, ...]:
    """Fill in what each trial cost, and what of it was wasted on attempts that did not complete.

    `charges` is accounting's word on attempts, by trial and number; the others are counted by their
    own clocks, at what the job asked for. Every attempt of a trial that has not completed is waste,
    and all but the last of one that has. Where nobody saw an attempt's end, all is None: unknown.
    """
    by_trial: dict[int, dict[int, Charge]] = {}
    for (trial, number), charge in (charges or {}).items():
        by_trial.setdefault(trial, {})[number] = charge
    return tuple(_priced(run, trial, by_trial.get(trial.index, {})) for trial in trials)


def _priced(run: Run, trial: Trial, charges: Mapping[int, Charge]) -> Trial:
    tried = {attempt.number: seconds_of(attempt) for attempt in trial.attempts}
    hours = [unit_seconds(run, tried.get(number), charges.get(number)) for number in sorted({*tried, *charges})]
    known = [span for span in hours if span is not None]
    if len(known) < len(hours) or (not hours and trial.state not in NEVER_STARTED):
        return replace(trial, usd=None, wasted_usd=None, unit_hours=None)
    wasted = known[:-1] if trial.state == "completed" else known
    price = run.price.usd_per_hour
    return replace(
        trial,
        usd=sum(known, Decimal(0)) * price / _HOUR,
        wasted_usd=sum(wasted, Decimal(0)) * price / _HOUR,
        unit_hours=sum(known, Decimal(0)) / _HOUR,
    )


def unit_seconds(run: Run, seconds: float | None, charge: Charge | None) -> Decimal | None:
    """Return the GPU-seconds or core-seconds of an attempt, by accounting or by its own clock; None is unknown."""
    if charge is not None:
        held = charge.unit_seconds(run.price)
        return None if held is None else Decimal(held)
    if seconds is None or (run.price.unit == "billing-hour" and run.price.units is None):
        return None
    return run.config.job.nodes * units_per_node(run.config.job, run.price) * _exact(seconds)


def _estimate(
    price: Price, *, nodes: int, units: int, jobs: int, seconds: Decimal | None, attempts: int = 1, run_id: str | None
) -> CostEstimate:
    held = None if seconds is None else nodes * units * attempts * seconds  # unit-seconds of a job
    return CostEstimate(
        price=price,
        nodes=nodes,
        units_per_node=units,
        job_count=jobs,
        attempts_per_trial=attempts,
        # Divided last, so that what is a round number comes out as one.
        duration_hours=None if seconds is None else seconds / _HOUR,
        unit_hours=None if held is None else jobs * held / _HOUR,
        ceiling_usd=None if held is None else jobs * held * price.usd_per_hour / _HOUR,
        usd_per_job=None if held is None else held * price.usd_per_hour / _HOUR,
        run_id=run_id,
    )


def _exact(number: float | Decimal) -> Decimal:
    return number if isinstance(number, Decimal) else Decimal(str(number))


def _complaint(name: str, message: str) -> EstimateError:
    return EstimateError(Problem(name, message, file="cost estimate"))


def _count(name: str, value: Any, *, least: int = 1) -> int:
    if isinstance(value, bool):
        raise _complaint(name, f"a number is meant here, not the boolean {value}")
    try:
        count = operator.index(value)
    except TypeError:
        raise _complaint(name, f"must be a whole number, not {value!r}") from None
    if count < least:
        raise _complaint(name, f"must be at least {least}, not {count}")
    return count


def _amount(name: str, value: Any) -> Decimal:
    """Read an amount that is not negative; a float is taken as it is written."""
    if isinstance(value, bool):
        raise _complaint(name, f"a number is meant here, not the boolean {value}")
    try:
        amount = _exact(value)
    except InvalidOperation:
        raise _complaint(name, f"must be a number, not {value!r}") from None
    if not amount.is_finite() or amount < 0:
        raise _complaint(name, f"must be a number of 0 or more, not {value}")
    return amount

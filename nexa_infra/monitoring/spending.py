"""What attempts did cost: the standard library alone, for a steward counts too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

from nexa_infra.monitoring.charges import Charge
from nexa_infra.runs.attempts import Attempt, TrialState
from nexa_infra.runs.prices import Price
from nexa_infra.runs.results import Trial

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.spec.job import SlurmJob

HOUR = Decimal(3600)
# States in which a trial without attempts has cost nothing; in any other, nobody saw what it cost.
NEVER_STARTED: frozenset[TrialState] = frozenset({"pending", "cancelled"})


def units_per_node(job: SlurmJob, price: Price) -> int:
    """Return what a price is counted by, on each of a job's nodes: GPUs, cores, or a share of what is billed."""
    if price.unit == "billing-hour":
        return math.ceil((price.units or 0) / job.nodes)
    return job.gpus if price.unit == "gpu-hour" else job.cores


def attempt_hours(job: SlurmJob, price: Price, seconds: float | Decimal) -> Decimal:
    """Return the GPU-hours or core-hours of one attempt: what it held, for as long as it ran."""
    return job.nodes * units_per_node(job, price) * exact(seconds) / HOUR


def attempt_cost(job: SlurmJob, price: Price, seconds: float | Decimal) -> Decimal:
    """Return the USD of one attempt: nodes × GPUs (or cores) × hours × price."""
    return job.nodes * units_per_node(job, price) * exact(seconds) * price.usd_per_hour / HOUR


def seconds_of(attempt: Attempt) -> float | None:
    """Return how long an attempt ran, or None where its end was never seen."""
    if attempt.ended is None or attempt.ended < attempt.started:
        return None
    return attempt.ended - attempt.started


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
        usd=sum(known, Decimal(0)) * price / HOUR,
        wasted_usd=sum(wasted, Decimal(0)) * price / HOUR,
        unit_hours=sum(known, Decimal(0)) / HOUR,
    )


def unit_seconds(run: Run, seconds: float | None, charge: Charge | None) -> Decimal | None:
    """Return the GPU-seconds or core-seconds of an attempt, by accounting or by its own clock; None is unknown."""
    if charge is not None:
        return charge.unit_seconds(run.price.unit)
    if seconds is None or (run.price.unit == "billing-hour" and run.price.units is None):
        return None
    job = run.config.job
    # Trials of a task that run side by side share what it holds.
    return job.nodes * units_per_node(job, run.price) * exact(seconds) / job.trials_at_once


def exact(number: float | Decimal) -> Decimal:
    """Return a number exactly; a float as it is written."""
    return number if isinstance(number, Decimal) else Decimal(str(number))

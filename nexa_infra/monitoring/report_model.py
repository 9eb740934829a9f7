"""What a cost report holds: the standard library alone, for a steward builds it too."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from nexa_infra.monitoring.estimates import CostEstimate
from nexa_infra.runs.attempts import TrialState
from nexa_infra.runs.endings import RunEnd
from nexa_infra.runs.prices import Price
from nexa_infra.spec.points import Value

# Keys of the JSON that are left out where there is nothing to say.
LEFT_OUT = ("image", "extends", "polls", "steward", "measured")


@dataclass(frozen=True)
class Objective:
    """The metric that says which trial is best."""

    metric: str  # the key in each trial's metrics.json
    goal: Literal["min", "max"]  # whether more or less of it is better


@dataclass(frozen=True)
class RankedTrial:
    """A trial in one of the report's rankings."""

    index: int
    hash: str
    parameters: dict[str, Value]
    state: TrialState
    seconds: float  # over all its attempts
    usd: Decimal | None  # of all its attempts; None is unknown
    metric: float | None  # the objective's value, where the trial has one
    metric_per_usd: float | None  # the metric over the cost, where more of it is better and both are above 0


@dataclass(frozen=True)
class FailedTrial:
    """A trial that ended badly, and its last words."""

    index: int
    state: TrialState
    attempt: int  # the last one's number
    exit_code: int | None
    signal: str | None  # what ended it, such as SIGKILL, where the exit code says so
    reason: str  # the scheduler's word on its end, for people; empty where it has none
    parameters: dict[str, Value]
    usd: Decimal | None
    stderr: tuple[str, ...]  # the last lines of its standard error
    stderr_file: str | None  # where all of it is, on the host that ran it


@dataclass(frozen=True)
class MeasuredMetric:
    """A metric of a training by step; None in place of a value is none, or no finite number."""

    name: str
    axis: str  # what steps are counted in: step, epoch, iteration, or line
    first: float | None
    last: float | None  # the one that was written last
    last_step: float
    min: float | None
    min_step: float | None
    max: float | None
    max_step: float | None
    best_step: float | None  # where it is best: by the objective, or, of a loss, lowest
    unsound: str | None  # that it is no finite number somewhere, in words
    plot: str | None  # its picture's file, from the run directory


@dataclass(frozen=True)
class Measured:
    """What a training appended to metrics.jsonl."""

    lines: int
    axis: str | None  # what steps are counted in
    step: float | None  # where it stood at last
    total: float | None  # how far it was to go, by its own word
    metrics: tuple[MeasuredMetric, ...]
    warnings: tuple[str, ...]  # what was wrong with them, by the config's health


@dataclass(frozen=True)
class ImageUsed:
    """The image that trials ran in."""

    image: str  # REGISTRY/NAME@sha256:…, an image's id, or a file's path
    digest: str  # of its manifest, its configuration or its file
    asked: str  # as it was asked for
    runtime: str  # what ran it; auto was found out on each node


@dataclass(frozen=True)
class Extended:
    """The run whose sweep a run goes on with."""

    run_id: str
    finished: int  # trials of this run's sweep that had finished there, and were left out
    trials: int  # of this run's sweep, with those


@dataclass(frozen=True)
class StewardCost:
    """What the steward of an unattended run has cost, besides its trials."""

    lives: int
    usd: Decimal


@dataclass(frozen=True)
class Polling:
    """What following a run has asked of its scheduler, by all its clients together."""

    period: float  # the shortest time between two polls, seconds
    calls: dict[str, int]  # polls, and how often squeue, sacct, … were called; `shared` are other runs' answers


@dataclass(frozen=True)
class CostReport:
    """What a run was going to cost, what it did cost, and what the money bought.

    `None` in place of an amount says that it is unknown.
    """

    __pydantic_config__ = {"extra": "forbid"}  # for `read_report`

    run_id: str
    name: str  # the job's name
    kind: Literal["sweep", "training"]
    end: RunEnd
    reason: str | None  # why it ended like this, where there is more to say
    created_at: datetime
    commit: str | None
    branch: str | None
    dirty: bool | None  # whether the code had changes that no commit holds
    tree: str | None  # the hash of the code's files, which names the snapshot
    patch: str | None  # SHA-256 of `git diff HEAD`, where the code had such changes
    image: ImageUsed | None  # what the trials ran in; of those that ran as they are, this key is left out
    extends: Extended | None  # the run that it extends; of one that extends none, this key is left out
    cluster: str | None  # where it ran; None is this machine
    job_ids: tuple[str, ...]  # of its arrays on the cluster, in the order of submission
    directory: str  # on the host that ran it
    flow_run_url: str | None  # its address in Prefect's UI

    trials: int
    states: dict[TrialState, int]
    attempts: int  # attempts that were started
    ends: dict[str, int]  # attempts that ended badly, by how: failed, timeout, out_of_memory, node_fail, preempted, …
    steward: StewardCost | None  # what its steward has cost; of a run without one, this key is left out
    polls: Polling | None  # what its scheduler was asked; of a run that nobody was asked about, this key is left out

    projected: CostEstimate
    prices: tuple[Price, ...]
    actual_usd: Decimal | None  # of the trials whose cost is known; None where none is
    actual_unit_hours: Decimal | None  # GPU-hours or core-hours of the same trials
    accounted: bool  # whether seconds and resources are from the cluster's accounting
    uncounted: int  # trials that ran at an unknown cost; the actual amounts lack them
    usd_per_trial_mean: Decimal | None  # over the trials that ran at a known cost
    usd_per_trial_median: Decimal | None
    wasted_usd: Decimal | None  # of attempts that did not complete
    wasted_share: float | None  # that of the actual cost, 0 to 1

    measured: Measured | None  # of a training that wrote metrics.jsonl; else this key is left out

    objective: Objective | None
    unranked: int  # completed trials whose metric is missing or no finite number
    best: tuple[RankedTrial, ...]
    dearest: tuple[RankedTrial, ...]

    failed_trials: str  # all that ended badly, such as 3,7-9
    failed: tuple[FailedTrial, ...]  # the first of them, with their last words
    retry_command: str | None  # runs the failed trials again
    resume_command: str | None  # runs the unfinished trials

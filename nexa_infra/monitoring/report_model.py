"""What a cost report holds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from nexa_infra.monitoring.costs import Amount, CostEstimate
from nexa_infra.runs.record import Price, Record
from nexa_infra.runs.results import TrialState
from nexa_infra.spec.fields import Value
from nexa_infra.spec.policy import Objective

RunEnd = Literal["done", "failed", "cancelled", "refused", "unfinished"]


class RankedTrial(Record):
    """A trial in one of the report's rankings."""

    index: int
    hash: str
    parameters: dict[str, Value]
    state: TrialState
    seconds: float = Field(description="over all its attempts")
    usd: Amount | None = Field(description="of all its attempts; null is unknown")
    metric: float | None = Field(description="the objective's value, where the trial has one")
    metric_per_usd: float | None = Field(
        description="the metric over the cost, where more of it is better and both are above 0"
    )


class FailedTrial(Record):
    """A trial that ended badly, and its last words."""

    index: int
    state: TrialState
    attempt: int = Field(description="the last one's number")
    exit_code: int | None
    signal: str | None = Field(description="what ended it, such as SIGKILL, where the exit code says so")
    reason: str = Field(default="", description="the scheduler's word on its end, for people; empty where it has none")
    parameters: dict[str, Value]
    usd: Amount | None
    stderr: tuple[str, ...] = Field(description="the last lines of its standard error")
    stderr_file: str | None = Field(description="where all of it is, on the host that ran it")


class MeasuredMetric(Record):
    """A metric of a training by step; null in place of a value is none, or no finite number."""

    name: str
    axis: str = Field(description="what steps are counted in: step, epoch, iteration, or line")
    first: float | None
    last: float | None = Field(description="the one that was written last")
    last_step: float
    min: float | None
    min_step: float | None
    max: float | None
    max_step: float | None
    best_step: float | None = Field(description="where it is best: by the objective, or, of a loss, lowest")
    unsound: str | None = Field(description="that it is no finite number somewhere, in words")
    plot: str | None = Field(description="its picture's file, from the run directory")


class Measured(Record):
    """What a training appended to metrics.jsonl."""

    lines: int
    axis: str | None = Field(description="what steps are counted in")
    step: float | None = Field(description="where it stood at last")
    total: float | None = Field(description="how far it was to go, by its own word")
    metrics: tuple[MeasuredMetric, ...]
    warnings: tuple[str, ...] = Field(description="what was wrong with them, by the config's health")


class ImageUsed(Record):
    """The image that trials ran in."""

    image: str = Field(description="REGISTRY/NAME@sha256:…, an image's id, or a file's path")
    digest: str = Field(description="of its manifest, its configuration or its file")
    asked: str = Field(description="as it was asked for")
    runtime: str = Field(description="what ran it; auto was found out on each node")


class CostReport(Record):
    """What a run was going to cost, what it did cost, and what the money bought.

    `None` in place of an amount says that it is unknown.
    """

    run_id: str
    name: str = Field(description="the job's name")
    kind: Literal["sweep", "training"]
    end: RunEnd
    reason: str | None = Field(description="why it ended like this, where there is more to say")
    created_at: datetime
    commit: str | None
    branch: str | None
    dirty: bool | None = Field(description="whether the code had changes that no commit holds")
    tree: str | None = Field(default=None, description="the hash of the code's files, which names the snapshot")
    patch: str | None = Field(default=None, description="SHA-256 of `git diff HEAD`, where the code had such changes")
    image: ImageUsed | None = Field(
        default=None, description="what the trials ran in; of those that ran as they are, this key is left out"
    )
    cluster: str | None = Field(default=None, description="where it ran; null is this machine")
    job_ids: tuple[str, ...] = Field(default=(), description="of its arrays on the cluster, in the order of submission")
    directory: str = Field(description="on the host that ran it")
    flow_run_url: str | None = Field(description="its address in Prefect's UI")

    trials: int
    states: dict[TrialState, int]
    attempts: int = Field(description="attempts that were started")

    projected: CostEstimate
    prices: tuple[Price, ...]
    actual_usd: Amount | None = Field(description="of the trials whose cost is known; null where none is")
    actual_unit_hours: Amount | None = Field(description="GPU-hours or core-hours of the same trials")
    accounted: bool = Field(
        default=False, description="whether seconds and resources are from the cluster's accounting"
    )
    uncounted: int = Field(description="trials that ran at an unknown cost; the actual amounts lack them")
    usd_per_trial_mean: Amount | None = Field(description="over the trials that ran at a known cost")
    usd_per_trial_median: Amount | None
    wasted_usd: Amount | None = Field(description="of attempts that did not complete")
    wasted_share: float | None = Field(description="that of the actual cost, 0 to 1")

    measured: Measured | None = Field(
        default=None, description="of a training that wrote metrics.jsonl; else this key is left out"
    )

    objective: Objective | None
    unranked: int = Field(description="completed trials whose metric is missing or no finite number")
    best: tuple[RankedTrial, ...]
    dearest: tuple[RankedTrial, ...]

    failed_trials: str = Field(description="all that ended badly, such as 3,7-9")
    failed: tuple[FailedTrial, ...] = Field(description="the first of them, with their last words")
    retry_command: str | None = Field(description="runs the failed trials again")
    resume_command: str | None = Field(description="runs the unfinished trials")

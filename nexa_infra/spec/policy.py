"""What a run may do by itself: its objective, its retries, its health, its budget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from nexa_infra.spec.fields import Count, Line, Lines, Spec, Truth, Usd, WholeNumber, as_list, shown
from nexa_infra.spec.walltime import parse_walltime

RetryReason = Literal["failed", "timeout", "oom", "node_fail", "preempted"]


class Objective(Spec):
    """The metric that says which trial is best."""

    metric: Line = Field(description="the key in each trial's metrics.json")
    goal: Literal["min", "max"] = Field(default="max", description="whether more or less of it is better")


class Retry(Spec):
    """Which trials are run again by themselves, and when the run gives up."""

    times: WholeNumber = Field(default=0, description="how often a trial may be run again")
    on: Annotated[tuple[RetryReason, ...], BeforeValidator(as_list)] = Field(
        default=("failed", "timeout", "oom", "node_fail", "preempted"), description="the ends that are retried"
    )
    max_failures: Count | None = Field(
        default=None, description="stop the run once this many trials have failed; unset, a failure never stops others"
    )
    memory_factor: Annotated[float, Field(gt=1, le=10)] | None = Field(
        default=None, description="memory a trial gets when run again after it ran out of it, times the last"
    )
    breaker: Count | None = Field(
        default=10,
        description="stop the run where the first so many trials to end all failed the same way; null never does",
    )


class Checkpoint(Spec):
    """How a trial that is interrupted goes on: where its checkpoints are, and how often its job requeues itself."""

    dir: Line | None = Field(
        default=None, description="where checkpoints are kept, <dir>/<run>/<trial>; unset, in the trial's own directory"
    )
    requeue: WholeNumber = Field(
        default=0, description="how often a job that reached its walltime, or gave way, puts itself back in the queue"
    )
    chain_until_done: Truth = Field(
        default=False,
        description="requeue as often as it takes, as long as checkpoints come; job.time over the "
        "partition's limit is cut to it",
    )

    @field_validator("dir")
    @classmethod
    def _dir(cls, text: str | None) -> str | None:
        if text is not None and not text.startswith(("/", "~/")):
            raise ValueError(
                f"{shown(text)} is no absolute path: write /path/to/it, or ~/path for one in the home there"
            )
        return text

    @property
    def resumes(self) -> bool:
        """Whether a job may put itself back in the queue."""
        return self.requeue > 0 or self.chain_until_done

    @property
    def most_requeues(self) -> int | None:
        """How often it may; None is as often as it takes."""
        return None if self.chain_until_done and not self.requeue else self.requeue


class Health(Spec):
    """What becomes of a training whose metrics, as it appends them to metrics.jsonl, are not what they should be."""

    nan: Literal["warn", "stop", "ignore"] = Field(
        default="warn", description="what to do where a loss is NaN or infinite"
    )
    metrics: Lines = Field(
        default=(), description="metrics that nan is about besides those whose name is, or ends in, loss"
    )
    stalled_after: Line | None = Field(
        default=None, description="how long it may write no new line, as a walltime such as 00:10:00; unset, for ever"
    )
    stalled: Literal["warn", "stop"] = Field(
        default="warn", description="what to do once it has written none for that long"
    )

    @field_validator("stalled_after")
    @classmethod
    def _stalled_after(cls, text: str | None) -> str | None:
        if text is not None:
            parse_walltime(text)
        return text

    @property
    def silence(self) -> float | None:
        """The time without a new line that is too long, seconds; None is never."""
        span = parse_walltime(self.stalled_after) if self.stalled_after is not None else None
        return None if span is None else span.total_seconds()

    def watches(self, metric: str) -> bool:
        """Whether `nan` is about a metric."""
        return metric.lower().endswith("loss") or metric in self.metrics


class Budget(Spec):
    """What the run may cost."""

    limit_usd: Usd | None = Field(default=None, description="refuse the run if its projected ceiling is over this, USD")

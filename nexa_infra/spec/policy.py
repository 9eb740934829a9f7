"""What a run may do by itself: its objective, its retries, its budget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from nexa_infra.spec.fields import Count, Line, Spec, Usd, WholeNumber, as_list

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


class Budget(Spec):
    """What the run may cost."""

    limit_usd: Usd | None = Field(default=None, description="refuse the run if its projected ceiling is over this, USD")

"""The cluster's own price: what Slurm will bill, and what it says it has billed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from nexa_infra.monitoring.charges import Charge
from nexa_infra.monitoring.estimates import estimate_run
from nexa_infra.monitoring.prices import price_for
from nexa_infra.monitoring.spending import price_trials
from nexa_infra.runs.attempts import Attempt
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.scheduling.slurm.billing import billing, read_weights
from nexa_infra.scheduling.slurm.site import Site
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.run import SweepConfig

CLUSTER = Cluster(name="c", workdir="/w", cost_per_billing_hour=Decimal("0.02"))


def a_run(units: int | None = None, job: Mapping[str, object] | None = None) -> Run:
    config = SweepConfig.model_validate(
        {"job": {"time": "01:00:00", **(job or {})}, "launcher": {"type": "command", "command": ["x"]},
         "sweep": {"parameters": {"n": [1, 2]}}}
    )  # fmt: skip
    price = replace(price_for(config.job, CLUSTER), units=units)
    return Run(id="r", config=config, directory="/w/runs/r", workdir="/w", cluster=CLUSTER, price=price,
               created_at=datetime.now(UTC))  # fmt: skip


def a_site(weights: str, *, flags: str = "", memory: str = "UNLIMITED", gpu: str | None = None) -> Site:
    partition = {"PartitionName": "p", "Default": "YES", "TRESBillingWeights": weights, "DefMemPerCPU": memory}
    return Site(config={"PriorityFlags": flags}, partitions=(partition,), gpu=gpu)


@pytest.mark.parametrize(
    ("job", "site", "units"),
    [
        ({"cpus_per_task": 4}, Site(partitions=({"PartitionName": "p", "Default": "YES"},)), 4),
        ({"cpus_per_task": 4}, a_site("CPU=1.0"), 4),
        ({"cpus_per_task": 4, "memory": "16G"}, a_site("CPU=1.0,Mem=0.25G"), 8),
        ({"cpus_per_task": 4, "memory": "16G"}, a_site("CPU=1.0,Mem=0.25G", flags="MAX_TRES"), 4),
        ({"cpus_per_task": 4}, a_site("CPU=1.0,Mem=0.25G", memory="2048"), 6),
        ({"cpus_per_task": 4}, a_site("CPU=1.0,Mem=0.25G"), None),
        ({"gpus_per_node": 2, "gpu_type": "a100", "nodes": 2}, a_site("CPU=1,GRES/gpu=10", gpu="a100"), 42),
        ({"gpus_per_node": 2, "gpu_type": "a100"}, a_site("CPU=1,GRES/gpu=10,GRES/gpu:a100=30", gpu="a100"), 61),
    ],
)
def test_what_slurm_will_bill(job: dict[str, object], site: Site, units: int | None) -> None:
    assert billing(a_run(job=job), site) == units


def test_weights_are_read_with_their_units() -> None:
    assert read_weights("CPU=1.0,Mem=0.25G,GRES/gpu:h100=2.5") == {"cpu": 1.0, "mem": 0.25 / 1024, "gres/gpu:h100": 2.5}
    assert read_weights("") == {}


def test_a_projection_counts_what_will_be_billed_and_is_unknown_where_that_is() -> None:
    known = estimate_run(a_run(units=8))
    assert known.ceiling_usd == Decimal("0.32")  # 2 trials x 8 units x 1 hour x $0.02
    assert estimate_run(a_run()).ceiling_usd is None


def test_what_was_billed_is_what_is_charged() -> None:
    trial = Trial(0, "h", {}, "completed", (Attempt(0, 1, 0.0, ended=100.0, exit_code=0),))
    [priced] = price_trials(a_run(units=8), [trial], {(0, 1): Charge(3600, 4, 0, billing=9)})
    assert priced.usd == Decimal("0.18") and priced.unit_hours == 9
    [unbilled] = price_trials(a_run(units=8), [trial], {(0, 1): Charge(3600, 4, 0)})
    assert unbilled.usd is None

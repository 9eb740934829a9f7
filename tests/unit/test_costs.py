"""What a batch will cost, and what attempts did cost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nexa_infra.errors import NexaError, PriceError
from nexa_infra.monitoring.costs import estimate_batch_cost
from nexa_infra.monitoring.estimates import CostEstimate, EstimateError, estimate_run
from nexa_infra.monitoring.prices import price_for
from nexa_infra.monitoring.spending import attempt_cost, attempt_hours, price_trials
from nexa_infra.runs.attempts import Attempt, TrialState
from nexa_infra.runs.prices import Price
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.run import SweepConfig

CORE = Price(item="cpu", unit="core-hour", usd_per_hour=Decimal("0.05"), provider="p", source="s", date="2026-11-23")
GPU = replace(CORE, item="h100", unit="gpu-hour", usd_per_hour=Decimal("3.25"))


def a_run(cluster: Cluster | None = None, **config: Any) -> Run:
    sweep = {"parameters": {"learning_rate": ["2e-5", "1e-5"], "batch_size": ["8", "16"]}}
    asked = SweepConfig.model_validate({"launcher": {"script": "train.py"}, "sweep": sweep, **config})
    return Run(
        id="20261124-101203-t-a1b2",
        config=asked,
        directory="/w/runs/20261124-101203-t-a1b2",
        workdir="/w",
        cluster=cluster,
        price=price_for(asked.job, cluster),
        created_at=datetime(2026, 11, 24, tzinfo=UTC),
    )


def test_a_batch_costs_nodes_times_gpus_times_hours_times_jobs_times_price() -> None:
    estimate = estimate_batch_cost(
        nodes=2, gpus_per_node=4, duration_hours=0.1, gpu_type="H100", job_count=12, run_id="r"
    )
    assert estimate.unit_hours == Decimal("9.6")
    assert estimate.ceiling_usd == Decimal("66.048")
    assert estimate.usd_per_job == Decimal("5.504")
    assert estimate.duration_hours == Decimal("0.1")
    assert (estimate.nodes, estimate.units_per_node, estimate.job_count, estimate.run_id) == (2, 4, 12, "r")
    assert (estimate.price.item, estimate.price.provider, estimate.expectation_usd) == ("h100", "aws", None)


def test_a_given_price_needs_no_known_type() -> None:
    estimate = estimate_batch_cost(nodes=1, gpus_per_node=2, duration_hours=8, gpu_type="abacus", gpu_hour_cost=3.25)
    assert estimate.ceiling_usd == Decimal(52)
    assert (estimate.price.item, estimate.price.source) == ("abacus", "gpu_hour_cost")
    with pytest.raises(PriceError, match="no price is known for the GPU type 'abacus'"):
        estimate_batch_cost(nodes=1, gpus_per_node=2, duration_hours=8, gpu_type="abacus")


def test_a_batch_without_gpus_is_priced_by_core_hour() -> None:
    estimate = estimate_batch_cost(nodes=2, gpus_per_node=0, duration_hours=10, gpu_type=None, cores_per_node=8)
    assert (estimate.price.unit, estimate.units_per_node) == ("core-hour", 8)
    assert estimate.ceiling_usd == 160 * Decimal("0.0529")


def test_what_is_a_round_number_comes_out_as_one() -> None:
    third = estimate_batch_cost(
        nodes=1, gpus_per_node=1, duration_hours=Decimal(1) / 3, gpu_type=None, gpu_hour_cost=3
    ).ceiling_usd
    assert third is not None
    assert abs(third - 1) < Decimal("1e-25")
    run = a_run(job={"time": "20", "gpus_per_node": 1, "cost_per_gpu_hour": "3"})
    assert estimate_run(run).ceiling_usd == 4


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("nodes", value) for value in (0, -1, True, 1.5, "2", None)],
        *[("gpus_per_node", value) for value in (-1, False, 0.5)],
        *[("job_count", value) for value in (0, True)],
        *[("cores_per_node", value) for value in (0, True)],
        *[("duration_hours", value) for value in (0, -1, True, float("nan"), float("inf"), "8h")],
        *[("gpu_hour_cost", value) for value in (-1, True, float("nan"), Decimal("sNaN"))],
    ],
)
def test_an_argument_that_makes_no_sense_is_named(argument: str, value: object) -> None:
    good: dict[str, Any] = {"nodes": 1, "gpus_per_node": 1, "duration_hours": 1, "gpu_type": "h100"}
    with pytest.raises(EstimateError, match=f"cost estimate: {argument}: ") as caught:
        estimate_batch_cost(**good | {argument: value})
    assert isinstance(caught.value, NexaError)
    assert isinstance(caught.value, ValueError)


def test_gpus_that_are_described_but_not_asked_for_are_an_error() -> None:
    with pytest.raises(EstimateError, match="gpu_type: is h100, but gpus_per_node is 0"):
        estimate_batch_cost(nodes=1, gpus_per_node=0, duration_hours=1, gpu_type="h100")
    with pytest.raises(PriceError, match="set gpu_type, or gpu_hour_cost"):
        estimate_batch_cost(nodes=1, gpus_per_node=1, duration_hours=1, gpu_type=None)


def test_an_estimate_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    estimate = estimate_batch_cost(
        nodes=1, gpus_per_node=1, duration_hours=2, gpu_type="l4", run_id="r", output_dir=folder
    )
    assert [path.name for path in folder.iterdir()] == ["cost_estimate.json"]
    text = (folder / "cost_estimate.json").read_text()
    assert TypeAdapter(CostEstimate).validate_json(text) == estimate
    data = json.loads(text)
    assert (data["ceiling_usd"], data["unit_hours"], data["price"]["usd_per_hour"]) == ("1.61", "2", "0.805")


def test_no_walltime_is_no_ceiling() -> None:
    estimate = estimate_batch_cost(nodes=1, gpus_per_node=1, duration_hours=None, gpu_type="h100")
    assert (estimate.ceiling_usd, estimate.unit_hours, estimate.usd_per_job) == (None, None, None)
    run = a_run(job={"time": "UNLIMITED"})
    assert estimate_run(run).ceiling_usd is None
    assert estimate_run(run, [3600]).expectation_usd == 4 * Decimal("0.0529")


def test_a_runs_ceiling_counts_every_trial_node_gpu_and_attempt() -> None:
    job = {"time": "08:00:00", "nodes": 2, "gpus_per_node": 4, "gpu_type": "rtx_5090", "cost_per_gpu_hour": "3.25"}
    assert estimate_run(a_run(job=job, retry={"times": 2})).attempts_per_trial == 11, "each kind of end for itself"
    estimate = estimate_run(a_run(job=job, retry={"times": 2, "on": ["failed"]}))
    assert estimate.attempts_per_trial == 3
    assert estimate.unit_hours == 4 * 3 * 2 * 4 * 8
    assert estimate.ceiling_usd == 768 * Decimal("3.25")
    assert estimate.usd_per_job == 192 * Decimal("3.25")
    assert (estimate.job_count, estimate.run_id) == (4, "20261124-101203-t-a1b2")


@pytest.mark.parametrize(
    ("config", "attempts"),
    [
        ({"checkpoint": {"requeue": 3}}, 4),
        ({"checkpoint": {"requeue": 3}, "retry": {"times": 2}}, 14),
        ({"checkpoint": {"requeue": 3, "chain_until_done": True}}, 4),
        ({"checkpoint": {"dir": "/kept"}}, 1),
    ],
)
def test_a_runs_ceiling_counts_every_time_that_a_job_goes_back_into_the_queue(
    config: dict[str, Any], attempts: int
) -> None:
    estimate = estimate_run(a_run(job={"time": "1:00:00", "cost_per_core_hour": "0.01"}, **config))
    assert estimate.attempts_per_trial == attempts
    assert estimate.ceiling_usd == 4 * attempts * Decimal("0.01")


def test_a_chain_without_an_end_has_no_ceiling() -> None:
    run = a_run(job={"time": "1:00:00"}, checkpoint={"chain_until_done": True})
    estimate = estimate_run(run, [3600])
    assert (estimate.ceiling_usd, estimate.duration_hours, estimate.unit_hours) == (None, None, None)
    assert estimate.expectation_usd == 4 * Decimal("0.0529")


def test_a_runs_cores_are_those_of_all_tasks_on_a_node() -> None:
    run = a_run(job={"time": "1:00:00", "ntasks_per_node": 2, "cpus_per_task": 3, "cost_per_core_hour": "0.01"})
    assert estimate_run(run).units_per_node == 6
    assert estimate_run(run).ceiling_usd == Decimal("0.24")


def test_on_a_cluster_a_walltime_is_rounded_up_to_whole_minutes_as_slurm_does() -> None:
    cluster = Cluster(name="c", workdir="/scratch", cost_per_core_hour=Decimal(6))
    assert estimate_run(a_run(cluster, job={"time": "0:30"})).ceiling_usd == Decimal("0.4")
    assert estimate_run(a_run(job={"time": "0:30", "cost_per_core_hour": "6"})).ceiling_usd == Decimal("0.2")


def test_the_expectation_is_the_median_of_history_and_never_over_the_walltime() -> None:
    run = a_run(job={"time": "1:00:00", "cost_per_core_hour": "1"})
    assert estimate_run(run, [60, 1800, 7200]).expectation_usd == 2
    assert estimate_run(run, [7200, 7201]).expectation_usd == 4
    assert estimate_run(run).expectation_usd is None
    with pytest.raises(EstimateError, match="history"):
        estimate_run(run, [float("nan")])


def test_an_attempt_costs_what_it_held_for_as_long_as_it_ran() -> None:
    job = SlurmJob(nodes=2, gpus_per_node=4, gpu_type="h100", cpus_per_task=16)
    assert attempt_cost(job, GPU, 1800) == 2 * 4 * Decimal("0.5") * Decimal("3.25")
    assert attempt_hours(job, GPU, 1800) == 4
    assert attempt_cost(SlurmJob(cpus_per_task=3, ntasks_per_node=2), CORE, 3600) == Decimal("0.30")
    assert attempt_cost(job, GPU, 0.1) == Decimal("0.1") * 26 / 3600


@given(st.floats(min_value=0, max_value=1e9), st.integers(1, 1000), st.integers(1, 16))
def test_an_attempts_cost_is_its_hours_times_the_price(seconds: float, nodes: int, gpus: int) -> None:
    job = SlurmJob(nodes=nodes, gpus_per_node=gpus, gpu_type="h100")
    cost = attempt_cost(job, GPU, seconds)
    assert cost >= 0
    assert abs(cost - attempt_hours(job, GPU, seconds) * GPU.usd_per_hour) <= cost * Decimal("1e-20")


def trial(state: TrialState, *spans: float | None, started: float = 100) -> Trial:
    """A trial whose attempts ran for so many seconds each; None has no end."""
    attempts = tuple(
        Attempt(0, number, started, "n", None if span is None else started + span, 0)
        for number, span in enumerate(spans, 1)
    )
    return Trial(0, "h", {}, state, attempts)


@pytest.mark.parametrize(
    ("state", "spans", "usd", "wasted"),
    [
        ("completed", [3600], 1, 0),
        ("completed", [1800, 3600], "1.5", "0.5"),
        ("failed", [3600, 3600], 2, 2),
        ("timeout", [3600], 1, 1),
        ("interrupted", [1800], "0.5", "0.5"),
        ("pending", [1800], "0.5", "0.5"),
        ("pending", [], 0, 0),
        ("cancelled", [], 0, 0),
        # Unknown is not nothing.
        ("running", [None], None, None),
        ("interrupted", [3600, None], None, None),
        ("completed", [-5], None, None),
        ("running", [], None, None),
        ("unknown", [], None, None),
    ],
)
def test_a_trial_costs_all_its_attempts_and_wastes_those_that_did_not_complete(
    state: TrialState, spans: list[float | None], usd: object, wasted: object
) -> None:
    run = a_run(job={"cost_per_core_hour": "1"})
    [priced] = price_trials(run, [trial(state, *spans)])
    assert priced.usd == (None if usd is None else Decimal(str(usd)))
    assert priced.wasted_usd == (None if wasted is None else Decimal(str(wasted)))


def test_importing_costs_brings_along_nothing_heavy() -> None:
    heavy = "pandas", "prefect", "fabric", "pydantic_settings", "rich"
    code = f"import nexa_infra.monitoring.costs, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("packs", "usd"),
    [
        ({}, "1"),
        ({"trials_per_task": 4}, "1"),
        ({"trials_per_task": 4, "trials_at_once": 2}, "0.5"),
        ({"trials_per_task": "auto"}, "1"),
        ({"trials_per_task": "auto", "trials_at_once": 2}, "0.5"),
    ],
)
def test_trials_that_run_side_by_side_share_what_their_task_costs(packs: dict[str, object], usd: str) -> None:
    job = {"time": "01:00:00", "cpus_per_task": 2, "cost_per_core_hour": "0.5", **packs}
    estimate = estimate_run(a_run(job=job))
    assert estimate.usd_per_job == Decimal(usd)

"""A run that needs no client: what its steward is given, and whether one can live on the cluster."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from nexa_infra.errors import BudgetError, ConfigError, PriceError, Problem, SubmitError
from nexa_infra.hosts.connections import host_of
from nexa_infra.hosts.shell import quote
from nexa_infra.monitoring.prices import price_for
from nexa_infra.monitoring.report_text import money
from nexa_infra.monitoring.spending import units_per_node
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.budget import LIVES_AHEAD
from nexa_infra.scheduling.bundle import write_bundle
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.probe import NodeAbilities, probe_steward
from nexa_infra.scheduling.slurm.steward_array import LEAST_LIVES
from nexa_infra.settings import settings
from nexa_infra.spec.job import SlurmJob

# How many lives one array has, and how long one may take, minutes.
LIVES = 40
LIFE_MINUTES = 10

_MAIN = """\
import sys

from nexa_infra.scheduling.steward import main
from nexa_infra.scheduling.reported import finish

sys.exit(main(sys.argv[1], finish))
"""

_SCRIPT = """\
#!/bin/bash
# One life of the steward of run {run_id}: it follows the run in place of a client.
set -u
cd -- {directory} || exit 66
# Should two arrays of one steward exist, the first to start is it.
claim=claims/$SLURM_JOB_NAME
[[ -L $claim ]] || ln -sT -- "$SLURM_ARRAY_JOB_ID" "$claim" 2>/dev/null
[[ $(readlink -- "$claim") == "$SLURM_ARRAY_JOB_ID" ]] || exit 0
export NEXA_STEWARD_ARRAY=$SLURM_ARRAY_JOB_ID NEXA_STEWARD_LIFE=$SLURM_ARRAY_TASK_ID
export NEXA_STEWARD_LIVES=$SLURM_ARRAY_TASK_COUNT
# What it submits must not believe that it is a part of this job.
for name in $(compgen -e); do
  case $name in SLURM_CONF) ;; SLURM_*|SBATCH_*) unset "$name" ;; esac
done
exec {python} -I steward/steward.pyz {directory} >>steward/log 2>&1
"""


def refuse_here(run: Run) -> None:
    """Refuse a run that nobody but its client could follow.

    Raises:
        ConfigError: it runs on this machine.
    """
    if run.config.unattended and run.cluster is None:
        message = "needs a cluster, whose nodes follow the run: without one, trials end with their client"
        raise ConfigError(Problem("unattended", message, file=run.config_file))


def check_nodes(run: Run) -> NodeAbilities:
    """Ask whether a steward can live on the cluster's nodes, once a day.

    Raises:
        SubmitError: it cannot, or that is not known; every reason is told.
    """
    if run.cluster is None:
        raise SubmitError("there is no cluster")
    found = probe_steward(SlurmClient(host_of(run.cluster)), run.cluster, run.config.job)
    if not found.able:
        told = "".join(f"\n  {each}" for each in found.problems)
        raise SubmitError(f"{run.cluster.name} cannot follow a run by itself (unattended: true):{told}")
    return found


def hold_budget(run: Run, said: Admission) -> None:
    """Refuse a run of whose budget not even one attempt, and its steward, can be paid.

    Raises:
        BudgetError: they cannot, or there is no telling what they may cost.
    """
    limit = run.config.budget.limit_usd
    if limit is None:
        return
    told = _budget(run, said)
    if told is None:
        raise BudgetError(
            f"a trial of run {run.id} has no ceiling that could be held against its budget of {money(limit)}: set "
            "job.time, and checkpoint.requeue in place of chain_until_done"
        )
    least = Decimal(told["attempt_usd"]) + LIVES_AHEAD * Decimal(told["life_usd"])
    if least > limit:
        raise BudgetError(
            f"one attempt of a trial may cost {money(Decimal(told['attempt_usd']))}, and the steward "
            f"{money(LIVES_AHEAD * Decimal(told['life_usd']))}: that is over the budget of {money(limit)}. Shorten "
            "job.time, or raise budget.limit_usd"
        )


def write_steward(run: Run, said: Admission) -> None:
    """Write what a steward needs beside the run: its program, its order, and what a client has worked out."""
    place = run.files.path / "steward"
    place.mkdir(exist_ok=True)
    python = check_nodes(run).python or "python3"
    job, cluster = run.config.job, run.cluster
    policy = policy_of(run)
    brief: dict[str, Any] = {
        "trials": run.trials,
        "job": {
            "walltime": job.walltime.total_seconds() if job.walltime is not None else None,
            "gpus": job.gpus,
            "gpu": job.gpu,
            "cores": job.cores,
        },
        "policy": {**asdict(policy), "retry_on": sorted(policy.retry_on)},
        "period": cluster.poll_floor if cluster else 30.0,
        "ceiling": cluster.poll_ceiling if cluster else 300.0,
        "patience": settings().patience,
        "grace": settings().grace_seconds,
        # Those that wait are jobs that are queued.
        "lives": min(LIVES, max(LEAST_LIVES, said.queue_size // 4)) if said.queue_size else LIVES,
        "sbatch": _options(run),
        "budget": _budget(run, said),
        "second_usd": str(_second_usd(run)),
        "life_usd": str(_second_usd(run) * 60 * LIFE_MINUTES),
        "most_requeues": run.config.checkpoint.most_requeues,
        "points": run.config.trials.points.to_json(),
    }
    write_atomically(place / "brief.json", json.dumps(brief, indent=2) + "\n")
    write_bundle(place / "steward.pyz", _MAIN)
    script = _SCRIPT.format(run_id=run.id, directory=quote(run.directory), python=quote(python))
    write_atomically(place / "steward.sbatch", script, mode=0o700)


def _options(run: Run) -> list[str]:
    job, cluster = run.config.job, run.cluster
    log = "/dev/null"  # each life writes its own, from where it has found the run directory
    found = {
        "partition": job.partition or (cluster.partition if cluster else None),
        "account": job.account or (cluster.account if cluster else None),
        "qos": job.qos,
        "reservation": job.reservation,
    }
    return [
        *(f"--{name}={value}" for name, value in found.items() if value is not None),
        f"--time={LIFE_MINUTES}",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--mem=512M",
        "--no-requeue",
        f"--output={log}",
        f"--error={log}",
    ]


def _budget(run: Run, said: Admission) -> dict[str, str] | None:
    """Return the budget, and what things cost at the most; None where there is none, or no bound."""
    limit, job = run.config.budget.limit_usd, run.config.job
    requeues = run.config.checkpoint.most_requeues
    if limit is None or job.walltime is None or requeues is None:
        return None
    # Slurm counts in whole minutes, rounded up; what is over its time has the site's grace, and then KillWait.
    seconds = 60 * math.ceil(job.walltime.total_seconds() / 60) + said.over_seconds + (60 if job.packs else 0)
    rate = run.price.usd_per_hour / 3600
    held = job.nodes * units_per_node(job, run.price)
    second = _second_usd(run)
    return {
        "usd": str(limit),
        "unit": run.price.unit,
        "usd_per_hour": str(run.price.usd_per_hour),
        "attempt_usd": str(held * Decimal(seconds) * rate * (1 + requeues)),
        "life_usd": str(second * 60 * LIFE_MINUTES),
        "second_usd": str(second),
    }


def _second_usd(run: Run) -> Decimal:
    """Return what a second of a steward costs, which holds one core; where no core has a price, as a trial's job."""
    job = run.config.job
    held = job.nodes * units_per_node(job, run.price)
    try:
        core = price_for(SlurmJob(cost_per_core_hour=job.cost_per_core_hour), run.cluster)
    except PriceError:
        return run.price.usd_per_hour / 3600 * held
    return core.usd_per_hour / 3600 * (held if core.unit == "billing-hour" else 1)

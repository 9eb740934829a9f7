"""What a run's config lets it do by itself, and what its cluster lets it do at all."""

from __future__ import annotations

import json
import re

from nexa_infra.monitoring.report_text import money
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.decide import Policy
from nexa_infra.scheduling.recorded import read_limits, throttled
from nexa_infra.scheduling.vitals import health_of

_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def policy_of(run: Run) -> Policy:
    """Return what a run's config lets it do by itself, and where."""
    config, limits = run.config, read_limits(run)
    retry, job, health = config.retry, config.job, health_of(run)
    names = {"oom": "out_of_memory"}
    return Policy(
        retries=retry.times,
        retry_on=frozenset(names.get(word, word) for word in retry.on),
        max_failures=retry.max_failures,
        requeues=config.checkpoint.most_requeues,
        nan=health.nan if health else "warn",
        silence=health.silence if health else None,
        stalled=health.stalled if health else "warn",
        breaker=retry.breaker if run.trials > (retry.breaker or 0) else None,
        canary=config.canary if config.kind == "sweep" else 0,
        parallelism=parallelism_of(run),
        array_size=limits.get("array_size"),
        pack=job.trials_per_task if isinstance(job.trials_per_task, int) else None,
        at_once=job.trials_at_once,
        most_pack=limits.get("pack"),
        memory=mebibytes(job.memory),
        memory_factor=retry.memory_factor,
        budget=money(config.budget.limit_usd) if config.unattended and config.budget.limit_usd is not None else None,
        local=run.cluster is None,
        full_seconds=2 * run.cluster.poll_floor if run.cluster else 0.0,
    )


def slots_of(run: Run) -> int | None:
    """Return how many array tasks may run at once, by a person's last word; None is as many as there is room for."""
    most = parallelism_of(run)
    return None if most is None else max(1, most // run.config.job.trials_at_once)


def parallelism_of(run: Run) -> int | None:
    """Return how many trials may run at once, by a person's last word; None is as many as there is room for."""
    return throttled(run, run.config.job.array_parallelism)


def write_limits(run: Run, said: Admission) -> None:
    """Keep what the cluster allows beside the run: whoever follows it, wherever, goes by it."""
    limits = {"array_size": said.array_size, "queue_size": said.queue_size, "pack": said.pack}
    write_atomically(run.files.limits, json.dumps({name: most for name, most in limits.items() if most}) + "\n")


def mebibytes(text: str | None) -> int | None:
    """Read an amount of memory as sbatch does, MiB; None where there is none, or all of a node's is meant."""
    found = re.fullmatch(r"([0-9]+)([KMGT]?)B?", text.upper()) if text else None
    return (round(int(found[1]) * _UNITS[found[2] or "M"]) or None) if found else None

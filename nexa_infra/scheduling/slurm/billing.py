"""What Slurm bills one trial: its partition's TRESBillingWeights over what the trial asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nexa_infra.runs.record import Run

if TYPE_CHECKING:
    from nexa_infra.scheduling.slurm.site import Site

_MIB = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0**2}


def billing(run: Run, site: Site) -> int | None:
    """Return the billing units of one trial, or None where they depend on a memory that nobody has named.

    See slurm.conf(5), TRESBillingWeights and PriorityFlags=MAX_TRES.
    """
    job, cluster = run.config.job, run.cluster
    partition = site.partition(job.partition or (cluster.partition if cluster else None)) or {}
    weights = read_weights(partition.get("TRESBillingWeights", ""))
    if not weights:
        return job.nodes * job.cores  # without weights Slurm bills the cores
    memory = _memory(job.memory, job.cores, partition, site.config)
    if memory is None and weights.get("mem"):
        return None
    gpus = weights.get(f"gres/gpu:{(site.gpu or '').lower()}") or weights.get("gres/gpu", 0.0)
    parts = [job.cores * weights.get("cpu", 0.0), (memory or 0.0) * weights.get("mem", 0.0), job.gpus * gpus]
    of_a_node = max(parts) if "MAX_TRES" in site.config.get("PriorityFlags", "") else sum(parts)
    return math.ceil(job.nodes * (of_a_node + weights.get("node", 0.0)))


def read_weights(text: str) -> dict[str, float]:
    """Read `CPU=1.0,Mem=0.25G,GRES/gpu=2.0`: a resource in small letters -> its weight, memory's by MiB."""
    found = {}
    for name, weight, unit in re.findall(r"([\w/:.-]+)=([\d.]+)([kmgt]?)", text.lower()):
        found[name] = float(weight) / _MIB[unit] if name == "mem" else float(weight)
    return found


def _memory(asked: str | None, cores: int, partition: Mapping[str, str], config: Mapping[str, str]) -> float | None:
    """Return the memory of one node of a trial, MiB."""
    if asked is not None:
        number, unit = re.fullmatch(r"(\d+)([kmgt]?)b?", asked.lower()).groups()  # type: ignore[union-attr]
        return float(number) * _MIB[unit] if int(number) else None  # 0 is all of it
    for place in (partition, config):
        for name, count in (("DefMemPerCPU", cores), ("DefMemPerNode", 1)):
            if place.get(name, "").isdigit() and int(place[name]):
                return float(place[name]) * count
    return None

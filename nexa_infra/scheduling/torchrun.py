"""Gang launch: one torchrun on each node of a job, which find each other at its first node."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from nexa_infra.spec.launcher import processes_asked
from nexa_infra.spec.torchrun import node_range, option_name

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.spec.job import SlurmJob
    from nexa_infra.spec.launcher import Launcher

# What starts torchrun on a node and each of its ranks, in the run directory.
GANG_SCRIPT = "gang.sh"
# Options of torchrun that say where its nodes meet: one who gives them has chosen the place.
_ENDPOINTS = frozenset({"--rdzv-endpoint", "--master-addr", "--master-port"})
_PLACES = _ENDPOINTS | {"--standalone"}


@dataclass(frozen=True)
class Gang:
    """How the job script starts torchrun, as its template shows it."""

    nodes: int
    words: int  # torchrun, and what follows it, before the program
    endpoint: str | None  # where its nodes meet, where the launcher says
    srun: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    elastic: bool = False


def gang_of(launcher: Launcher, job: SlurmJob) -> Gang | None:
    """Return how a launcher's torchrun is started; None where it starts none."""
    if launcher.type != "torchrun":
        return None
    nodes = job.nodes
    least = node_range(launcher.nnodes)[0] if launcher.nnodes else nodes
    elastic = least < nodes
    endpoint = launcher.rdzv_endpoint
    env = {
        "NEXA_GANG_PROCESSES": str(processes_asked(launcher)),
        "NEXA_GANG_TASKS": str(job.ntasks_per_node),
        "NEXA_GANG_CORES": str(job.cores),
        "NEXA_GANG_NODES": f"{least}:{nodes}" if elastic else str(nodes),
        "NEXA_GANG_RESTARTS": str(launcher.max_restarts),
        "NEXA_GANG_BACKEND": launcher.rdzv_backend,
        "NEXA_GANG_TIMEOUT": str(launcher.rdzv_timeout),
        "NEXA_GANG_WARNING": job.warning_signal,
    }
    if any(option_name(word) in _ENDPOINTS for word in launcher.extra_args):
        env["NEXA_GANG_PLACED"] = "1"
    if launcher.interface is not None:
        env |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), launcher.interface)
    if launcher.max_restarts or elastic:
        # Ranks that start again would be sent to the store of a process group that is gone.
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    srun = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={job.cores}"]
    # Where fewer nodes may go on, one that dies does not end the others.
    srun += ["--kill-on-bad-exit=0", "--no-kill"] if elastic else ["--kill-on-bad-exit=1"]
    return Gang(nodes, 1 + len(launcher.extra_args), endpoint, tuple(srun), tuple(env.items()), elastic)


def chooses_place(launcher: Launcher) -> bool:
    """Say whether torchrun's own options among a launcher's say where its nodes meet."""
    return any(option_name(word) in _PLACES for word in launcher.extra_args)


def gang_script() -> str:
    """Return the script that starts torchrun on a node, and each of its ranks."""
    return (files("nexa_infra.scheduling") / "templates" / GANG_SCRIPT).read_text(encoding="utf-8")


def placement_of(run: Run) -> str:
    """Say where a run's trials run, what starts them, and in which image, for people."""
    where = placement(run.config.launcher, run.config.job, run.cluster.name if run.cluster else None)
    if run.container is None:
        return where
    runtime = "what runs containers there" if run.container.runtime == "auto" else run.container.runtime
    return f"{where}, in {run.container.asked} by {runtime} ({run.container.digest[:19]})"


def placement(launcher: Launcher, job: SlurmJob, cluster: str | None) -> str:
    """Say where a trial runs and what starts it, for people."""
    where = f"on {cluster}" if cluster else "on this machine"
    if launcher.type != "torchrun":
        started = "a program" if launcher.type == "command" else launcher.python
        return f"{started} {where}" if cluster is None or job.nodes == 1 else f"{started} {where}, {job.nodes} nodes"
    asked = processes_asked(launcher)
    if asked == "auto":
        asked = job.gpus or job.ntasks_per_node
    many = {"gpu": f"{job.gpus} processes, one a GPU", "cpu": f"{job.cores} processes, one a core"}.get(
        str(asked), "1 process" if asked == 1 else f"{asked} processes"
    )
    if cluster is None or job.nodes == 1:
        alone = "" if job.nodes == 1 else f" (job.nodes: {job.nodes} is for a cluster)"
        return f"torchrun --standalone {where}, {many}{alone}"
    least = node_range(launcher.nnodes)[0] if launcher.nnodes else job.nodes
    nodes = f"{job.nodes} nodes" if least == job.nodes else f"{least} to {job.nodes} nodes"
    return f"torchrun {where}, {nodes}, {many} on each, {launcher.rdzv_backend} rendezvous"

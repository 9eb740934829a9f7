"""A sweep of 1,000 trials queued on the test rig's own Slurm, beside bare sbatch of the same script; and polled.

`python -m benchmarks.slurm WHAT FOLDER SSHD` is how this file calls itself, for a process that speaks to the rig.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, Place, alternated, place, say
from benchmarks.rig import cancel_all, cluster_of, counted, environment_on, forget_calls, host_of, rig
from nexa_infra.hosts import connections
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import prepare_slurm_batch
from nexa_infra.spec.cluster import Cluster
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

ROUNDS = 15
POLLS = 20
TRIALS = 1000
ARRAY = f"0-{TRIALS - 1}"
MODULES = 100
CONFIG = "bench.yaml"

# Held, so that nothing runs while something is measured.
_SWEEP = {
    "job": {"name": "bench", "time": "00:05:00", "memory": "100M", "extra": {"hold": True}},
    "launcher": {"type": "command", "command": ["true"]},
    "sweep": {"parameters": {name: list(range(10)) for name in "abc"}},
}


def slurm() -> Iterator[Figure]:
    """Queue 1,000 trials on the login node and over SSH, in turn with sbatch, and poll them.

    Each is measured from the config file to the array in the queue, the login included, in a process
    that has its imports. The code's snapshot is there already, and what the cluster allows was asked
    in a round before; for `submit.ssh-first` neither is so.
    """
    with place() as here, rig(here, make_repository) as (cluster, sshd):
        say(f"{ROUNDS} rounds on the login node")
        found = _measured(here, cluster, "here", sshd)
        yield _beside("submit.here", found["batch"], "sbatch", found["raw"], limit=3)
        yield _beside("submit.road", found["road"], "sbatch", found["raw"])

        say(f"{ROUNDS} rounds over SSH")
        found = _measured(here, cluster, "ssh", sshd)
        yield _beside("submit.ssh", found["road"], "ssh HOST sbatch", found["raw"], limit=1.5)
        yield _beside("submit.ssh-first", found["first"], "ssh HOST sbatch", found["raw"])
        told = {"first": found["scripts_first"], "shells": found["sessions"]}
        yield Figure("submit.round-trips", found["scripts"], "scripts", baseline=told)
        yield Figure("submit.logins", found["logins"], "logins", limit=1)

        say(f"{POLLS} polls")
        with counted(here, cluster) as counting:
            found = _measured(here, cluster, "poll", counting)
        yield Figure("poll.scheduler-calls", found["calls"], "Slurm commands a poll", limit=1, baseline=found["names"])
        yield _beside("poll.time", found["poll"], "squeue over the same connection", found["raw"])


def _beside(name: str, seconds: float, tool: str, raw: float, *, limit: float | None = None) -> Figure:
    return Figure(name, seconds / raw, f"times {tool}", limit, {"tool": tool, "s": raw, "ours_s": seconds})


def sbatch(directory: Path) -> list[str]:
    """Return the command by which a person queues what is in a run directory."""
    log, script = directory / "job.log", directory / "job.sbatch"
    return ["sbatch", "--parsable", f"--array={ARRAY}", f"--output={log}", "--open-mode=append", str(script), "0", "1"]


def queue(argv: list[str]) -> float:
    """Queue an array by a command, and take it out of the queue again; return the command's seconds."""
    begun = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"`{shlex.join(argv)}` ended with exit code {done.returncode}: {done.stderr}")
    cancel_all()
    return taken


def make_repository(here: Place) -> None:
    """Make a repository with a config of 1,000 trials."""
    (here.project / CONFIG).write_text(json.dumps(_SWEEP))  # JSON is YAML
    (here.project / "package").mkdir()
    for number in range(MODULES):
        text = f"NUMBER = {number}\n" + "# one more line of a module of a middling size\n" * 40
        (here.project / "package" / f"module_{number:02}.py").write_text(text)
    here.run("git", "init", "--quiet")
    here.run("git", "add", "--all")
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "commit.gpgsign=false")
    here.run("git", *identity, "commit", "--quiet", "--message", "start")


def _measured(here: Place, cluster: SlurmRig, what: str, sshd: SshRig) -> dict[str, Any]:
    """Return what `what` measures, in a process that speaks to the rig."""
    environment = environment_on(here, cluster)
    answer: dict[str, Any] = here.python(
        "-m", "benchmarks.slurm", what, here.folder, sshd.folder, env=environment
    ).answer()
    return answer


class _Road:
    """The road to a cluster, up to the queued array."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.directory = Path()  # of the last run, on the cluster

    def __call__(self) -> float:
        """Take the road, its login included, and take the array out of the queue again; return the road's seconds."""
        connections.close_all()
        begun = time.perf_counter()
        run = self.queued()
        taken = time.perf_counter() - begun
        self.directory = Path(run.directory)
        cancel_all()
        return taken

    def queued(self) -> Run:
        """Take the road, and return the run whose array is queued."""
        run = steps.plan(CONFIG, cluster=self.cluster)
        steps.admit(run, steps.estimate_cost(run))
        run = steps.render(steps.sync(run))
        if steps.submit(run).job_id is None:
            raise SystemExit(f"run {run.id} was not queued")
        return run

    @property
    def host(self) -> SshHost:
        """The connection of the last run."""
        return host_of(self.cluster)


def _here(folder: Path) -> dict[str, object]:
    """Measure `prepare_slurm_batch`, the whole road and sbatch, on the login node."""
    numbers = count()

    def batch() -> float:
        begun = time.perf_counter()
        made = prepare_slurm_batch(CONFIG, submit=True, output_dir=folder / "batches" / str(next(numbers)))
        taken = time.perf_counter() - begun
        if not made.job_ids or made.array != ARRAY:
            raise SystemExit(f"not the array {ARRAY} was queued, but {made.array}")
        cancel_all()
        return taken

    batch()
    script = folder / "batches" / "0"
    road = _Road(Cluster(name="here", workdir=str(folder / "here")))
    ours, whole, raw = alternated(ROUNDS, batch, road, lambda: queue(sbatch(script)))
    return {"batch": ours, "road": whole, "raw": raw}


def _ssh(folder: Path, sshd: SshRig) -> dict[str, object]:
    """Measure the whole road over SSH, the very first time and then in turn with `ssh HOST sbatch`."""
    road = _Road(cluster_of(sshd, folder / "far"))
    first = road()
    scripts = road.host.round_trips
    command = sshd.command(shlex.join(sbatch(road.directory)))
    whole, raw = alternated(ROUNDS, road, lambda: queue(command))
    sshd.forget_logins()
    road()
    counted = {"logins": sshd.logins(), "scripts": road.host.round_trips, "sessions": road.host.sessions}
    return {"first": first, "road": whole, "raw": raw, "scripts_first": scripts, **counted}


def _poll(folder: Path, sshd: SshRig) -> dict[str, object]:
    """Count the Slurm commands of polls of a queued run, and time them beside squeue over the same connection."""
    road = _Road(cluster_of(sshd, folder / "polled"))
    run = road.queued()
    calls = forget_calls(folder)
    scheduler = steps.scheduler_of(run)
    for _ in range(POLLS):
        if scheduler.poll(run).pending != TRIALS:
            raise SystemExit(f"run {run.id} is not queued any more")
        scheduler.tasks(run)  # what is read besides, where a poll brings news
    names = calls.read_text().split()
    squeue = ["squeue", "-h", "-u", "root", "-t", "all"]
    ours, raw = alternated(POLLS, _clocked(lambda: scheduler.poll(run)), _clocked(lambda: road.host.run(squeue)))
    cancel_all()
    counted = {name: names.count(name) for name in sorted(set(names))}
    return {"calls": len(names) / POLLS, "names": counted, "poll": ours, "raw": raw}


def _clocked(action: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun

    return measure


def main() -> None:
    """Measure what the arguments say, in the folder that they name; the answer is the last line."""
    match sys.argv[1:]:
        case ["here", folder, _]:
            answer = _here(Path(folder))
        case ["ssh", folder, sshd]:
            answer = _ssh(Path(folder), SshRig(Path(sshd)))
        case ["poll", folder, sshd]:
            answer = _poll(Path(folder), SshRig(Path(sshd)))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

"""Torchrun trainings on the test rig's own Slurm: beside a script written by hand, and what an interruption costs.

`python -m benchmarks.training WHAT FOLDER` is how this file calls itself, for a process that speaks to the rig.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, BenchmarkError, Figure, Place, place, say
from benchmarks.rig import environment_on, rig
from benchmarks.slurm import make_repository
from nexa_infra.operations import launch
from nexa_infra.runs.attempts import Attempt, read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run
from nexa_infra.spec.cluster import Cluster
from tests.rig.slurm import SlurmRig

PAIRS = 5
NODES = PROCESSES = 2
INTERVAL = 10  # steps from a checkpoint to the next: the example saves one an epoch
EPOCHS = 10
STEP_SECONDS = 0.25  # so that the job takes its time by its steps, 25 seconds
CHAINED_EPOCHS = 6
CHAINED_STEP_SECONDS = 2.0  # so that it takes more than one walltime
# Slurm may warn up to a minute early, and a busy machine takes half of one to start: a minute might hold no step.
WALLTIME = "2"
KILLED_AT = (5, 18, 31, 44, 57)  # steps, from right behind a checkpoint to right before the next
PATIENCE = 300.0

# What a person writes who has read torchrun's page. A node of the rig is no name on the network: its address is.
_BY_HAND = """\
#!/bin/bash
#SBATCH --job-name=by-hand
#SBATCH --time=00:05:00
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=800M
date +%s.%N >began
. {venv}/bin/activate
srun --kill-on-bad-exit=1 torchrun --nnodes={nodes} --nproc-per-node={processes} \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint=127.0.0.1:{port} {program}
code=$?
date +%s.%N >ended
exit "$code"
"""


def training() -> Iterator[Figure]:
    """Train the example on Slurm by torchrun, through the engine and by hand; and interrupt it, warned and unwarned.

    A job's time is from its script's first instant to its last, by its own clock; what it waits in the queue
    is not in it. The value is the median of the pairs' ratios.
    """
    if find_spec("torch") is None:
        raise BenchmarkError("PyTorch is not installed: `make torch` brings it")
    with place() as here, rig(here, make_repository) as (cluster, _):
        shutil.copy(ROOT / "deployments" / "examples" / "ddp" / "train.py", here.project)

        say(f"{PAIRS} pairs of jobs on {NODES} nodes, about a minute and a half each")
        found = _measured(here, cluster, "gang")
        told = {"tool": "sbatch by hand", "s": found["hand"], "ours_s": found["ours"], "ratios": found["ratios"]}
        yield Figure("training.gang", found["ratio"], "times a script by hand", limit=1.05, baseline=told)

        say("a training that takes several walltimes, and one that is killed")
        found = _measured(here, cluster, "lost-steps")
        told = {"checkpoint_interval": INTERVAL, **found["told"]}
        yield Figure("training.lost-steps", found["lost"], "steps a requeue", limit=1, baseline=told)


def _measured(here: Place, cluster: SlurmRig, what: str) -> dict[str, Any]:
    """Return what `what` measures, in a process that speaks to the rig."""
    environment = environment_on(here, cluster)
    answer: dict[str, Any] = here.python(
        "-m", "benchmarks.training", what, here.folder, env=environment, patience=1800.0
    ).answer()
    return answer


def _gang(folder: Path) -> dict[str, object]:
    """Take the time of the same job by the engine and by hand, in turn; who goes first changes from pair to pair."""
    numbers = count()

    def ours(epochs: int) -> float:
        run = _trained(folder, f"gang-{epochs}", _words(epochs, STEP_SECONDS), nodes=NODES)
        (attempt,) = _attempts(run)
        # The script claims its run before it does anything else of note.
        (claim,) = (Path(run.directory) / "claims").iterdir()
        return (attempt.ended or 0.0) - claim.lstat().st_mtime

    def hand(epochs: int) -> float:
        where = folder / "by-hand" / str(next(numbers))
        _ended(_by_hand(where, _words(epochs, STEP_SECONDS), nodes=NODES))
        if not (where / "model.pt").exists():
            raise SystemExit(f"the job by hand has not trained: {(where / 'job.log').read_text()[-2000:]}")
        began, ended = (float((where / name).read_text()) for name in ("began", "ended"))
        return ended - began

    ours(1), hand(1)
    taken: list[tuple[float, float]] = []
    for number in range(PAIRS):
        if number % 2:
            later = hand(EPOCHS)
            taken.append((ours(EPOCHS), later))
        else:
            taken.append((ours(EPOCHS), hand(EPOCHS)))
    # The two of a pair met much the same machine: what else it does changes from pair to pair.
    ratios = [our / their for our, their in taken]
    of_ours, of_hand = (statistics.median(each) for each in zip(*taken, strict=True))
    told = [round(each, 3) for each in ratios]
    return {"ours": of_ours, "hand": of_hand, "ratio": statistics.median(ratios), "ratios": told}


def _lost_steps(folder: Path) -> dict[str, object]:
    """Count the steps that a chain of walltimes does twice; and those of a job that is killed unwarned."""
    run = _trained(
        folder,
        "chained",
        _words(CHAINED_EPOCHS, CHAINED_STEP_SECONDS),
        time_limit=WALLTIME,
        warning=25,
        checkpoint={"chain_until_done": True},
    )
    trial = Path(run.directory) / "trials" / "0"
    requeues = len(_attempts(run)) - 1
    if not requeues:
        raise SystemExit("the training was done before its walltime came")
    began = [_began(trial / f"attempt-{number}.out") for number in range(2, requeues + 2)]
    killed = _lost_by_kills(folder / "killed")
    told = {"requeues": requeues, "went_on_at": began, "without the warning": killed, "killed_at": KILLED_AT}
    return {"lost": _executed_twice(trial) / requeues, "told": told}


def _lost_by_kills(where: Path) -> float:
    """Kill the job by hand at some steps, and start it again; return the steps that it does twice, a kill."""
    for step in KILLED_AT:
        (where / "steps").unlink(missing_ok=True)  # of the start before
        job = _by_hand(where, _words(CHAINED_EPOCHS, STEP_SECONDS), nodes=1)
        _until(lambda step=step: _step(where) >= step, f"step {step}")  # type: ignore[misc]
        _kill_ranks(where / "job.log")
        _ended(job)
    _ended(_by_hand(where, _words(CHAINED_EPOCHS, 0.0), nodes=1))
    if not (where / "model.pt").exists():
        raise SystemExit(f"the killed job has not been resumed: {(where / 'job.log').read_text()[-2000:]}")
    return _executed_twice(where) / len(KILLED_AT)


def _executed_twice(where: Path) -> int:
    return (where / "checkpoints" / "executed").stat().st_size - CHAINED_EPOCHS * INTERVAL


def _words(epochs: int, seconds: float) -> dict[str, str]:
    return {"epochs": str(epochs), "steps_per_epoch": str(INTERVAL), "step_seconds": str(seconds)}


def _trained(
    folder: Path, name: str, parameters: dict[str, str], *, nodes: int = 1, time_limit: str = "5",
    warning: int | None = None, **more: object,
) -> Run:  # fmt: skip
    """Train by the engine, on the login node, to the end; return the run."""
    job = {"name": name, "time": time_limit, "nodes": nodes, "memory": "800M", "setup": {"venv": sys.prefix}}
    config = {
        "job": job if warning is None else {**job, "signal_before_end": warning},
        "launcher": {"type": "torchrun", "script": "train.py", "nproc_per_node": PROCESSES},
        "training": {"parameters": parameters},
        **more,
    }
    path = Path(f"{name}.yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    run = launch.plan_training(path, cluster=Cluster(name="here", workdir=str(folder / "here"), poll_floor=5))
    launch.follow_run(run)
    return run


def _attempts(run: Run) -> list[Attempt]:
    return read_attempts(RunDirectory(Path(run.directory)))[0]


def _by_hand(where: Path, parameters: dict[str, str], *, nodes: int) -> str:
    """Queue the script that a person writes, in a folder of its own; return the job's id."""
    where.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = ["train.py", *(f"--{name}={value}" for name, value in parameters.items())]
    shutil.copy("train.py", where)
    script = _BY_HAND.format(
        nodes=nodes, processes=PROCESSES, port=port, venv=shlex.quote(sys.prefix), program=shlex.join(program)
    )
    argv = ["sbatch", "--parsable", "--output=job.log", "--open-mode=append", "--export=ALL,NEXA_METRICS_LOG=steps"]
    done = subprocess.run(argv, cwd=where, input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{shlex.join(argv)}` ended with exit code {done.returncode}: {done.stderr}")
    return done.stdout.strip()


def _ended(job: str) -> None:
    """Wait until a job has left the queue."""
    argv = ["squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING,COMPLETING"]

    def gone() -> bool:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return not done.stdout.strip() and (done.returncode == 0 or "Invalid job id" in done.stderr)

    _until(gone, f"the end of job {job}", every=1.0)


def _until(true: Callable[[], bool], what: str, every: float = 0.05) -> None:
    limit = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > limit:
            raise SystemExit(f"{what} has not come within {PATIENCE:.0f} s")
        time.sleep(every)


def _kill_ranks(log: Path) -> None:
    """End the ranks that were started last by SIGKILL: scancel would send them SIGTERM first, which is a warning."""
    for pid in re.findall(r"^node \S+ pid (\d+) rank", log.read_text(), re.MULTILINE)[-PROCESSES:]:
        os.kill(int(pid), signal.SIGKILL)


def _step(where: Path) -> int:
    """The last step that was taken in a folder."""
    path = where / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    found = re.match(r'\{"step": (\d+)', lines[-1]) if lines else None
    return int(found[1]) if found else 0


def _began(log: Path) -> int:
    """The step at which an attempt went on."""
    found = re.search(r"resumed at step (\d+)", log.read_text())
    return int(found[1]) if found else 0


def main() -> None:
    """Measure what the arguments say, in the folder that they name; the answer is the last line."""
    match sys.argv[1:]:
        case ["gang", folder]:
            answer = _gang(Path(folder))
        case ["lost-steps", folder]:
            answer = _lost_steps(Path(folder))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

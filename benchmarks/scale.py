"""10,000 trials in ten arrays on the test rig's own Slurm, over SSH: queued, watched, throttled and collected."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import BenchmarkError, Figure, Place, place, say
from benchmarks.rig import counted, environment_on, rig
from benchmarks.scale_site import ARRAYS, CONFIG, HELD, HOUR, PARALLELISM, ROUNDS, THROTTLED, TRIALS, WATCHED_OVER
from nexa_infra.scheduling.watch import GROWTH
from nexa_infra.spec.cluster import Cluster
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

# What counts as the CPU of one poll: of the login node's processes, and of this one's.
MOST_CPU_MS = 50.0
# Whatever was cancelled in a round before is forgotten soon.
SETTINGS = {"MaxJobCount": "100000", "MinJobAge": "10"}

_SWEEP = {
    "job": HELD,
    "launcher": {"type": "command", "command": ["true"]},
    "sweep": {"parameters": {name: list(range(10)) for name in "abcd"}},
}


def scale() -> Iterator[Figure]:
    """Queue, watch, throttle and collect 10,000 trials over SSH; each in a process of its own, beside the raw tool."""
    with place() as here, rig(here, make_repository, SETTINGS) as (cluster, sshd):
        measured = partial(_measured, here, cluster)
        say(f"queue: {ROUNDS} rounds of {ARRAYS} arrays")
        found = measured("queue", sshd)
        beside = {"tool": "ssh HOST sbatch, over one connection that stays open (ControlMaster)", **found}
        yield Figure("scale.queue", found["ours_s"] / found["raw_s"], f"times {ARRAYS} sbatch", 1.5, beside)

        say(f"polls of {TRIALS:,} trials")
        with counted(here, cluster) as counting:
            found = measured("calls", counting)
            yield Figure("scale.calls_a_poll", found["calls"], "Slurm commands a poll", 1, found["names"])
            found = measured("shared", counting)
            yield Figure("scale.calls_shared", found.pop("calls"), "squeue a poll of 10 runs", 1, found)
        found = measured("polls", sshd)
        worst = max(found.values(), key=lambda each: float(each["login_ms"]))
        yield Figure("scale.poll_cpu", worst["login_ms"], "ms on the login node", MOST_CPU_MS, found)
        ours = max(float(each["poll_ms"]) for each in found.values())
        yield Figure("scale.poll_cpu_client", ours, "ms of the client, to ask", MOST_CPU_MS)
        ours = max(float(each["read_ms"]) for each in found.values())
        yield Figure("scale.read_cpu_client", ours, "ms of the client, to read and decide", MOST_CPU_MS)
        polls = _polls_an_hour()
        taken = polls * worst["login_ms"] + worst["idle_ms_an_hour"]
        told = {"polls": polls, "ms_a_poll": worst["login_ms"], "idle_ms_an_hour": worst["idle_ms_an_hour"]}
        yield Figure("scale.login_cpu", taken / 10 / HOUR, "% of a core over the first hour", 0.1, told)

        say(f"following {TRIALS:,} trials while {WATCHED_OVER} end")
        found = measured("memory", sshd)
        yield Figure("scale.watcher_memory", found.pop("grown"), "MiB over its start", 50, found)
        silent = found.pop("inodes")

        say(f"{THROTTLED} trials of a second, {PARALLELISM} at once")
        found = measured("throttle", sshd)
        inodes = found.pop("inodes")
        yield Figure("scale.max_running", found.pop("most"), "trials at once, by sacct", PARALLELISM, found)
        yield Figure("scale.inodes", inodes.pop("beyond"), "inodes a trial beyond its own", 2, inodes)
        told = {
            "own": "none: it is silent",
            "they_are": "trials/N, status/ARRAY_N, attempt-1.out, attempt-1.err, both empty",
        }
        yield Figure("scale.inodes_silent", silent, "inodes of a trial that writes nothing", None, told)

        say(f"collecting {TRIALS:,} results")
        found = _collected(here, cluster, sshd)
        told = {"tool": "tar | tar over such a connection", **found}
        yield Figure("scale.collect", found["ours_s"] / found["raw_s"], "times tar", 3, told)


def _polls_an_hour() -> int:
    """Count the polls of a run's first hour, by the default periods."""
    cluster, moment, polls = Cluster(name="default", workdir="/w"), 0.0, 0
    while moment < HOUR:
        polls += 1
        moment += min(max(cluster.poll_floor, moment / GROWTH), cluster.poll_ceiling)
    return polls


def make_repository(here: Place) -> None:
    """Make a repository with a config of 10,000 trials."""
    (here.project / CONFIG).write_text(json.dumps(_SWEEP))  # JSON is YAML
    here.run("git", "init", "--quiet")


def _measured(here: Place, cluster: SlurmRig, what: str, sshd: SshRig, *more: str) -> dict[str, Any]:
    """Return what `what` measures, in a process that speaks to the rig."""
    words: list[str | Path] = ["-m", "benchmarks.scale_inside", what, here.folder, sshd.folder, *more]
    answer: dict[str, Any] = here.python(*words, env=environment_on(here, cluster)).answer()
    return answer


def _collected(here: Place, cluster: SlurmRig, sshd: SshRig) -> dict[str, float]:
    """Return the medians of rounds of collecting and of tar, each the first thing that a process asks."""
    made = _measured(here, cluster, "over", sshd)
    _account(cluster, made["tokens"], made["arrays"])
    rounds = [_measured(here, cluster, "collect", sshd, made["mirror"]) for _ in range(4)][1:]
    return {name: statistics.median(float(each[name]) for each in rounds) for name in rounds[0]}


def _account(cluster: SlurmRig, tokens: Sequence[str], arrays: Sequence[int]) -> None:
    """Let accounting know arrays that have never run: copies of a job that has."""
    job = cluster.submit("--mem=100M", "--time=5", script="sleep 1")
    done = partial(cluster.run, ["sacct", "-nX", "-j", job, "-o", "State"])
    cluster.wait_until(lambda: done().stdout.strip() == "COMPLETED", 60.0, "a job has not ended")
    sql = partial(_sql, cluster)
    columns = sql("select column_name from information_schema.columns where table_name = 'rig_job_table'").split()
    # In one table with what it came from, its own key is its own.
    columns.remove("job_db_inx")
    for token, array in zip(tokens, arrays, strict=True):
        told = {
            "id_job": f"{array} + seq",
            "id_array_job": str(array),
            "id_array_task": "seq",
            "job_name": f"'{token}'",
        }
        values = ", ".join(told.get(name, f"`{name}`") for name in columns)
        source = f"rig_job_table cross join seq_0_to_{TRIALS // ARRAYS - 1}"
        into = ", ".join(f"`{name}`" for name in columns)
        sql(f"insert into rig_job_table ({into}) select {values} from {source} where id_job = {job}")


def _sql(cluster: SlurmRig, text: str) -> str:
    socket = cluster.folder / "mariadb" / "socket"
    argv = ["mariadb", "--no-defaults", "--user=root", f"--socket={socket}", "--batch", "--skip-column-names"]
    done = cluster.run([*argv, f"--execute={text}", "slurm_rig"])
    if done.returncode:
        raise BenchmarkError(f"the database of the rig refuses: {done.stderr}")
    return done.stdout

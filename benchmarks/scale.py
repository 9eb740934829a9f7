"""10,000 trials in ten arrays on the test rig's own Slurm, over SSH: queued, watched, throttled and collected.

`python -m benchmarks.scale WHAT FOLDER SSHD` is how this file calls itself, for a process that speaks to the rig.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import BenchmarkError, Figure, Place, alternated, place, say
from benchmarks.slurm import environment_on
from deployments.environment import SetupError
from nexa_infra.hosts import connections
from nexa_infra.hosts.login import connect
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations import steps
from nexa_infra.runs.index import run_at
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, write_submission
from nexa_infra.scheduling.counts import polls_of
from nexa_infra.scheduling.decide import decide
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.recorded import read_state
from nexa_infra.scheduling.slurm.text import read_accounting, task_indices
from nexa_infra.scheduling.vitals import MetricsWatch
from nexa_infra.scheduling.watch import GROWTH, follow
from nexa_infra.spec.cluster import Cluster, ClusterLimits
from nexa_infra.spec.run import SweepConfig
from tests.rig.daemons import descendants
from tests.rig.fixtures import why_not
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

ARRAYS = 10
TRIALS = 10_000
ROUNDS = 5
POLLS = 40
FOLLOWERS = 10
CONFIG = "scale.yaml"
CALLS = "calls"
IDLE = 10.0  # seconds
# What counts as the CPU of one poll: of the login node's processes, and of this one's.
MOST_CPU_MS = 50.0

# Held, so that nothing runs while something is measured.
_HELD = {"name": "scale", "time": "00:05:00", "memory": "100M", "extra": {"hold": True}}
_SWEEP = {
    "job": _HELD,
    "launcher": {"type": "command", "command": ["true"]},
    "sweep": {"parameters": {name: list(range(10)) for name in "abcd"}},
}
# Both streams and metrics.json are the trial's own; a second, so that sacct sees it run.
_SPEAKS = 'echo out; echo err >&2; echo "{\\"loss\\": 1}" >"$NEXA_METRICS"; sleep 1'
THROTTLED, THROTTLED_ARRAY, PARALLELISM = 300, 50, 12
# What a trial of `scale.watcher_memory` runs beside: the rig's nodes have 16 cores in all.
WATCHED, WATCHED_OVER, WATCHED_POLLS = 4, 300, 20
# Stands before squeue on the PATH of a login, and notes down that it was called.
_COUNTING = '#!/bin/sh\necho {name} >>{calls}\nexec {command} "$@"\n'
_COUNTED = ("sbatch", "scancel", "sacct", "sacctmgr", "scontrol", "sdiag", "sinfo", "squeue", "sstat")
_HOUR = 3600.0


def scale() -> Iterator[Figure]:
    """Queue, watch, throttle and collect 10,000 trials over SSH; each in a process of its own, beside the raw tool."""
    with place() as here, _rig(here) as (cluster, sshd):
        measured = partial(_measured, here, cluster)
        say(f"queue: {ROUNDS} rounds of {ARRAYS} arrays")
        found = measured("queue", sshd)
        beside = {"tool": "ssh HOST sbatch, over one connection that stays open (ControlMaster)", **found}
        yield Figure("scale.queue", found["ours_s"] / found["raw_s"], f"times {ARRAYS} sbatch", 1.5, beside)

        say(f"polls of {TRIALS:,} trials")
        with _counted(here, cluster) as counted:
            found = measured("calls", counted)
            yield Figure("scale.calls_a_poll", found["calls"], "Slurm commands a poll", 1, found["names"])
            found = measured("shared", counted)
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
        yield Figure("scale.login_cpu", taken / 10 / _HOUR, "% of a core over the first hour", 0.1, told)

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
    while moment < _HOUR:
        polls += 1
        moment += min(max(cluster.poll_floor, moment / GROWTH), cluster.poll_ceiling)
    return polls


@contextmanager
def _rig(here: Place) -> Iterator[tuple[SlurmRig, SshRig]]:
    """Start a Slurm that takes so many, and an sshd to its login node.

    Raises:
        BenchmarkError: there can be none here, or something does not start.
    """
    if reason := why_not():
        raise BenchmarkError(f"no Slurm to submit to: {reason}")
    (here.project / CONFIG).write_text(json.dumps(_SWEEP))  # JSON is YAML
    here.run("git", "init", "--quiet")
    here.folder.chmod(0o755)
    say("starting a Slurm and an sshd")
    try:
        # Whatever was cancelled in a round before is forgotten soon.
        settings = {"MaxJobCount": "100000", "MinJobAge": "10"}
        with SlurmRig(here.folder / "slurm", settings=settings) as cluster, _sshd(here, cluster, "sshd") as sshd:
            yield cluster, sshd
    except SetupError as error:
        raise BenchmarkError(str(error)) from error


def _sshd(here: Place, cluster: SlurmRig, name: str, **more: str) -> SshRig:
    environment = {"SLURM_CONF": str(cluster.conf), **more}
    return SshRig(here.folder / name, environment=environment, accounts=cluster.accounts)


@contextmanager
def _counted(here: Place, cluster: SlurmRig) -> Iterator[SshRig]:
    """Start an sshd whose sessions find Slurm's commands behind scripts that note down every call."""
    folder, calls = here.folder / "counting", here.folder / CALLS
    folder.mkdir()
    path = cluster.environment()["PATH"]
    for name in _COUNTED:
        if command := shutil.which(name, path=path):
            (folder / name).write_text(_COUNTING.format(name=name, calls=calls, command=command))
            (folder / name).chmod(0o755)
    with _sshd(here, cluster, "sshd-counted", PATH=f"{folder}:{path}") as sshd:
        yield sshd


def _measured(here: Place, cluster: SlurmRig, what: str, sshd: SshRig, *more: str) -> dict[str, Any]:
    """Return what `what` measures, in a process that speaks to the rig."""
    words: list[str | Path] = ["-m", "benchmarks.scale", what, here.folder, sshd.folder, *more]
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


# -- in a process of its own


class _Raw:
    """Commands over a connection that is open, each in a session of its own, as any SSH client has them."""

    def __init__(self, host: SshHost) -> None:
        self._connection, self._transport = connect(host.login)

    def run(self, command: str, sink: Any = None) -> bytes:
        """Return what a command printed, or give it to a sink."""
        channel = self._transport.open_session()
        channel.exec_command(command)
        told = bytearray()
        while piece := channel.recv(1 << 17):
            if sink is None:
                told += piece
            else:
                sink.write(piece)
        if code := channel.recv_exit_status():
            raise SystemExit(f"`{command}` ended with exit code {code}: {channel.recv_stderr(2000)!r}")
        return bytes(told)


class _Site:
    """The rig as a cluster, its open connection, and its raw tools."""

    def __init__(self, folder: Path, sshd: Path, **more: Any) -> None:
        self.folder = folder
        self.sshd = SshRig(sshd)
        self.cluster = Cluster(
            name="rig",
            host=self.sshd.host,
            port=self.sshd.port,
            user="root",
            key_file=str(self.sshd.key),
            known_hosts=str(self.sshd.known_hosts),
            workdir=str(folder / "far"),
            **more,
        )

    @property
    def host(self) -> SshHost:
        """The open connection."""
        host = connections.host_of(self.cluster)
        if not isinstance(host, SshHost):
            raise SystemExit(f"{host.name} is reached without SSH")
        return host

    def rendered(self, changes: Mapping[str, object] | None = None) -> Run:
        """Take the road up to the run directory there."""
        overrides = [f"{name}={json.dumps(value)}" for name, value in (changes or {}).items()]
        run = steps.plan(CONFIG, cluster=self.cluster, overrides=overrides)
        steps.admit(run, steps.estimate_cost(run))
        return steps.render(steps.sync(run))

    def cpu(self) -> float:
        """Return the seconds that the login node's processes have taken: its sshd, and all that came of it."""
        if (main := self.sshd.sshd.process) is None:
            raise SystemExit("the sshd has ended")
        return sum(map(_taken, [main.pid, *(each.pid for each in descendants(main))])) / os.sysconf("SC_CLK_TCK")


def _taken(process: int) -> int:
    """Return the ticks of a process, and of its children that have ended."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, words[11:15]))


def _sbatch(run: Run, chunk: int, token: str = "scale") -> list[str]:
    """Return the command by which a person queues one of the arrays of a run."""
    log = f"{run.directory}/job.log"
    return ["sbatch", "--parsable", f"--job-name={token}", f"--array=0-{TRIALS // ARRAYS - 1}", f"--output={log}",
            f"--error={log}", "--open-mode=append", f"{run.directory}/job.sbatch", str(chunk), str(ARRAYS)]  # fmt: skip


def _cancel_all() -> None:
    subprocess.run(["scancel", "--user=root"], stdin=subprocess.DEVNULL, check=True)


def _queued() -> int:
    """Count the arrays that wait."""
    squeue = ["squeue", "-h", "-t", "PENDING", "-o", "%F"]
    done = subprocess.run(squeue, stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True)
    return len(set(done.stdout.split()))


@contextmanager
def _shared_ssh(site: _Site) -> Iterator[list[str]]:
    """Open a connection for all the `ssh` that are begun while it lasts; yield their command, which lacks its words."""
    control = site.folder / "control"
    options = ["-o", "BatchMode=yes", "-o", f"ControlPath={control}", "-o", "ControlMaster=auto"]
    command = site.sshd.command(options=[*options, "-o", "ControlPersist=yes"])
    run = partial(subprocess.run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run([*command, "true"], check=True)
    try:
        yield command
    finally:
        run([*command, "-O", "exit"], check=False)


def _queue(site: _Site) -> dict[str, float]:
    """Queue ten arrays by the step, by `ssh HOST sbatch` over a connection that is shared, and by less than that."""
    runs: list[Run] = [site.rendered()]
    raw = _Raw(site.host)

    def checked(seconds: float) -> float:
        if (found := _queued()) != ARRAYS:
            raise SystemExit(f"not {ARRAYS} arrays are queued, but {found}")
        _cancel_all()
        return seconds

    def ours() -> float:
        runs.append(site.rendered())
        begun = time.perf_counter()
        steps.submit(runs[-1])
        return checked(time.perf_counter() - begun)

    def by(call: Callable[[list[str]], object]) -> float:
        begun = time.perf_counter()
        for chunk in range(ARRAYS):
            call(_sbatch(runs[0], chunk))
        return checked(time.perf_counter() - begun)

    with _shared_ssh(site) as ssh:
        run = partial(subprocess.run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        found = alternated(
            ROUNDS,
            ours,
            lambda: by(lambda words: run([*ssh, shlex.join(words)])),
            lambda: by(lambda words: raw.run(shlex.join(words))),
        )
    return dict(zip(("ours_s", "raw_s", "raw_sessions_in_process_s"), found, strict=True))


def _calls(site: _Site) -> dict[str, Any]:
    """Count Slurm's commands in polls of 10,000 waiting trials, and in what is read besides."""
    run = site.rendered()
    steps.submit(run)
    calls = site.folder / CALLS
    if not calls.read_text():
        raise SystemExit("Slurm's commands were not counted: the sessions there have another PATH than their sshd's")
    calls.write_text("")
    scheduler, metrics = steps.scheduler_of(run), MetricsWatch(run)
    for _ in range(WATCHED_POLLS):
        queue = scheduler.poll(run, fresh=True)  # as a poll asks that comes a period after the last
        if queue.pending != TRIALS:
            raise SystemExit(f"run {run.id} is not queued any more")
        read_state(run, policy_of(run), scheduler, queue, metrics)
    names = calls.read_text().split()
    _cancel_all()
    return {"calls": len(names) / WATCHED_POLLS, "names": dict(Counter(names))}


def _shared(site: _Site) -> dict[str, Any]:
    """Follow ten runs at once, begun at moments spread over a period, and count squeue's calls a poll."""
    runs = [site.rendered({"sweep.parameters.a": [number]}) for number in range(FOLLOWERS)]
    for run in runs:
        steps.submit(run)
    calls = site.folder / CALLS
    calls.write_text("")
    asyncio.run(_follow_all(site, runs))
    names = Counter(calls.read_text().split())
    told = [polls_of(run) for run in runs]
    polls = sum(each.calls["polls"] for each in told if each)
    noted = sum(each.calls.get("squeue", 0) for each in told if each)
    _cancel_all()
    return {"calls": names["squeue"] / polls, "polls": polls, "squeue": names["squeue"], "squeue_in_reports": noted}


async def _follow_all(site: _Site, runs: Sequence[Run]) -> None:
    period = site.cluster.poll_floor

    async def one(number: int, run: Run) -> None:
        await asyncio.sleep(number * period / len(runs))
        polls = follow(run, steps.scheduler_of(run), period=period)
        with_limit = asyncio.timeout(WATCHED_POLLS * period)
        try:
            async with with_limit, aclosing(polls):
                async for _ in polls:
                    pass
        except TimeoutError:
            return

    await asyncio.gather(*(one(number, run) for number, run in enumerate(runs)))


def _polls(site: _Site) -> dict[str, Any]:
    """Measure the CPU of polls: all 10,000 waiting, and half of them over."""
    waiting = site.rendered()
    steps.submit(waiting)
    found = {"all_wait": _cpu_of_polls(site, waiting, pending=TRIALS)}
    _cancel_all()
    half = site.rendered()
    _make_over(half, range(ARRAYS // 2), old=True)
    for chunk in range(ARRAYS // 2, ARRAYS):
        job = site.host.run(_sbatch(half, chunk, f"nexa-{half.id}-{chunk + 1}")).stdout.strip()
        _record(half, chunk, job)
    found["half_over"] = _cpu_of_polls(site, half, pending=TRIALS // 2)
    _cancel_all()
    return found


def _cpu_of_polls(site: _Site, run: Run, *, pending: int) -> dict[str, Any]:
    scheduler, metrics = steps.scheduler_of(run), MetricsWatch(run)
    for _ in range(3):  # the first one brings everything
        queue = scheduler.poll(run)
        decide(read_state(run, policy_of(run), scheduler, queue, metrics), time.time())
    if queue.pending != pending:
        raise SystemExit(f"{queue.pending} trials of run {run.id} wait, not {pending}")
    far, own, reading = site.cpu(), time.process_time(), 0.0
    for _ in range(POLLS):
        queue = scheduler.poll(run, fresh=True)
        begun = time.process_time()
        decide(read_state(run, policy_of(run), scheduler, queue, metrics), time.time())
        reading += time.process_time() - begun
    far, own = site.cpu() - far, time.process_time() - own
    idle = site.cpu()
    time.sleep(IDLE)
    idle = site.cpu() - idle
    each = 1000 / POLLS
    return {
        "login_ms": far * each,
        "poll_ms": (own - reading) * each,
        "read_ms": reading * each,
        "idle_ms_an_hour": idle * 1000 * _HOUR / IDLE,
    }


def _make_over(run: Run, chunks: Sequence[int], *, old: bool) -> None:
    """Write what the trials of some arrays leave, without running them: on a small machine that takes half an hour."""
    far, moment = Path(run.directory), time.time() - 7200
    for chunk in chunks:
        array = _array(chunk)
        _record(run, chunk, str(array))
        for task in range(TRIALS // ARRAYS):
            trial = task * ARRAYS + chunk
            begun, ended = f"{moment + task:.6f}", f"{moment + task + 1.5:.6f}"
            status = far / "status" / f"{array}_{task}"
            status.write_text(
                f"start\t{trial}\t1\t{begun}\tn1\t0\ncode\t{trial}\t1\t0\nend\t{trial}\t1\t{ended}\t0\t\n"
            )
            folder = far / "trials" / str(trial)
            folder.mkdir()
            (folder / "attempt-1.out").touch()
            (folder / "attempt-1.err").touch()
            metrics = {"loss": 1 / (1 + trial), "accuracy": 0.5 + trial / 30_000, "epochs": 12, "seconds": 1.25}
            (folder / "metrics.json").write_text(json.dumps(metrics))
            if old and task % 50:  # the others have ended lately, as a poll sees it
                os.utime(status, (moment, moment))


def _array(chunk: int) -> int:
    """Return an id far from those that the rig gives."""
    return 5_000_000 + 10_000 * chunk


def _record(run: Run, chunk: int, job: str) -> None:
    size = TRIALS // ARRAYS
    submission = Submission(
        number=chunk + 1,
        token=f"nexa-{run.id}-{chunk + 1}",
        trials=size,
        array=f"0-{size - 1}",
        chunk=chunk,
        chunks=ARRAYS,
        alone=not chunk,
        created_at=datetime.now(UTC),
        job_id=job,
    )
    write_submission(run.files, submission)
    shutil.copy(run.files.submission(submission.number), Path(run.directory) / "submissions")


def _memory(site: _Site) -> dict[str, Any]:
    """Queue trials of `true` that run, and follow them in a process that does nothing else."""
    run = site.rendered({"job.extra": {}, "job.array_parallelism": WATCHED})
    steps.submit(run)
    words = (sys.executable, "-m", "benchmarks.scale", "watch", site.folder, site.sshd.folder, run.files.path)
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    _cancel_all()
    found: dict[str, Any] = json.loads(done.stdout)
    far = Path(run.directory)
    # By its own log: whoever had just been cancelled may not have one yet.
    spoken = [folder for folder in (far / "trials").iterdir() if (folder / "attempt-1.err").exists()]
    trials = sum(1 for folder in spoken for _ in (folder, *folder.iterdir()))
    return {**found, "inodes": trials / len(spoken) + 1}  # and its status file


def _watch(run: Run) -> dict[str, Any]:
    """Follow a run until many of its trials are over; return what its memory grew by, MiB."""
    scheduler = steps.scheduler_of(run)
    steps.scheduler_of(run).counts(run)
    connections.host_of(run.cluster).run(["true"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is of what comes now
    begun, own = _memory_of("VmRSS"), time.process_time()
    told: list[float] = []
    over = 0

    async def watching() -> None:
        nonlocal over
        async with aclosing(follow(run, scheduler, period=1.0)) as polls:
            async for poll in polls:
                told.append(_memory_of("VmRSS"))
                over = poll.over
                if over >= WATCHED_OVER and len(told) >= WATCHED_POLLS:
                    return

    asyncio.run(watching())
    calls = polls_of(run)
    polls = calls.calls["polls"] if calls else len(told)
    return {
        "grown": _memory_of("VmHWM") - begun,
        "start_mib": begun,
        "last_mib": told[-1],
        "after_5_polls_mib": told[4],
        "polls": polls,
        "over": over,
        "sacct": calls.calls.get("sacct", 0) if calls else 0,
        "cpu_ms_a_poll": (time.process_time() - own) * 1000 / polls,
    }


def _memory_of(name: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def _inodes(far: Path) -> int:
    """Count what belongs to trials in a run directory."""
    return sum(1 for name in ("status", "trials") for _ in (far / name).rglob("*"))


def _throttle(site: _Site) -> dict[str, Any]:
    """Run trials in several arrays to their end, and return how many ran at once, by sacct."""
    config = site.folder / "throttled.json"
    sweep = {
        "job": {**_HELD, "extra": {}, "array_parallelism": PARALLELISM},
        "launcher": {"type": "command", "command": ["sh", "-c", _SPEAKS]},
        "sweep": {"parameters": {"n": list(range(THROTTLED))}},
    }
    config.write_text(json.dumps(sweep))
    run = steps.plan(SweepConfig.model_validate(sweep), cluster=site.cluster)
    run = steps.render(steps.sync(run))
    far = Path(run.directory)
    before = _inodes(far)
    begun = time.monotonic()
    steps.submit(run)

    async def watching() -> None:
        async with aclosing(steps.watch(run)) as polls:
            async for _ in polls:
                pass

    asyncio.run(watching())
    taken = time.monotonic() - begun
    trials = steps.collect(run)
    if any(trial.state != "completed" for trial in trials):
        raise SystemExit(f"not all trials of run {run.id} have completed: {Counter(trial.state for trial in trials)}")
    rows = read_accounting(run.files.accounting.read_text())
    by_sacct = [(float(row.started), float(row.ended)) for row in rows]
    own = [(each.started, each.ended or each.started) for trial in trials for each in trial.attempts]
    fixed = {"inodes": _inodes(far) - before, "written": sum(1 for _ in (far / "trials").rglob("*/*"))}
    counted = {
        "beyond": (fixed["inodes"] - fixed["written"]) / THROTTLED,
        "trials": THROTTLED,
        "in_all": fixed["inodes"] / THROTTLED,
        "its_own": "attempt-1.out, attempt-1.err, metrics.json",
        "beyond_are": "trials/N, status/ARRAY_N",
        "an_array_besides": sum(1 for name in ("submissions", "claims") for _ in (far / name).iterdir())
        / len({row.array_id for row in rows}),
    }
    return {
        "most": _most(by_sacct),
        "by_its_own_lines": _most(own),
        "array_parallelism": PARALLELISM,
        "arrays": len({row.array_id for row in rows}),
        "tasks": sum(len(task_indices(row.tasks)) for row in rows),
        "s": taken,
        "inodes": counted,
    }


def _most(spans: Sequence[tuple[float, float]]) -> int:
    """Return how many half-open intervals overlap at most."""
    changes = sorted([(begun, 1) for begun, _ in spans] + [(ended, -1) for _, ended in spans])
    most = now = 0
    for _, change in changes:  # at one moment, ends come first
        now += change
        most = max(most, now)
    return most


def _over(site: _Site) -> dict[str, Any]:
    """Make a run whose 10,000 trials have ended; nothing of it is in this client's copy."""
    run = site.rendered()
    _make_over(run, range(ARRAYS), old=False)
    tokens = [f"nexa-{run.id}-{chunk + 1}" for chunk in range(ARRAYS)]
    return {"mirror": str(run.files.path), "tokens": tokens, "arrays": [_array(chunk) for chunk in range(ARRAYS)]}


def _collect(site: _Site, run: Run) -> dict[str, float]:
    """Collect, and fetch the same files by tar, in turns of which the first is nobody's."""
    site.host.run(["true"])
    raw = _Raw(site.host)
    # Each time another folder: removing so many files keeps a disk busy for a while.
    target = site.folder / f"untarred-{os.getpid()}"
    target.mkdir()
    find = f"cd {shlex.quote(run.directory)} && find status submissions trials -type f ! -name 'attempt-*' -print0"
    begun = time.perf_counter()
    with subprocess.Popen(["tar", "-xf", "-", "-C", str(target)], stdin=subprocess.PIPE) as tar:
        raw.run(f"{find} | tar -cf - --null -T -", tar.stdin)
    plain = time.perf_counter() - begun
    begun = time.perf_counter()
    trials = steps.collect(run)
    ours = time.perf_counter() - begun
    if any(trial.state != "completed" or not trial.metrics for trial in trials):
        raise SystemExit(f"run {run.id} was not collected whole")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    accounted = len(read_accounting(run.files.accounting.read_text()))
    files = sum(1 for each in target.rglob("*") if each.is_file())
    return {"ours_s": ours, "raw_s": plain, "files": files, "accounted": accounted, "peak_mib": peak}


def main() -> None:
    """Measure what the arguments say, in the folder that they name; the answer is the last line."""
    what, folder, sshd, *more = sys.argv[1:] if len(sys.argv) > 3 else ("", "", "")
    place, server = Path(folder), Path(sshd)
    answer: object
    match what, more:
        case "queue", []:
            answer = _queue(_Site(place, server))
        case "calls", []:
            answer = _calls(_Site(place, server))
        case "shared", []:
            answer = _shared(_Site(place, server, poll_floor=2.0))
        case "polls", []:
            answer = _polls(_Site(place, server))
        case "memory", []:
            answer = _memory(_Site(place, server, poll_floor=1.0, poll_ceiling=1.0))
        case "watch", [mirror]:
            answer = _watch(run_at(Path(mirror)))
        case "throttle", []:
            limits = ClusterLimits(max_array_size=THROTTLED_ARRAY)
            answer = _throttle(_Site(place, server, limits=limits, poll_floor=1.0, poll_ceiling=1.0))
        case "over", []:
            answer = _over(_Site(place, server))
        case "collect", [mirror]:
            copy = Path(mirror).with_name(f"{Path(mirror).name}-{os.getpid()}")
            shutil.copytree(mirror, copy, symlinks=True)
            answer = _collect(_Site(place, server), run_at(copy))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

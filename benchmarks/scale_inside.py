"""What a process that speaks to the rig measures: python -m benchmarks.scale_inside WHAT FOLDER SSHD [MIRROR]."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import alternated
from benchmarks.rig import cancel_all, forget_calls
from benchmarks.scale_site import (
    ARRAYS,
    HELD,
    HOUR,
    PARALLELISM,
    ROUNDS,
    THROTTLED,
    TRIALS,
    WATCHED_OVER,
    Raw,
    Site,
    array_of,
    make_over,
    queued,
    record,
    sbatch,
    shared_ssh,
)
from nexa_infra.hosts import connections
from nexa_infra.operations import steps
from nexa_infra.runs.index import run_at
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.counts import polls_of
from nexa_infra.scheduling.decide import decide
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.recorded import read_state
from nexa_infra.scheduling.slurm.text import read_accounting, task_indices
from nexa_infra.scheduling.vitals import MetricsWatch
from nexa_infra.scheduling.watch import follow
from nexa_infra.spec.cluster import ClusterLimits
from nexa_infra.spec.run import SweepConfig

POLLS = 40
FOLLOWERS = 10
IDLE = 10.0  # seconds
THROTTLED_ARRAY = 50
# What a trial of `scale.watcher_memory` runs beside: the rig's nodes have 16 cores in all.
WATCHED, WATCHED_POLLS = 4, 20
# Both streams and metrics.json are the trial's own; a second, so that sacct sees it run.
_SPEAKS = 'echo out; echo err >&2; echo "{\\"loss\\": 1}" >"$NEXA_METRICS"; sleep 1'


def _queue(site: Site) -> dict[str, float]:
    """Queue ten arrays by the step, by `ssh HOST sbatch` over a connection that is shared, and by less than that."""
    runs: list[Run] = [site.rendered()]
    raw = Raw(site.host)

    def checked(seconds: float) -> float:
        if (found := queued()) != ARRAYS:
            raise SystemExit(f"not {ARRAYS} arrays are queued, but {found}")
        cancel_all()
        return seconds

    def ours() -> float:
        runs.append(site.rendered())
        begun = time.perf_counter()
        steps.submit(runs[-1])
        return checked(time.perf_counter() - begun)

    def by(call: Callable[[list[str]], object]) -> float:
        begun = time.perf_counter()
        for chunk in range(ARRAYS):
            call(sbatch(runs[0], chunk))
        return checked(time.perf_counter() - begun)

    with shared_ssh(site) as ssh:
        run = partial(subprocess.run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        found = alternated(
            ROUNDS,
            ours,
            lambda: by(lambda words: run([*ssh, shlex.join(words)])),
            lambda: by(lambda words: raw.run(shlex.join(words))),
        )
    return dict(zip(("ours_s", "raw_s", "raw_sessions_in_process_s"), found, strict=True))


def _calls(site: Site) -> dict[str, Any]:
    """Count Slurm's commands in polls of 10,000 waiting trials, and in what is read besides."""
    run = site.rendered()
    steps.submit(run)
    calls = forget_calls(site.folder)
    scheduler, metrics = steps.scheduler_of(run), MetricsWatch(run)
    for _ in range(WATCHED_POLLS):
        queue = scheduler.poll(run, fresh=True)  # as a poll asks that comes a period after the last
        if queue.pending != TRIALS:
            raise SystemExit(f"run {run.id} is not queued any more")
        read_state(run, policy_of(run), scheduler, queue, metrics)
    names = calls.read_text().split()
    cancel_all()
    return {"calls": len(names) / WATCHED_POLLS, "names": dict(Counter(names))}


def _shared(site: Site) -> dict[str, Any]:
    """Follow ten runs at once, begun at moments spread over a period, and count squeue's calls a poll."""
    runs = [site.rendered({"sweep.parameters.a": [number]}) for number in range(FOLLOWERS)]
    for run in runs:
        steps.submit(run)
    calls = forget_calls(site.folder)
    asyncio.run(_follow_all(site, runs))
    names = Counter(calls.read_text().split())
    told = [polls_of(run) for run in runs]
    polls = sum(each.calls["polls"] for each in told if each)
    noted = sum(each.calls.get("squeue", 0) for each in told if each)
    cancel_all()
    return {"calls": names["squeue"] / polls, "polls": polls, "squeue": names["squeue"], "squeue_in_reports": noted}


async def _follow_all(site: Site, runs: Sequence[Run]) -> None:
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


def _polls(site: Site) -> dict[str, Any]:
    """Measure the CPU of polls: all 10,000 waiting, and half of them over."""
    waiting = site.rendered()
    steps.submit(waiting)
    found = {"all_wait": _cpu_of_polls(site, waiting, pending=TRIALS)}
    cancel_all()
    half = site.rendered()
    make_over(half, range(ARRAYS // 2), old=True)
    for chunk in range(ARRAYS // 2, ARRAYS):
        job = site.host.run(sbatch(half, chunk, f"nexa-{half.id}-{chunk + 1}")).stdout.strip()
        record(half, chunk, job)
    found["half_over"] = _cpu_of_polls(site, half, pending=TRIALS // 2)
    cancel_all()
    return found


def _cpu_of_polls(site: Site, run: Run, *, pending: int) -> dict[str, Any]:
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
        "idle_ms_an_hour": idle * 1000 * HOUR / IDLE,
    }


def _memory(site: Site) -> dict[str, Any]:
    """Queue trials of `true` that run, and follow them in a process that does nothing else."""
    run = site.rendered({"job.extra": {}, "job.array_parallelism": WATCHED})
    steps.submit(run)
    words = (sys.executable, "-m", "benchmarks.scale_inside", "watch", site.folder, site.sshd.folder, run.files.path)
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    cancel_all()
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


def _throttle(site: Site) -> dict[str, Any]:
    """Run trials in several arrays to their end, and return how many ran at once, by sacct."""
    config = site.folder / "throttled.json"
    sweep = {
        "job": {**HELD, "extra": {}, "array_parallelism": PARALLELISM},
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


def _over(site: Site) -> dict[str, Any]:
    """Make a run whose 10,000 trials have ended; nothing of it is in this client's copy."""
    run = site.rendered()
    make_over(run, range(ARRAYS), old=False)
    tokens = [f"nexa-{run.id}-{chunk + 1}" for chunk in range(ARRAYS)]
    return {"mirror": str(run.files.path), "tokens": tokens, "arrays": [array_of(chunk) for chunk in range(ARRAYS)]}


def _collect(site: Site, run: Run) -> dict[str, float]:
    """Collect, and fetch the same files by tar, in turns of which the first is nobody's."""
    site.host.run(["true"])
    raw = Raw(site.host)
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
            answer = _queue(Site(place, server))
        case "calls", []:
            answer = _calls(Site(place, server))
        case "shared", []:
            answer = _shared(Site(place, server, poll_floor=2.0))
        case "polls", []:
            answer = _polls(Site(place, server))
        case "memory", []:
            answer = _memory(Site(place, server, poll_floor=1.0, poll_ceiling=1.0))
        case "watch", [mirror]:
            answer = _watch(run_at(Path(mirror)))
        case "throttle", []:
            limits = ClusterLimits(max_array_size=THROTTLED_ARRAY)
            answer = _throttle(Site(place, server, limits=limits, poll_floor=1.0, poll_ceiling=1.0))
        case "over", []:
            answer = _over(Site(place, server))
        case "collect", [mirror]:
            copy = Path(mirror).with_name(f"{Path(mirror).name}-{os.getpid()}")
            shutil.copytree(mirror, copy, symlinks=True)
            answer = _collect(Site(place, server), run_at(copy))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

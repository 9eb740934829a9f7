"""A bad night of Slurm, disks and nodes: no trial is lost, none runs twice, nothing is left behind.

`make chaos` runs all of it; without, some cases are left out and the others are short.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nexa_infra.runs.record import Run
from tests.chaos.bad_night import PATIENCE, TRIALS, begun, finish, prepared, tally
from tests.chaos.tally import FULL, Tally, only_in_full, starts
from tests.chaos.test_submission import Site, resume, site, submit, there, wait
from tests.rig.slurm import SlurmRig

__all__ = ["site", "tally"]

# ---- Slurm's own bad days ----


def test_slurmctld_stopped(site: Site, tally: Tally, capfd: pytest.CaptureFixture[str]) -> None:
    seconds = 60.0 if FULL else 5.0
    going = prepared(site, tally, "job.array_parallelism=5")
    asked = [prepared(site, tally, over_ssh=far, snapshot=going) for far in ((False, True) if FULL else (True,))]
    followed = site.client(resume, going)
    wait(begun(tally, going, 3))
    site.slurm.stop_controller()
    clients = [site.client(resume, run) for run in asked]
    wait(lambda: all(there(run, "submissions/1.json").exists() for run in asked))
    time.sleep(seconds)
    site.slurm.start_controller()
    assert {each.wait(PATIENCE) for each in (followed, *clients)} == {"done"}
    for run in (going, *asked):
        tally.add(site.slurm, run)
    tally.notes.append(f"stopped for {seconds:.0f} s, one run under way, {len(asked)} being submitted")
    tally.close(capfd)


def restart_empty(slurm: SlurmRig) -> None:
    """Start a controller that was killed before it had saved anything of its jobs."""
    for path in slurm.folder.rglob("job_state*"):
        path.unlink()
    with slurm.conf.open("a") as conf:  # until the rig writes it anew: no id is given twice
        conf.write(f"FirstJobId={100_000 + int(time.time()) % 1_000_000 * 10}\n")
    slurm.start_controller()


@pytest.mark.parametrize(
    "heard", [True, False] if FULL else [False], ids=lambda heard: f"its id {'heard' if heard else 'unheard'}"
)
def test_slurmctld_killed_after_accepting_and_restarted_empty_of_the_job(
    site: Site, tally: Tally, heard: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    run = prepared(site, tally, "job.extra.hold=true", work="true", over_ssh=heard)
    mute = there(run, "mute")
    if not heard:
        mute.touch()
    client = site.client(submit, run)
    wait(lambda: site.queued(run))
    first = site.queued(run)
    if heard:
        assert client.wait() == "done"
    site.slurm.kill_controller()
    if not heard:
        client.kill()
    tally.killed["after" if there(run, "submissions/1.answer").exists() else "between"] += 1
    restart_empty(site.slurm)
    mute.unlink(missing_ok=True)
    assert not site.queued(run)
    follower = site.client(resume, run)
    wait(lambda: site.queued(run), 60.0)
    second = site.queued(run)
    assert len(second) == 1 and second != first
    site.slurm.run(["scontrol", "release", *second])
    assert follower.wait(PATIENCE) == "done"
    tally.add(site.slurm, run)
    tally.notes.append(f"array {first} was accepted and forgotten, {second} ran")
    tally.close(capfd)


@only_in_full
def test_slurmdbd_stopped_throughout(site: Site, tally: Tally, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [prepared(site, tally)]
    runs.append(prepared(site, tally, over_ssh=True, snapshot=runs[0]))
    site.slurm.stop_dbd()
    clients = [site.client(resume, run) for run in runs]
    assert [client.wait(PATIENCE) for client in clients] == ["done", "done"]
    reports = [json.loads(run.files.report_json.read_bytes()) for run in runs]
    site.slurm.start_dbd()
    for run in runs:
        tally.add(site.slurm, run)
    assert not any(report["accounted"] for report in reports)
    tally.close(capfd)


# ---- disks ----


@contextmanager
def small_disk(site: Site, options: str) -> Iterator[Path]:
    """A file system of its own for the workdir, which the nodes see too."""
    workdir = Path(site.cluster(over_ssh=False).workdir)
    workdir.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "nexa-small", str(workdir)], check=True)
    try:
        restart_nodes(site.slurm)
        yield workdir
    finally:
        site.slurm.run(["scancel", "--me"])
        subprocess.run(["umount", "-l", str(workdir)], check=False)
        restart_nodes(site.slurm)


def restart_nodes(slurm: SlurmRig) -> None:
    """Nodes are in mount namespaces of their own, made when they start."""
    for name in ("n1", "n2"):
        slurm.node(name).stop()
        slurm.node_up(name)


def fill(workdir: Path, what: str) -> Callable[[], None]:
    """Leave no room on a small disk; return what makes room again."""
    ballast = workdir / "ballast"
    ballast.mkdir()
    with suppress(OSError):
        if what == "disk":
            with (ballast / "one").open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
        for number in range(100_000):
            (ballast / str(number)).touch()

    def free() -> None:
        for path in ballast.iterdir():
            path.unlink()
        ballast.rmdir()

    return free


DISKS = {"disk full": ("disk", "size=6M"), "inode quota met": ("inodes", "size=64M,nr_inodes=1200")}


@pytest.mark.parametrize("end", DISKS if FULL else ["inode quota met"])
def test_under_the_run_directory(site: Site, tally: Tally, end: str, capfd: pytest.CaptureFixture[str]) -> None:
    what, options = DISKS[end]
    # A trial whose result finds no room has not come to its end.
    work = 'sleep 1; echo "{\\"n\\": $NEXA_TRIAL}" >$NEXA_METRICS'
    with small_disk(site, options) as workdir:
        run = prepared(site, tally, "job.array_parallelism=4", work=work)
        free = fill(workdir, what)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (workdir / "one more").write_bytes(bytes(4096))
        told = site.client(resume, run).wait(PATIENCE)
        assert told != "done"
        tally.notes.append(f"before: {told[:160]}")
        free()
        client = site.client(resume, run)
        wait(begun(tally, run, 5), 60.0)
        free = fill(workdir, what)
        time.sleep(3.0 if FULL else 1.5)
        free()
        told = client.wait(PATIENCE)
        tally.notes.append(f"meanwhile: {told[:160]}")
        if told != "done":
            finish(site, run)
        tally.add(site.slurm, run)
        tally.close(capfd)


# ---- trials that are broken off ----


def running(site: Site, run: Run, node: str) -> int:
    """How many tasks of a run are on a node."""
    told = site.slurm.run(["squeue", "-h", "-r", "-t", "running", "-w", node, "-o", "%j"]).stdout
    return sum(line.startswith(f"nexa-{run.id}-") for line in told.splitlines())


# Slurm starts them again itself, or we do.
BY_SLURM: tuple[str, ...] = ()
BY_US = ("job.extra.no-requeue=true", "retry.times=1")


LONG = "sleep 4" if FULL else "sleep 2"
WAYS = {"requeued by Slurm": BY_SLURM, "retried by us": BY_US}


@pytest.mark.parametrize("way", WAYS if FULL else ["retried by us"])
def test_a_node_down_in_mid_trial(site: Site, tally: Tally, way: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = WAYS[way]
    run = prepared(site, tally, *options, work=LONG, over_ssh=not options)
    client = site.client(resume, run)
    wait(begun(tally, run, 6), 60.0)
    node = max(("n1", "n2"), key=lambda name: running(site, run, name))
    broken = running(site, run, node)
    site.slurm.node_down(node)
    time.sleep(1.0)
    site.slurm.node_up(node)
    assert client.wait(PATIENCE) == "done"
    tally.add(site.slurm, run)
    tally.notes.append(f"{node} went down with {broken} trials")
    tally.close(capfd)
    assert len(starts(tally.words, run)) > run.trials


@only_in_full
@pytest.mark.parametrize("way", WAYS)
def test_preemption_by_a_higher_partition(
    site: Site, tally: Tally, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = WAYS[way]
    run = prepared(site, tally, *options, "job.partition=spare", "job.nodelist=n2", work=LONG, over_ssh=not options)
    client = site.client(resume, run)
    wait(begun(tally, run, 6), 60.0)
    high = site.slurm.submit("--partition=high", "--nodelist=n2", "--cpus-per-task=6", "--mem=100M", script="sleep 1")
    wait(lambda: "PENDING" not in site.slurm.states(high), 60.0)
    assert client.wait(PATIENCE) == "done"
    tally.add(site.slurm, run)
    tally.notes.append(f"starts {len(starts(tally.words, run))}")
    tally.close(capfd)
    assert len(starts(tally.words, run)) > run.trials


@pytest.mark.parametrize(
    "by_itself", [True, False] if FULL else [True], ids=lambda by: "by its own script" if by else "by hand"
)
def test_the_last_array_task_requeued(
    site: Site, tally: Tally, by_itself: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["checkpoint.requeue=1"] if by_itself else []
    # The first time the last one would run for ever, and the others outlast what befalls it.
    work = f"if [ $NEXA_TRIAL$NEXA_ATTEMPT = {TRIALS - 1}1 ]; then sleep 200; else sleep 3; fi"
    run = prepared(site, tally, *options, work=work)
    client = site.client(resume, run)
    last = f"_{TRIALS - 1}"
    wait(lambda: any(each.task.endswith(last) for each in starts(tally.words, run)), 90.0)
    [array] = site.queued(run)
    if by_itself:
        site.slurm.run(["scancel", "--batch", f"--signal={run.config.job.warning_signal}", f"{array}{last}"])
    else:
        site.slurm.run(["scontrol", "requeue", f"{array}{last}"])
    assert client.wait(PATIENCE) == "done"
    tally.add(site.slurm, run)
    broken = [each for each in starts(tally.words, run) if each.attempt > 1]
    tally.notes.append(f"started again: {[each.task for each in broken]}")
    tally.close(capfd)
    assert [each.trial for each in broken] == [TRIALS - 1]

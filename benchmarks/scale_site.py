"""What the measurements at 10,000 trials share: the rig as they see it, the raw tools, and runs that have ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rig import cluster_of, host_of
from nexa_infra.hosts.login import connect
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, write_submission
from tests.rig.daemons import descendants
from tests.rig.ssh import SshRig

ARRAYS = 10
TRIALS = 10_000
ROUNDS = 5
CONFIG = "scale.yaml"
THROTTLED, PARALLELISM = 300, 12
WATCHED_OVER = 300  # trials that are over when `scale.watcher_memory` has seen enough
HOUR = 3600.0

# Held, so that nothing runs while something is measured.
HELD = {"name": "scale", "time": "00:05:00", "memory": "100M", "extra": {"hold": True}}


class Raw:
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


class Site:
    """The rig as a cluster, its open connection, and its raw tools."""

    def __init__(self, folder: Path, sshd: Path, **more: Any) -> None:
        self.folder = folder
        self.sshd = SshRig(sshd)
        self.cluster = cluster_of(self.sshd, folder / "far", **more)

    @property
    def host(self) -> SshHost:
        """The open connection."""
        return host_of(self.cluster)

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


def sbatch(run: Run, chunk: int, token: str = "scale") -> list[str]:
    """Return the command by which a person queues one of the arrays of a run."""
    log = f"{run.directory}/job.log"
    return ["sbatch", "--parsable", f"--job-name={token}", f"--array=0-{TRIALS // ARRAYS - 1}", f"--output={log}",
            f"--error={log}", "--open-mode=append", f"{run.directory}/job.sbatch", str(chunk), str(ARRAYS)]  # fmt: skip


def queued() -> int:
    """Count the arrays that wait."""
    squeue = ["squeue", "-h", "-t", "PENDING", "-o", "%F"]
    done = subprocess.run(squeue, stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True)
    return len(set(done.stdout.split()))


@contextmanager
def shared_ssh(site: Site) -> Iterator[list[str]]:
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


def make_over(run: Run, chunks: Sequence[int], *, old: bool) -> None:
    """Write what the trials of some arrays leave, without running them: on a small machine that takes half an hour."""
    far, moment = Path(run.directory), time.time() - 7200
    for chunk in chunks:
        array = array_of(chunk)
        record(run, chunk, str(array))
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


def array_of(chunk: int) -> int:
    """Return an id far from those that the rig gives."""
    return 5_000_000 + 10_000 * chunk


def record(run: Run, chunk: int, job: str) -> None:
    """Write, here and there, that one of the arrays of a run was queued as this job."""
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

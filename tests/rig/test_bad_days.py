"""Real Slurm and real SSH on their bad days, in the middle of a run: nothing is lost, nothing runs twice."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.watch import Poll
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import shell_config, states_by_sacct
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig


class Going:
    """A run that is followed in a thread, and what was told of it."""

    def __init__(self, config: Path, cluster: Cluster) -> None:
        self.run = steps.plan(config, cluster=cluster)
        self.polls: list[Poll] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        try:
            launch.follow_run(self.run, tell=self.polls.append)
        except BaseException as error:  # noqa: BLE001 - it is the test's to look at
            self.error = error

    def until(self, true: Callable[[Poll], bool], seconds: float = 40.0) -> None:
        """Wait for a poll that is as described."""
        limit = time.monotonic() + seconds
        while not any(true(poll) for poll in list(self.polls)):
            assert self._thread.is_alive(), self.error
            assert time.monotonic() < limit, self.polls[-3:]
            time.sleep(0.05)

    def end(self, seconds: float = 60.0) -> None:
        """Wait for the end of it, which must be a good one."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.polls[-3:]
        if self.error:
            raise self.error

    def stop(self) -> None:
        self._thread.join(60.0)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that the trials wait for."""
    return tmp_path / "gate"


@contextmanager
def followed(config: Path, cluster: Cluster, gate: Path) -> Iterator[Going]:
    going = Going(config, cluster)
    try:
        yield going
    finally:
        gate.touch()
        going.stop()


def waiting(tmp_path: Path, gate: Path, *, job: str = "") -> Path:
    return shell_config(tmp_path, f"until [ -e {gate} ]; do sleep 0.1; done", [1, 2, 3], job=job)


def all_running(poll: Poll) -> bool:
    return poll.states.get("running") == 3


def not_known(poll: Poll) -> bool:
    return any("not known" in note for note in poll.notes)


def test_slurmctld_stopped_and_started_in_mid_run(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, gate: Path
) -> None:
    with followed(waiting(tmp_path, gate), cluster, gate) as going:
        going.until(all_running)
        slurm.stop_controller()
        gate.touch()  # the trials end while nobody can be asked
        going.until(not_known)
        slurm.start_controller()
        going.end()
    assert states_by_sacct(slurm, going.run) == ["COMPLETED"] * 3
    assert [len(trial.attempts) for trial in steps.look(manage.find(going.run.id))] == [1, 1, 1]


def test_slurmctld_that_says_nothing_for_good_leaves_the_run_to_resume(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXA_PATIENCE", "1")
    settings.cache_clear()
    with followed(waiting(tmp_path, gate), cluster, gate) as going:
        going.until(all_running)
        slurm.stop_controller()
        going.stop()
        assert going.error is not None
        assert "Its jobs are left as they are" in str(going.error) and f"resume {going.run.id}" in str(going.error)
        slurm.start_controller()
    launch.follow_run(manage.prepare_resume(going.run.id))
    assert states_by_sacct(slurm, going.run) == ["COMPLETED"] * 3


def test_slurmdbd_stopped_throughout(cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, gate: Path) -> None:
    gate.touch()
    slurm.stop_dbd()
    going = Going(waiting(tmp_path, gate), cluster)
    going.end()
    report = manage.report_of(manage.find(going.run.id))
    assert report.end == "done" and not report.accounted
    # By the trials' own clocks, and never nothing.
    assert report.actual_usd is not None and report.actual_usd > 0
    slurm.start_dbd()


def test_sshd_killed_in_mid_run(
    cluster: Cluster, slurm: SlurmRig, sshd: SshRig, home: Path, tmp_path: Path, gate: Path
) -> None:
    with followed(waiting(tmp_path, gate), cluster, gate) as going:
        going.until(all_running)
        sshd.kill()
        gate.touch()
        going.until(not_known, 60)
        sshd.start()
        going.end()
    assert states_by_sacct(slurm, going.run) == ["COMPLETED"] * 3
    assert len(read_submissions(going.run.files)) == 1


def test_connections_cut_again_and_again(
    cluster: Cluster, slurm: SlurmRig, sshd: SshRig, home: Path, tmp_path: Path, gate: Path
) -> None:
    with followed(waiting(tmp_path, gate), cluster, gate) as going:
        going.until(all_running)
        for _ in range(12):
            time.sleep(0.3)
            sshd.cut()
        gate.touch()
        going.end()
    assert states_by_sacct(slurm, going.run) == ["COMPLETED"] * 3
    assert [len(trial.attempts) for trial in steps.look(manage.find(going.run.id))] == [1, 1, 1]


def test_an_array_that_the_controller_forgets_is_submitted_again_and_runs_once(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, gate: Path
) -> None:
    gate.touch()
    with connections.kept_open(cluster):
        run = steps.plan(waiting(tmp_path, gate, job=", extra: {hold: true}"), cluster=cluster)
        steps.admit(run, steps.estimate_cost(run))
        run = steps.render(steps.sync(run))
        first = steps.submit(run)
        forget(slurm, first.job_id or "")
        # As after a controller that has lost its state: the array is nowhere, and none of it has started.
        again = steps.submit(run)
        assert again.number == 2 and again.job_id != first.job_id
        slurm.run(["scontrol", "release", again.job_id or ""])
        launch.follow_run(manage.find(run.id))
    # Not by sacct: a controller that lost its state gives the ids of earlier jobs again.
    assert [(trial.state, len(trial.attempts)) for trial in steps.look(manage.find(run.id))] == [("completed", 1)] * 3
    claim = Path(cluster.workdir) / "runs" / run.id / "claims" / first.token
    assert str(claim.readlink()) == "void"
    skip_ids(slurm)


def skip_ids(slurm: SlurmRig) -> None:
    """Give later tests ids that no job had before: sacct, and the kernel's control groups, would mix the two up."""
    slurm.stop_controller()
    with slurm.conf.open("a") as conf:  # until the rig writes it anew, by when the ids are past it
        conf.write("FirstJobId=20001\n")
    slurm.start_controller()


def forget(slurm: SlurmRig, job: str) -> None:
    """Make the controller forget a job: its files go while it does not run."""
    slurm.stop_controller()
    spool = slurm.folder / "state"
    found = [path for path in slurm.folder.rglob("job_state*") if path.is_file()]
    assert found, f"no job state under {spool}"
    for path in found:
        path.unlink()
    slurm.start_controller()
    limit = time.monotonic() + 20
    while slurm.run(["squeue", "-h", "-j", job]).stdout:
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_sweep_held_by_hand_is_told_and_goes_on_when_released(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, gate: Path
) -> None:
    gate.touch()
    with followed(waiting(tmp_path, gate, job=", extra: {hold: true}"), cluster, gate) as going:
        going.until(lambda poll: any("scontrol release" in note for note in poll.notes))
        [job] = {each.job_id for each in read_submissions(going.run.files)}
        released: subprocess.CompletedProcess[str] = slurm.run(["scontrol", "release", str(job)])
        assert released.returncode == 0
        going.end()

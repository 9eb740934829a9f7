"""Every end that Slurm has for a trial, as a user is told of it, and what it cost."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

from nexa_infra.errors import RunCancelledError, RunFailedError, UnknownStateError
from nexa_infra.hosts import connections
from nexa_infra.monitoring.report import CostReport
from nexa_infra.operations import launch, steps
from nexa_infra.runs.index import run_at
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.watch import Poll
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import cluster_at, shell_config
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

# What the trials of the large run do, by their index.
MANY = """
case $2 in
  well) exit 0 ;;
  three) sleep 1.2; exit 3 ;;
  segv) kill -SEGV $$ ;;
  memory) exec python3 -c "kept = bytearray(2**28); print(len(kept))" ;;
  *) exec sleep 321 ;;
esac
"""
KINDS = ["well", "three", "segv", "memory", "timeout", "running", "pending"]
HELD = "extra: {hold: true}, nodelist: n1"


@dataclass
class Followed:
    """A run, and what was told of it to its end."""

    run: Run
    polls: list[Poll] = field(default_factory=list)
    error: BaseException | None = None
    trials: tuple[Trial, ...] = ()
    report: CostReport | None = None
    submissions: int = 0
    without: tuple[Trial, ...] = ()  # the same, for a client that has no accounting to ask

    @property
    def notes(self) -> str:
        """All that its polls told, beside numbers."""
        return "\n".join(note for poll in self.polls for note in poll.notes)

    @property
    def job(self) -> str:
        """The id of its first array."""
        return read_submissions(self.run.files)[0].job_id or ""

    def follow(self) -> None:
        """Take it to its end, and look at what is left."""
        try:
            launch.follow_run(self.run, tell=self.polls.append)
        except Exception as error:  # noqa: BLE001 - a test's to look at
            self.error = error
        self.look()

    def look(self) -> None:
        """Keep what a person would find."""
        self.trials = steps.look(self.run)
        self.report = steps.build(self.run, self.trials)
        self.submissions = len(read_submissions(self.run.files))

    def until(self, true: Callable[[Poll], object], within: float = 30.0) -> None:
        """Wait for a poll that is as described."""
        limit = time.monotonic() + within
        while not any(true(poll) for poll in list(self.polls)):
            assert time.monotonic() < limit and self.error is None, (self.error, self.polls[-3:])
            time.sleep(0.05)


@dataclass(frozen=True)
class Scene:
    """All that was run, and has ended."""

    many: Followed
    preempted: Followed
    lost: Followed
    moved: Followed
    hopeless: Followed
    late: Followed


@pytest.fixture(scope="module")
def scene(started_slurm: SlurmRig, started_sshd: SshRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Run everything side by side, once."""
    folder = tmp_path_factory.mktemp("ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(started_slurm.conf))
        patch.setenv("NEXA_HOME", str(folder / "home"))
        settings.cache_clear()
        started_slurm.start()
        try:
            yield play(started_slurm, started_sshd, folder)
        finally:
            started_slurm.reset()
            connections.close_all()
            settings.cache_clear()


def play(slurm: SlurmRig, sshd: SshRig, folder: Path) -> Scene:
    """Start the runs, and bring about their ends."""
    far, here = cluster_at(sshd, folder / "w"), Cluster(name="here", workdir=str(folder / "w"), poll_floor=0.3)
    project = folder / "project"
    project.mkdir()
    # A dependency of which Slurm will find out, within half a minute, that it is never met.
    failing = slurm.submit("--hold", script="exit 1")

    def planned(cluster: Cluster, name: str, script: str, values: list[object], job: str) -> Followed:
        config = shell_config(project, script, values, name=name, job=f", {job}")
        return Followed(steps.plan(config, cluster=cluster))

    sleeping = "test $NEXA_ATTEMPT = 1 || exit 0; exec sleep 322"
    scene = Scene(
        many=planned(far, "many", MANY, list(KINDS), HELD),
        preempted=planned(
            far,
            "preempted",
            sleeping,
            [1],
            "partition: spare, nodelist: n2, cpus_per_task: 4, extra: {no-requeue: true}",
        ),
        lost=planned(here, "lost", sleeping, [1], "nodelist: n2, extra: {no-requeue: true}"),
        moved=planned(here, "moved", sleeping, [1], "nodelist: n2"),
        late=planned(far, "late", "true", [1], "nodelist: n2, cpus_per_task: 8, extra: {deadline: now+303seconds}"),
        hopeless=planned(here, "hopeless", "true", [1], f'dependency: "afterok:{failing}"'),
    )
    everyone = list(vars(scene).values())
    with ThreadPoolExecutor(len(everyone)) as pool:
        ends = [pool.submit(each.follow) for each in everyone if each is not scene.late]
        try:
            scene.many.until(lambda poll: poll.notes)
            slurm.run(["scontrol", "release", failing])
            end_many(slurm, scene.many)
            for each in (scene.preempted, scene.lost, scene.moved):
                each.until(lambda poll: poll.states.get("running"))
                status = Path(each.run.directory) / "status"
                slurm.wait_until(lambda: any(status.iterdir()), 30.0, "it has not begun")  # noqa: B023
            ends.append(pool.submit(scene.late.follow))  # it waits for cores until it is too late
            scene.late.until(lambda poll: poll.states.get("deadline"))
            end_nodes(slurm, scene)
            late = wait(ends, timeout=150.0).not_done
            assert not late, (slurm.run(["squeue"]).stdout, *(each.polls[-1:] for each in everyone if not each.trials))
            for end in ends:
                end.result()
        except BaseException:
            slurm.run(["scancel", "--me"])  # whatever follows them comes to an end
            raise
    slurm.stop_dbd()
    for each in everyone:
        each.without = seen_without_accounting(each.run, folder)
    slurm.start_dbd()
    return scene


def end_many(slurm: SlurmRig, many: Followed) -> None:
    """End trials of the large run by hand: one that waits, one that runs; the limit of another comes at once."""
    job = many.job
    slurm.run(["scancel", f"{job}_{KINDS.index('pending')}"])
    slurm.run(["scontrol", "release", job])
    many.until(lambda poll: poll.states.get("running", 0) >= 3)
    slurm.run(["scontrol", "update", f"JobId={job}_{KINDS.index('timeout')}", "EndTime=now"])
    slurm.run(["scancel", f"{job}_{KINDS.index('running')}"])


def end_nodes(slurm: SlurmRig, scene: Scene) -> None:
    """Take a trial's cores away, and then its neighbours' node."""
    slurm.submit("--partition=high", "--nodelist=n2", "--cpus-per-task=5", "--mem=100M")
    scene.preempted.until(lambda poll: poll.states.get("preempted"))
    slurm.node_down("n2")
    scene.lost.until(lambda poll: poll.states.get("node_fail"))
    slurm.node_up("n2")


def seen_without_accounting(run: Run, folder: Path) -> tuple[Trial, ...]:
    """Look at a run as a client does that has asked no accounting yet, and cannot now."""
    if run.mirror is None:
        run.files.accounting.unlink(missing_ok=True)
        return steps.look(run)
    place = folder / "other" / "runs" / run.id
    for name in ("submissions", "status", "trials", "claims"):
        (place / name).mkdir(parents=True)
    shutil.copy(run.files.record, place)
    return steps.look(run_at(place))


def end_of(followed: Followed, kind: str) -> tuple[Trial, Trial]:
    """What became of a trial of the large run: with accounting, and without."""
    index = KINDS.index(kind)
    return followed.trials[index], followed.without[index]


def core_seconds(followed: Followed, amount: Decimal | None) -> float:
    """How many core-seconds an amount buys; what nobody knows buys none."""
    return float(amount * 3600 / followed.run.price.usd_per_hour) if amount is not None else -1.0


def test_a_held_run_tells_how_to_release_it_and_goes_on(scene: Scene) -> None:
    many = scene.many
    assert f"7 trials held (JobHeldUser): `scontrol release {many.job}` lets it start" in many.notes
    assert "held" not in many.polls[-1].notes


def test_a_program_s_own_end_is_told_by_its_exit_code(scene: Scene) -> None:
    well, _ = end_of(scene.many, "well")
    assert (well.state, well.exit_code, well.reason) == ("completed", 0, "")
    for kind, code in (("three", 3), ("segv", 139)):
        for seen in end_of(scene.many, kind):
            assert (seen.state, seen.exit_code, seen.reason) == ("failed", code, "")
    three, without = end_of(scene.many, "three")
    assert core_seconds(scene.many, three.usd) in {1.0, 2.0}, "by accounting, in whole seconds"
    assert core_seconds(scene.many, without.usd) == pytest.approx(three.seconds), "by its own clock"


def test_a_walltime_is_told_with_its_remedy(scene: Scene) -> None:
    timeout, without = end_of(scene.many, "timeout")
    assert (timeout.state, without.state) == ("timeout", "timeout")
    assert re.fullmatch(
        r"ran into its walltime of 00:05:00 on n1 \(TIMEOUT\): raise job.time, or let it resume from a checkpoint",
        timeout.reason,
    )
    assert without.reason.startswith("ran into its walltime of 00:05:00 (TIMEOUT)")
    assert timeout.usd and without.usd, "it heard the warning, and wrote its end"


def test_what_a_person_cancels_on_the_cluster_is_cancelled_and_by_whom(scene: Scene) -> None:
    running, running_without = end_of(scene.many, "running")
    pending, pending_without = end_of(scene.many, "pending")
    assert running.reason.startswith("was cancelled by root on n1 (CANCELLED by 0)")
    assert running_without.reason == "was cancelled (CANCELLED)", "squeue does not say by whom"
    for seen in (pending, pending_without):
        assert seen.reason.startswith("left the queue before it started") and not seen.attempts and seen.usd == 0
    for seen in (running, running_without, pending, pending_without):
        assert seen.state == "cancelled"


def test_a_run_of_which_a_person_cancelled_something_ends_as_cancelled_and_is_not_submitted_again(scene: Scene) -> None:
    many = scene.many
    assert isinstance(many.error, RunCancelledError)
    assert "2 of its trials were cancelled on the cluster, not by this package" in str(many.error)
    assert f"`nexa-infra resume {many.run.id}` goes on with it" in str(many.error)
    assert many.report is not None and many.report.end == "cancelled" and many.submissions == 1


def test_memory_that_ran_out_is_told_with_its_remedy(scene: Scene, started_slurm: SlurmRig) -> None:
    if not started_slurm.memory_limits:
        pytest.skip("memory is limited where the machine has cgroup v1's memory controller")
    memory, without = end_of(scene.many, "memory")
    assert (memory.state, memory.exit_code) == ("out_of_memory", 1)
    assert memory.reason == "used more memory than it had asked for on n1 (OUT_OF_MEMORY): raise job.memory"
    assert without.state == "failed", "the step's end is in accounting alone"
    assert scene.many.report is not None
    told = next(each for each in scene.many.report.failed if each.index == memory.index)
    assert any(re.search("Out Of Memory|oom.kill", line) for line in told.stderr), told.stderr


def test_a_trial_that_gives_way_to_another_job(scene: Scene) -> None:
    (trial,), (without,) = scene.preempted.trials, scene.preempted.without
    assert trial.state == without.state == "preempted"
    assert trial.reason == "gave way to a job of higher priority on n2 (PREEMPTED): a retry may go well"
    held = core_seconds(scene.preempted, trial.usd)
    assert held >= 4 and held % 4 == pytest.approx(0), "four cores, in whole seconds"
    assert isinstance(scene.preempted.error, RunFailedError) and trial.reason in str(scene.preempted.error)


def test_a_trial_whose_node_goes_away(scene: Scene) -> None:
    (trial,), (without,) = scene.lost.trials, scene.lost.without
    assert trial.state == without.state == "node_fail"
    assert trial.reason == "lost its node n2 (NODE_FAIL): no fault of the trial's: a retry may go well"
    assert trial.exit_code is None, "its program has not said how it ended"
    assert core_seconds(scene.lost, trial.usd) >= 1
    assert without.usd is None, "nobody saw its end"
    assert isinstance(scene.lost.error, RunFailedError) and "(NODE_FAIL)" in str(scene.lost.error)


def test_a_trial_that_slurm_starts_again_elsewhere_is_paid_for_twice(scene: Scene) -> None:
    (trial,), (without,) = scene.moved.trials, scene.moved.without
    assert scene.moved.error is None and scene.moved.submissions == 1
    assert trial.state == without.state == "completed" and [each.number for each in trial.attempts] == [1, 2]
    assert core_seconds(scene.moved, trial.usd) >= core_seconds(scene.moved, trial.wasted_usd) >= 1
    assert without.usd is None, "the end of the first attempt was not seen, and it was not free"


def test_a_trial_that_can_no_longer_end_by_its_deadline(scene: Scene) -> None:
    (trial,), (without,) = scene.late.trials, scene.late.without
    assert trial.state == without.state == "deadline" and not trial.attempts
    assert trial.reason.startswith("could not end by its deadline (DEADLINE): lower job.time")
    assert trial.usd == 0, "accounting knows that it has held nothing"
    assert without.usd is None


def test_what_can_never_start_is_a_clear_error_and_nothing_is_cancelled(scene: Scene) -> None:
    error = str(scene.hopeless.error)
    assert isinstance(scene.hopeless.error, UnknownStateError)
    assert "can never go on as it is" in error and "(DependencyNeverSatisfied)" in error
    assert "check job.dependency. Nothing was cancelled: `nexa-infra cancel" in error
    assert scene.hopeless.trials[0].state == scene.hopeless.without[0].state == "pending"
    assert scene.hopeless.submissions == 1


def test_without_any_accounting_a_run_ends_by_squeue_s_memory(
    rig_folder: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "case $2 in well) sleep 1 ;; three) exit 3 ;; *) exec sleep 323 ;; esac"
    with SlurmRig(rig_folder, accounting=False) as other:
        for name, value in other.environment().items():
            monkeypatch.setenv(name, value)
        cluster = Cluster(name="bare", workdir=str(tmp_path / "w"), poll_floor=0.3)
        project = tmp_path / "project"
        project.mkdir()
        run = steps.plan(shell_config(project, script, ["well", "three", "cancelled"]), cluster=cluster)
        assert any("keeps no accounting" in note for note in steps.check(run).notes)
        followed = Followed(run)
        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(followed.follow)
            followed.until(lambda poll: poll.states.get("completed"))
            other.run(["scancel", f"{followed.job}_2"])
            going.result(60.0)
    well, three, cancelled = followed.trials
    assert not run.files.accounting.exists() and run.files.left.exists()
    assert [each.state for each in followed.trials] == ["completed", "failed", "cancelled"]
    assert core_seconds(followed, well.usd) == pytest.approx(well.seconds)
    assert three.usd and cancelled.usd, "by their own clocks"
    assert cancelled.reason == "was cancelled (CANCELLED)"
    assert followed.report is not None and not followed.report.accounted

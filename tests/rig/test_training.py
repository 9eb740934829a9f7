"""Trainings on real Slurm by real torchrun, on one node and on two: their ranks, failures and interruptions."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import RunFailedError
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, steps
from nexa_infra.operations.voice import speaker
from nexa_infra.runs.ranks import Gang, read_gang, read_records
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.history import kind_of
from nexa_infra.scheduling.watch import Poll
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import ROOT, cluster_at
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

pytest.importorskip("torch", reason="PyTorch is not installed: make install brings it")

STEPS = 60  # of every training here, in epochs of ten
CONFIG = """\
job: {{name: {name}, time: "{time}", memory: 800M, setup: {{venv: {venv}}}{job}}}
launcher: {{type: torchrun, script: train.py, nproc_per_node: 2{launcher}}}
training: {{parameters: {{epochs: 6, steps_per_epoch: 10, step_seconds: {seconds}}}}}
{more}
"""
ELASTIC = ', nnodes: "1:2", max_restarts: 2'
PATIENCE = 240.0


@dataclass
class Trained:
    """A training, and what was told of it to its end."""

    run: Run
    polls: list[Poll] = field(default_factory=list)
    error: BaseException | None = None
    heard: list[str] = field(default_factory=list)

    def follow(self) -> None:
        """Take it to its end."""
        speaker.set(self.heard.extend)  # of this thread
        try:
            launch.follow_run(self.run, tell=self.polls.append)
        except Exception as error:  # noqa: BLE001 - a test's to look at
            self.error = error

    def there(self, name: str) -> Path:
        """A file of its trial, on the cluster."""
        return Path(self.run.directory) / "trials" / "0" / name

    def printed(self, attempt: int = 1) -> str:
        """What an attempt has printed."""
        path = self.there(f"attempt-{attempt}.out")
        return path.read_text() if path.exists() else ""

    def gang(self, attempt: int = 1) -> Gang:
        """What its nodes recorded of an attempt."""
        return read_gang(read_records(self.there(f"attempt-{attempt}")))

    @property
    def step(self) -> int:
        """The last step that was taken."""
        path = self.there("metrics.jsonl")
        steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
        return int(steps[-1]) if steps else 0

    @property
    def loss(self) -> float:
        """The loss that it ended with."""
        return float(steps.look(self.run)[0].metrics["loss"])

    @property
    def executed(self) -> int:
        """Steps that were taken in all."""
        return self.there("checkpoints/executed").stat().st_size

    @property
    def job(self) -> str:
        """Its job's id."""
        submissions = read_submissions(self.run.files)
        return (submissions[0].job_id if submissions else None) or ""

    def until_step(self, step: int) -> None:
        """Wait until a step has been taken."""
        self.wait(lambda: self.step >= step)

    def wait(self, true: Any) -> None:
        """Wait until something is true of it."""
        limit = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < limit and self.error is None, (self.error, self.polls[-3:])
            time.sleep(0.1)

    def kill_rank(self, rank: int) -> str:
        """End a rank's process by SIGKILL; return its node."""
        for path in self.there("attempt-1").glob("node-*"):
            for line in path.read_text().splitlines():
                match line.split("\t"):
                    case ["start", number, "0", pid, _] if int(number) == rank:
                        os.kill(int(pid), signal.SIGKILL)
                        return path.read_text().split("\t")[1]
        raise AssertionError(f"rank {rank} was not started")


@dataclass(frozen=True)
class Scene:
    """All that was run, and has ended."""

    alone: Path  # the parameters that one process makes of the same data
    gang: Trained
    killed: Trained
    restarted: Trained
    chained: Trained
    preempted: Trained
    mute: Trained
    lost: Trained
    elastic: Trained
    sweep: Trained
    killed_on: str
    taken: frozenset[int]


@pytest.fixture(scope="module")
def scene(started_slurm: SlurmRig, started_sshd: SshRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Run everything side by side, once."""
    folder = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(started_slurm.conf))
        patch.setenv("NEXA_HOME", str(folder / "home"))
        settings.cache_clear()
        started_slurm.start()
        try:
            yield play(started_slurm, started_sshd, folder, stack)
        finally:
            started_slurm.run(["scancel", "--me"])
            started_slurm.reset()
            connections.close_all()
            settings.cache_clear()


def play(slurm: SlurmRig, sshd: SshRig, folder: Path, stack: ExitStack) -> Scene:
    """Start the trainings, and bring about what happens to them."""
    project = folder / "project"
    project.mkdir()
    shutil.copy(ROOT / "deployments" / "examples" / "ddp" / "train.py", project)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    far = cluster_at(sshd, folder / "it's a workdir")

    def planned(name: str, **parts: object) -> Trained:
        return Trained(plan(project, far, name, **parts))

    mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    trained = {
        "gang": planned("gang", job=", nodes: 2"),
        "killed": planned("killed", job=", nodes: 2", launcher=", rdzv_backend: static", seconds=0.3),
        "restarted": planned("restarted", job=", nodes: 2", launcher=", max_restarts: 1", seconds=0.3),
        # Slurm looks every 30 s and warns up to 30 s early: 14 to 44 s after the start, which is less than it takes.
        "chained": planned(
            "chained",
            time="1",
            job=", nodelist: n1, signal_before_end: 16",
            seconds=0.8,
            more="checkpoint: {chain_until_done: true}",
        ),
        "preempted": planned(
            "preempted",
            job=', partition: low, nodelist: n1, gres: "gpu:a100:4", gpu_type: a100',
            seconds=0.4,
            more="checkpoint: {requeue: 1}",
        ),
        "mute": planned(
            "mute",
            job=", nodes: 2",
            launcher=f", rdzv_endpoint: 127.0.0.1:{mute.getsockname()[1]}, rdzv_timeout: 5",
        ),
    }
    trained["sweep"] = Trained(steps.plan(swept(project), cluster=far))
    alone = folder / "alone"
    alone.mkdir()
    with ThreadPoolExecutor(len(trained) + 2) as pool:
        ends = {name: pool.submit(each.follow) for name, each in trained.items() if name != "gang"}
        try:
            trained["killed"].until_step(15)
            killed_on = trained["killed"].kill_rank(2)
            trained["restarted"].until_step(25)
            trained["restarted"].kill_rank(2)
            trained["preempted"].until_step(15)
            slurm.submit("--partition=high", "--nodelist=n1", "--gres=gpu:a100:4", "--mem=100M", script="sleep 5")
            # The ports that the next jobs would choose.
            newest = max(int(each.job) for each in trained.values() if each.job)
            taken = frozenset(20000 + job % 12000 for job in range(newest + 1, newest + 10))
            for port in taken:
                with suppress(OSError):  # somebody else's, which will do
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            ends["gang"] = pool.submit(trained["gang"].follow)
            run_alone(project, alone)
            for name in ends.keys() - {"chained", "preempted"}:  # which are on n1
                ends[name].result(PATIENCE)
            more = {
                "lost": planned("lost", job=", nodes: 2", seconds=0.4, more="checkpoint: {requeue: 1}"),
                "elastic": planned("elastic", job=", nodes: 2", launcher=ELASTIC, seconds=0.4),
            }
            trained |= more
            ends |= {name: pool.submit(each.follow) for name, each in more.items()}
            for each in more.values():
                each.until_step(15)
            slurm.node_down("n2")
            more["lost"].wait(lambda: more["lost"].polls[-1].states.get("pending"))
            slurm.node_up("n2")
            for end in ends.values():
                end.result(PATIENCE)
        except BaseException:
            slurm.run(["scancel", "--me"])  # whatever follows them comes to an end
            raise
    return Scene(alone / "model.pt", killed_on=killed_on, taken=taken, **trained)


def plan(project: Path, cluster: Cluster, name: str, **parts: object) -> Run:
    """Plan a training of the example."""
    path = project / f"{name}.yaml"
    filled: dict[str, object] = {"time": "00:05:00", "job": "", "launcher": "", "seconds": 0.0, "more": "", **parts}
    path.write_text(CONFIG.format(name=name, venv=sys.prefix, **filled))
    return launch.plan_training(path, cluster=cluster)


def swept(project: Path) -> Path:
    """Write a sweep whose trials torchrun starts."""
    path = project / "sweep.yaml"
    text = CONFIG.format(name="swept", venv=sys.prefix, time="5", job="", launcher="", seconds=0, more="")
    lines = [line for line in text.splitlines() if not line.startswith("training:")]
    path.write_text("\n".join([*lines, "sweep: {parameters: {epochs: [1, 2]}}"]))
    return path


def run_alone(project: Path, folder: Path) -> None:
    """Train in one process, on the same data."""
    environment = {**os.environ, "NEXA_TRIAL_DIR": str(folder), "NEXA_CHECKPOINT_DIR": str(folder / "checkpoints")}
    argv = [sys.executable, str(project / "train.py"), "--epochs=6", "--steps-per-epoch=10"]
    subprocess.run(argv, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)


def story(trained: Trained) -> tuple[int, int, int, int]:
    """Read `attempt A resumed at step S of T, steps executed in all N` of the last attempt."""
    attempt = steps.look(trained.run)[0].attempt
    found = re.findall(
        r"attempt (\d+) \w+ at step (\d+) of (\d+), steps executed in all (\d+)", trained.printed(attempt)
    )
    number, began, total, executed = map(int, found[-1])
    return number, began, total, executed


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the parameters of two models."""
    import torch

    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_four_ranks_on_two_nodes_make_what_one_process_makes(scene: Scene) -> None:
    gang = scene.gang
    assert gang.error is None
    lines = [
        re.search(r"node (\S+) pid (\d+) rank (\d+) of 4", gang.there(f"attempt-1/rank-{rank}.log").read_text())
        for rank in range(4)
    ]
    said = [line.groups() for line in lines if line]
    assert [rank for _, _, rank in said] == ["0", "1", "2", "3"] and len(set(said)) == 4
    assert sorted(node for node, _, _ in said) == ["n1", "n1", "n2", "n2"]
    assert "\n".join(gang.heard) == gang.there("attempt-1/rank-0.log").read_text().rstrip(), "over SSH, as it came"
    assert "rank 0 of 4" in gang.printed() and "rank 1 of 4" not in gang.printed(), "rank 0 is heard, the others kept"
    assert difference(gang.there("model.pt"), scene.alone) <= 1e-6


def test_a_port_that_is_taken_is_left_alone(scene: Scene) -> None:
    host, _, port = scene.gang.gang().endpoint.rpartition(":")
    assert host == "127.0.0.1", "n1 is no name on the network: it is met at the address that Slurm knows"
    assert int(port) not in scene.taken and 20000 + int(scene.gang.job) % 12000 in scene.taken


def test_the_rank_that_failed_first_is_named_with_its_node_and_its_signal(scene: Scene) -> None:
    killed = scene.killed
    assert isinstance(killed.error, RunFailedError)
    told = f"rank 2 on {scene.killed_on} was ended by SIGKILL"
    assert told in str(killed.error) and told in killed.run.files.report_markdown.read_text()
    assert len(killed.gang().failures) == 4, "the others failed by their collectives"


def test_ranks_that_are_started_again_go_on_from_the_checkpoint(scene: Scene) -> None:
    assert scene.restarted.error is None
    number, began, total, executed = story(scene.restarted)
    assert (number, began % 10, total) == (1, 0, STEPS) and began >= 20
    assert executed == scene.restarted.executed > STEPS, "what was lost was done again"
    assert scene.restarted.gang().restarts == 1
    assert scene.restarted.loss == pytest.approx(scene.gang.loss, abs=1e-6)


def test_a_chain_of_walltimes_goes_on_until_it_is_done(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    chained = scene.chained
    assert chained.error is None
    number, began, total, executed = story(chained)
    with capfd.disabled():
        sys.stderr.write(
            f"\nchained: attempt {number} resumed at step {began} of {total}, executed in all {executed}\n"
        )
    assert number >= 2 and began > 0 and total == STEPS
    assert executed <= STEPS + number - 1, "at most one step is lost at a requeue"
    assert len(read_submissions(chained.run.files)) == 1, "the job put itself back in the queue"
    assert chained.loss == pytest.approx(scene.gang.loss, abs=1e-6)
    trial = steps.look(chained.run)[0]
    assert len(trial.attempts) == number
    # One that was requeued before it had ended could not say why: it might have ended well.
    assert all(each.cause == "timeout" or each.ended is None for each in trial.attempts[:-1])
    assert trial.wasted_usd and trial.usd and trial.usd > trial.wasted_usd > 0, "every attempt is paid for"


def test_a_preempted_training_goes_on_when_its_place_is_free_again(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    preempted = scene.preempted
    assert preempted.error is None
    number, began, total, executed = story(preempted)
    with capfd.disabled():
        sys.stderr.write(
            f"\npreempted: attempt {number} resumed at step {began} of {total}, executed in all {executed}\n"
        )
    assert (number, total) == (2, STEPS) and began > 0
    assert executed <= STEPS + 1, "at most one step is lost"
    assert len(read_submissions(preempted.run.files)) == 1
    assert preempted.loss == pytest.approx(scene.gang.loss, abs=1e-6)
    trial = steps.look(preempted.run)[0]
    # By its own word, or by the scheduler's, where the grace time was over before it could say so.
    said = steps.scheduler_of(preempted.run).ends(preempted.run)
    kinds = [kind_of(each, said.get((0, each.number))) for each in trial.attempts]
    assert kinds == ["preempted", "completed"]


def test_nodes_that_cannot_meet_are_told_within_the_bound(scene: Scene) -> None:
    mute = scene.mute
    assert isinstance(mute.error, RunFailedError)
    assert re.search(
        r"no rendezvous: n1, n2 came, and they did not all meet at 127.0.0.1:\d+ within 5 s", str(mute.error)
    )
    trial = steps.look(mute.run)[0]
    assert trial.attempts[0].seconds < 60


def test_a_training_whose_node_dies_is_requeued_and_goes_on(scene: Scene) -> None:
    lost = scene.lost
    assert lost.error is None
    number, began, total, _ = story(lost)
    assert (number, total) == (2, STEPS) and began > 0
    assert len(read_submissions(lost.run.files)) == 1
    assert lost.loss == pytest.approx(scene.gang.loss, abs=1e-6)


def test_an_elastic_training_goes_on_with_the_nodes_that_are_left(scene: Scene) -> None:
    elastic = scene.elastic
    assert elastic.error is None
    number, began, _, _ = story(elastic)
    assert number == 1 and began > 0, "the same attempt, from its checkpoint"
    assert "rank 0 of 4" in elastic.printed() and "rank 0 of 2" in elastic.printed()
    assert elastic.loss == pytest.approx(scene.gang.loss, abs=1e-6)


def test_a_sweep_s_trials_are_started_by_torchrun(scene: Scene) -> None:
    sweep = scene.sweep
    assert sweep.error is None
    for index in range(2):
        folder = Path(sweep.run.directory) / "trials" / str(index)
        assert re.findall(r"rank (\d) of 2", (folder / "attempt-1" / "rank-1.log").read_text()) == ["1"]
        assert (folder / "model.pt").exists()

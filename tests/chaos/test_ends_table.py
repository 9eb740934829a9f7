"""Every end of a trial that can be caused on the rig, as sacct says it and as we say it, with what it cost: a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deployments.processes import Process
from nexa_infra.hosts import connections
from nexa_infra.operations import manage, steps
from nexa_infra.runs.results import Trial
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.spec.cluster import Cluster
from tests.chaos.tally import only_in_full, show
from tests.rig.clusters import cluster_at, shell_config, workdir
from tests.rig.daemons import command_of, end, environments
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig
from tests.rig.test_ends import Followed

__all__ = ["workdir"]

# What the trials of one run do, what is done to them, and the state that this is.
MANY = """
sleep 1
case $2 in
  completed) exit 0 ;;
  failed) exit 3 ;;
  lacking) no-such-command ;;
  segv) kill -SEGV $$ ;;
  killed) kill -KILL $$ ;;
  memory) exec python3 -c "kept = bytearray(2**28); print(len(kept))" ;;
  *) exec sleep 321 ;;
esac
"""
KINDS: dict[str, tuple[str, str, str]] = {
    "completed": ("completed", "exit 0", "completed"),
    "failed": ("failed", "exit 3", "failed"),
    "lacking": ("failed", "a command that is not there", "failed"),
    "segv": ("failed by a signal of its own", "kill -SEGV of itself", "failed"),
    "killed": ("failed by KILL", "kill -KILL of itself", "failed"),
    "memory": ("out of memory", "256 MiB touched, 50 asked for", "out_of_memory"),
    "timeout": ("timeout", "scontrol update EndTime=now", "timeout"),
    "running": ("cancelled while it ran", "scancel ARRAY_TASK", "cancelled"),
    "pending": ("cancelled while it waited", "scancel ARRAY_TASK", "cancelled"),
    "signalled": ("cancelled by a signal", "scancel --full --signal=KILL", "cancelled"),
    "shot": ("its batch script killed", "kill -9 on the node", "failed"),
}
TWICE = "test $NEXA_ATTEMPT = 1 || exit 0; exec sleep 322"
NEVER = {
    "boot fail (BOOT_FAIL)": "the rig's nodes are not powered up by Slurm: there is no ResumeProgram",
    "revoked (REVOKED)": "needs a federation of clusters",
    "a machine that really loses power": "a node here goes down by SIGKILL of its slurmd and all of its processes",
    "the kernel's own killer": "memory is held by a control group; the whole machine never runs out",
}


@dataclass
class Table:
    """What is run, and the rows that come of it."""

    slurm: SlurmRig
    far: Cluster
    near: Cluster
    folder: Path
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    runs: int = 0

    def run(self, script: str, values: list[object], job: str = "", *, far: bool = False) -> Followed:
        self.runs += 1
        config = shell_config(self.folder, script, values, name=f"end{self.runs}", job=job)
        return Followed(steps.plan(config, cluster=self.far if far else self.near))

    def sacct(self, followed: Followed, task: int) -> str:
        """What sacct says of a task, each execution; of one that it has never heard of, nothing."""
        job = followed.job
        told = self.slurm.run(["sacct", "-XnPD", "-j", job, "--format=JobID,State,ExitCode"]).stdout
        lines = [line.split("|") for line in told.splitlines()]
        mine = {job, f"{job}_{task}", f"{job}_[{task}]"}
        return ", ".join(f"{state} {code}" for found, state, code in lines if found in mine) or "nothing"

    def add(self, followed: Followed, task: int, end: str, cause: str, state: str) -> None:
        trial = followed.trials[task]
        row = (end, cause, self.sacct(followed, task), words(trial), usd(trial))
        self.rows.append(row)
        # What was ended while it waited costs nothing; a launch that failed has held its node, though nothing started.
        free = not trial.attempts and state in {"cancelled", "deadline"}
        if trial.state != state or trial.usd is None or (free and trial.usd):
            steps_too = self.slurm.run(
                ["sacct", "-nPD", "-j", f"{followed.job}_{task}", "--format=JobID,State,ExitCode"]
            )
            self.wrong.append(f"{' | '.join(row)}: it should be {state}; with its steps: {steps_too.stdout.split()}")

    def __str__(self) -> str:
        head = ("end", "how it was caused", "sacct said", "we said", "USD")
        lines = [head, ("---",) * 5, *self.rows]
        told = "\n".join(f"| {' | '.join(row)} |" for row in lines)
        return told + "\nnot to be caused here: " + "; ".join(f"{end}: {why}" for end, why in NEVER.items())


def words(trial: Trial) -> str:
    code = f", exit code {trial.exit_code}" if trial.exit_code is not None else ""
    tries = f", {len(trial.attempts)} attempts" if len(trial.attempts) > 1 else ""
    return f"{trial.state}{code}{tries}" + (f": {trial.reason}" if trial.reason else "")


def usd(trial: Trial) -> str:
    return "not known" if trial.usd is None else f"{trial.usd:.7f}"


def many(table: Table) -> Callable[[], None]:
    """Ends that a program, or a person, brings about by hand."""
    followed = table.run(MANY, list(KINDS), ", extra: {hold: true}, nodelist: n1, array_parallelism: 8", far=True)
    slurm, index = table.slurm, list(KINDS).index

    def act() -> None:
        followed.until(lambda poll: poll.notes)
        job = followed.job
        slurm.run(["scancel", f"{job}_{index('pending')}"])
        slurm.run(["scontrol", "release", job])
        followed.until(lambda poll: poll.states.get("running", 0) >= 3)
        wait_running(slurm, [f"{job}_{index(kind)}" for kind in ("timeout", "running", "signalled", "shot")])
        slurm.run(["scontrol", "update", f"JobId={job}_{index('timeout')}", "EndTime=now"])
        slurm.run(["scancel", f"{job}_{index('running')}"])
        slurm.run(["scancel", "--full", "--signal=KILL", f"{job}_{index('signalled')}"])
        end(scripts(job, index("shot")))

    def add() -> None:
        for kind, (name, cause, state) in KINDS.items():
            if kind != "memory" or slurm.memory_limits:
                table.add(followed, index(kind), name, cause, state)

    return along(followed, act, add)


def scripts(job: str, task: int) -> list[Process]:
    """The batch scripts of an array task: Slurm keeps them by this name."""
    found = []
    for process, environment in environments():
        if (environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")) == (job, str(task)) and (
            command_of(process) == "slurm_script"
        ):
            found.append(process)
    return found


def wait_running(slurm: SlurmRig, jobs: list[str]) -> None:
    limit = time.monotonic() + 30
    while any(slurm.states(job) != ["RUNNING"] for job in jobs):
        assert time.monotonic() < limit, jobs
        time.sleep(0.1)
    time.sleep(1.0)  # and their steps have begun


def along(followed: Followed, act: Callable[[], None], add: Callable[[], None]) -> Callable[[], None]:
    """Follow a run, act on it meanwhile, and add its rows when it is over."""

    def play() -> None:
        with ThreadPoolExecutor(1) as pool:
            going: Future[None] = pool.submit(followed.follow)
            act()
            going.result(120.0)
        add()

    return play


def running(followed: Followed) -> bool:
    followed.until(lambda poll: poll.states.get("running"))
    return True


def by_our_verb(table: Table) -> Callable[[], None]:
    followed = table.run("exec sleep 323", [1, 2], ", array_parallelism: 1, nodelist: n1")

    def act() -> None:
        running(followed)
        wait_running(table.slurm, [f"{read_submissions(followed.run.files)[0].job_id}_0"])
        manage.cancel(followed.run.id)

    def add() -> None:
        table.add(followed, 0, "the run cancelled, of it what ran", "nexa-infra cancel RUN", "cancelled")
        table.add(followed, 1, "the run cancelled, of it what waited", "nexa-infra cancel RUN", "cancelled")

    return along(followed, act, add)


def by_hand(table: Table) -> Callable[[], None]:
    followed = table.run(TWICE, [1], ", nodelist: n1", far=True)

    def act() -> None:
        running(followed)
        wait_running(table.slurm, [f"{followed.job}_0"])
        table.slurm.run(["scontrol", "requeue", f"{followed.job}_0"])

    return along(
        followed, act, lambda: table.add(followed, 0, "requeued by hand", "scontrol requeue ARRAY_TASK", "completed")
    )


def unlaunched(table: Table) -> Callable[[], None]:
    table.near = table.near.model_copy(
        update={"workdir": str(table.folder.parent / "plain")}
    )  # Slurm itself opens the log
    followed = table.run("exit 0", [1], ", nodelist: n1")

    def play() -> None:
        run = followed.run
        steps.admit(run, steps.estimate_cost(run))
        followed.run = steps.render(steps.sync(run))
        (Path(run.directory) / "job.log").mkdir()  # no log can be opened there
        followed.follow()
        table.add(followed, 0, "a launch that failed", "its log cannot be opened on the node", "failed")

    return play


def late(table: Table) -> None:
    """A deadline that comes while other jobs have the cores."""
    blocker = table.slurm.submit("--nodelist=n2", "--cpus-per-task=8", "--mem=100M", script="sleep 60")
    wait_running(table.slurm, [blocker])
    followed = table.run("true", [1], ", nodelist: n2, cpus_per_task: 8, extra: {deadline: now+303seconds}", far=True)
    followed.follow()
    table.slurm.run(["scancel", blocker])
    table.add(followed, 0, "deadline", "--deadline, while the node is busy", "deadline")


def preempted(table: Table) -> None:
    """What a higher partition does to a job, by whether that may be queued again."""
    slurm = table.slurm
    more = "partition: spare, nodelist: n2, cpus_per_task: 4"
    gone = table.run(TWICE, [1], f", {more}, extra: {{no-requeue: true}}", far=True)
    back = table.run(TWICE, [1], f", {more}")
    give_way(slurm, gone, back)
    table.add(gone, 0, "preempted, cancelled", "a job of a higher partition; --no-requeue", "preempted")
    table.add(back, 0, "preempted, requeued", "a job of a higher partition", "completed")
    ended = table.run(TWICE, [1], f", {more}")
    slurm.run(["scontrol", "update", "PartitionName=spare", "PreemptMode=CANCEL"])
    try:
        give_way(slurm, ended)
    finally:
        slurm.run(["scontrol", "update", "PartitionName=spare", "PreemptMode=REQUEUE"])
    table.add(ended, 0, "preempted, cancelled", "a job of a higher partition; PreemptMode=CANCEL", "preempted")


def give_way(slurm: SlurmRig, *runs: Followed) -> None:
    with ThreadPoolExecutor(len(runs)) as pool:
        going = [pool.submit(each.follow) for each in runs]
        for each in runs:
            running(each)
        wait_running(slurm, [f"{each.job}_0" for each in runs])
        slurm.submit("--partition=high", "--nodelist=n2", "--cpus-per-task=8", "--mem=100M", script="sleep 1")
        for each_end in going:
            each_end.result(120.0)


def node_down(table: Table) -> None:
    """What becomes of a node's jobs, by whether they may be queued again."""
    lost = table.run(TWICE, [1], ", nodelist: n2, extra: {no-requeue: true}", far=True)
    moved = table.run(TWICE, [1], ", nodelist: n2")
    with ThreadPoolExecutor(2) as pool:
        going = [pool.submit(each.follow) for each in (lost, moved)]
        for each in (lost, moved):
            running(each)
        wait_running(table.slurm, [f"{each.job}_0" for each in (lost, moved)])
        table.slurm.node_down("n2")
        time.sleep(1.0)
        table.slurm.node_up("n2")
        for each_end in going:
            each_end.result(120.0)
    table.add(lost, 0, "node fail", "slurmd and all its processes killed; --no-requeue", "node_fail")
    table.add(moved, 0, "node fail, requeued", "slurmd and all its processes killed", "completed")


@pytest.fixture
def table(slurm: SlurmRig, sshd: SshRig, workdir: Path, home: Path, tmp_path: Path) -> Iterator[Table]:
    project = tmp_path / "project"
    project.mkdir()
    near = Cluster(name="here", workdir=str(workdir), poll_floor=0.3)
    yield Table(slurm, cluster_at(sshd, workdir), near, project)
    connections.close_all()


@only_in_full
def test_every_end_that_can_be_caused(table: Table, capfd: pytest.CaptureFixture[str]) -> None:
    # Those on n1 are side by side; on n2 one node's fate follows another.
    beside = [many(table), by_our_verb(table), by_hand(table), unlaunched(table)]
    with ThreadPoolExecutor(len(beside)) as pool:
        going = [pool.submit(each) for each in beside]
        try:
            for act in (late, preempted, node_down):
                act(table)
            for each in going:
                each.result(180.0)
        except BaseException:
            table.slurm.run(["scancel", "--me"])  # whatever follows them comes to an end
            raise
    if not table.slurm.memory_limits:
        NEVER["out of memory (OUT_OF_MEMORY)"] = "this machine has no control groups by which Slurm holds memory"
    show(capfd, str(table))
    assert not table.wrong, "\n".join(table.wrong)

"""The local default: the same array script, run here, under one supervisor."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexa_infra.errors import SubmitError
from nexa_infra.runs.attempts import TaskState
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, read_submissions, trials_of
from nexa_infra.scheduling import supervisor
from nexa_infra.scheduling.arguments import pack_rounds, script_arguments
from nexa_infra.scheduling.arrays import Throttle
from nexa_infra.scheduling.base import Admission, Queue
from nexa_infra.scheduling.needs import lacking_here
from nexa_infra.scheduling.script import warns
from nexa_infra.spec.job import SlurmJob


@dataclass
class LocalScheduler:
    """Runs arrays on this machine; they end when their client does.

    `kill_wait` is the time between TERM and KILL, in seconds.
    """

    kill_wait: float = 3.0
    patience: float = 14400.0

    def submit(self, run: Run, submission: Submission) -> Submission | None:
        """Start a supervisor for the array; see `Scheduler.submit`."""
        directory = run.files
        sweep_up(directory)
        job = run.config.job
        gpus = visible_gpus()
        limit = job.walltime.total_seconds() if job.walltime else None
        if limit is not None and submission.pack > 1:  # the script holds each of its trials to the limit
            limit = pack_rounds(job, submission.pack) * limit + 60
        order = {
            "script": str(directory.script),
            "arguments": script_arguments(submission),
            "environment": _environment(run, submission),
            "tasks": submission.tasks,
            "parallel": parallelism(job, gpus),
            "throttle": str(directory.throttle),
            "side_by_side": job.trials_at_once,
            "walltime": limit,
            "warning": job.warning_seconds if warns(run.config) and submission.pack == 1 else None,
            "signal": job.warning_signal,
            "kill_wait": self.kill_wait,
            "gpus": gpus if len(gpus) >= job.gpus else [],
            "gpus_per_task": job.gpus,
            "cancelled": str(directory.cancelled),
            "journal": str(_journal(directory, submission.number)),
            "lock": str(_lock(directory)),
            "log": str(directory.log),
        }
        client = os.pidfd_open(os.getpid())
        try:
            started = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(client)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[client],
                start_new_session=True,
                cwd="/",
                text=True,
            )
        finally:
            os.close(client)
        answer = _hand_over(started, order)
        if "array" not in answer:
            raise SubmitError(f"run {run.id} is already being run here by another client: wait for it, or cancel it")
        _followed[run.id] = started
        return replace(submission, job_id=str(answer["array"]))

    def check(self, run: Run) -> Admission:
        """Ask for what can be known before a trial runs; see `Scheduler.check`."""
        if wrong := lacking_here(run, _inherited()):
            told = "".join(f"\n  {each}" for each in wrong)
            raise SubmitError(f"this machine cannot run {run.config.job.name}; nothing was copied or started:{told}")
        return Admission()

    def prepare(self, run: Run) -> None:
        """See `Scheduler.prepare`: it is where it was made."""

    def submit_together(self, run: Run, submissions: Sequence[Submission]) -> list[Submission]:  # noqa: ARG002
        """See `Scheduler.submit_together`: no run here has more than one array at a time."""
        return []

    def leave(self, run: Run) -> None:
        """See `Scheduler.leave`: nothing here waits."""

    def settle(self, run: Run, submission: Submission) -> Submission | None:  # noqa: ARG002
        """See `Scheduler.settle`: a client that was killed has ended what it started."""
        return None

    def reopen(self, run: Run) -> None:
        """See `Scheduler.reopen`."""
        run.files.cancelled.unlink(missing_ok=True)
        run.files.reopened.touch()

    def bring(self, run: Run) -> None:
        """See `Scheduler.bring`: it is here."""

    def bring_words(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """See `Scheduler.bring_words`: they are here."""

    def bring_ranks(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """See `Scheduler.bring_ranks`: they are here."""

    def publish(self, run: Run) -> None:
        """See `Scheduler.publish`: it is there."""

    def ends(self, run: Run) -> Mapping[tuple[int, int], str]:
        """See `Scheduler.ends`: by the supervisors' journals; trials that share a task say it themselves."""
        found: dict[tuple[int, int], str] = {}
        for submission in read_submissions(run.files):
            if submission.pack > 1:
                continue
            ends = _read_tasks(_journal(run.files, submission.number), active=False)
            for task, [asked] in enumerate(trials_of(run, submission)):
                if task in ends and ends[task][2] is not None:
                    found[asked] = ends[task][0]
        return found

    def failures(self, run: Run) -> Sequence[tuple[str, float]]:  # noqa: ARG002
        """See `Scheduler.failures`: this machine does not go away alone."""
        return ()

    def close(self, run: Run) -> bool:
        """See `Scheduler.close`: what a supervisor has not started goes with it."""
        return not is_supervised(run.files)

    def counts(self, run: Run) -> Mapping[str, int]:  # noqa: ARG002
        """See `Scheduler.counts`: nobody is asked."""
        return {}

    def throttle(self, run: Run, changes: Sequence[Throttle]) -> None:
        """See `Scheduler.throttle`: the supervisor reads a person's word itself."""

    def keep_steward(self, run: Run) -> None:
        """See `Scheduler.keep_steward`: no run here has one, for it ends with its client."""

    def keep_throttle(self, run: Run, word: str) -> None:
        """See `Scheduler.keep_throttle`."""
        write_atomically(run.files.throttle, f"{word}\n")

    def poll(self, run: Run, *, fresh: bool = False) -> Queue:  # noqa: ARG002
        """Read the newest journal; see `Scheduler.poll`."""
        directory = run.files
        active = is_supervised(directory)
        journals = _journals(directory)
        if not journals:
            return Queue(active)
        return _read_journal(journals[-1], active)

    def tasks(self, run: Run) -> dict[int, TaskState]:
        """Say how each trial's newest array task stands; see `Scheduler.tasks`."""
        directory = run.files
        active = is_supervised(directory)
        found: dict[int, TaskState] = {}
        for submission in read_submissions(directory):
            ends = _read_tasks(_journal(directory, submission.number), active)
            for task, trials in enumerate(trials_of(run, submission)):
                if (said := ends.get(task)) is not None:
                    found |= {trial: TaskState(attempt, *said) for trial, attempt in trials}
        return found

    def cancel(self, run: Run) -> None:
        """Tell the supervisor to end its tasks, and wait for it; see `Scheduler.cancel`."""
        directory = run.files
        stop_supervisor(directory, patience=self.kill_wait + 3.0)
        sweep_up(directory)
        if (started := _followed.pop(run.id, None)) is not None:
            started.wait()

    def ends_with_client(self, run: Run) -> bool:
        """Say whether this process started the run's supervisor; see `Scheduler.ends_with_client`."""
        started = _followed.get(run.id)
        return started is not None and started.poll() is None


# The supervisors that this process started, kept so that they are reaped.
_followed: dict[str, subprocess.Popen[str]] = {}


def parallelism(job: SlurmJob, gpus: list[str]) -> int:
    """Return how many trials run at once here: as the job says, else as many as cores and GPUs allow."""
    at_once = job.array_parallelism or max(1, len(os.sched_getaffinity(0)) // job.cores)
    if job.gpus and len(gpus) >= job.gpus:
        at_once = min(at_once, len(gpus) // job.gpus)
    return at_once


def visible_gpus() -> list[str]:
    """Return this machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def is_supervised(directory: RunDirectory) -> bool:
    """Say whether a supervisor of the run lives: it holds a lock as long as it does."""
    try:
        with _lock(directory).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def stop_supervisor(directory: RunDirectory, *, patience: float) -> None:
    """End the run's supervisor: TERM, then, after `patience` seconds, KILL."""
    deadline = time.monotonic() + patience
    number = signal.SIGTERM
    while is_supervised(directory):
        for pid in _holders(directory):
            supervisor.send(pid, number)
        while is_supervised(directory) and time.monotonic() < deadline:
            time.sleep(0.02)
        deadline, number = time.monotonic() + 1.0, signal.SIGKILL


def sweep_up(directory: RunDirectory) -> None:
    """End what a killed supervisor left: processes that carry the run's directory in their environment."""
    if is_supervised(directory):
        return
    mark = f"NEXA_RUN_DIR={directory.path}".encode()
    while found := _marked(mark):
        supervisor.kill(found)
        time.sleep(0.02)


def _marked(mark: bytes) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and mark in supervisor.environment_of(pid) and not _zombie(pid)]


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except (OSError, IndexError):
        return True


def _holders(directory: RunDirectory) -> list[int]:
    """Return the processes that have the run's lock open and are supervisors."""
    lock = _lock(directory)
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(supervisor.__file__) in words and any(
                entry.readlink() == lock for entry in (path / "fd").iterdir()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _hand_over(started: subprocess.Popen[str], order: dict[str, Any]) -> dict[str, Any]:
    """Send the order, and read the answer; the supervisor goes on without these pipes."""
    stdin, stdout, stderr = started.stdin, started.stdout, started.stderr
    if stdin is None or stdout is None or stderr is None:
        raise SubmitError("the supervisor has no pipes")
    try:
        with stdin:
            json.dump(order, stdin)
        line = stdout.readline()
        if not line:
            raise SubmitError(f"the supervisor could not start: {stderr.read()[-2000:].strip()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
    except BrokenPipeError as error:
        raise SubmitError(f"the supervisor could not start: {stderr.read()[-2000:].strip()}") from error
    finally:
        stdout.close()
        stderr.close()


def _inherited() -> dict[str, str]:
    """Return what tasks take from the client's own environment; its interpreter comes first."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    return {**inherited, "PATH": path}


def _environment(run: Run, submission: Submission) -> dict[str, str]:
    """Return the environment of every task: the client's own, and what Slurm would set."""
    job = run.config.job
    node = socket.gethostname()
    last = submission.tasks - 1
    slurm = {
        "JOB_NAME": submission.token,
        "ARRAY_TASK_COUNT": submission.tasks,
        "ARRAY_TASK_MIN": 0,
        "ARRAY_TASK_MAX": last,
        "JOB_NODELIST": node,
        "NODELIST": node,
        "JOB_NUM_NODES": 1,
        "NNODES": 1,
        "NODEID": 0,
        "NTASKS": job.ntasks_per_node,
        "PROCID": 0,
        "LOCALID": 0,
        "CPUS_PER_TASK": job.cpus_per_task,
        "CPUS_ON_NODE": job.cores,
        "SUBMIT_DIR": run.directory,
        "SUBMIT_HOST": node,
    }
    return {
        **_inherited(),
        **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
        "SLURMD_NODENAME": node,
        "NEXA_SCHEDULER": "local",
        "NEXA_RUN_DIR": run.directory,
    }


def _lock(directory: RunDirectory) -> Path:
    return directory.submissions / "supervisor.lock"


def _journal(directory: RunDirectory, number: int) -> Path:
    return directory.submissions / f"{number}.journal"


def _journals(directory: RunDirectory) -> list[Path]:
    found = directory.submissions.glob("*.journal")
    return sorted(found, key=lambda path: int(path.stem))


def _read_tasks(path: Path, active: bool) -> dict[int, tuple[str, int | None, float | None]]:
    """Return each task's state, exit code and end; what an ended supervisor left open was interrupted."""
    found: dict[int, tuple[str, int | None, float | None]] = {}
    for words in _journal_lines(path):
        match words:
            case ["array", _, count]:
                found = dict.fromkeys(range(int(count)), ("PENDING", None, None))
            case ["start", task, _]:
                found[int(task)] = ("RUNNING" if active else "INTERRUPTED", None, None)
            case ["end", task, state, code, moment]:
                found[int(task)] = (state, int(code), float(moment))
    return found


def _read_journal(path: Path, active: bool) -> Queue:
    tasks = started = 0
    ended: dict[str, int] = {}
    for words in _journal_lines(path):
        match words:
            case ["array", _, count]:
                tasks = int(count)
            case ["start", _, _]:
                started += 1
            case ["end", _, state, _, _]:
                ended[state] = ended.get(state, 0) + 1
    over = sum(ended.values())
    return Queue(active, pending=tasks - started, running=started - over if active else 0, ended=ended)


def _journal_lines(path: Path) -> list[list[str]]:
    """Return the words of a journal's whole lines; one that a full disk tore is no line yet."""
    text = path.read_text() if path.exists() else ""
    return [line.split("\t") for line in text[: text.rfind("\n") + 1].splitlines()]

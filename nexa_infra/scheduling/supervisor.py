"""Runs an array of local tasks and ends every descendant of them; the standard library alone.

Started by `scheduling.local` as a script, in a session of its own: it reads one JSON object on
standard input, answers with one JSON line, and then lives until its tasks are over, its client has
gone, or it gets TERM. It is a child subreaper, so a process that double-forks or leaves its session
becomes its child and is ended with the rest. What it saw is appended to its journal:
`array <id> <tasks>`, `start <task> <time>`, `end <task> <state> <exit code> <time>`, `over`, tab-separated.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """The tasks of one array: those that wait, those that run, and how they end."""

    def __init__(self, order: dict[str, Any], client: int) -> None:
        """`order` is what `scheduling.local` sent; `client` is a pidfd of the client."""
        self.script: str = order["script"]
        self.arguments: list[str] = order["arguments"]
        self.environment: dict[str, str] = order["environment"]
        self.tasks: int = order["tasks"]
        self.parallel: int = order["parallel"]
        self.throttle: str = order["throttle"]  # a file with a person's word on that
        self.side_by_side: int = order["side_by_side"]  # trials of one task that run at once
        self.walltime: float | None = order["walltime"]
        self.warning: float | None = order["warning"]  # seconds before the walltime
        self.signal = signal.Signals[f"SIG{order['signal']}"]  # by which it is told
        self.kill_wait: float = order["kill_wait"]
        self.gpus: list[str] = order["gpus"]
        self.gpus_per_task: int = order["gpus_per_task"]
        self.marker: str = order["cancelled"]
        self.array = time.time_ns() // 1000
        self.client = client
        self.next = 0
        self.running: dict[int, int] = {}  # pid -> task
        self.granted: dict[int, list[str]] = {}  # task -> GPUs
        self.deadlines: dict[int, float] = {}  # pid -> moment of its next signal
        self.warnings: dict[int, float] = {}  # pid -> moment of its warning
        self.timed_out: set[int] = set()
        self.stopping: str | None = None
        self.stop_deadline = 0.0
        self.journal = os.open(order["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, *words: object) -> None:
        """Append a line to the journal, in one write."""
        os.write(self.journal, ("\t".join(str(word) for word in words) + "\n").encode())

    def run(self, wakeup: int) -> None:
        """Run the tasks to their end; `wakeup` is where signals are announced."""
        self.note("array", self.array, self.tasks)
        while True:
            self._reap()
            while not self.stopping and self.next < self.tasks and len(self.running) < self._most():
                self._start(self.next)
                self.next += 1
            if not self.running:
                break
            watched = [wakeup, self.client] if self.client >= 0 else [wakeup]
            ready, _, _ = select.select(watched, [], [], self._patience())
            told = wakeup in ready and signal.SIGTERM in os.read(wakeup, 4096)
            if told or self.client in ready:
                self._stop()
            self._enforce()
        end_descendants(max(0.0, self.stop_deadline - time.monotonic()))
        self.note("over")

    def _most(self) -> int:
        """Return how many tasks may run at once."""
        try:
            with open(self.throttle) as stream:  # noqa: PTH123 - a program that starts fast
                word = stream.read().strip()
        except OSError:
            return self.parallel
        room = len(self.gpus) // self.gpus_per_task if self.gpus_per_task and self.gpus else self.parallel
        return max(1, int(word) // self.side_by_side) if word.isdigit() and int(word) else max(room, self.parallel)

    def _start(self, task: int) -> None:
        environment = dict(self.environment)
        environment["SLURM_ARRAY_JOB_ID"] = str(self.array)
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
        environment["SLURM_JOB_ID"] = str(self.array + task)
        if self.gpus_per_task and self.gpus:
            self.granted[task] = [self.gpus.pop(0) for _ in range(self.gpus_per_task)]
            environment["CUDA_VISIBLE_DEVICES"] = environment["SLURM_JOB_GPUS"] = ",".join(self.granted[task])
        self.note("start", task, f"{time.time():.6f}")
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                # Should the supervisor be killed, the script hears TERM and passes it on.
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(143)
                for number in (signal.SIGTERM, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, [])
                os.execve("/bin/bash", ["bash", self.script, *self.arguments], environment)  # noqa: S606
            finally:
                os._exit(127)
        self.running[pid] = task
        if self.walltime is not None:
            self.deadlines[pid] = time.monotonic() + self.walltime
            if self.warning is not None:
                self.warnings[pid] = self.deadlines[pid] - self.warning

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            task = self.running.pop(pid, None)
            if task is None:
                continue
            self.deadlines.pop(pid, None)
            self.warnings.pop(pid, None)
            self.gpus.extend(self.granted.pop(task, ()))
            self._end_left_behind(task)
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            if task in self.timed_out:
                state = "TIMEOUT"
            else:
                state = self.stopping or ("COMPLETED" if code == 0 else "FAILED")
            self.note("end", task, state, code, f"{time.time():.6f}")

    def _end_left_behind(self, task: int) -> None:
        """End what a task left running: Slurm ends a job's processes with the job."""
        mark = f"SLURM_JOB_ID={self.array + task}".encode()
        for pid in children(os.getpid()):
            if pid not in self.running and mark in environment_of(pid):
                kill([pid, *descendants(pid)])

    def _stop(self) -> None:
        if self.stopping is None:
            self.stopping = "CANCELLED" if os.path.exists(self.marker) else "INTERRUPTED"  # noqa: PTH110
            self.stop_deadline = time.monotonic() + self.kill_wait
            self.client = -1
            for pid in self.running:
                send(pid, signal.SIGTERM)

    def _enforce(self) -> None:
        now = time.monotonic()
        if self.stopping and now >= self.stop_deadline:
            kill(descendants(os.getpid()))
            self.stop_deadline = now + 0.1
        for pid, moment in list(self.warnings.items()):
            if now >= moment:
                del self.warnings[pid]
                send(pid, self.signal)
        for pid, moment in list(self.deadlines.items()):
            if now < moment:
                continue
            task = self.running[pid]
            if task in self.timed_out:
                kill([*descendants(pid), pid])
                del self.deadlines[pid]
            else:
                self.timed_out.add(task)
                self.deadlines[pid] = now + self.kill_wait
                send(pid, signal.SIGTERM)

    def _patience(self) -> float:
        moments = [*self.deadlines.values(), *self.warnings.values()] + ([self.stop_deadline] if self.stopping else [])
        wait = min(moments) - time.monotonic() if moments else 1.0
        return min(max(wait, 0.0), 1.0)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as stream:  # noqa: PTH123
            return [int(word) for word in stream.read().split()]
    except FileNotFoundError:
        return [other for other, parent in _parents().items() if parent == pid]
    except (ProcessLookupError, PermissionError):
        return []


def descendants(pid: int) -> list[int]:
    """Return every descendant of a process, nearest first."""
    below: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        below.setdefault(parent, []).append(child)
    found: list[int] = []
    queue = [pid]
    while queue:
        nearest = below.get(queue.pop(0), [])
        found.extend(nearest)
        queue.extend(nearest)
    return found


def environment_of(pid: int) -> list[bytes]:
    """Return a process's environment, as it was when its program started."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:  # noqa: PTH123
            return stream.read().split(b"\0")
    except OSError:
        return []


def kill(pids: list[int]) -> None:
    """Send KILL to processes."""
    for pid in pids:
        send(pid, signal.SIGKILL)


def end_descendants(grace: float) -> None:
    """End every descendant of this process: TERM, `grace` seconds later KILL, until none is left."""
    deadline = time.monotonic() + grace
    told = False
    while _alive():
        left = descendants(os.getpid())
        if time.monotonic() >= deadline:
            kill(left)
        elif not told:
            told = True
            for pid in left:
                send(pid, signal.SIGTERM)
        time.sleep(0.01)


def _alive() -> bool:
    """Reap what has ended; return whether a child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stream:  # noqa: PTH123
                    found[int(name)] = int(stream.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue
    return found


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Take the order, answer, run it."""
    order = json.load(sys.stdin)
    lock = os.open(order["lock"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _answer({"error": "locked"})
        return 1
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    supervisor = Supervisor(order, int(sys.argv[1]))
    _answer({"array": supervisor.array})
    os.dup2(os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 1)
    os.dup2(1, 2)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    supervisor.run(reader)
    return 0


if __name__ == "__main__":
    sys.exit(main())

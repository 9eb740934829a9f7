"""Daemons in the foreground, each recorded by process id and start time, and what else runs for them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deployments.environment import SetupError
from deployments.processes import MARK, Process


@dataclass(frozen=True)
class Daemon:
    """One daemon: its output is in `<folder>/<name>.log`, its record in `<folder>/<name>.json`.

    Unlike `deployments.processes.Service`, starting and stopping it leaves alone what it has started:
    slurmd's jobs outlive slurmd.
    """

    name: str
    folder: Path
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What the daemon prints."""
        return self.folder / f"{self.name}.log"

    @property
    def mark(self) -> str:
        """The value of NEXA_SERVICE that the daemon and its children inherit."""
        return f"{self.folder.resolve()}/{self.name}"

    @property
    def process(self) -> Process | None:
        """The process that was recorded at the start, if it still runs."""
        try:
            record = json.loads((self.folder / f"{self.name}.json").read_text())
            found = Process(record["pid"], record["started"], record["boot"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if found.alive else None

    def start(self) -> None:
        """Start the daemon, unless it runs."""
        if self.process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            started = subprocess.Popen(
                self.argv,
                cwd=self.folder,
                env={**self.environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _children.append(started)
        if process := Process.of(started.pid):
            record = {"pid": process.pid, "started": process.started, "boot": process.boot}
            draft = self.folder / f"{self.name}.new"
            draft.write_text(json.dumps(record))
            draft.replace(self.folder / f"{self.name}.json")

    def await_ready(self, ready: Callable[[], bool], *, patience: float = 30.0) -> None:
        """Wait until the daemon does its work.

        Raises:
            SetupError: it ended, or `patience` seconds went by; the message ends with its last words.
        """
        deadline = time.monotonic() + patience
        while not ready():
            if self.process is None or time.monotonic() > deadline:
                what = "ended" if self.process is None else f"was not ready after {patience:g} s"
                told = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise SetupError(f"{self.name} {what}; {self.log} ends with:\n{told}")
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """Send the daemon, and nobody else, a signal."""
        if process := self.process:
            process.send(number)

    def stop(self, *, patience: float = 10.0) -> None:
        """End the daemon by SIGTERM, by SIGKILL after `patience` seconds; its children are left."""
        if process := self.process:
            process.send(signal.SIGCONT)  # one that a test has stopped would not hear
            process.send(signal.SIGTERM)
            if not _gone([process], patience):
                end([process])

    def kill(self) -> None:
        """End the daemon by SIGKILL; its children are left."""
        if process := self.process:
            end([process])


# Children of this process: asked now and then, so that none stays a zombie.
_children: list[subprocess.Popen[bytes]] = []


def _gone(processes: Iterable[Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(process.alive for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    _children[:] = [child for child in _children if child.poll() is None]
    return True


def end(processes: Sequence[Process]) -> None:
    """End these processes by SIGKILL, and wait until they have gone (5 seconds at most)."""
    for process in processes:
        process.send(signal.SIGKILL)
    _gone(processes, 5.0)


def environments() -> Iterator[tuple[Process, Mapping[str, str]]]:
    """Yield the processes whose environment can be read, without this one and those that it descends from."""
    own, ancestor = set(), os.getpid()
    while ancestor > 0 and (process := Process.of(ancestor)):
        own.add(ancestor)
        ancestor = process.parent
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        try:
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        if found := Process.of(int(entry.name)):
            yield found, dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def command_of(process: Process) -> str:
    """Return the name of the program that a process runs; empty when it has ended."""
    try:
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(of: Process) -> list[Process]:
    """Return the children of a process, and theirs."""
    everyone = [Process.of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found, parents = [], {of.pid}
    while layer := [process for process in everyone if process and process.parent in parents]:
        found += layer
        parents = {process.pid for process in layer}
    return found


def sweep(wanted: Callable[[Mapping[str, str]], bool]) -> None:
    """End every process whose environment is wanted, and those that it starts meanwhile."""
    for _ in range(20):
        if not (found := [process for process, environment in environments() if wanted(environment)]):
            return
        end(found)


def put(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Make a file hold this text, if it does not: nobody who reads it meanwhile finds half of it."""
    if path.exists() and path.read_text() == text:
        return
    draft = path.with_name(f"{path.name}.new")
    draft.touch(mode=mode)
    draft.chmod(mode)
    draft.write_text(text)
    draft.replace(path)


# Of so many processes.
_SHARES = 16


def free_ports(count: int) -> list[int]:
    """Choose ports on which nothing listens, below those that the kernel gives to clients.

    They stay free while a daemon is away: the kernel takes none of them for a connection of somebody's. Of the
    processes of one test run, each has ports of its own.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.randrange(15000 + number % _SHARES, 30000, _SHARES)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in chosen:
            chosen.append(port)
    return chosen


def listens(port: int) -> bool:
    """Say whether something answers on this port of the loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0

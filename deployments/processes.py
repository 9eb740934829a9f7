"""Processes that outlive the command that started them: started, recorded, found again, and stopped by id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Every process of a service inherits this variable, so that those which left its session are found as well.
MARK = "NEXA_SERVICE"


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one with the same id by when it started."""

    pid: int
    started: int  # clock ticks since the machine's start
    boot: str
    parent: int = field(default=0, compare=False)

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Look a process up; `None` where there is none, or only its zombie."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The command's name stands in parentheses and may hold anything: fields count from the last one.
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]), boot_id(), int(fields[1]))

    @property
    def alive(self) -> bool:
        """Whether this very process runs."""
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


def boot_id() -> str:
    """Return what tells this start of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Service:
    """A process in a session of its own, with its output in `<name>.log` and its record in `<name>.json`."""

    name: str
    folder: Path

    @property
    def log(self) -> Path:
        """What the service prints."""
        return self.folder / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def _mark(self) -> str:
        return f"{self.folder.resolve()}/{self.name}"

    def running(self) -> dict[str, str] | None:
        """Return the facts that were recorded at the start; `None` if the service does not run."""
        found = self._read()
        return found[1] if found and found[0].alive else None

    def _read(self) -> tuple[Process, dict[str, str]] | None:
        try:
            record = json.loads(self._record.read_text())
            return Process(record["pid"], record["started"], record["boot"]), record["facts"]
        except (OSError, ValueError, TypeError, KeyError):
            return None  # none, or one that was cut short: the mark still finds the process

    def start(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], facts: Mapping[str, str]) -> None:
        """Start the service, ending first what an unrecorded start left behind.

        Raises:
            OSError: the program cannot be started.
        """
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            started = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**env, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if process := Process.of(started.pid):
            record = {"pid": process.pid, "started": process.started, "boot": process.boot, "facts": dict(facts)}
            draft = self._record.with_suffix(".new")
            draft.write_text(json.dumps(record))
            draft.replace(self._record)

    def stop(self, grace: float = 15.0) -> bool:
        """End the service and all that it started; say whether there was anything to end.

        Its children are asked first, and then itself, each given `grace` seconds: so a worker's runs
        can still tell the server how they ended. Then the rest is asked; what is left after five
        seconds more is killed.
        """
        found = self._read()
        leaders = [found[0]] if found and found[0].alive else []
        children = [process for process in self._marked() if leaders and process.parent == leaders[0].pid]
        asked = 0
        for group, patience in ((children, grace), (leaders, grace), (self._marked(), 5.0)):
            asked += _ask_to_end(list(group), patience)
        while stubborn := list(self._marked()):
            for process in stubborn:
                process.send(signal.SIGKILL)
            _wait(stubborn, 1.0)
        self._record.unlink(missing_ok=True)
        return asked > 0

    def _marked(self) -> Iterator[Process]:
        """Yield the processes that inherited the service's mark."""
        wanted = f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            process = Process.of(int(entry.name))
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue  # ended meanwhile, or another user's
            if process and wanted in environment.split(b"\0"):
                yield process

    def last_words(self, lines: int = 20) -> str:
        """Return the end of the service's output."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def _ask_to_end(processes: Sequence[Process], seconds: float) -> int:
    for process in processes:
        process.send(signal.SIGTERM)
    _wait(processes, seconds)
    return len(processes)


def _wait(processes: Sequence[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)

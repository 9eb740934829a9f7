"""What every host can do: run a command, start one, move files; and how a command that failed is told of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from nexa_infra.errors import HostError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Completed:
    """A command that has ended."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    def check(self) -> Completed:
        """Return this, or raise `HostError` with the command's own last words where it failed."""
        if self.returncode:
            words = self.stderr.strip() or self.stdout.strip() or "it said nothing"
            raise HostError(f"{self.argv[0]} ended with {self.returncode}: {words[-2000:]}")
        return self


class ConnectionLostError(HostError):
    """The connection ended before the answer was whole: whether what was asked was done is not known."""


class UnreachableError(HostError):
    """The host, or the way to it, is away: trying again later may help."""


def retried(ask: Callable[[], Answer], tries: int = 4) -> Answer:
    """Ask what is safe to ask again until its answer comes whole.

    Raises:
        ConnectionLostError: it never did.
    """
    for left in reversed(range(tries)):
        try:
            return ask()
        except ConnectionLostError:
            if not left:
                raise
    raise AssertionError("there is a last try")


def check_started(program: str, code: int, said: str, where: str, cwd: Path | None = None) -> None:
    """Raise `HostError` where a shell or env(1) says that there is no such program, or no such folder."""
    last = said.rstrip().rpartition("\n")[2]
    if code == 126 and cwd is not None and "cd: " in last:
        raise HostError(f"the folder {cwd} is not there, or may not be entered, {where}")
    if code in {126, 127} and (f"exec: {program}: " in last or (last.startswith("env: ") and program in last)):
        raise HostError(f"{program} is not installed {where}" if code == 127 else f"{program} cannot be run {where}")


def check_streamed(program: str, code: int, said: str, where: str) -> None:
    """Raise `HostError` where a long-lived command did not end of its own will, with 0."""
    if not code:
        return
    check_started(program, code, said, where)
    if code > 128:
        raise HostError(f"{program} was ended {where} by signal {code - 128}")
    raise HostError(f"{program} ended with {code} {where}: {said.strip()[-2000:] or 'it said nothing'}")


class Host(Protocol):
    """A machine on which commands are run; a command is a list, quoted once, at the edge."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def remote(self) -> bool:
        """Whether its files are others than this machine's."""

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float | None = None,
    ) -> Completed:
        """Run a command to its end; `env` is added to the host's own.

        `timeout` is how long it may be silent, in seconds. What it leaves in the background is not waited for.

        Raises:
            ConnectionLostError: the answer never came whole; the command may or may not have run.
            HostError: the command could not be started, or was silent for too long.
        """

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script by `/bin/sh`, in one round trip; `timeout` is how long it may be silent, in seconds.

        Nothing is on its standard input, and what it leaves in the background is not waited for.

        Raises:
            ConnectionLostError: the answer never came whole; the script may or may not have run.
            HostError: the host could not be reached; the script has not run.
        """

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Generator[bytes, None, None]:
        """Yield what a long-lived command, such as `tail -f`, prints; it ends when the iterator is closed.

        Where it prints nothing for `every` seconds, nothing (`b""`) is yielded.

        Raises:
            ConnectionLostError: the connection was cut.
            HostError: it could not be started, or it failed.
        """

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source` to `destination`, one of which may be `there(path)`; `stdin` is for `--files-from=-`.

        Raises:
            ConnectionLostError: the connection was cut; what was copied is there, and copying again goes on from it.
            HostError: rsync is missing, or failed.
        """

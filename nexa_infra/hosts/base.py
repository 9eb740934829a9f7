"""What every host can do: run a command, start one, move files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nexa_infra.errors import HostError


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
        """Run a command to its end; `env` is added to the host's own, `timeout` is in seconds.

        Raises:
            HostError: the command could not be started, or did not end in time.
        """

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script by `/bin/sh`, in one round trip; `timeout` is how long it may be silent, in seconds.

        Raises:
            ConnectionLostError: the answer never came whole; the script may or may not have run.
            HostError: the host could not be reached; the script has not run.
        """

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Iterator[bytes]:
        """Yield what a long-lived command, such as `tail -f`, prints; it ends with the iterator.

        Where it prints nothing for `every` seconds, nothing (`b""`) is yielded.

        Raises:
            HostError: it could not be started, or its connection was cut.
        """

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source` to `destination`, one of which may be `there(path)`; `stdin` is for `--files-from=-`.

        Raises:
            HostError: rsync is missing, or failed.
        """

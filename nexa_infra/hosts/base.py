"""What every host can do: run a command, start one, move files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Host(Protocol):
    """A machine on which commands are run; a command is a list, quoted once, at the edge."""

    name: str

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

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source`, here, to `destination`, there; `stdin` is for `--files-from=-`.

        Raises:
            HostError: rsync is missing, or failed.
        """

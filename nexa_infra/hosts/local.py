"""The machine at hand."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed

_PIECE = 1 << 16


class LocalHost:
    """Commands by subprocess, copies by rsync, all on this machine."""

    name = "this machine"
    remote = False

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float | None = None,
    ) -> Completed:
        """Run a command to its end; see `Host.run`."""
        try:
            done = subprocess.run(
                list(argv),
                cwd=cwd,
                env={**os.environ, **env} if env else None,
                input=stdin if stdin is not None else "",
                capture_output=True,
                text=True,
                errors="surrogateescape",
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError as error:
            what = f"the folder {cwd} is not there" if cwd and not cwd.is_dir() else f"{argv[0]} is not installed here"
            raise HostError(f"{what} (asked for: {' '.join(argv)[:200]})") from error
        except OSError as error:
            raise HostError(f"{argv[0]} could not be started here: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise HostError(f"{argv[0]} did not end within {timeout} s here") from error
        return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script by `/bin/sh`; see `Host.script`."""
        return self.run(["/bin/sh", "-s"], stdin=text, timeout=timeout)

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Iterator[bytes]:
        """Yield what a long-lived command prints; see `Host.stream`."""
        try:
            started = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            raise HostError(f"{argv[0]} could not be started here: {error.strerror}") from error
        try:
            descriptor = started.stdout.fileno() if started.stdout else -1
            while True:
                if not select.select([descriptor], [], [], every)[0]:
                    yield b""
                elif piece := os.read(descriptor, _PIECE):
                    yield piece
                else:
                    return
        finally:
            started.kill()
            started.wait()
            if started.stdout:
                started.stdout.close()

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""
        return path

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source` to `destination`; see `Host.rsync`."""
        try:
            self.run(["rsync", *options, "--", source, destination], stdin=stdin).check()
        except HostError as error:
            if "not installed" in str(error):
                raise HostError("rsync is not installed here: apt-get install rsync (or your system's own)") from error
            raise

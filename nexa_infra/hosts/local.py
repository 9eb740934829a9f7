"""The machine at hand."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed


class LocalHost:
    """Commands by subprocess, copies by rsync, all on this machine."""

    name = "local"

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

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source` to `destination`; see `Host.rsync`."""
        try:
            self.run(["rsync", *options, "--", source, destination], stdin=stdin).check()
        except HostError as error:
            if "not installed" in str(error):
                raise HostError("rsync is not installed here: apt-get install rsync (or your system's own)") from error
            raise

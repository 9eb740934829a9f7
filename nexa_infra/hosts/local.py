"""The machine at hand."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import IO

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed, check_streamed
from nexa_infra.hosts.framing import alone
from nexa_infra.hosts.transfer import complaint

_PIECE = 1 << 16
# How often it is asked whether a command has ended whose output something else still holds, seconds.
_LOOK = 0.05


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
        started = _start(argv, cwd=cwd, env={**os.environ, **env} if env else None, stdin=subprocess.PIPE)
        with started:
            try:
                told, complained = _converse(started, (stdin or "").encode("utf-8", "surrogateescape"), timeout)
            except TimeoutError as error:
                raise HostError(f"{argv[0]} has said nothing for {timeout:g} s here, and was ended") from error
            finally:
                started.kill()
        return Completed(
            tuple(argv),
            started.returncode,
            told.decode("utf-8", "surrogateescape"),
            complained.decode("utf-8", "surrogateescape"),
        )

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        """Run a POSIX script by `/bin/sh`; see `Host.script`."""
        done = self.run(["/bin/sh", "-s"], stdin=alone(text), timeout=timeout)
        return Completed(("sh", "-s"), done.returncode, done.stdout, done.stderr)

    def stream(self, argv: Sequence[str], *, every: float = 0.5) -> Generator[bytes, None, None]:
        """Yield what a long-lived command prints; see `Host.stream`."""
        complaints = bytearray()
        with _start(argv, stdin=subprocess.DEVNULL) as started, selectors.DefaultSelector() as waiting:
            try:
                for stream in _outputs(started):
                    waiting.register(stream, selectors.EVENT_READ)
                while _outputs(started)[0].fileno() in waiting.get_map():
                    ready = waiting.select(every)
                    told = b""
                    for key, _ in ready:
                        if not (piece := os.read(key.fd, _PIECE)):
                            waiting.unregister(key.fileobj)
                        elif key.fileobj is started.stdout:
                            told = piece
                        else:
                            complaints += piece
                            del complaints[:-2000]
                    if told or not ready:
                        yield told
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(5.0)
                code = started.poll() or 0
            finally:
                started.kill()
        check_streamed(argv[0], 128 - code if code < 0 else code, complaints.decode("utf-8", "replace"), "here")

    def there(self, path: str) -> str:
        """Return a path on this host, as `rsync` wants it."""
        return path

    def rsync(self, source: str, destination: str, *, options: Sequence[str] = (), stdin: str | None = None) -> None:
        """Copy `source` to `destination`; see `Host.rsync`."""
        try:
            done = self.run(["rsync", *options, "--", source, destination], stdin=stdin)
        except HostError as error:
            if "not installed" in str(error):
                raise HostError("rsync is not installed here: apt-get install rsync (or your system's own)") from error
            raise
        if done.returncode:
            raise HostError(complaint(done.returncode, done.stderr.strip()))


def _start(
    argv: Sequence[str], *, stdin: int, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(argv), cwd=cwd, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    except FileNotFoundError as error:
        what = f"the folder {cwd} is not there" if cwd and not cwd.is_dir() else f"{argv[0]} is not installed here"
        raise HostError(f"{what} (asked for: {' '.join(argv)[:200]})") from error
    except OSError as error:
        raise HostError(f"{argv[0]} could not be started here: {error.strerror}") from error


def _outputs(started: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if started.stdout is None or started.stderr is None:
        raise ValueError("its output is not read")
    return started.stdout, started.stderr


def _converse(started: subprocess.Popen[bytes], told: bytes, patience: float | None) -> tuple[bytearray, bytearray]:
    """Give a command its input, and return what it printed until it ended: others may hold its output for longer.

    Raises:
        TimeoutError: nothing came for `patience` seconds.
    """
    printed = {stream.fileno(): bytearray() for stream in _outputs(started)}
    left = memoryview(told)
    heard = time.monotonic()
    with selectors.DefaultSelector() as waiting:
        for descriptor in printed:
            waiting.register(descriptor, selectors.EVENT_READ)
        if stdin := started.stdin:
            os.set_blocking(stdin.fileno(), False)
            waiting.register(stdin, selectors.EVENT_WRITE)
        while waiting.get_map():
            ended = started.poll() is not None
            ready = waiting.select(0 if ended else _LOOK)
            if not ready and ended:
                break
            if not ready and patience is not None and time.monotonic() - heard >= patience:
                raise TimeoutError
            for key, _ in ready:
                heard = time.monotonic()
                if stdin is not None and key.fileobj is stdin:
                    try:
                        left = left[os.write(key.fd, left[:_PIECE]) :] if left else left
                    except BrokenPipeError:
                        left = memoryview(b"")
                    if not left:
                        waiting.unregister(stdin)
                        stdin.close()
                elif piece := os.read(key.fd, _PIECE):
                    printed[key.fd] += piece
                else:
                    waiting.unregister(key.fd)
    try:
        started.wait(patience)  # it may have closed its output before
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    told_by, complained = printed.values()
    return told_by, complained

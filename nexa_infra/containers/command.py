"""A container by a runtime's command line, through the script that jobs use as well: Apptainer, Singularity."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nexa_infra.containers.docker import GRACE, Ended, Ending, Hear
from nexa_infra.containers.script import CONTAINER_CONF, CONTAINER_SCRIPT, GUARD, container_conf, shell_text
from nexa_infra.errors import ContainerError
from nexa_infra.runs.record import Container
from nexa_infra.settings import settings

# How container.sh ends where no program has run: EX_UNAVAILABLE and its kin, of sysexits.h.
_REFUSED = range(64, 79)


def run_by_script(
    container: Container,
    argv: Sequence[str],
    *,
    workdir: Path,
    directory: Path,
    identity: str,
    env: Mapping[str, str],
    hear: Hear,
    gpus: int = 0,
    timeout: float | None = None,
    stop: threading.Event | None = None,
) -> Ending:
    """Run a program in a container to its end, in a session of its own that ends with this process.

    Raises:
        ContainerError: the runtime is not there, or the image could not be had; the message holds its words.
    """
    _write(container, directory, identity, gpus)
    begun = time.time()
    with _started(directory, "run", argv, workdir, {**env, "NEXA_CONTAINER_NAMES": ""}) as process:
        ended, said = _follow(process, hear, timeout, stop or threading.Event())
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if ended == "exited" and code in _REFUSED and said.startswith("container.sh: "):
        raise ContainerError(said.removeprefix("container.sh: ").strip())
    return Ending(code, ended, time.time() - begun)


def fetch_by_script(directory: Path, *, stdin: bytes = b"", stop: threading.Event | None = None) -> tuple[int, str]:
    """Let the container.sh in `directory` bring its image; return its exit code, and what it says.

    What is on its standard input is a registry's login. `stop`, once set, ends it; so does the end of this process.
    """
    said = bytearray()
    env = {"NEXA_REGISTRY_LOGIN": "-"} if stdin else {}
    with _started(directory, "fetch", (), directory, env, stdin) as process:
        _follow(process, lambda _, data: said.extend(data), None, stop or threading.Event())
    return process.returncode, said.decode(errors="replace")


@contextmanager
def _started(
    directory: Path, verb: str, argv: Sequence[str], workdir: Path, env: Mapping[str, str], stdin: bytes = b""
) -> Iterator[subprocess.Popen[bytes]]:
    """Start container.sh in a session of its own, which ends with this block, and with this process."""
    lease, held = os.pipe()
    try:
        process = subprocess.Popen(
            ["bash", str(directory / CONTAINER_SCRIPT), verb, *argv],
            cwd=workdir,
            env={**os.environ, **env, "NEXA_LEASE": str(lease)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[lease],
            start_new_session=True,
        )
    finally:
        os.close(lease)
    try:
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin)
        yield process
    finally:
        os.close(held)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write(container: Container, directory: Path, identity: str, gpus: int) -> None:
    cache = settings().home.expanduser().resolve() / "images"
    lines = container_conf(container, run_id=identity, cache=str(cache), gpus=gpus)
    texts = {CONTAINER_CONF: "".join(f"{line}\n" for line in lines)}
    texts |= {name: shell_text(name) for name in (CONTAINER_SCRIPT, GUARD)}
    # Nobody else reads them, and nobody after a crash: no disk is waited for.
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="")


def _follow(
    process: subprocess.Popen[bytes], hear: Hear, timeout: float | None, stop: threading.Event
) -> tuple[Ended, str]:
    """Hear a process to its end; return how it ended, and the last of what container.sh itself said."""
    deadline = None if timeout is None else time.monotonic() + timeout
    ended: Ended = "exited"
    said = ""
    kill_at: float | None = None
    with selectors.DefaultSelector() as streams:
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                streams.register(stream, selectors.EVENT_READ, name)
        while streams.get_map() and not (process.poll() is not None and not streams.select(0)):
            for key, _ in streams.select(0.1):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    streams.unregister(key.fileobj)
                    continue
                hear(key.data, data)
                if key.data == "stderr":
                    said = _last_of_ours(said + data.decode(errors="replace"))
            now = time.monotonic()
            if ended == "exited" and (stop.is_set() or (deadline is not None and now >= deadline)):
                ended = "cancelled" if stop.is_set() else "timeout"
                kill_at = now + GRACE
                _signal(process, signal.SIGTERM)
            elif kill_at is not None and now >= kill_at:
                _signal(process, signal.SIGKILL)
                kill_at = None
        process.wait()
    return ended, said


def _last_of_ours(text: str) -> str:
    at = text.rfind("container.sh: ")
    return text[at:][-4000:] if at >= 0 else text[-20:]


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)

"""Docker, by its own SDK: an image brought by digest, a container run to its end, and nothing of it left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexa_infra.containers import reaper
from nexa_infra.containers.script import GUARD, shell_text
from nexa_infra.errors import ContainerError
from nexa_infra.runs.record import Container
from nexa_infra.spec.container import Mount, size_bytes

if TYPE_CHECKING:
    import docker
    from docker.errors import APIError

# What a program has said: its stream, and whole bytes as they came.
Hear = Callable[[Literal["stdout", "stderr"], bytes], None]
Ended = Literal["exited", "out_of_memory", "timeout", "cancelled"]
# Between TERM and KILL, seconds.
GRACE = 10.0
LABEL = "nexa.run"
# Where the engine listens, unless DOCKER_HOST names another place.
SOCKET = Path("/var/run/docker.sock")
# What a container is called that has no network.
_ALONE = "nexa"


@dataclass(frozen=True)
class Ending:
    """How a container has ended."""

    exit_code: int  # 128 + N for signal N
    ended: Ended
    seconds: float


def connect(host: str | None = None) -> docker.DockerClient:
    """Return a client of Docker's engine, DOCKER_HOST's or the usual one, once it has answered.

    Raises:
        ContainerError: it does not answer; the message says where it was looked for.
    """
    import docker
    from docker.errors import DockerException

    try:
        client = docker.DockerClient(base_url=host) if host else docker.from_env()
        client.ping()
    except (DockerException, OSError) as error:
        where = host or os.environ.get("DOCKER_HOST") or f"unix://{SOCKET}"
        why = _silence(str(error))
        raise ContainerError(
            f"Docker's engine does not answer at {where} ({why}): start it, set DOCKER_HOST, or choose another runtime"
        ) from error
    return client


def _silence(words: str) -> str:
    """Say in a word why an engine is silent, where the SDK's words hold it."""
    known = {
        "FileNotFoundError": "there is no socket",
        "PermissionError": "this account may not use its socket: is it in the group docker?",
        "ConnectionRefusedError": "nothing listens there",
    }
    return next((told for name, told in known.items() if name in words), words)


def is_remote(client: docker.DockerClient) -> bool:
    """Say whether an engine is reached over a network, so that its files are others than this machine's."""
    return str(client.api.base_url) != "http+docker://localhost"


def own_image(client: docker.DockerClient, name: str) -> str | None:
    """Return the id of an image that was built where the engine is; None of one that is not there, or was pulled."""
    from docker.errors import ImageNotFound

    try:
        found = client.api.inspect_image(name)
    except ImageNotFound:
        return None
    # One that came from a registry is pinned as that registry has it; one that was pushed elsewhere is still our own.
    name = name.partition(":")[0]
    pulled = any(str(each).partition("@")[0] == name for each in found.get("RepoDigests") or ())
    return None if pulled else str(found["Id"])


def run(
    client: docker.DockerClient,
    container: Container,
    argv: Sequence[str],
    *,
    mounts: Sequence[Mount],
    workdir: str,
    env: Mapping[str, str],
    labels: Mapping[str, str],
    name: str,
    hear: Hear,
    gpus: int = 0,
    timeout: float | None = None,
    stop: threading.Event | None = None,
) -> Ending:
    """Run a program in a container to its end, hearing what it says; the container is removed however that comes.

    `timeout` is in seconds, after which it is ended: TERM, then KILL; `stop`, once set, ends it likewise. Where this
    process is killed, the engine sees the container's standard input close, and its first process ends it all; one
    that has not started yet is removed by a reaper.

    Raises:
        ContainerError: the engine refuses, or went away meanwhile.
    """
    from docker.errors import APIError, DockerException

    begun = time.time()
    api = client.api
    with _reaped(client, name) as runs:
        try:
            made = api.create_container(
                container.image,
                ["-c", shell_text(GUARD), "nexa", *argv],
                entrypoint=["/bin/sh"],
                environment=dict(env),
                labels=dict(labels),
                working_dir=workdir,
                user=f"{os.getuid()}:{os.getgid()}",
                name=name,
                hostname=_ALONE if container.settings.network in {None, "none"} else None,
                stdin_open=True,
                host_config=_host_config(client, container, mounts, gpus),
            )
        except (DockerException, OSError) as error:
            raise ContainerError(f"Docker refuses a container of {container.asked}: {words_of(error)}") from error
        watched = _Watched(client, made["Id"], timeout, stop)
        try:
            connection = api.attach_socket(made["Id"], params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            try:
                watched.start()
                runs()
                for stream, data in _frames(connection):
                    hear(stream, data)
            finally:
                connection.close()
            code = watched.end()
        except APIError as error:
            raise ContainerError(_refusal(container, words_of(error), gpus)) from error
        except (DockerException, OSError) as error:
            raise ContainerError(f"Docker's engine went away while {container.asked} ran: {error}") from error
        finally:
            watched.close()
    ended = watched.why or ("out_of_memory" if code == 137 and _ran_out(client, name, begun) else "exited")
    if ended == "exited" and code in {137, 143}:
        _check_stays(client, container)
    return Ending(code, ended, time.time() - begun)


def remove(client: docker.DockerClient, identity: str) -> None:
    """End and remove a container; one that is gone already is fine."""
    from docker.errors import APIError

    with suppress(APIError):  # it is gone, or going
        client.api.remove_container(identity, force=True, v=True)


@contextmanager
def _reaped(client: docker.DockerClient, name: str) -> Iterator[Callable[[], None]]:
    """Have a container removed, should this process be killed before it says that the container runs.

    That is for an engine whose socket is here.
    """
    path = getattr(client.api.get_adapter(client.api.base_url), "socket_path", None)
    if path is None:
        yield lambda: None
        return
    with subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(path), name],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    ) as process:  # fmt: skip

        def runs() -> None:
            if process.stdin is not None and not process.stdin.closed:
                with suppress(OSError), process.stdin:
                    process.stdin.write(b"r")

        try:
            yield runs
        except Exception:
            runs()
            raise
        # Any other end, such as Ctrl-C in the middle of a request, is for the reaper.
        runs()


class _Watched:
    """A container that runs: ended when its time is over, its caller says so, or leaves by an error."""

    def __init__(self, client: Any, identity: str, timeout: float | None, stop: threading.Event | None) -> None:
        self.why: Literal["timeout", "cancelled"] | None = None
        self._client, self._id, self._timeout = client, identity, timeout
        self._stop = stop or threading.Event()
        self._code: int | None = None
        self._problem: Exception | None = None
        self._over = threading.Event()
        self._waiter = threading.Thread(target=self._wait, name="nexa-container", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="nexa-container-end", daemon=True)

    def start(self) -> None:
        """Start the container, and watch it."""
        self._client.api.start(self._id)
        self._waiter.start()
        self._keeper.start()

    def _wait(self) -> None:
        try:
            # A request of its own, which the engine answers once the container is gone.
            answer = self._client.api.wait(self._id, timeout=None, condition="removed")
            self._code = int(answer["StatusCode"])
        except Exception as error:  # noqa: BLE001 - told by `end`, in the caller's thread
            self._problem = error
        finally:
            self._over.set()

    def _keep(self) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._over.is_set():
            if self._stop.is_set():
                self.why = "cancelled"
            elif deadline is not None and time.monotonic() >= deadline:
                self.why = "timeout"
            if self.why is not None:
                self._end()
                return
            self._over.wait(0.1)

    def _end(self) -> None:
        for signal, patience in (("TERM", GRACE), ("KILL", 30.0)):
            with suppress(Exception):  # it has ended meanwhile, or the engine is away: `end` says so
                self._client.api.kill(self._id, signal)
            if self._over.wait(patience):
                return

    def end(self) -> int:
        """Return its exit code, once the engine has removed it."""
        self._over.wait()
        if self._code is not None:
            return self._code
        from docker.errors import NotFound

        if isinstance(self._problem, NotFound):
            return 137  # it was removed before it could be asked for
        raise OSError(str(self._problem))

    def close(self) -> None:
        """Leave nothing of it, however its caller left."""
        if not self._over.is_set():
            remove(self._client, self._id)
        self._over.set()


def _frames(connection: Any) -> Iterator[tuple[Literal["stdout", "stderr"], bytes]]:
    """Yield what a container says, by its stream."""
    from docker.utils.socket import frames_iter

    with suppress(AttributeError):
        connection._sock.settimeout(None)  # the SDK has no other way to wait for ever
    for number, data in frames_iter(connection, tty=False):
        yield ("stderr" if number == 2 else "stdout"), data


def _host_config(client: Any, container: Container, mounts: Sequence[Mount], gpus: int) -> Any:
    from docker.types import DeviceRequest, LogConfig
    from docker.types import Mount as Bind

    settings = container.settings
    memory = size_bytes(settings.memory) if settings.memory else None
    amd = gpus > 0 and Path("/dev/kfd").exists()
    return client.api.create_host_config(
        auto_remove=True,
        mounts=[Bind(each.target, each.source, type="bind", read_only=each.read_only) for each in mounts],
        network_mode=settings.network or "none",
        # Without a network its own name would lead nowhere, and programs that look it up would wait.
        extra_hosts={_ALONE: "127.0.0.1"} if settings.network in {None, "none"} else None,
        shm_size=size_bytes(settings.shm_size) if settings.shm_size else None,
        mem_limit=memory,
        memswap_limit=memory,
        nano_cpus=int(settings.cpus * 1e9) if settings.cpus else None,
        pids_limit=settings.processes,
        group_add=[str(group) for group in os.getgroups()],
        security_opt=["no-new-privileges"],
        log_config=LogConfig(type="none"),
        devices=["/dev/kfd", "/dev/dri"] if amd else None,
        device_requests=[DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus and not amd else None,
    )


def _ran_out(client: Any, name: str, since: float) -> bool:
    """Say whether the kernel ended something in the container for its memory.

    On a busy machine the engine hears of it a moment after the end.
    """
    with suppress(Exception):  # then its exit code is all that is known
        for wait in (0.0, 0.2, 0.2, 0.2, 0.2):
            time.sleep(wait)
            events = client.api.events(
                since=since, until=time.time(), decode=True, filters={"container": name, "event": "oom"}
            )
            if any(True for _ in events):
                return True
    return False


def _check_stays(client: Any, container: Container) -> None:
    """Notice an engine that is being stopped: it ends its containers first, and answers on for a moment."""
    from docker.errors import DockerException

    try:
        for _ in range(10):
            client.ping()
            time.sleep(0.2)
    except (DockerException, OSError) as error:
        raise ContainerError(f"Docker's engine was stopped while {container.asked} ran: {error}") from error


def _refusal(container: Container, words: str, gpus: int) -> str:
    """Say why Docker could not start a container."""
    if gpus and ("device driver" in words or "nvidia-container-cli" in words):
        return (
            f"{gpus} GPUs are asked for, and Docker's engine has none to give: it needs an NVIDIA GPU and the NVIDIA "
            f"container toolkit ({words})"
        )
    if '"/bin/sh"' in words:
        return f"the image {container.asked} has no /bin/sh, by which a container is ended with its caller: add a shell"
    return f"Docker could not run {container.asked}: {words}"


def words_of(error: Exception | APIError) -> str:
    """Return the engine's own words where an error holds them."""
    return str(getattr(error, "explanation", None) or error)

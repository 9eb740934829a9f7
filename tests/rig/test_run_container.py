"""run_container on a real dockerd, and the Prefect task over it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.containers import credentials
from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.credentials import Credentials
from nexa_infra.containers.runner import ContainerResult, run_container
from nexa_infra.errors import ConfigError, ContainerError
from nexa_infra.spec.container import Mount
from tests.conftest import PrefectServer
from tests.rig.boxed import COMPARES, HOSTILE, HOSTILE_NAME, hostile_mounts, left_of, pushed
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.proxy import wait
from tests.rig.registry import RegistryRig

DEAF = "trap '' TERM HUP; (setsid sleep 1103 &); echo up; while :; do sleep 0.2; done"


@pytest.fixture(autouse=True)
def workspace(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a file."""
    folder = tmp_path / "work space"
    folder.mkdir()
    (folder / "file").write_text("code\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def catalog(docker: DockerRig, busybox_image: Image) -> Catalog:
    """A catalog of one target, which says where it is and what it was told."""
    return Catalog.model_validate(
        {"targets": {"shell": {"image": docker.load(busybox_image), "command": ["sh", "-c", 'echo "$@"', "shell"]}}}
    )


def ran(catalog: Catalog, script: str, *args: str, **more: Any) -> ContainerResult:
    return run_container("shell", command=["sh", "-c", script, "shell"], bootstrap_args=args, catalog=catalog, **more)


def test_a_result_says_all_that_became_of_it(docker: DockerRig, catalog: Catalog, home: Path) -> None:
    done = run_container("shell", bootstrap_args=["-n", "two words", "$(id)"], catalog=catalog, run_id="a1")
    assert (done.run_id, done.target, done.runtime) == ("a1", "shell", "docker")
    assert (done.exit_code, done.ended, done.ok) == (0, "exited", True)
    assert done.stdout == "two words $(id)" and done.stderr == ""
    assert done.digest == docker.must("images", "--no-trunc", "--quiet", "nexa-rig/busybox:1").strip()
    assert done.image == done.digest
    assert done.directory == home / "containers" / "a1"
    assert (done.directory / "stdout.log").read_text() == done.stdout
    assert 0 < done.seconds < 30 and done.check() is done
    assert left_of(docker, "a1", done.directory) == []


def test_a_bad_end_is_an_error_that_holds_the_last_words(docker: DockerRig, catalog: Catalog) -> None:
    done = ran(catalog, "echo out; echo no such layer >&2; exit 7")
    assert (done.exit_code, done.ended, done.ok, done.stderr) == (7, "exited", False, "no such layer\n")
    with pytest.raises(ContainerError, match=r"the container of shell ended with 7 .*: no such layer"):
        done.check()


def test_memory_and_time_are_told_apart(docker: DockerRig, catalog: Catalog) -> None:
    hungry = ran(catalog, "dd if=/dev/zero of=/dev/null bs=200M count=1; exit $?", memory="32M")
    assert (hungry.exit_code, hungry.ended) == (137, "out_of_memory")
    slow = ran(catalog, "trap 'echo told; exit 4' TERM; echo up; while :; do sleep 0.1; done", timeout=0.5)
    assert (slow.exit_code, slow.ended, slow.stdout) == (4, "timeout", "up\ntold\n")
    with pytest.raises(ContainerError, match="longer timeout"):
        slow.check()
    killed = ran(catalog, "kill -KILL $$")
    assert (killed.exit_code, killed.ended) == (137, "exited")


def test_a_program_that_hears_no_term_is_killed(
    docker: DockerRig, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexa_infra.containers.docker.GRACE", 0.5)
    done = ran(catalog, DEAF, timeout=0.5)
    assert (done.exit_code, done.ended) == (137, "timeout")
    assert left_of(docker, done.run_id, done.directory) == []


def test_what_it_says_is_heard_line_by_line_while_it_runs(docker: DockerRig, catalog: Catalog, tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []
    script = 'for n in 1 2 3; do echo "line $n"; done; until [ -e "$NEXA_RUN_DIR/go" ]; do sleep 0.05; done; printf end'
    output = tmp_path / "out"
    running = threading.Thread(
        target=lambda: ran(catalog, script, output_dir=output, tell=lambda *told: heard.append(told))
    )
    running.start()
    wait(lambda: heard == [("stdout", f"line {n}") for n in (1, 2, 3)])
    (output / "go").touch()
    running.join(30)
    assert heard[3:] == [("stdout", "end")]


def test_a_stop_ends_it(docker: DockerRig, catalog: Catalog) -> None:
    stop = threading.Event()
    done = ran(catalog, "echo up; exec sleep 1104", stop=stop, tell=lambda *_: stop.set())
    assert (done.exit_code, done.ended) == (143, "cancelled")
    assert left_of(docker, done.run_id, done.directory) == []


def test_it_sees_the_workspace_read_only_and_its_mounts_and_no_network(
    docker: DockerRig, catalog: Catalog, workspace: Path, tmp_path: Path
) -> None:
    (data := tmp_path / "data").mkdir()
    (data / "kept").write_text("kept\n")
    script = """
pwd; cat file; touch file 2>/dev/null && echo written
cat /data/kept; touch /data/new 2>/dev/null && echo written
ls /sys/class/net; echo "$A"; id -u; touch "$NEXA_RUN_DIR/output"; echo "$0"
"""
    done = ran(catalog, script, mounts=[Mount(source=str(data), target="/data")], extra_env={"A": "a\nb"})
    assert done.stdout.splitlines() == [str(workspace), "code", "kept", "lo", "a", "b", str(os.getuid()), "shell"]
    assert (done.directory / "output").stat().st_uid == os.getuid()
    with_network = ran(catalog, "ls /sys/class/net", network="host")
    assert set(with_network.stdout.split()) == {path.name for path in Path("/sys/class/net").iterdir()}


def test_it_carries_the_label_of_its_run(docker: DockerRig, catalog: Catalog) -> None:
    labels: list[str] = []

    def look(*_: str) -> None:
        labels.append(docker.must("ps", "--filter", "label=nexa.run=a2", "--format", "{{.Names}}").strip())

    ran(catalog, "echo up; sleep 1", run_id="a2", tell=look)
    assert labels == ["nexa-a2"]


def test_another_image_runs_in_its_place(docker: DockerRig, catalog: Catalog, python_image: Image) -> None:
    done = run_container(
        "shell", override_image=docker.load(python_image), catalog=catalog,
        command=["python3", "-c", "print(6 * 7)"],
    )  # fmt: skip
    assert done.stdout == "42\n"


def test_hostile_values_arrive_as_they_are(
    docker: DockerRig, catalog: Catalog, python_image: Image, tmp_path: Path
) -> None:
    (workspace := tmp_path / "work" / HOSTILE_NAME).mkdir(parents=True)
    env = {f"BOX_{number}": value for number, value in enumerate(HOSTILE)}
    mounts = [Mount.model_validate(each) for each in hostile_mounts(tmp_path)]
    output = tmp_path / "out" / HOSTILE_NAME
    expected = {"env": env, "mounts": [each.target for each in mounts], "args": HOSTILE, "home": str(output)}
    (workspace / "expected.json").write_text(json.dumps(expected))
    done = run_container(
        "shell", override_image=docker.load(python_image), catalog=catalog, command=["python3", "-c", COMPARES],
        bootstrap_args=HOSTILE, extra_env=env, mounts=mounts, workspace=workspace, output_dir=output,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("different 0\n", "")


def test_an_image_of_a_registry_is_pulled_by_its_digest_with_a_login(
    docker: DockerRig, catalog: Catalog, registry: RegistryRig, busybox_image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    digest = pushed(docker, registry, busybox_image, "boxed:1", "mark")
    image = f"{registry.address}/boxed:1"
    credentials.remember(Credentials(registry.address, registry.user, "not-the-password"))
    with pytest.raises(ContainerError, match=f"{registry.address} refuses .* the login of rig") as refused:
        ran(catalog, "true", override_image=image)
    assert "not-the-password" not in str(refused.value)
    credentials.remember(Credentials(registry.address, registry.user, registry.password))
    done = ran(catalog, "ls /", override_image=image)
    assert "mark" in done.stdout.split()
    assert (done.image, done.digest) == (f"{registry.address}/boxed@{digest}", digest)
    with pytest.raises(ContainerError, match=f"{registry.address} has no .*look for the digest sha256:0+ there"):
        ran(catalog, "true", override_image=f"{registry.address}/boxed@sha256:{'0' * 64}")


def test_a_full_disk_is_said(
    docker: DockerRig, catalog: Catalog, registry: RegistryRig, busybox_image: Image, rig_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    pushed(docker, registry, busybox_image, "large:2", "large", mib=40)
    credentials.remember(Credentials(registry.address, registry.user, registry.password))
    with DockerRig(rig_folder / "d", disk_mib=32) as small:
        monkeypatch.setenv("DOCKER_HOST", small.host)
        for _ in range(2):
            with pytest.raises(ContainerError, match="the disk of Docker's engine is full, .* could not be pulled"):
                ran(catalog, "true", override_image=f"{registry.address}/large:2")
            assert small.must("images", "-aq") == "" and small.must("ps", "-aq") == ""


def test_what_makes_no_sense_is_said_and_starts_nothing(
    docker: DockerRig, catalog: Catalog, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"shel.*did you mean 'shell'"):
        run_container("shel", catalog=catalog)
    with pytest.raises(ConfigError, match=r"container.mounts: .*gone is not there: make it, or name another"):
        ran(catalog, "true", mounts=[Mount(source=str(tmp_path / "gone"), target="/data")])
    with pytest.raises(ConfigError, match=r"container.mounts|memory"):
        ran(catalog, "true", memory="much")
    with pytest.raises(ContainerError, match="GPU"):
        ran(catalog, "true", gpus=1)
    assert docker.must("ps", "-aq") == ""


def test_an_engine_that_cannot_be_reached_is_one_error(
    docker: DockerRig, catalog: Catalog, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(ContainerError, match="Docker's engine does not answer at unix:///nowhere/docker.sock"):
        ran(catalog, "true", runtime="docker")
    assert not home.exists()


@pytest.mark.parametrize("abruptly", [False, True], ids=["stopped", "killed"])
def test_an_engine_that_goes_away_in_mid_run_is_named(abruptly: bool, docker: DockerRig, catalog: Catalog) -> None:
    def leave(*_: str) -> None:
        threading.Thread(target=docker.kill if abruptly else docker.dockerd.stop).start()

    with pytest.raises(ContainerError, match="Docker's engine (went away|was stopped) while nexa-rig/busybox:1 ran"):
        ran(catalog, "echo up; exec sleep 1105", tell=leave, run_id="a3").check()
    docker.start()
    wait(lambda: docker.containers("a3") == [])
    assert ran(catalog, "echo again").stdout == "again\n"


CLIENT = """
import sys
from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.runner import run_container
catalog = Catalog.model_validate_json(sys.argv[1])
run_container("shell", command=["sh", "-c", sys.argv[2]], catalog=catalog, run_id="b1", output_dir=sys.argv[3])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "int"])
def test_a_client_that_is_ended_leaves_nothing(
    number: signal.Signals, docker: DockerRig, catalog: Catalog, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, catalog.model_dump_json(exclude_defaults=True), DEAF, str(output)],
        stderr=subprocess.DEVNULL,
    )
    log = output / "stdout.log"
    wait(lambda: log.exists() and log.read_text() == "up\n" and len(left_of(docker, "b1", output)) >= 3, within=30)
    began = time.monotonic()
    client.send_signal(number)
    client.wait(30)
    wait(lambda: left_of(docker, "b1", output) == [], within=30)
    assert time.monotonic() - began < 30


# Killed when the engine has made the container and not started it, and while the engine makes it.
BEFORE_IT_STARTS = """
import os
from nexa_infra.containers import docker
docker._Watched.start = lambda self: os.kill(os.getpid(), 9)
"""
WHILE_IT_IS_MADE = """
import os
from docker.api.client import APIClient
sent = APIClient.send
def send(self, request, **more):
    if not request.url.partition("?")[0].endswith("/containers/create"):
        return sent(self, request, **more)
    import threading
    threading.Thread(target=sent, args=(self, request), kwargs=more).start()
    import time
    time.sleep(0.005)
    os.kill(os.getpid(), 9)
APIClient.send = send
"""


@pytest.mark.parametrize("patch", [BEFORE_IT_STARTS, WHILE_IT_IS_MADE], ids=["before it starts", "while it is made"])
def test_a_client_that_is_killed_before_its_container_runs_leaves_nothing(
    patch: str, docker: DockerRig, catalog: Catalog, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for _ in range(3):
        argv = [sys.executable, "-c", patch + CLIENT, catalog.model_dump_json(exclude_defaults=True), DEAF, str(output)]
        assert subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
        time.sleep(0.3)  # what the engine was asked for, it may still be making
        wait(lambda: left_of(docker, "b1", output) == [], within=30)


# ---- Prefect ----

FLOW = """
import asyncio, sys
from prefect import flow
from nexa_infra.blocks import ImageCatalog
from nexa_infra.tasks import container_run

@flow(name="boxed")
async def boxed():
    catalog = ImageCatalog(targets=[{"name": "shell", "image": sys.argv[1]}])
    command = ["sh", "-c", sys.argv[2]]
    await container_run("shell", command=command, catalog=catalog, run_id="b2", output_dir=sys.argv[3])

asyncio.run(boxed())
"""


def logged(flow_run: object) -> set[tuple[int, str]]:
    """Return what Prefect's server has been told of a flow run: level and message."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    async def read() -> set[tuple[int, str]]:
        async with get_client() as client:
            found = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run])))
            return {(each.level, each.message) for each in found}

    return asyncio.run(read())


def test_what_a_container_says_is_in_prefects_log(
    prefect_server: PrefectServer, docker: DockerRig, catalog: Catalog
) -> None:
    from prefect import flow
    from prefect.runtime import flow_run

    from nexa_infra.blocks import ImageCatalog
    from nexa_infra.tasks import container_run

    shell = ImageCatalog.model_validate({"targets": [{"name": "shell", "image": catalog.targets["shell"].image}]})
    runs = []

    @flow(name="boxed")
    async def boxed(script: str) -> ContainerResult:
        runs.append(flow_run.id)
        return await container_run("shell", command=["sh", "-c", script], catalog=shell)

    done = asyncio.run(boxed("echo to out; echo to err >&2"))
    assert done.ok and done.stdout == "to out\n"
    wait(lambda: {(20, "to out"), (20, "to err")} <= logged(runs[0]))
    with pytest.raises(ContainerError, match="ended with 7"):
        asyncio.run(boxed("exit 7"))
    assert docker.must("ps", "-aq") == ""


@pytest.mark.parametrize("how", ["killed", "told to end"])
def test_a_flow_that_is_ended_leaves_no_container(
    how: str, prefect_server: PrefectServer, docker: DockerRig, catalog: Catalog, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    image = catalog.targets["shell"].image
    script = DEAF if how == "killed" else "echo up; exec sleep 1107"
    flow = subprocess.Popen([sys.executable, "-c", FLOW, image, script, str(output)], stderr=subprocess.DEVNULL)
    log = output / "stdout.log"
    wait(lambda: log.exists() and log.read_text() == "up\n", within=60)
    flow.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
    wait(lambda: left_of(docker, "b2", output) == [], within=30)
    flow.wait(30)


@pytest.mark.parametrize("where", ["in its process", "in Prefect"])
def test_a_flow_that_is_cancelled_leaves_no_container(
    where: str, prefect_server: PrefectServer, docker: DockerRig, catalog: Catalog, tmp_path: Path
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling

    from nexa_infra.blocks import ImageCatalog
    from nexa_infra.tasks import container_run

    shell = ImageCatalog.model_validate({"targets": [{"name": "shell", "image": catalog.targets["shell"].image}]})
    output = tmp_path / "out"

    @flow(name="boxed")
    async def boxed() -> None:
        running = asyncio.ensure_future(
            container_run(
                "shell", command=["sh", "-c", "echo up; exec sleep 1106"], catalog=shell, run_id="b3", output_dir=output
            )
        )
        await asyncio.to_thread(wait, lambda: (log := output / "stdout.log").exists() and log.read_text())
        if where == "in Prefect":
            async with get_client() as client:
                await client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
        else:
            running.cancel()
        await running

    with pytest.raises((asyncio.CancelledError, BaseExceptionGroup, ContainerError)):
        asyncio.run(boxed())
    assert left_of(docker, "b3", output) == []

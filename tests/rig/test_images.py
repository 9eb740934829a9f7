"""The images that deployments/ builds, built for real on a bare Debian; and the flow that runs in one of them."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.images.build import build, push, record
from deployments.services import DOCKER_PUSHED
from nexa_infra.containers.catalog import load_catalog
from tests.rig.daemons import free_ports
from tests.rig.docker import DockerRig
from tests.rig.images import debootstrap, kept
from tests.rig.registry import RegistryRig

if TYPE_CHECKING:
    from tests.conftest import PrefectServer

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deployments" / "images"
NAMES = ("train-light", "train-heavy", "infer")
# What Debian's older 3.11 needs, and this process's Python may not.
ELSEWHERE = ("async-timeout>=4.0.3", "setuptools>=77", "wheel")
# With venv the three images need no apt: only the flow's, later, waits for a mirror.
PACKAGES = ("ca-certificates", "python3", "python3-venv")


class Quiet(SimpleHTTPRequestHandler):
    """A folder over HTTP."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def wheels(requirements: Sequence[str], name: str) -> Path:
    """A package index with what builds install: containers know nothing of where this machine's pip looks."""

    def make(target: Path) -> None:
        loot = target / "loot"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(loot), "--prefer-binary"]
        done = subprocess.run([*command, *requirements], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        for file in loot.iterdir():
            project = re.sub(r"[-_.]+", "-", file.name.partition("-")[0]).lower()
            (target / "simple" / project).mkdir(parents=True, exist_ok=True)
            file.rename(target / "simple" / project / file.name)

    pins = [path.read_text() for path in sorted(IMAGES.glob("*/*.txt"))] if name == "images" else []
    recipe = json.dumps([sys.version, *requirements, *pins, (ROOT / "constraints.txt").read_text()])
    return kept(f"wheels-{name}", recipe, make)


@pytest.fixture(scope="module", autouse=True)
def _written() -> Iterator[None]:
    """Gigabytes are written here: on their way to the disk they would hold up the database of the next tests."""
    yield
    os.sync()


@pytest.fixture(scope="module")
def index(container_packages: None) -> Iterator[str]:
    """The address of an index with the packages of the three images."""
    files = [word for name in NAMES for word in ("--requirement", f"deployments/images/{name}/requirements.txt")]
    with Served(wheels(files, "images")) as address:
        yield address


@pytest.fixture(scope="module")
def flow_index(container_packages: None) -> Iterator[str]:
    """The address of an index with all that the project itself needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["examples"], *ELSEWHERE]
    with Served(wheels(["--constraint", "constraints.txt", *needed], "flow")) as address:
        yield address


class Served:
    """A folder, served on the loopback for the length of a block."""

    def __init__(self, folder: Path) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/simple/"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def debian(docker: DockerRig, container_packages: None) -> str:
    """A bare Debian with its Python, whole: the rig's own images have no apt, which the flow's image needs."""
    name = "nexa-rig/debian:1"
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            root = Path(folder) / "root"
            debootstrap(suite, PACKAGES, root)
            subprocess.run(["tar", "--numeric-owner", "-C", str(root), "-cf", str(target), "."], check=True)

    if docker.run(["image", "inspect", name]).returncode:
        docker.must("import", str(kept("debian.tar", f"{suite} {PACKAGES}", make)), name)
    return name


@pytest.fixture
def built(docker: DockerRig, debian: str, index: str) -> DockerRig:
    """The session's dockerd with the three images, whose later builds are its cache's.

    PyTorch is left out: its CPU build takes 30 seconds and 850 MB more, and its absence shows the argument at work.
    """
    arguments = [f"PIP_INDEX_URL={index}", "PIP_TRUSTED_HOST=127.0.0.1", "TORCH="]
    for name in NAMES:
        if docker.run(["image", "inspect", f"nexa-infra/{name}:0.1.0"]).returncode:
            own = arguments if name == "train-heavy" else arguments[:2]
            build([name], base=debian, arguments=own, network="host")
    return docker


def health(docker: DockerRig, name: str, *options: str) -> dict[str, object]:
    target = load_catalog(IMAGES / "catalog.yaml").targets[name]
    told = docker.must("run", "--rm", "--network=none", *options, target.image, *target.health)
    found = json.loads(told)
    assert isinstance(found, dict)
    return found


def pins(name: str) -> dict[str, str]:
    text = (IMAGES / name / "requirements.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_built_on_a_bare_debian_and_says_what_it_holds(built: DockerRig, name: str) -> None:
    told = health(built, name)

    packages = told["packages"]
    assert isinstance(packages, dict)
    assert packages["numpy"] == pins(name)["numpy"]
    assert set(packages.items()) <= set(pins(name).items())
    assert str(told["python"]).startswith("3.")
    assert (told["uid"], told["gid"]) == (1000, 1000)
    devices = told["devices"]
    assert isinstance(devices, dict)
    assert devices["cpu"] >= 1
    assert (devices["nvidia"], devices["amd"], devices["cuda_visible_devices"]) == (0, 0, None)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_holds_what_is_pinned_and_nothing_else(built: DockerRig, name: str) -> None:
    listed = built.must("run", "--rm", "--network=none", f"nexa-infra/{name}:0.1.0", "pip", "list", "--format=json")

    there = {each["name"].lower(): each["version"] for each in json.loads(listed)}
    assert there.keys() - {"pip", "setuptools"} == {each.lower() for each in pins(name)}
    assert "--build-arg" not in built.must("image", "inspect", f"nexa-infra/{name}:0.1.0")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_serves_any_user_with_a_home_in_scratch(built: DockerRig, name: str) -> None:
    options = ["--rm", "--network=none", "--user=12345:12345", "--env=HOME=/scratch"]
    script = "cd && touch there && python3 -c 'import numpy, os; print(os.getuid(), os.getcwd())'"

    told = built.must("run", *options, f"nexa-infra/{name}:0.1.0", "sh", "-c", script)

    assert told == "12345 /scratch\n"
    assert health(built, name, *options[2:])["uid"] == 12345


def test_the_server_answers_is_found_healthy_and_ends_when_it_is_asked(built: DockerRig, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def predict(x):\n    return [each * 2 for each in x]\n")
    tmp_path.chmod(0o755)
    [port] = free_ports(1)
    mounted = f"{tmp_path}:/workspace:ro"
    options = [
        "--detach",
        "--network=host",
        "--volume",
        mounted,
        f"--env=SERVE_PORT={port}",
        "--env=SERVE_HOST=127.0.0.1",
    ]
    container = built.must("run", *options, "nexa-infra/infer:0.1.0", "nexa-serve", "model:predict").strip()

    def ask(path: str, body: bytes | None = None) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=10) as answer:
            found = json.load(answer)
        assert isinstance(found, dict)
        return found

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert ask("/health") == {"status": "ok", "function": "model:predict"}
            break
        except OSError:
            time.sleep(0.1)
    assert ask("/predict", b"[1, 2]") == {"result": [2, 4]}
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask("/predict", b"5")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask("/predict", b"{")
    assert built.run(["exec", container, "nexa-serve", "--check"]).returncode == 0
    inspected = json.loads(built.must("image", "inspect", "nexa-infra/infer:0.1.0"))
    assert inspected[0]["Config"]["Healthcheck"]["Test"] == ["CMD", "nexa-serve", "--check"]
    begun = time.monotonic()
    built.must("stop", container)
    assert time.monotonic() - begun < 8
    assert built.must("inspect", "--format={{.State.ExitCode}}", container) == "0\n"


def test_a_function_that_is_not_there_is_named(built: DockerRig) -> None:
    done = built.run(["run", "--rm", "--network=none", "nexa-infra/infer:0.1.0", "nexa-serve", "model:predict"])

    assert done.returncode == 2
    assert "there is no module 'model' in /workspace" in done.stderr


def test_what_is_pushed_is_written_down_with_its_digest_and_pulled_by_it(
    built: DockerRig, registry: RegistryRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in registry.login.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "catalog.yaml"

    record(push(f"{registry.address}/team", ["infer"]), file)

    infer = load_catalog(file).targets["infer"]
    assert infer.image == f"{registry.address}/team/infer:0.1.0"
    name = f"{registry.address}/team/infer@{infer.digest}"
    built.must("rmi", infer.image)
    built.must("pull", name, more=registry.login)
    assert json.loads(built.must("run", "--rm", "--network=none", name, *infer.health))["uid"] == 1000


@pytest.fixture
def building(
    docker: DockerRig, registry: RegistryRig, debian: str, flow_index: str, monkeypatch: pytest.MonkeyPatch
) -> DockerRig:
    """The session's dockerd, and how the flow's image is to be built on it."""
    for name, value in registry.login.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEXA_REGISTRY", f"{registry.address}/team")
    monkeypatch.setenv("NEXA_BUILD_BASE", debian)
    monkeypatch.setenv("NEXA_BUILD_NETWORK", "host")
    monkeypatch.setenv("NEXA_BUILD_INDEX_URL", flow_index)
    monkeypatch.setenv("NEXA_BUILD_TRUSTED_HOST", "127.0.0.1")
    return docker


@pytest.mark.server
def test_a_sweep_s_flow_runs_in_a_container_of_a_pushed_image_and_leaves_none(
    building: DockerRig, registry: RegistryRig, prefect_server: PrefectServer
) -> None:
    prefect_server.services.deploy(DOCKER_PUSHED)
    # This engine has no bridge, and so no gateway that Prefect's worker could name.
    hosts = 'container_create_kwargs={"extra_hosts": {"host.docker.internal": "127.0.0.1"}}'
    small = json.dumps(["sweep.parameters.learning_rate=[1e-3]", "sweep.parameters.epochs=[1]", "job.name=inside"])

    command = [sys.executable, "-m", "prefect", "deployment", "run", "sweep/docker", "--watch"]
    done = subprocess.run(
        [*command, "--job-variable", hosts, "--param", f"overrides={small}"],
        env=prefect_server.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Flow run finished successfully" in done.stdout
    image = f"{registry.address}/team/nexa-infra-flow:0.1.0"
    script = "cat /runs/runs/*-inside-*/results.csv; stat -c %u /runs/runs/*-inside-*"
    told = building.must("run", "--rm", "--network=none", "--volume=nexa-runs:/runs", image, "sh", "-c", script)
    assert told.count("completed") == 2
    assert told.splitlines()[-1] == "1000"
    assert f"{image.rpartition(':')[0]}@sha256:" in building.must(
        "image", "inspect", "--format={{.RepoDigests}}", image
    )
    packages = json.loads(building.must("run", "--rm", "--network=none", image, "nexa-health"))["packages"]
    assert (packages["nexa-infra"], packages["prefect"]) == (version("nexa-infra"), version("prefect"))
    eventually_no_container(building)


def eventually_no_container(docker: DockerRig) -> None:
    deadline = time.monotonic() + 60
    while (left := docker.must("ps", "-aq").split()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []

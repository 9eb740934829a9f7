"""What `make` manages on a machine: services by id, the environment by stamps, packages by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deployments.environment import Environment, SetupError, install_packages
from deployments.processes import Process, Service
from deployments.services import DOCKER_HERE, DOCKER_PUSHED, HOST, LOCAL, Services, is_free

ROOT = Path(__file__).resolve().parents[2]
# Starts a grandchild in a session of its own, whose parent has gone; then waits, as told by its argument.
FAMILY = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
parent = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
parent += "; open(sys.argv[2], 'w').write(str(p.pid))"
subprocess.run([sys.executable, "-c", parent, code, sys.argv[1]], check=True)
time.sleep(600)
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service("family", tmp_path / "services")
    yield service
    service.stop(grace=0.1)


def start(service: Service, *argv: str) -> None:
    service.start([sys.executable, *argv], cwd=Path("/"), env=dict(os.environ), facts={"url": "here"})


def eventually(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_a_service_is_found_again_with_its_facts(service: Service) -> None:
    start(service, "-c", "import time; time.sleep(600)")

    assert Service(service.name, service.folder).running() == {"url": "here"}


def test_stopping_ends_descendants_that_left_the_session_and_ignore_term(service: Service, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    start(service, "-c", FAMILY, str(told))
    eventually(lambda: told.exists() and told.read_text())
    grandchild = Process.of(int(told.read_text()))
    assert grandchild is not None

    assert service.stop(grace=5) is True

    assert not grandchild.alive
    assert service.running() is None
    assert service.stop() is False


def test_a_process_that_was_given_a_dead_service_s_id_is_left_alone(service: Service) -> None:
    start(service, "-c", "pass")
    eventually(lambda: service.running() is None)
    with subprocess.Popen(["sleep", "600"]) as other:
        found = Process.of(other.pid)
        assert found is not None
        record = {"pid": found.pid, "started": found.started - 1, "boot": found.boot, "facts": {"url": "here"}}
        (service.folder / "family.json").write_text(json.dumps(record))

        assert service.running() is None
        assert service.stop() is False
        assert found.alive
        other.kill()


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": "x"}', None])
def test_a_service_whose_record_is_lost_is_stopped_all_the_same(service: Service, record: str | None) -> None:
    start(service, "-c", "import time; time.sleep(600)")
    path = service.folder / "family.json"
    process = Process.of(json.loads(path.read_text())["pid"])
    assert process is not None
    if record is None:
        path.unlink()
    else:
        path.write_text(record)

    assert service.running() is None
    assert service.stop(grace=5) is True
    assert not process.alive


def test_starting_again_leaves_one_process(service: Service) -> None:
    start(service, "-c", "import time; time.sleep(600)")
    first = Process.of(json.loads((service.folder / "family.json").read_text())["pid"])
    (service.folder / "family.json").unlink()

    start(service, "-c", "import time; time.sleep(600)")

    assert first is not None
    assert not first.alive
    assert service.running() is not None


def test_a_service_that_fails_leaves_its_last_words(service: Service) -> None:
    start(service, "-c", "raise SystemExit('no such luck')")

    eventually(lambda: service.running() is None)
    assert service.last_words() == "no such luck"


def test_a_port_in_use_is_not_free() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        port = other.getsockname()[1]
        other.listen()
        assert not is_free(port)
    assert is_free(port)


def test_services_do_not_see_a_person_s_own_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://elsewhere.example.org/api")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("MAKEFLAGS", "-j --jobserver-auth=3,4")
    monkeypatch.setenv("NO_PROXY", "example.org")

    found = Services(tmp_path, Path("/venv/bin/python")).environment("http://127.0.0.1:4207/api")

    assert found["PREFECT_API_URL"] == "http://127.0.0.1:4207/api"
    assert "PREFECT_API_KEY" not in found
    assert "MAKEFLAGS" not in found
    assert found["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert found["PATH"].startswith("/venv/bin:")


def test_a_prefect_toml_of_one_s_own_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "prefect.toml"
    own.write_text('[api]\nurl = "https://elsewhere.example.org/api"\n')

    Services(tmp_path, Path(sys.executable)).stop()

    assert "elsewhere" in own.read_text()


def test_a_server_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the disk is full\nexit 1\n")
    python.chmod(0o755)

    with pytest.raises(SetupError, match=r"(?s)did not start.*the disk is full"):
        Services(tmp_path, python).start_server(patience=20)


def test_one_command_at_a_time_changes_the_services(tmp_path: Path) -> None:
    services = Services(tmp_path, Path(sys.executable))
    attempt = ["flock", "--nonblock", str(services.home / "services.lock"), "true"]

    with services.lock():
        assert subprocess.run(attempt).returncode == 1
    assert subprocess.run(attempt).returncode == 0


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that setting up would run, which succeed without doing anything."""
    ran: list[list[str]] = []

    def record(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr("deployments.environment.subprocess.run", record)
    return ran


def test_a_ready_environment_runs_no_command(project: Path, commands: list[list[str]]) -> None:
    Environment(project).ensure(dev=True)
    assert [argv[-1] for argv in commands] == [".[dev,examples]"]
    commands.clear()

    Environment(project).ensure(dev=True)
    Environment(project).ensure()

    assert commands == []


def test_the_main_job_s_environment_grows_into_the_tests(project: Path, commands: list[list[str]]) -> None:
    Environment(project).ensure()
    Environment(project).ensure(dev=True)

    assert [argv[-1] for argv in commands] == [".[examples]", ".[dev,examples]"]


def test_pytorch_is_brought_when_it_is_asked_for_and_the_main_job_does_without(
    project: Path, commands: list[list[str]]
) -> None:
    Environment(project).ensure()
    assert not Environment(project).has_torch
    Environment(project).ensure(torch=True)
    Environment(project).ensure()

    assert [argv[-1] for argv in commands] == [".[examples]", ".[examples,torch]"]


def test_new_pins_are_installed_and_a_linter_s_settings_are_not(project: Path, commands: list[list[str]]) -> None:
    Environment(project).ensure()
    commands.clear()

    with (project / "pyproject.toml").open("a") as stream:
        stream.write("\n[tool.another]\nline-length = 80\n")
    Environment(project).ensure()
    assert commands == []

    with (project / "constraints.txt").open("a") as stream:
        stream.write("another==1.0\n")
    Environment(project).ensure()
    assert [argv[-1] for argv in commands] == [".[examples]"]


def test_a_moved_project_gets_a_new_environment(project: Path, commands: list[list[str]]) -> None:
    Environment(project).ensure()
    commands.clear()
    moved = project.rename(project.with_name("moved"))

    Environment(moved).ensure()

    assert commands[0][1:] == ["-m", "venv", "--clear", str(moved / ".venv")]


def test_missing_packages_are_named_with_the_command_where_root_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.environment.os.geteuid", lambda: 1000)

    with pytest.raises(SetupError) as caught:
        install_packages(["rsync", "shellcheck"])

    assert caught.value.exit_code == 2
    assert "sudo apt-get update && sudo apt-get install --yes --no-install-recommends rsync shellcheck" in str(
        caught.value
    )


def test_root_installs_what_is_missing_and_only_that(
    project: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.environment.os.geteuid", lambda: 0)
    monkeypatch.setattr(
        "deployments.environment.shutil.which", lambda name: None if name == "rsync" else f"/usr/bin/{name}"
    )

    Environment(project).ensure()

    [installed] = [argv for argv in commands if "install" in argv and argv[0] == "apt-get"]
    assert installed[-1] == "rsync"
    assert "shellcheck" not in installed


def test_a_machine_without_apt_get_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.environment.shutil.which", lambda name: None)

    with pytest.raises(SetupError, match="this machine lacks rsync: install them with its package manager"):
        install_packages(["rsync"])


def test_a_signal_to_a_process_that_has_ended_is_no_error() -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        process = Process.of(other.pid)
        other.kill()
    assert process is not None
    process.send(signal.SIGTERM)
    assert not process.alive


def deployments() -> dict[str, dict[str, Any]]:
    """What prefect.yaml deploys, by flow and name."""
    every = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]
    return {f"{each['entrypoint'].rpartition(':')[2]}/{each['name']}": each for each in every}


def test_each_deployment_is_made_with_its_pool_and_make_up_needs_no_docker() -> None:
    made = {
        pool: [name for name in deployments() if any(fnmatch(name, pattern) for pattern in pool.deployments)]
        for pool in (LOCAL, DOCKER_HERE, DOCKER_PUSHED)
    }

    assert made == {
        LOCAL: ["sweep/default", "sweep/slurm", "training/default", "training/slurm"],
        DOCKER_HERE: ["sweep/docker-here"],
        DOCKER_PUSHED: ["sweep/docker"],
    }
    for pool, names in made.items():
        assert {deployments()[name]["work_pool"]["name"] for name in names} == {pool.name}
        assert any("build" in deployments()[name] for name in names) == (pool.kind == "docker")


def test_the_flow_s_image_is_built_alike_with_a_registry_and_without() -> None:
    pushed, here = deployments()["sweep/docker"], deployments()["sweep/docker-here"]
    [[build]] = [step.values() for step in pushed["build"]]
    [[build_here]] = [step.values() for step in here["build"]]

    assert {**build, "image_name": "nexa-infra/flow"} == build_here
    assert (len(pushed["push"]), here["push"]) == (1, [])
    assert {**pushed["work_pool"]["job_variables"], "image_pull_policy": "Never"} == here["work_pool"]["job_variables"]
    for name in ("entrypoint", "parameters", "pull", "tags", "description"):
        assert pushed[name] == here[name]

"""Trials in Docker on the local default: a real dockerd and a real registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect_docker import DockerRegistryCredentials  # type: ignore[import-untyped]

from nexa_infra import launch_slurm_sweep
from nexa_infra.blocks.docker import credentials_of
from nexa_infra.containers import credentials
from nexa_infra.errors import ContainerError, RunFailedError
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.settings import settings
from tests.rig.boxed import HOSTILE_NAME, boxed_project, hostile_project, left_of, pushed
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig

MEASURES = ["sh", "-c", 'echo "{\\"loss\\": 0.$1}" > "$NEXA_METRICS"; ls /; echo "seed $1"', "trial"]
FAILS_ONCE = ["sh", "-c", 'ls /; [ "$NEXA_ATTEMPT" -gt 1 ]', "trial"]


@pytest.fixture(autouse=True)
def _own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own, and no login that another test has left."""
    monkeypatch.setattr(credentials, "_REMEMBERED", {})


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scratch folders of trials are made, which is empty once they are gone."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def log_in(registry: RegistryRig, password: str | None = None) -> None:
    """Give this process the registry's login, as a block has it."""
    block = DockerRegistryCredentials(
        username=registry.user, password=password or registry.password, registry_url=f"http://{registry.address}"
    )
    credentials.remember(credentials_of(block))


def swept(config: Path) -> Run:
    """Run a sweep to its end, and return its run."""
    return manage.find(launch_slurm_sweep(config, submit=True).run_id)


def test_a_sweep_runs_its_trials_in_an_image_of_a_registry(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path, scratch: Path
) -> None:
    digest = pushed(docker, registry, busybox_image, "lab/train:1", "one")
    log_in(registry)
    asked = f"{registry.address}/lab/train:1"
    batch = launch_slurm_sweep(boxed_project(tmp_path / "p", {"image": asked}, command=MEASURES), submit=True)

    run = manage.find(batch.run_id)
    pinned = f"{registry.address}/lab/train@{digest}"
    recorded = json.loads(run.files.record.read_text())["container"]
    assert (recorded["image"], recorded["digest"], recorded["asked"]) == (pinned, digest, asked)
    trials = steps.look(run)
    assert [(trial.state, trial.metrics) for trial in trials] == [("completed", {"loss": n / 10}) for n in (1, 2, 3)]
    said = run.files.stdout(1, 1).read_text().split("\n")
    assert "one" in said and "seed 2" in said
    assert batch.report is not None and batch.report.image is not None and batch.report.image.digest == digest
    assert json.loads(run.files.report_json.read_text())["image"]["image"] == pinned
    shown = subprocess.run(
        [sys.executable, "-m", "nexa_infra", "report", run.id], capture_output=True, text=True, check=True
    ).stdout
    assert digest in shown and digest in run.files.report_markdown.read_text()
    assert left_of(docker, run.id, run.directory) == [] and list(scratch.iterdir()) == []


def test_a_trial_gives_the_same_metrics_bare_and_in_docker(
    docker: DockerRig, python_image: Image, tmp_path: Path
) -> None:
    found = []
    for number, container in enumerate((None, {"image": docker.load(python_image)})):
        run = swept(boxed_project(tmp_path / str(number), container))
        assert (run.container is None) == (container is None)
        found.append([trial.metrics for trial in steps.look(run)])
    assert found[0] == found[1] and len({str(metrics) for metrics in found[0]}) == 3


def test_an_image_that_was_pushed_elsewhere_is_still_this_machines_own(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path
) -> None:
    docker.load(busybox_image)
    docker.must("tag", busybox_image.name, f"{registry.address}/elsewhere:1")
    docker.must("push", f"{registry.address}/elsewhere:1", more=registry.login)
    run = swept(boxed_project(tmp_path / "p", {"image": busybox_image.name}, command=MEASURES, seeds=[1]))
    assert run.container is not None and run.container.source == "local"


def test_outputs_belong_to_the_user_who_asks(docker: DockerRig, python_image: Image, rig_folder: Path) -> None:
    config = boxed_project(rig_folder / "p", {"image": docker.load(python_image)}, seeds=[1])
    (home := rig_folder / "home").mkdir(mode=0o700)
    for path in [rig_folder, *rig_folder.rglob("*")]:
        os.chown(path, 21001, 21001)
    # The code of this project may lie where nobody else can read: that is not what is tested.
    user = ["setpriv", "--reuid=21001", "--regid=21001", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    more = {"HOME": str(home), "NEXA_HOME": str(home / "nexa"), "XDG_CACHE_HOME": str(home), "DOCKER_CONFIG": str(home)}
    docker.socket.chmod(0o666)
    try:
        done = subprocess.run(
            [*user, sys.executable, "-m", "nexa_infra", "sweep", str(config)],
            cwd=config.parent, env={**os.environ, **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        docker.socket.chmod(0o660)
    assert done.returncode == 0, done.stderr
    (trials,) = (home / "nexa" / "runs").glob("*/trials")
    (metrics,) = trials.glob("*/metrics.json")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in [metrics, *trials.rglob("*")]} == {(21001, 21001)}


# ---- registries ----


@contextmanager
def watched_arguments(word: str) -> Iterator[list[str]]:
    """Yield the commands that were seen with a word in their arguments, while this lasts."""
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if word.encode() in (told := path.read_bytes()):
                        seen.append(told.decode(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_a_password_opens_a_registry_and_is_seen_nowhere(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path, home: Path, scratch: Path
) -> None:
    digest = pushed(docker, registry, busybox_image, "secret:1", "kept")
    config = boxed_project(
        tmp_path / "p", {"image": f"{registry.address}/secret@{digest}"}, command=["sh", "-c", "env; ls /", "trial"]
    )
    log_in(registry)
    with watched_arguments(registry.password) as seen:
        run = swept(config)
    assert seen == []
    assert "kept" in run.files.stdout(0, 1).read_text().split()
    written = [path for folder in (home, scratch, docker.config, config.parent) for path in folder.rglob("*")]
    assert run.files.record in written
    token = json.loads((registry.folder / "client" / "config.json").read_text())["auths"][registry.address]["auth"]
    for secret in (registry.password, token):
        assert [path for path in written if path.is_file() and secret.encode() in path.read_bytes()] == []


def test_a_wrong_password_is_said_without_showing_it(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path, home: Path
) -> None:
    digest = pushed(docker, registry, busybox_image, "secret:2", "kept")
    log_in(registry, "not-the-password")
    for image in ("secret:2", f"secret@{digest}"):
        config = boxed_project(tmp_path / image, {"image": f"{registry.address}/{image}"}, command=MEASURES)
        with pytest.raises(ContainerError) as refused:
            launch_slurm_sweep(config, submit=True)
        told = str(refused.value)
        assert told.startswith("container.image: ")
        assert f"the registry {registry.address} refuses" in told and "the login of rig" in told
        assert "not-the-password" not in told
    assert not home.exists()


def test_a_digest_that_does_not_exist_is_said_before_anything_is_started(
    docker: DockerRig, registry: RegistryRig, tmp_path: Path, home: Path
) -> None:
    log_in(registry)
    image = f"{registry.address}/lab/train@sha256:{'0' * 64}"
    with pytest.raises(ContainerError, match=rf"{registry.address} has no .*look for the digest sha256:0+ there"):
        launch_slurm_sweep(boxed_project(tmp_path / "p", {"image": image}, command=MEASURES), submit=True)
    assert not home.exists()


def test_a_tag_that_moves_changes_no_run_that_was_begun(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path
) -> None:
    old = pushed(docker, registry, busybox_image, "moving:1", "before")
    log_in(registry)
    config = boxed_project(
        tmp_path / "p", {"image": f"{registry.address}/moving:1"}, command=FAILS_ONCE, seeds=[1], retry={"times": 0}
    )
    run = launch.plan_sweep(config)
    with pytest.raises(RunFailedError):
        launch.follow_run(run)
    new = pushed(docker, registry, busybox_image, "moving:1", "after")
    assert new != old
    docker.must("rmi", f"{registry.address}/moving@{old}")

    report = launch.follow_run(manage.prepare_retry(run.id)).report
    assert report is not None and report.image is not None and report.image.digest == old
    assert old in run.files.report_markdown.read_text() and new not in run.files.report_markdown.read_text()
    assert run.files.stdout(0, 2).read_text().split().count("before") == 1

    later = launch.plan_sweep(config)
    assert later.container is not None and later.container.digest == new
    with pytest.raises(RunFailedError):
        launch.follow_run(later)
    words = later.files.stdout(0, 1).read_text().split()
    assert "after" in words and "before" not in words


def test_hostile_values_arrive_as_they_are(
    docker: DockerRig, python_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / HOSTILE_NAME
    monkeypatch.setenv("NEXA_HOME", str(home))
    settings.cache_clear()
    run = swept(hostile_project(tmp_path / "p", {"image": docker.load(python_image)}, home))
    assert run.files.stdout(0, 1).read_text() == "different 0\n"
    assert [trial.metrics for trial in steps.look(run)] == [{"different": 0.0}]

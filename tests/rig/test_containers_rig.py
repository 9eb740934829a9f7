"""The parts for containers: what the tests of containers take for granted."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from deployments.environment import SetupError
from tests.rig import images
from tests.rig.accounts import ADA
from tests.rig.apptainer import ApptainerRig
from tests.rig.daemons import environments
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

HOSTILE = "-x 'a' \"b\" $(id) `id` ${HOME} \\ ü,;:=%\n *"


def left_by(folder: Path) -> list[str]:
    """What still runs, or is mounted, for a rig's folder."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    marked = [str(process) for process, found in environments() if str(folder) in found.get("NEXA_SERVICE", "")]
    groups = [str(path) for path in Path("/sys/fs/cgroup").rglob(DockerRig(folder).group)]
    return [*mounts, *marked, *groups]


def test_an_image_is_pushed_and_pulled_by_its_digest(
    docker: DockerRig, registry: RegistryRig, busybox_image: Image
) -> None:
    digest = registry.push(docker, docker.load(busybox_image), "first:1")
    name = f"{registry.address}/first@{digest}"
    wrong = {"DOCKER_CONFIG": str(docker.config)}

    assert "no basic auth credentials" in docker.run(["pull", name], more=wrong).stderr
    refused = docker.run(["login", "--username", registry.user, "--password-stdin", registry.address], script="wrong")
    assert "unauthorized" in refused.stderr.lower()
    docker.must("pull", name, more=registry.login)
    assert docker.must("run", "--rm", "--init", "--network=none", name, "echo", HOSTILE) == f"{HOSTILE}\n"


def test_a_tag_moves_and_the_old_digest_stays(docker: DockerRig, registry: RegistryRig, busybox_image: Image) -> None:
    old = registry.push(docker, docker.load(busybox_image), "moving:1")
    container = docker.must("run", "--detach", "--network=none", busybox_image.name, "touch", "/new").strip()
    docker.must("wait", container)
    docker.must("commit", container, "moved")
    new = registry.push(docker, "moved", "moving:1")

    assert new != old
    for digest in (old, new):
        docker.must("pull", f"{registry.address}/moving@{digest}", more=registry.login)


def test_a_registry_may_ask_for_no_password(docker: DockerRig, busybox_image: Image, rig_folder: Path) -> None:
    with RegistryRig(rig_folder, auth=False) as registry:
        digest = registry.push(docker, docker.load(busybox_image), "open:1")
        docker.must("pull", f"{registry.address}/open@{digest}")
    assert not left_by(rig_folder)


def test_containers_of_a_run_are_found_by_their_label(docker: DockerRig, busybox_image: Image) -> None:
    command = ["run", "--detach", "--init", "--network=none", "--label=nexa.run=a1", docker.load(busybox_image)]
    container = docker.must(*command, "sleep", "1000").strip()

    assert docker.containers("a2") == []
    assert [container.startswith(short) for short in docker.containers("a1")] == [True]


def test_a_small_disk_fills(container_packages: None, busybox_image: Image, rig_folder: Path) -> None:
    with DockerRig(rig_folder / "d", disk_mib=32) as docker:
        docker.load(busybox_image)
        fill = ["run", "--rm", "--network=none", busybox_image.name, "dd", "if=/dev/zero", "of=/full", "bs=1M"]
        assert "No space left on device" in docker.run(fill).stderr
        with pytest.raises(SetupError, match="no space left on device"):
            docker.load(images.python())
    assert not left_by(rig_folder / "d")


@pytest.mark.parametrize("abruptly", [False, True])
def test_nothing_is_left_of_a_dockerd_that_has_ended(
    container_packages: None, busybox_image: Image, rig_folder: Path, abruptly: bool
) -> None:
    docker = DockerRig(rig_folder / "d")
    docker.start()
    trap = "trap '' TERM; sleep 1001 & wait; sleep 1002"
    docker.must("run", "--detach", "--network=none", docker.load(busybox_image), "sh", "-c", trap)
    if abruptly:
        docker.kill()
    docker.stop()

    assert not left_by(rig_folder / "d")
    assert not {b"sleep\x001001\x00", b"sleep\x001002\x00"} & command_lines()


def command_lines() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.add(path.read_bytes())
    return found


def test_containers_outlive_a_dockerd_that_was_killed_and_end_when_it_starts_again(
    container_packages: None, busybox_image: Image, rig_folder: Path
) -> None:
    with DockerRig(rig_folder / "d") as docker:
        command = ["run", "--detach", "--init", "--network=none", "--label=nexa.run=a1", docker.load(busybox_image)]
        container = docker.must(*command, "sleep", "1003").strip()
        docker.kill()
        assert b"sleep\x001003\x00" in command_lines()
        docker.start()
        state = docker.must("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", container)
        assert state.split() == ["exited", "143"]


def test_apptainer_builds_from_the_registry_and_from_an_archive(
    apptainer: ApptainerRig, docker: DockerRig, registry: RegistryRig, busybox_image: Image, tmp_path: Path
) -> None:
    digest = registry.push(docker, docker.load(busybox_image), "sif:1")
    source = f"docker://{registry.address}/sif@{digest}"
    login = {"APPTAINER_DOCKER_USERNAME": registry.user, "APPTAINER_NOHTTPS": "1"}
    for name, origin, password in [
        ("a", f"docker-archive://{busybox_image.archive}", ""),
        ("r", source, registry.password),
    ]:
        sif = tmp_path / f"{name}.sif"
        built = apptainer.run(["build", str(sif), origin], more={**login, "APPTAINER_DOCKER_PASSWORD": password})
        assert built.returncode == 0, built.stderr
        done = apptainer.run(["exec", "--containall", "--no-home", "--bind", f"{tmp_path}:/d", str(sif), "ls", "/d"])
        assert f"{name}.sif" in done.stdout.split()

    refused = apptainer.run(
        ["build", str(tmp_path / "w"), source], more={**login, "APPTAINER_DOCKER_PASSWORD": "wrong"}
    )
    assert refused.returncode == 255
    assert "UNAUTHORIZED" in refused.stderr


def test_apptainer_gets_what_it_is_given(apptainer: ApptainerRig, python_image: Image, tmp_path: Path) -> None:
    here = tmp_path / "a folder\nof two lines"
    here.mkdir()
    told = "import os, sys; print(repr((sys.argv[1], os.environ['X'], os.getcwd()))); sys.exit(7)"
    mount = f'type=bind,"source={here}","destination={here}"'
    argv = ["exec", "--mount", mount, str(apptainer.sif(python_image)), "python3", "-c", told, HOSTILE]
    done = apptainer.run(argv, more={"X": HOSTILE}, cwd=here)
    assert (done.returncode, done.stdout) == (7, f"{(HOSTILE, HOSTILE, str(here))!r}\n"), done.stderr


@pytest.mark.parametrize("options", [[], ["--containall"]])
def test_a_signal_to_apptainer_reaches_the_program(
    apptainer: ApptainerRig, busybox_image: Image, options: list[str]
) -> None:
    program = "trap 'echo usr1' USR1; trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"
    argv = ["apptainer", "exec", *options, str(apptainer.sif(busybox_image)), "sh", "-c", program]
    with subprocess.Popen(argv, env=apptainer.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.terminate()
        assert process.wait(timeout=10) == 9


def test_a_plain_user_may_call_apptainer(apptainer: ApptainerRig, slurm: SlurmRig, busybox_image: Image) -> None:
    sif = apptainer.sif(busybox_image)
    done = apptainer.run(["exec", "--containall", str(sif), "id", "-u"], user=ADA, accounts=slurm.accounts)
    assert done.stdout == f"{ADA.uid}\n", done.stderr


@pytest.mark.parametrize("over_ssh", [False, True])
def test_jobs_on_both_nodes_find_apptainer_and_docker(
    slurm: SlurmRig, sshd: SshRig, apptainer: ApptainerRig, docker: DockerRig, busybox_image: Image,
    workdirs: Path, over_ssh: bool,
) -> None:  # fmt: skip
    sif, name = apptainer.sif(busybox_image), docker.load(busybox_image)
    script = (
        f"apptainer exec --containall {sif} sleep 2 && docker run --rm --network=none {name} true"
        f" && echo $SLURMD_NODENAME >{workdirs}/$SLURM_ARRAY_TASK_ID"
    )
    submit = ["sbatch", "--parsable", "--output=/dev/null", "--array=0-1", "--ntasks=8", f"--wrap='{script}'"]
    if over_ssh:
        told = sshd.run(*submit)
        assert told.returncode == 0, told.stderr
    else:
        slurm.submit("--array=0-1", "--ntasks=8", script=script)
    deadline = time.monotonic() + 30
    while len(found := [path.read_text().strip() for path in workdirs.iterdir()]) < 2 or "" in found:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(found) == {"n1", "n2"}


@pytest.fixture
def workdirs(rig_folder: Path) -> Path:
    """A folder for what jobs say."""
    rig_folder.joinpath("said").mkdir()
    return rig_folder / "said"


def test_what_is_kept_is_made_again_if_it_is_damaged_or_otherwise_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    made: list[Path] = []

    def make(target: Path) -> None:
        made.append(target)
        target.mkdir()
        (target / "file").write_text("whole")

    for _ in range(2):
        assert (images.kept("thing", "one", make) / "file").read_text() == "whole"
    assert len(made) == 1
    (tmp_path / "cache" / "thing" / "file").unlink()
    images.kept("thing", "one", make)
    assert len(made) == 2
    images.kept("thing", "two", make)
    assert len(made) == 3

    with pytest.raises(ZeroDivisionError):
        images.kept("thing", "three", lambda _: made.append(Path(str(1 / 0))))
    images.kept("thing", "two", make)
    assert len(made) == 4

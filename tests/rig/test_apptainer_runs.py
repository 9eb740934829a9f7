"""Trials inside a real Apptainer, under real Slurm: one SIF for all, the same program, the same ends."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_slurm_sweep, run_container
from nexa_infra.containers import credentials
from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.credentials import Credentials
from nexa_infra.errors import ConfigError, ContainerError, RunCancelledError, RunFailedError
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.slurm import SlurmBatchArtifacts
from nexa_infra.spec.cluster import Cluster
from tests.rig.accounts import ADA
from tests.rig.apptainer import ApptainerRig
from tests.rig.clusters import cluster_at
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

PATIENCE = 180.0


def config_of(
    folder: Path, container: dict[str, Any], script: str, values: list[object], *, name: str = "boxed", **more: Any
) -> Path:
    """Write the config of a sweep whose trials run a shell script with `--n` and a value as $1 and $2."""
    job = {"name": name, "time": "00:05:00", "memory": "50M", **more.pop("job", {})}
    config = {
        "job": job,
        "container": {"runtime": "apptainer", **container},
        "launcher": {"type": "command", "command": ["sh", "-c", script, "trial"]},
        "sweep": {"parameters": {"n": values}},
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config, ensure_ascii=False).replace("\x7f", "\\u007f"))
    return path


def wait_for(true: Any, what: str | Callable[[], str], within: float = PATIENCE) -> None:
    """Wait until something is true."""
    limit = time.monotonic() + within
    while not true():
        assert time.monotonic() < limit, what if isinstance(what, str) else what()
        time.sleep(0.05)


@pytest.fixture
def pushed(docker: DockerRig, registry: RegistryRig, busybox_image: Image) -> str:
    """The small image in the registry, by its tag."""
    registry.push(docker, docker.load(busybox_image), "small:1")
    return f"{registry.address}/small:1"


@pytest.fixture
def login(registry: RegistryRig, docker: DockerRig, rig_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the registry's password, as a cluster has it; and this machine's own, by `docker login`."""
    monkeypatch.setenv("DOCKER_CONFIG", registry.login["DOCKER_CONFIG"])
    file = rig_folder / "login.json"
    shutil.copy(registry.folder / "client" / "config.json", file)
    file.chmod(0o600)
    return file


@pytest.fixture
def known(registry: RegistryRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own login, as a block gives it."""
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    credentials.remember(Credentials(registry.address, registry.user, registry.password))


class Watched:
    """Where a password has been seen while a block ran: arguments of processes, files that others may read."""

    def __init__(self, password: str, folders: list[Path]) -> None:
        self.forms = [password.encode(), base64.b64encode(f"rig:{password}".encode())]
        self.folders = folders
        self.seen: set[str] = set()
        self._over = threading.Event()

    def __enter__(self) -> Watched:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    self._look(path.read_bytes(), f"the arguments {path}")
            for path in (Path(at) / name for top in self.folders for at, _, names in os.walk(top) for name in names):
                with suppress(OSError):
                    if path.stat().st_mode & 0o077:
                        self._look(path.read_bytes(), str(path))

    def _look(self, data: bytes, where: str) -> None:
        if any(form in data for form in self.forms):
            self.seen.add(f"{where}: {data[:300]!r}")


def holding(password: str, top: Path) -> list[Path]:
    """Return the files that hold a password, whoever may read them."""
    forms = [password.encode(), base64.b64encode(f"rig:{password}".encode())]
    files = [Path(folder) / name for folder, _, names in os.walk(top) for name in names]
    return [path for path in files if path.is_file() and any(form in path.read_bytes() for form in forms)]


# -- one SIF


def test_of_fifty_trials_on_two_nodes_one_builds_the_sif(
    cluster: Cluster, slurm: SlurmRig, apptainer: ApptainerRig, registry: RegistryRig, pushed: str, login: Path,
    workdir: Path, rig_folder: Path, home: Path, tmp_path: Path,
) -> None:  # fmt: skip
    config = config_of(
        tmp_path, {"image": pushed, "auth_file": str(login)}, 'echo "$2 on $SLURMD_NODENAME"', list(range(50))
    )
    with Watched(registry.password, [workdir]) as watched:
        batch = launch_slurm_sweep(config, submit=True, cluster=cluster)

    assert batch.report is not None and batch.report.states == {"completed": 50}
    said = [(workdir / "runs" / batch.run_id / "trials" / str(n) / "attempt-1.out").read_text() for n in range(50)]
    assert [line.split()[0] for line in said] == [str(n) for n in range(50)]
    assert {line.split()[2] for line in said} == {"n1", "n2"}
    digest = registry_digest(batch)
    images = workdir / "images"
    assert (images / f"{digest}.log").read_text().count("BUILD") == 1
    assert sorted(path.name for path in images.iterdir()) == [f"{digest}.log", f"{digest}.sif"]
    assert f"sha256:{digest}" in (workdir / "runs" / batch.run_id / "cost_report.md").read_text()
    assert not watched.seen
    assert not holding(registry.password, workdir)

    # The nodes run sixteen at a time; now, without the SIF, fifty ask at the same moment.
    for path in images.iterdir():
        path.unlink()
    asker = shlex.quote(str(workdir / "runs" / batch.run_id / "container.sh"))
    script = f"for n in {{1..25}}; do bash {asker} fetch && echo had >>{rig_folder}/$SLURMD_NODENAME & done; wait"
    for node in ("n1", "n2"):
        slurm.submit(f"--nodelist={node}", "--mem=500M", script=script)

    def served() -> list[int]:
        said = (rig_folder / "n1", rig_folder / "n2")
        return [len(path.read_text().split()) if path.exists() else 0 for path in said]

    wait_for(lambda: served() == [25, 25], "not all have an image")
    assert (images / f"{digest}.log").read_text().count("BUILD") == 1
    assert sorted(path.name for path in images.iterdir()) == [f"{digest}.log", f"{digest}.sif"]


def registry_digest(batch: SlurmBatchArtifacts) -> str:
    """The digest that a run's record froze."""
    return digest_of(manage.find(batch.run_id))


def digest_of(run: Run) -> str:
    """The digest of the image that a run's trials run in."""
    assert run.container is not None
    return run.container.digest.removeprefix("sha256:")


def test_a_login_that_only_the_client_has_reaches_the_login_node_and_nobody_sees_it(
    cluster: Cluster, apptainer: ApptainerRig, registry: RegistryRig, pushed: str, known: None, workdir: Path,
    home: Path, tmp_path: Path,
) -> None:  # fmt: skip
    config = config_of(tmp_path, {"image": pushed}, "echo in", [1])
    with Watched(registry.password, [workdir, home]) as watched:
        batch = launch_slurm_sweep(config, submit=True, cluster=cluster)

    assert batch.report is not None and batch.report.states == {"completed": 1}
    log = (workdir / "images" / f"{registry_digest(batch)}.log").read_text()
    built_on = re.findall(r"\bby (\S+?)\.\d+\.\d+, ", log)
    assert built_on == [socket.gethostname()], "not on a node, which knows no password"
    assert not watched.seen
    assert not holding(registry.password, workdir) and not holding(registry.password, home)
    assert not list(Path("/tmp").glob(f"nexa-container-{os.getuid()}-*/login"))


# -- what the program gets

HOSTILE = [
    "", " ", "a b", "new\nline", "-dash", "--", "it's", '"', '""', "back\\slash", "\\n", "#x", ";x", "c\rr", "*", "~",
    "$HOME", "$(id)", "`id`", "${HOME:-x}", "a,b", "a:b", "a=b", "%s", "!x", "日本 é ☃ 𝄞", "tab\tx",
    "'\"$(id)`id`\\ \n,:=é",
    "\x7f\x01", "end\n", "\n", "[x]", "<&>|",
]  # fmt: skip
ODD = "\x7f'\n`"
# Counts what differs from what the test meant, which lies beside it.
CHECK = r"""
import json, os, sys
with open("expected.json") as stream:
    expected = json.load(stream)
different = []
for name, value in expected["env"].items():
    if os.environ.get(name) != value:
        different.append(("env", name, value, os.environ.get(name)))
if sys.argv[1:] != expected["argv"]:
    different.append(("argv", expected["argv"], sys.argv[1:]))
for target, text in expected["mounts"].items():
    try:
        with open(target + "/file") as stream:
            found = stream.read()
    except OSError as error:
        found = str(error)
    if found != text:
        different.append(("mount", target, text, found))
for name in ("NEXA_RUN_DIR", "NEXA_TRIAL_DIR"):
    if not os.path.isdir(os.environ[name]) or not os.path.samefile(os.getcwd(), os.environ["NEXA_RUN_DIR"] + "/code"):
        different.append((name, os.environ[name], os.getcwd()))
with open(os.environ["NEXA_TRIAL_DIR"] + "/written", "w") as stream:
    stream.write(os.environ["NEXA_RUN_DIR"])
for each in different:
    print(each)
print("different", len(different))
"""


def test_hostile_values_reach_the_program_as_they_are(
    cluster: Cluster, apptainer: ApptainerRig, python_image: Image, workdir: Path, rig_folder: Path, home: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    env = {f"{where}_{n}": value for where in ("BOX", "JOB") for n, value in enumerate(HOSTILE)}
    lines = {f"FILE_{n}": value for n, value in enumerate(HOSTILE) if "\n" not in value}
    env_file = rig_folder / "secrets.env"
    env_file.write_bytes("".join(f"{name}={value}\n" for name, value in lines.items()).encode())
    env_file.chmod(0o600)
    mounts, seen = [], {}
    for n, value in enumerate(each for each in HOSTILE if each.strip() and "\x7f" not in each):
        folder = rig_folder / "data" / f"{n} {value}"
        folder.mkdir(parents=True)
        (folder / "file").write_text(f"{n}")
        target = f"/mnt/{n}{value}"
        mounts.append({"source": str(folder), "target": target})
        seen[target] = f"{n}"
    (tmp_path / "check.py").write_text(CHECK)
    (tmp_path / "expected.json").write_text(
        json.dumps({"env": env | lines, "argv": [*HOSTILE, "--n", ODD], "mounts": seen})
    )
    config = config_of(
        tmp_path,
        {
            "image": str(apptainer.sif(python_image)),
            "env": {name: value for name, value in env.items() if name.startswith("BOX")},
            "mounts": mounts,
        },
        "",
        [ODD],
        job={"env": {name: value for name, value in env.items() if name.startswith("JOB")}, "env_file": str(env_file)},
        launcher={"type": "command", "command": ["python3", "check.py", *HOSTILE]},
    )

    batch = launch_slurm_sweep(config, submit=True, cluster=cluster)

    trial = workdir / "runs" / batch.run_id / "trials" / "0"
    assert (trial / "attempt-1.out").read_text() == "different 0\n", (trial / "attempt-1.err").read_text()
    assert (trial / "written").read_text() == str(workdir / "runs" / batch.run_id)


# -- the same program

TRAIN = """
import json, math, os, random, sys
random.seed(int(sys.argv[2]))
weight = 0.0
for _ in range(1000):
    x = random.gauss(0, 1)
    weight += 0.01 * (math.tanh(3 * x) - weight * x) * x
with open(os.environ["NEXA_METRICS"], "w") as stream:
    json.dump({"weight": weight, "loss": (weight - 3) ** 2}, stream)
"""


@pytest.mark.parametrize("runtime", ["apptainer", "docker"])
def test_a_trial_s_metrics_are_those_of_the_bare_program(
    runtime: str, apptainer: ApptainerRig, docker: DockerRig, python_image: Image, home: Path, tmp_path: Path
) -> None:
    docker.load(python_image)
    image = str(apptainer.sif(python_image)) if runtime == "apptainer" else str(python_image.archive)
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = {"type": "command", "command": ["python3", "train.py"]}
    found = []
    for name in ("none", runtime):
        config = config_of(tmp_path, {"image": image, "runtime": name}, "", [1, 2], name=name, launcher=launcher)
        batch = launch_slurm_sweep(config, submit=True)
        assert batch.directory is not None
        found.append([json.loads((batch.directory / "trials" / str(n) / "metrics.json").read_text()) for n in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1]


# -- images that are files


def test_an_archive_of_docker_save_is_an_image(
    apptainer: ApptainerRig, busybox_image: Image, home: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "saved: it's.tar"
    shutil.copy(busybox_image.archive, archive)
    config = config_of(tmp_path, {"image": f"docker-archive:{archive}"}, "busybox | head -n 1", [1])
    batch = launch_slurm_sweep(config, submit=True)

    assert batch.directory is not None
    assert (batch.directory / "trials/0/attempt-1.out").read_text().startswith("BusyBox")
    with tarfile.open(archive) as saved:
        member = saved.extractfile("config.json")
        assert member is not None
        assert registry_digest(batch) == hashlib.sha256(member.read()).hexdigest(), "as docker has it"
    sif = home / "images" / f"{registry_digest(batch)}.sif"
    sif.unlink()
    run = steps.plan(config)
    os.utime(archive, (1, 1))
    with pytest.raises(ContainerError, match=r"it's\.tar has changed since the run was submitted"):
        launch.follow_run(run)
    assert not list(sif.parent.glob("*.sif*"))


NO_GPU = not list(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists()


def test_a_node_names_itself_and_says_what_is_wrong_there(
    cluster: Cluster, apptainer: ApptainerRig, busybox_image: Image, home: Path, tmp_path: Path
) -> None:
    sif = tmp_path / "it's a.sif"
    shutil.copy(apptainer.sif(busybox_image), sif)
    hidden = {"setup": {"lines": ["PATH=/usr/bin:/bin"]}, "nodelist": "n2"}
    gpus = {"gpus_per_node": 1, "gpu_type": "a100", "partition": "gpu"}
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (sif, {}, r"a\.sif has changed since the run was submitted, or is not there, on n[12]"),
        (
            apptainer.sif(busybox_image),
            hidden,
            r"apptainer is not installed on n2: let job\.setup load it, or set cont",
        ),
    ]
    if NO_GPU:  # what is there where there are GPUs, no test here can tell
        wrong.append((apptainer.sif(busybox_image), gpus, r"the job asks for 1 GPUs a node, but n[12] has none"))
    runs = [
        steps.plan(config_of(tmp_path, {"image": str(image)}, "true", [1], job=job, name=f"w{n}"), cluster=cluster)
        for n, (image, job, _) in enumerate(wrong)
    ]
    os.utime(sif, (1, 1))
    for ended, (_, _, words) in zip([following(run) for run in runs], wrong, strict=True):
        with pytest.raises(RunFailedError, match=words):
            ended.result(PATIENCE)


def test_a_sif_that_is_not_there_is_refused_before_anything_is_submitted(
    cluster: Cluster, apptainer: ApptainerRig, workdir: Path, home: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, {"image": str(tmp_path / "none.sif")}, "true", [1])
    with pytest.raises(ConfigError, match=r"container\.image.*none\.sif is not there, on"):
        launch_slurm_sweep(config, submit=True, cluster=cluster)
    assert not workdir.exists()


# -- a plain user


def test_what_a_plain_user_s_trials_write_is_the_user_s(
    sshd: SshRig, slurm: SlurmRig, apptainer: ApptainerRig, pushed: str, login: Path, workdir: Path, home: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    for path in (workdir.parent, login):
        os.chown(path, ADA.uid, ADA.uid)
    script = 'id -u; id -g; touch "$NEXA_TRIAL_DIR/made" "$HOME/there" /scratch/here; ! touch code 2>/dev/null'
    config = config_of(tmp_path, {"image": pushed, "auth_file": str(login)}, script, [1, 2])
    batch = launch_slurm_sweep(config, submit=True, cluster=cluster_at(sshd, workdir, user=ADA.name))
    connections.close_all()

    trial = workdir / "runs" / batch.run_id / "trials" / "0"
    assert (trial / "attempt-1.out").read_text() == f"{ADA.uid}\n{ADA.uid}\n"
    assert (trial / "made").exists()
    owners = {path.lstat().st_uid for path in [workdir, *workdir.rglob("*")]}
    assert owners == {ADA.uid}


# -- signals and ends

TOLD = """
import os, signal, sys, time
kept = int(sys.argv[2])
told = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: told.append(signal.Signals(number).name))
place = os.environ["NEXA_TRIAL_DIR"]

open(place + "/up", "w").close()
print(sys.stdin.read() == "", flush=True)
while not told:
    time.sleep(0.02)
time.sleep(0.7)
with open(place + "/told", "w") as stream:
    stream.write(" ".join(told))
os._exit(7) if kept == 7 else os.kill(os.getpid(), kept) if kept else time.sleep(60)
"""


SAVING = """
import os, signal, sys, time
place = os.environ["NEXA_CHECKPOINT_DIR"]
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append("USR1"))
if os.path.exists(place + "/saved"):
    print("resumed", flush=True)
    sys.exit(0)
open(os.environ["NEXA_TRIAL_DIR"] + "/up", "w").close()
while not told:
    time.sleep(0.02)
time.sleep(0.7)
print(*told, flush=True)
open(place + "/saved", "w").close()
sys.exit(75)
"""


def following(run: Run) -> Future[SlurmBatchArtifacts]:
    """Take a run to its end, in a thread."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(launch.follow_run, run)
    finally:
        pool.shutdown(wait=False)


def programs(word: str) -> list[str]:
    """Return the command lines of processes that name something."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if word in line]


def test_signals_reach_the_program_once_and_ends_are_those_of_a_bare_one(
    cluster: Cluster, slurm: SlurmRig, apptainer: ApptainerRig, python_image: Image, workdir: Path, home: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """All side by side: Slurm looks for walltimes that are over only every 30 seconds."""
    (tmp_path / "told.py").write_text(TOLD)
    (tmp_path / "saving.py").write_text(SAVING)
    image = {"image": str(apptainer.sif(python_image))}
    asked: dict[str, tuple[str, dict[str, Any], list[object], dict[str, Any]]] = {
        "sent": ("told.py", image, [7, 9, 11], {}),
        "boxed": ("told.py", image, [0, 0], {}),
        "bare": ("told.py", image | {"runtime": "none"}, [0, 0], {}),
        "warned": ("saving.py", image, [1], {"checkpoint": {"requeue": 1}}),
    }
    runs = {}
    for name, (script, container, values, more) in asked.items():
        launcher = {"type": "command", "command": ["python3", script]}
        config = config_of(tmp_path, container, "", values, name=name, launcher=launcher, **more)
        runs[name] = steps.plan(config, cluster=cluster)
    trials = {name: workdir / "runs" / run.id / "trials" for name, run in runs.items()}
    ends = {name: following(run) for name, run in runs.items()}
    for name, run in runs.items():
        up = [trials[name] / str(n) / "up" for n in range(run.trials)]
        wait_for(
            lambda: all(each.exists() for each in up) or (ends[name].done() and ends[name].result()),  # noqa: B023
            lambda: f"no start: {name}\n{slurm.run(['squeue']).stdout}{ends[name]}",  # noqa: B023
            within=150,  # Slurm may look for room no oftener than every 30 s
        )
    jobs = {name: read_submissions(run.files)[0].job_id for name, run in runs.items()}
    for n, signal in enumerate(("USR1", "USR2", "TERM")):
        slurm.run(["scancel", "--signal", signal, f"{jobs['sent']}_{n}"])
    for name in ("boxed", "bare"):
        slurm.run(["scancel", f"{jobs[name]}_0"])
        slurm.run(["scontrol", "update", f"JobId={jobs[name]}_1", "EndTime=now"])
    # As Slurm does it for --signal=B:USR1@90, without the wait.
    slurm.run(["scancel", "--signal=USR1", "--batch", str(jobs["warned"])])
    for name in ("sent", "boxed", "bare"):
        with pytest.raises((RunFailedError, RunCancelledError)):
            ends[name].result(PATIENCE)
    ends["warned"].result(PATIENCE)

    def told(name: str) -> list[list[str]]:
        return [(trials[name] / str(n) / "told").read_text().split() for n in range(runs[name].trials)]

    assert told("sent") == [["SIGUSR1"], ["SIGUSR2"], ["SIGTERM"]]
    assert [trial.exit_code for trial in steps.look(runs["sent"])] == [7, 137, 139]
    assert [trial.state for trial in steps.look(runs["boxed"])] == ["cancelled", "timeout"]
    assert told("boxed") == told("bare")
    assert told("boxed")[0] == ["SIGTERM"] and set(told("boxed")[1]) == {"SIGTERM"}
    assert (trials["boxed"] / "0" / "attempt-1.out").read_text() == "True\n", "its standard input is empty"
    said = [(trials["warned"] / "0" / f"attempt-{n}.out").read_text() for n in (1, 2)]
    assert said == ["USR1\n", "resumed\n"]
    assert steps.look(runs["warned"])[0].state == "completed"
    assert not programs("told.py")


def test_nothing_is_left_of_a_client_that_was_killed_on_this_machine(
    apptainer: ApptainerRig, busybox_image: Image, home: Path, tmp_path: Path
) -> None:
    mark = f"30{os.getpid()}"
    image = {"image": str(apptainer.sif(busybox_image))}
    config = config_of(tmp_path, image, f'touch "$NEXA_TRIAL_DIR/up"; sleep {mark} & sleep {mark}', [1, 2])
    code = f"from nexa_infra import launch_slurm_sweep as l; l({str(config)!r}, submit=True)"
    client = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, env=dict(os.environ))
    try:
        wait_for(lambda: len(list(home.glob("runs/*/trials/*/up"))) == 2, "they do not start")
        assert programs(f"sleep {mark}")
    finally:
        client.kill()
        client.wait()
    wait_for(lambda: not programs(f"sleep {mark}") and not programs(str(home)), "something lives on", 30.0)
    assert "apptainer" not in Path("/proc/mounts").read_text()
    launch_slurm_sweep(config_of(tmp_path, image, "true", [1]), submit=True)
    assert not scratch()


def scratch() -> list[Path]:
    """Return what container.sh has left on this machine of those that have ended."""
    return [
        path for path in Path("/tmp").glob(f"nexa-container-{os.getuid()}-*")
        if not Path("/proc", path.name.split("-")[3]).exists()
    ]  # fmt: skip


# -- the disk, and torchrun


def test_a_disk_that_is_full_is_said_and_leaves_no_half_a_sif(
    apptainer: ApptainerRig, busybox_image: Image, home: Path, tmp_path: Path
) -> None:
    images = home / "images"
    images.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", images], check=True)
    try:
        config = config_of(tmp_path, {"image": str(busybox_image.archive)}, "echo there is room", [1, 2])
        run = steps.plan(config)
        with pytest.raises(ContainerError, match=r"(?s)could not be made a SIF on .*no space left on device"):
            launch.follow_run(run)
        digest = digest_of(run)
        left = {path.name.removeprefix(digest) for path in images.iterdir()}
        assert left <= {".log", ".sif.failed"}
        subprocess.run(["mount", "-o", "remount,size=20m", images], check=True)
        launch.follow_run(manage.prepare_resume(run.id))
        assert sorted(path.name for path in images.iterdir()) == [f"{digest}.log", f"{digest}.sif"]
    finally:
        subprocess.run(["umount", "--lazy", images], check=True)


# A stand-in, which starts one rank as torchrun does.
TORCHRUN = """\
#!/bin/bash
while [[ $1 == --* && $1 != --no-python ]]; do shift; done
shift
RANK=$SLURM_NODEID exec "$@"
"""


def test_torchrun_s_ranks_run_inside(
    cluster: Cluster, apptainer: ApptainerRig, python_image: Image, rig_folder: Path, workdir: Path, home: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    (rig_folder / "torchrun").write_text(TORCHRUN)
    (rig_folder / "torchrun").chmod(0o755)
    told = "import os; print('rank', os.environ['RANK'], 'in', os.environ.get('APPTAINER_NAME'))"
    (tmp_path / "train.py").write_text(told)
    mount = {"source": str(rig_folder / "torchrun"), "target": "/usr/local/bin/torchrun"}
    config = config_of(
        tmp_path, {"image": str(apptainer.sif(python_image)), "mounts": [mount]}, "", [1],
        job={"nodes": 2}, launcher={"type": "torchrun", "script": "train.py", "nproc_per_node": 1},
    )  # fmt: skip
    batch = launch_slurm_sweep(config, submit=True, cluster=cluster)
    attempt = workdir / "runs" / batch.run_id / "trials" / "0" / "attempt-1"
    said = [(attempt / f"rank-{n}.log").read_text() for n in range(2)]
    assert [line.split()[:3] for line in said] == [["rank", "0", "in"], ["rank", "1", "in"]]
    assert all(line.strip().endswith(".sif") for line in said)


# -- run_container


@pytest.fixture
def catalog(apptainer: ApptainerRig, busybox_image: Image) -> Catalog:
    """A catalog with the small image, as a SIF."""
    target = {"image": str(apptainer.sif(busybox_image)), "purpose": "tests", "command": ["sh", "-c"]}
    return Catalog.model_validate({"require_digest": False, "targets": {"small": target}})


def test_a_container_is_run_from_python_by_apptainer(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    script = 'echo "$1 $GREETING"; echo bad >&2; pwd; touch "$NEXA_RUN_DIR/made"; exit 3'
    result = run_container(
        "small", bootstrap_args=[script, "it", "a\nb"], extra_env={"GREETING": "$HOME 'x'"},
        workspace=tmp_path, catalog=catalog, runtime="apptainer",
    )  # fmt: skip

    assert (result.exit_code, result.ended, result.runtime) == (3, "exited", "apptainer")
    assert (result.stdout, result.stderr) == (f"a\nb $HOME 'x'\n{tmp_path}\n", "bad\n")
    assert (result.directory / "made").exists()
    assert not scratch()


def test_a_timeout_and_a_stop_end_the_program_and_are_told_apart(catalog: Catalog, home: Path, tmp_path: Path) -> None:
    mark = f"31{os.getpid()}"
    script = f"trap 'exit 5' TERM; echo up; sleep {mark} & wait; sleep {mark}"
    late = run_container(
        "small", bootstrap_args=[script], workspace=tmp_path, catalog=catalog, runtime="apptainer", timeout=1.5
    )
    assert (late.ended, late.stdout) == ("timeout", "up\n")
    stop = threading.Event()
    stopped = run_container(
        "small", bootstrap_args=[script], workspace=tmp_path, catalog=catalog, runtime="apptainer", stop=stop,
        tell=lambda *_: stop.set(),
    )  # fmt: skip
    assert stopped.ended == "cancelled"
    wait_for(lambda: not programs(f"sleep {mark}"), "the program lives on", 5.0)
    assert not scratch()


def test_nothing_is_left_of_a_python_process_that_was_killed(
    apptainer: ApptainerRig, busybox_image: Image, home: Path, tmp_path: Path
) -> None:
    mark = f"32{os.getpid()}"
    target = {"image": str(apptainer.sif(busybox_image)), "purpose": "tests", "command": ["sh", "-c"]}
    file = tmp_path / "catalog.yaml"
    file.write_text(json.dumps({"require_digest": False, "targets": {"small": target}}))
    code = (
        "from nexa_infra import run_container as r; r('small', runtime='apptainer', "
        f"catalog={str(file)!r}, workspace={str(tmp_path)!r}, "
        f"bootstrap_args=['trap \"\" TERM; sleep {mark} & sleep {mark}'])"
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True, env=dict(os.environ)) for _ in range(3)
    ]
    try:
        wait_for(lambda: sum(line.startswith(f"sleep {mark}") for line in programs(mark)) == 6, "they do not start")
        for client in clients[:2]:
            client.kill()
        # Several run at once: the third is none of the others' business.
        wait_for(lambda: sum(line.startswith(f"sleep {mark}") for line in programs(mark)) == 2, "they live on", 30.0)
        assert clients[2].poll() is None
    finally:
        for client in clients:
            client.kill()
            client.wait()
    wait_for(lambda: not programs(mark), "something lives on", 30.0)
    assert "apptainer" not in Path("/proc/mounts").read_text()
    run_container("small", bootstrap_args=["true"], workspace=tmp_path, catalog=file, runtime="apptainer").check()
    assert not scratch()

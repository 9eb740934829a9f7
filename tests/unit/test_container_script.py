"""Scripts whose trials run in containers: whole texts, real shellcheck, real bash; the runtimes here are stand-ins.

Real Docker and real Apptainer run in the rig. Pyxis is not packaged, and no GPU is here: what they would be told is
held by golden texts and by stand-ins that only write down their arguments.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.containers.script import CONTAINER_CONF, CONTAINER_SCRIPT, GUARD, container_conf, shell_text
from nexa_infra.runs.record import Container
from nexa_infra.scheduling.script import render_script
from nexa_infra.spec.container import ContainerSettings, Mount, RuntimeName
from nexa_infra.spec.run import SweepConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "scripts"
DIGEST = "sha256:" + "ab" * 32
HOSTILE = "a b\n\"c\" 'd' $(id) `id` \\ , : ; é -- *"


def a_container(runtime: RuntimeName = "docker", **more: Any) -> Container:
    settings = ContainerSettings(
        env={"GREETING": 'it\'s "$HOME"\n'}, shm_size="8G", memory="16G", cpus=2.5, processes=512, network="host"
    )
    given: dict[str, Any] = {
        "asked": "registry.example.org/lab/train:1.2",
        "image": f"registry.example.org/lab/train@{DIGEST}",
        "digest": DIGEST,
        "runtime": runtime,
        "settings": settings,
        "mounts": (
            Mount(source="/scratch/my data", target="/data/imagenet"),
            Mount(source="~/cache", target="/cache", read_only=False),
        ),
    }
    return Container.model_validate({**given, **more})


def a_config(**launcher: Any) -> SweepConfig:
    program = launcher or {"type": "python", "script": "train.py"}
    return SweepConfig.model_validate(
        {
            "job": {"name": "boxed", "gpus_per_node": 2, "gpu_type": "a100", "memory": "32G", "env": {"SEED": "1"}},
            "launcher": program,
            "sweep": {"parameters": {"lr": ["0.1", "0.01"]}, "env": {"MODE": "fast"}},
        }
    )


def rendered(name: str) -> str:
    """Return a golden script as it is rendered now, what stands beside it included."""
    runtime: RuntimeName = "pyxis" if name.startswith("pyxis") else "docker"
    launcher = {"type": "torchrun", "script": "train.py", "nnodes": None} if name.endswith("gang") else {}
    config = a_config(**launcher)
    if name.endswith("gang"):
        config = config.model_copy(update={"job": config.job.model_copy(update={"nodes": 2})})
    container = a_container(runtime, auth_file="~/.docker/lab.json")
    script = render_script(
        config, run_id="r", run_dir="/scratch/my runs/r", container=container, images="~/nexa/images"
    )
    conf = script.tables.get(CONTAINER_CONF)
    return script.text + ("".join(f"\n# {CONTAINER_CONF}: {line}" for line in conf()) + "\n" if conf else "")


@pytest.mark.parametrize("name", ["docker", "docker-gang", "pyxis", "pyxis-gang"])
def test_a_script_in_a_container_is_the_golden_one(name: str) -> None:
    assert rendered(name) == (GOLDEN / f"container-{name}.sbatch").read_text()


@pytest.mark.parametrize("name", ["docker", "docker-gang", "pyxis", "pyxis-gang"])
def test_such_a_script_passes_shellcheck(name: str, tmp_path: Path) -> None:
    (tmp_path / "job.sbatch").write_text(rendered(name))
    done = subprocess.run(["shellcheck", "--shell=bash", tmp_path / "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "shell"), [(CONTAINER_SCRIPT, "bash"), (GUARD, "sh")])
def test_the_shell_programs_pass_shellcheck(name: str, shell: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(shell_text(name))
    done = subprocess.run(["shellcheck", f"--shell={shell}", tmp_path / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_script_without_a_container_knows_nothing_of_them() -> None:
    script = render_script(a_config(), run_id="r", run_dir="/r")
    assert "container" not in script.text
    assert CONTAINER_SCRIPT not in script.tables


# -- stand-ins that write down what they are told, as JSON lines

_STAND_IN = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as stream:
    stream.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}) + "\\n")
{body}
"""


def stand_in(folder: Path, name: str, body: str = "") -> Path:
    """Put a stand-in on the PATH's first folder, and return where it writes down what it is told."""
    log = folder / f"{name}.jsonl"
    log.touch()
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(_STAND_IN.format(python=sys.executable, log=str(log), body=body))
    program.chmod(0o755)
    return log


def told(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def start(
    folder: Path,
    container: Container,
    *argv: str,
    verb: str = "run",
    cwd: Path | None = None,
    before: Sequence[str] = (),
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """Run container.sh as a job would, the stand-ins first on its PATH."""
    run_dir = folder / "runs" / uuid.uuid4().hex
    run_dir.mkdir(parents=True)
    conf = {"run_id": "r", "cache": str(folder / "images"), **more.pop("conf", {})}
    (run_dir / CONTAINER_CONF).write_text("".join(f"{line}\n" for line in container_conf(container, **conf)))
    for name in (CONTAINER_SCRIPT, GUARD):
        (run_dir / name).write_text(shell_text(name))
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "NEXA_RUN_DIR": str(run_dir),
        **more,
    }
    return subprocess.run(
        [*before, "bash", str(run_dir / CONTAINER_SCRIPT), verb, *argv],
        cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_docker_is_told_the_limits_the_mounts_and_the_labels_and_no_value_that_may_be_secret(tmp_path: Path) -> None:
    log = stand_in(tmp_path, "docker")
    done = start(
        tmp_path, a_container(), "train", HOSTILE, NEXA_CONTAINER_NAMES="TOKEN PATH", TOKEN="hush", NEXA_TRIAL="3"
    )
    assert done.returncode == 0, done.stderr
    ran = next(each for each in told(log) if each["argv"][0] == "run")
    argv = ran["argv"]
    pairs = list(itertools.pairwise(argv))
    assert argv[-2:] == ["train", HOSTILE]
    for pair in [
        ("--network", "host"), ("--shm-size", str(8 << 30)), ("--memory", str(16 << 30)), ("--cpus", "2.5"),
        ("--pids-limit", "512"), ("--label", "nexa.run=r"), ("--label", "nexa.trial=3"), ("--env", "TOKEN"),
        ("--env", 'GREETING=it\'s "$HOME"\n'), ("--user", f"{os.getuid()}:{os.getgid()}"),
        ("--mount", 'type=bind,"source=/scratch/my data","target=/data/imagenet",readonly'),
        ("--mount", f'type=bind,"source={tmp_path}/cache","target=/cache"'),
    ]:  # fmt: skip
        assert pair in pairs
    assert "hush" not in " ".join(argv)
    assert ran["env"]["TOKEN"] == "hush"


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))) or Path("/dev/kfd").exists(), reason="a GPU is here")
@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_a_job_that_asks_for_gpus_says_so_where_the_node_has_none(runtime: RuntimeName, tmp_path: Path) -> None:
    stand_in(tmp_path, runtime)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{'ab' * 32}.sif").touch()
    done = start(tmp_path, a_container(runtime), "true", conf={"gpus": 2})
    assert done.returncode == 69
    assert "the job asks for 2 GPUs a node, but" in done.stderr
    assert "has none" in done.stderr


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_without_a_network_the_program_has_a_name_for_itself_that_leads_somewhere(
    runtime: RuntimeName, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{'ab' * 32}.sif").touch()
    log = stand_in(tmp_path, runtime)
    for network in ("none", "host"):
        done = start(tmp_path, a_container(runtime, settings={"network": network}), "train")
        assert done.returncode == 0, done.stderr
    alone, among = [each for each in told(log) if each["argv"][0] in {"run", "exec"}]
    if runtime == "docker":
        assert ("--add-host", "nexa:127.0.0.1") in itertools.pairwise(alone["argv"])
        assert ("--env", "NEXA_ALONE") in itertools.pairwise(alone["argv"])
    else:
        assert ("--net", "--network") in itertools.pairwise(alone["argv"])
        assert alone["env"]["APPTAINERENV_NEXA_ALONE"] == "1"
    assert not {"--add-host", "--net"} & set(among["argv"])
    assert "NEXA_ALONE" not in among["env"]


# A /dev with two GPUs, for the processes below this one; no driver is asked.
_WITH_GPUS = """
mount -t tmpfs -o mode=755 none "$0" && for each in null zero urandom; do
  touch "$0/$each" && mount --bind "/dev/$each" "$0/$each"
done
ln -s /proc/self/fd "$0/fd" && mknod "$0/nvidia0" c 195 0 && mknod "$0/nvidia1" c 195 1 && mount --rbind "$0" /dev
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make device files")
@pytest.mark.parametrize(
    ("environment", "device", "inside"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, '"device=1"', "0"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_GPUS": "2,3"}, '"device=2,3"', "0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "2,3", "SLURM_STEP_GPUS": "3"}, '"device=3"', "0"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f6c"}, '"device=GPU-8f6c"', None),
        ({}, "all", None),
    ],
)
def test_docker_is_told_the_gpus_as_the_node_counts_them_and_the_program_counts_from_0(
    environment: dict[str, Any], device: str, inside: str | None, tmp_path: Path
) -> None:
    log = stand_in(tmp_path, "docker")
    (tmp_path / "dev").mkdir()
    before = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _WITH_GPUS, str(tmp_path / "dev")]
    done = start(tmp_path, a_container(), "train", conf={"gpus": 2}, before=before, **environment)
    assert done.returncode == 0, done.stderr
    argv = next(each["argv"] for each in told(log) if each["argv"][0] == "run")
    assert argv[argv.index("--gpus") + 1] == device
    given = [word for word in argv if word.startswith("CUDA_VISIBLE_DEVICES=")]
    assert given == ([f"CUDA_VISIBLE_DEVICES={inside}"] if inside is not None else [])


def test_a_runtime_that_is_not_installed_is_named_with_the_node(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = start(tmp_path, a_container("singularity"), "true", SLURMD_NODENAME="n7")
    assert done.returncode == 69
    assert "singularity is not installed on n7" in done.stderr


def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    log = stand_in(tmp_path, "singularity", "open(sys.argv[-2], 'w').close() if sys.argv[1] == 'build' else None")
    done = start(tmp_path, a_container("auto"), "train")
    assert done.returncode == 0, done.stderr
    assert [each["argv"][0] for each in told(log)] == ["build", "exec"]
    assert told(log)[1]["env"]["SINGULARITYENV_GREETING"] == 'it\'s "$HOME"\n'


def test_a_login_that_others_may_read_is_refused(tmp_path: Path) -> None:
    stand_in(tmp_path, "docker", "sys.exit(sys.argv[1:3] == ['image', 'inspect'])")
    auth = tmp_path / ".docker" / "lab.json"
    auth.parent.mkdir()
    auth.write_text("{}")
    auth.chmod(0o644)
    done = start(tmp_path, a_container(auth_file="~/.docker/lab.json"), "train")
    assert done.returncode == 78
    assert f"container.auth_file {auth} has mode 644: chmod 600 it" in done.stderr


# -- one SIF, however many ask

_SLOW_BUILD = """
import time
if sys.argv[1] == "build":
    time.sleep({seconds})
    {then}
    open(sys.argv[-2], "w").write("a SIF")
"""


def ask_at_once(folder: Path, count: int) -> list[subprocess.CompletedProcess[str]]:
    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(start, folder, a_container("apptainer"), "train", SLURMD_NODENAME=f"n{number % 3}")
            for number in range(count)
        ]
        return [each.result() for each in asked]


def test_of_many_that_ask_at_once_one_builds_and_nothing_but_the_sif_and_its_log_stays(tmp_path: Path) -> None:
    log = stand_in(tmp_path, "apptainer", _SLOW_BUILD.format(seconds=1, then=""))
    done = ask_at_once(tmp_path, 16)
    assert [each.returncode for each in done] == [0] * 16
    assert [each["argv"][0] for each in told(log)].count("build") == 1
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["ab" * 32 + ".log", "ab" * 32 + ".sif"]
    assert (tmp_path / "images" / f"{'ab' * 32}.log").read_text().count("BUILD") == 1


def test_a_build_that_fails_fails_for_all_that_waited_and_is_tried_anew_by_who_comes_later(
    tmp_path: Path,
) -> None:
    then = "print('no space left on device'); sys.exit(9)"
    log = stand_in(tmp_path, "apptainer", _SLOW_BUILD.format(seconds=2, then=then))
    done = ask_at_once(tmp_path, 8)
    assert {each.returncode for each in done} == {74}
    assert all("no space left on device" in each.stderr for each in done)
    assert [each["argv"][0] for each in told(log)] == ["build"]
    assert not list((tmp_path / "images").glob("*.sif*.part"))
    assert start(tmp_path, a_container("apptainer"), "train").returncode == 74
    assert [each["argv"][0] for each in told(log)] == ["build", "build"]


def test_the_lock_of_a_builder_that_was_killed_is_taken_over_at_once_on_its_node(tmp_path: Path) -> None:
    stand_in(tmp_path, "apptainer", _SLOW_BUILD.format(seconds=0, then=""))
    images = tmp_path / "images"
    images.mkdir()
    gone = "n0.999999.1"
    (images / f"{'ab' * 32}.sif.lock").symlink_to(gone)
    (images / f"{'ab' * 32}.sif.{gone}.part").write_text("half a SIF")
    begun = time.monotonic()
    done = start(tmp_path, a_container("apptainer"), "train", SLURMD_NODENAME="n0")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 10
    assert not list(images.glob("*.part"))


def test_scratch_is_gone_with_its_script_and_that_of_a_killed_one_with_the_next(tmp_path: Path) -> None:
    stand_in(tmp_path, "docker")
    left = tmp_path / f"nexa-container-{os.getuid()}-999999-abcdef"
    (left / "scratch").mkdir(parents=True)
    assert start(tmp_path, a_container(), "train").returncode == 0
    assert not list(tmp_path.glob("nexa-container-*"))


@pytest.mark.parametrize(
    ("registry", "plain"),
    [("127.0.0.1:5000", "1"), ("localhost:5000", "1"), ("localhost", "1"), ("[::1]:5000", "1"),
     ("127.evil.example.org", None), ("127.0.0.1.example.org", None), ("localhost.example.org", None),
     ("r.example.org", None)],
)  # fmt: skip
def test_only_the_loopback_is_built_from_in_plain(registry: str, plain: str | None, tmp_path: Path) -> None:
    log = stand_in(tmp_path, "apptainer", _SLOW_BUILD.format(seconds=0, then=""))
    image = f"{registry}/lab/train@sha256:{'ab' * 32}"
    done = start(tmp_path, a_container("apptainer", image=image), "train")
    assert done.returncode == 0, done.stderr
    assert told(log)[0]["env"].get("APPTAINER_NOHTTPS") == plain

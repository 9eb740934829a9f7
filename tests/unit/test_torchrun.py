"""What a config asks of torchrun: its keys, how its nodes are started, and what people are told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import ConfigError
from nexa_infra.operations import launch
from nexa_infra.scheduling.script import Script, render_script
from nexa_infra.scheduling.torchrun import Gang, chooses_place, gang_of, gang_script, placement
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.launcher import Launcher, processes_asked
from nexa_infra.spec.load import load_config
from nexa_infra.spec.run import TrainingConfig

DESIGN = """\
job:
  name: nexa-training
  partition: gpu
  time: "08:00:00"
  gpus_per_node: 4
  gpu_type: rtx_5090
  cost_per_gpu_hour: 3.25
launcher:
  type: torchrun
  script: train.py
  extra_args: [--standalone]
sweep:
  base_args: [--epochs, "2"]
  parameters:
    learning_rate: [2e-5, 1e-5]
"""


def torchrun(**keys: Any) -> Launcher:
    return Launcher.model_validate({"type": "torchrun", "script": "train.py", **keys})


def a_job(**keys: Any) -> SlurmJob:
    return SlurmJob.model_validate(keys)


def gang(launcher: Launcher, **job: Any) -> Gang:
    made = gang_of(launcher, a_job(**job))
    assert made is not None
    return made


def env(launcher: Launcher, **job: Any) -> dict[str, str]:
    return dict(gang(launcher, **job).env)


def script_of(launcher: Launcher, **config: Any) -> Script:
    asked = TrainingConfig.model_validate({"launcher": launcher.model_dump(exclude_defaults=True), **config})
    return render_script(asked, run_id="r", run_dir="/r")


# ---- the keys ----


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({}, "auto"),
        ({"nproc_per_node": 4}, 4),
        ({"nproc_per_node": "4"}, 4),
        ({"nproc_per_node": " gpu "}, "gpu"),
        ({"extra_args": ["--nproc-per-node=4"]}, 4),
        ({"extra_args": ["--nproc_per_node", "cpu"]}, "cpu"),
        ({"nproc_per_node": 2, "extra_args": ["--nproc-per-node", "3"]}, 3),
        ({"nproc_per_node": 2, "extra_args": ["--nproc-per-node={n}"]}, 2),
        ({"nproc_per_node": 2, "extra_args": ["--nproc-per-node"]}, 2),
    ],
)
def test_processes_are_those_of_torchrun_s_own_option_or_of_the_key(keys: dict[str, Any], asked: str | int) -> None:
    assert processes_asked(torchrun(**keys)) == asked


@pytest.mark.parametrize("endpoint", ["node7:29500", "10.0.0.7:1", "[fe80::1]:65535", "a_b.c-d:29500"])
def test_an_endpoint_is_a_host_and_a_port(endpoint: str) -> None:
    assert torchrun(rdzv_endpoint=f" {endpoint} ").rdzv_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["node7", "node7:", ":1", "n:0", "n:65536", "a b:1", "-n:1", "n;ls:1", "::1:29500"]
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"is no endpoint: write HOST:PORT"):
        torchrun(rdzv_endpoint=endpoint)


@pytest.mark.parametrize("nodes", ["0", "0:2", "3:2", "1:", ":2", "a", "1:2:3", "-1", "²"])
def test_what_is_no_number_of_nodes_is_refused(nodes: str) -> None:
    with pytest.raises(ValueError, match=r"is no number of nodes|starts at no node|the wrong way round"):
        torchrun(nnodes=nodes)


@pytest.mark.parametrize("processes", ["0", "-1", "many", "1.5", "", True, [2], "123456"])
def test_what_is_no_number_of_processes_is_refused(processes: Any) -> None:
    with pytest.raises(ValueError, match=r"is no number of processes|is meant here"):
        torchrun(nproc_per_node=processes)


def test_keys_that_stay_at_their_defaults_go_with_any_type() -> None:
    assert Launcher.model_validate({"script": "train.py", "nproc_per_node": "auto", "max_restarts": 0}).type == "python"


# ---- how it is started ----


def test_nothing_but_torchrun_is_a_gang() -> None:
    assert gang_of(Launcher(script="train.py"), a_job(nodes=2)) is None
    assert gang_of(Launcher(type="command", command=("x",)), a_job()) is None


def test_one_torchrun_is_started_on_each_node() -> None:
    made = gang(torchrun(extra_args=["--role=r"]), nodes=2, ntasks_per_node=2, cpus_per_task=4)
    assert (made.nodes, made.words, made.endpoint, made.elastic) == (2, 2, None, False)
    assert made.srun == (
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=1",
    )
    assert dict(made.env) == {
        "NEXA_GANG_PROCESSES": "auto",
        "NEXA_GANG_TASKS": "2",
        "NEXA_GANG_CORES": "8",
        "NEXA_GANG_NODES": "2",
        "NEXA_GANG_RESTARTS": "0",
        "NEXA_GANG_BACKEND": "c10d",
        "NEXA_GANG_TIMEOUT": "600",
        "NEXA_GANG_WARNING": "USR1",
    }


def test_what_the_launcher_says_of_the_rendezvous_is_handed_on() -> None:
    launcher = torchrun(
        nproc_per_node=2, rdzv_backend="static", rdzv_endpoint="n7:29500", rdzv_timeout=30, interface="ib0"
    )
    assert gang(launcher, nodes=2).endpoint == "n7:29500"
    told = env(launcher, nodes=2)
    assert (told["NEXA_GANG_PROCESSES"], told["NEXA_GANG_BACKEND"], told["NEXA_GANG_TIMEOUT"]) == ("2", "static", "30")
    assert {name for name, value in told.items() if value == "ib0"} == {
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "TP_SOCKET_IFNAME",
    }


def test_a_gang_that_may_shrink_outlives_a_node() -> None:
    made = gang(torchrun(nnodes="1:3", max_restarts=2), nodes=3)
    assert made.elastic and made.srun[-2:] == ("--kill-on-bad-exit=0", "--no-kill")
    told = dict(made.env)
    assert (told["NEXA_GANG_NODES"], told["NEXA_GANG_RESTARTS"]) == ("1:3", "2")
    assert told["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", "ranks that start again need a store of their own"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in env(torchrun(nnodes="3"), nodes=3)
    assert "#SBATCH --no-kill" in script_of(torchrun(nnodes="1:3"), job={"nodes": 3}).text


def test_processes_of_torchrun_s_own_option_are_those_that_the_node_is_told() -> None:
    assert env(torchrun(extra_args=["--nproc-per-node=3"]))["NEXA_GANG_PROCESSES"] == "3"


@pytest.mark.parametrize(
    ("options", "chosen", "placed"),
    [
        ([], False, False),
        (["--role", "r"], False, False),
        (["--standalone"], True, False),
        (["--rdzv_endpoint=n7:1", "--rdzv-backend=c10d"], True, True),
        (["--master-addr", "n7", "--master_port=1"], True, True),
    ],
)
def test_one_who_says_where_the_nodes_meet_has_chosen_it(options: list[str], chosen: bool, placed: bool) -> None:
    launcher = torchrun(extra_args=options)
    assert chooses_place(launcher) is chosen
    assert ("NEXA_GANG_PLACED" in env(launcher)) is placed
    if "--standalone" not in options:
        assert ("meet() {" in script_of(launcher, job={"nodes": 2}).text) is not chosen


def test_the_gang_s_script_stands_beside_the_job_s() -> None:
    made = script_of(torchrun())
    assert "\n".join(made.tables["gang.sh"]()) + "\n" == gang_script()
    assert "gang.sh" not in script_of(Launcher(script="train.py")).tables


# ---- what people are told ----


@pytest.mark.parametrize(
    ("keys", "job", "cluster", "told"),
    [
        ({}, {}, None, "torchrun --standalone on this machine, 1 process"),
        ({}, {"gpus_per_node": 4}, None, "torchrun --standalone on this machine, 4 processes"),
        ({"nproc_per_node": "gpu"}, {"gpus_per_node": 4}, "c", "torchrun --standalone on c, 4 processes, one a GPU"),
        ({"nproc_per_node": "cpu"}, {"cpus_per_task": 8}, "c", "torchrun --standalone on c, 8 processes, one a core"),
        ({"extra_args": ["--nproc-per-node=3"]}, {}, "c", "torchrun --standalone on c, 3 processes"),
        (
            {"nproc_per_node": 2},
            {"nodes": 2},
            None,
            "torchrun --standalone on this machine, 2 processes (job.nodes: 2 is for a cluster)",
        ),
        ({"nproc_per_node": 2}, {"nodes": 2}, "c", "torchrun on c, 2 nodes, 2 processes on each, c10d rendezvous"),
        (
            {"nnodes": "1:4", "nproc_per_node": 1},
            {"nodes": 4},
            "c",
            "torchrun on c, 1 to 4 nodes, 1 process on each, c10d rendezvous",
        ),
        ({"rdzv_backend": "static"}, {"nodes": 2}, "c", "torchrun on c, 2 nodes, 1 process on each, static rendezvous"),
    ],
)
def test_where_it_runs_and_as_what_is_told(
    keys: dict[str, Any], job: dict[str, Any], cluster: str | None, told: str
) -> None:
    assert placement(torchrun(**keys), a_job(**job), cluster) == told


def test_what_is_no_torchrun_is_told_likewise() -> None:
    assert placement(Launcher(script="t.py"), a_job(), None) == "python3 on this machine"
    assert placement(Launcher(script="t.py"), a_job(nodes=2), "c") == "python3 on c, 2 nodes"
    assert placement(Launcher(type="command", command=("x",)), a_job(), "c") == "a program on c"


# ---- without torchrun ----


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program, in which the test stands."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_for_four_gpus_is_previewed_on_a_machine_without_torchrun(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = project / "bin"
    bare.mkdir()
    (bare / "python3").symlink_to("/usr/bin/env")  # its own folder comes first on the PATH of trials, and has none
    monkeypatch.setattr("sys.executable", str(bare / "python3"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (project / "c.yaml").write_text(DESIGN)
    assert load_config("c.yaml").launcher.extra_args == ("--standalone",)
    before = sorted(project.rglob("*"))
    shown = launch.preview(launch.plan_sweep("c.yaml"))
    assert sorted(project.rglob("*")) == before and not home.exists()
    assert shown.shown[0] == (0, "torchrun --standalone train.py --epochs 2 --learning_rate 2e-5")
    (note,) = shown.notes
    assert "nothing was copied or started" in note and "torchrun is not installed on this machine" in note


def test_distributed_needs_a_python_program(project: Path) -> None:
    (project / "c.yaml").write_text("launcher:\n  type: command\n  command: [./run.sh]\ntraining: {}\n")
    with pytest.raises(ConfigError) as caught:
        launch.plan_training("c.yaml", distributed=True)
    assert str(caught.value) == "c.yaml:2: launcher.type: distributed needs a Python script or module, not a command"
    (project / "c.yaml").write_text("launcher:\n  script: train.py\n  extra_args: [-O]\ntraining: {}\n")
    with pytest.raises(ConfigError, match=r"^c\.yaml:3: launcher\.extra_args: are the interpreter's own"):
        launch.plan_training("c.yaml", distributed=True)


def test_distributed_changes_how_a_script_is_started_and_nothing_else(project: Path) -> None:
    (project / "c.yaml").write_text("launcher: {script: train.py, argument_style: name=value}\ntraining: {}\n")
    started = launch.plan_training("c.yaml", distributed=True).config.launcher
    assert (started.type, started.script, started.argument_style) == ("torchrun", "train.py", "name=value")
    assert launch.plan_training("c.yaml").config.launcher.type == "python"
    (project / "c.yaml").write_text(
        "launcher: {type: torchrun, script: train.py, nproc_per_node: 2, extra_args: [--standalone]}\ntraining: {}\n"
    )
    plain = launch.plan_training("c.yaml", distributed=False).config.launcher
    assert plain == Launcher(script="train.py")
    assert launch.plan_training("c.yaml").config.launcher.nproc_per_node == 2

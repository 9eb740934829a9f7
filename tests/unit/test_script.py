"""The rendered array script: whole texts, real shellcheck, real bash."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.scheduling.script import render_script, sbatch_options
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.run import SweepConfig, TrainingConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "scripts"

CASES: dict[str, dict[str, Any]] = {
    "torchrun": {
        "job": {
            "name": "t",
            "partition": "gpu",
            "time": "08:00:00",
            "gpus_per_node": 4,
            "array_parallelism": 2,
            "gpu_type": "rtx_5090",
            "cost_per_gpu_hour": 3.25,
        },
        "launcher": {"type": "torchrun", "script": "train.py", "extra_args": ["--standalone"]},
        "sweep": {
            "base_args": ["--epochs", "2"],
            "parameters": {"learning_rate": ["2e-5", "1e-5"], "batch_size": ["8", "16"]},
        },
    },
    "everything": {
        "job": {
            "name": "all",
            "account": "lab",
            "qos": "high",
            "time": "1-12",
            "nodes": 2,
            "ntasks_per_node": 2,
            "cpus_per_task": 8,
            "memory": "64G",
            "constraint": "ib&avx512",
            "gres": "gpu:a100:2",
            "nodelist": "n[1-2]",
            "exclude": "n3",
            "reservation": "r1",
            "dependency": "afterok:12",
            "mail_type": "END",
            "mail_user": "a@example.org",
            "extra": {"comment": "it's # a comment", "exclusive": True},
            "env": {"GREETING": "hello\n'world'"},
            "env_file": "~/secrets.env",
            "setup": {
                "modules": ["cuda/12.4", "gcc"],
                "conda": "my env",
                "venv": "~/venvs/train",
                "lines": ["ulimit -n 4096"],
            },
        },
        "launcher": {
            "type": "command",
            "command": ["./run.sh", "--width={width}", "{{literal}}"],
            "argument_style": "--name=value",
        },
        "sweep": {
            "parameters": {"width": ["8", "16"], "bias": [True, False, None]},
            "zip": {"lr": ["1e-4", "1e-3"], "steps": ["10", "20"]},
            "exclude": [{"width": "8", "bias": True}],
            "overrides": {"seed": "7"},
            "env": {"WANDB_MODE": "offline"},
        },
    },
    "training": {
        "launcher": {"module": "pkg.train", "extra_args": ["-u"]},
        "training": {"args": ["--data", "my data"], "parameters": {"amp": True, "epochs": "3"}},
    },
}


def made(name: str) -> str:
    case = CASES[name]
    config = (TrainingConfig if "training" in case else SweepConfig).model_validate(case)
    return render_script(config, run_id="20261124-081500-t-a1b2", run_dir="/scratch/my runs/run").text


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_the_golden_one(name: str) -> None:
    assert made(name) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_script_passes_shellcheck(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(made(name))
    done = subprocess.run(["shellcheck", "--shell=bash", path], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_million_trials_make_a_script_as_short_as_four() -> None:
    axes = {f"axis_{n}": [str(value) for value in range(10)] for n in range(6)}
    config = SweepConfig.model_validate({"sweep": {"parameters": axes}, "launcher": {"script": "train.py"}})
    script = render_script(config, run_id="r", run_dir="/r")
    assert len(config.sweep) == 1_000_000
    assert len(script.text.encode()) < 16 * 1024
    assert not script.tables


def test_a_long_list_of_trials_goes_to_a_table_beside_the_script() -> None:
    config = SweepConfig.model_validate(
        {"sweep": {"trials": [{"seed": str(n)} for n in range(1000)]}, "launcher": {"script": "train.py"}}
    )
    script = render_script(config, run_id="r", run_dir="/r")
    assert list(script.tables) == ["tables/axis-0"]
    assert list(script.tables["tables/axis-0"]())[999] == "nexa_args+=(--seed 999)"
    assert len(script.text.encode()) < 16 * 1024


def test_values_of_sbatch_lines_are_quoted_where_sbatch_would_split_them() -> None:
    job = SlurmJob.model_validate({"extra": {"comment": 'a "b" # c', "wckey": "plain"}})
    options = list(sbatch_options(job))
    assert '--comment="a \\"b\\" # c"' in options
    assert "--wckey=plain" in options


def test_a_cluster_s_partition_stands_in_where_the_job_names_none() -> None:
    cluster = Cluster(name="c", workdir="/scratch", partition="gpu")
    assert "--partition=gpu" in list(sbatch_options(SlurmJob(), cluster))
    assert "--partition=cpu" in list(sbatch_options(SlurmJob(partition="cpu"), cluster))


def run_by_hand(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": "/usr/bin:/bin", "NEXA_SCHEDULER": "local"}
    return subprocess.run(["bash", str(script), "0", "1"], env=base | environment, capture_output=True, text=True)


def test_the_script_refuses_to_run_outside_an_array(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(made("training"))
    done = run_by_hand(path)
    assert done.returncode == 2
    assert "not an array task" in done.stderr


def test_the_script_refuses_a_trial_that_the_sweep_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(made("torchrun"))
    done = run_by_hand(path, SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_JOB_ID="1")
    assert done.returncode == 2
    assert "no trial 4 among 4" in done.stderr


def test_the_exit_code_is_right_when_a_signal_comes_as_the_trial_ends(tmp_path: Path) -> None:
    """Bash itself loses such a child's status now and then, so TERM is aimed at the end, many times."""
    for place in ("status", "trials", "claims", "code"):
        (tmp_path / place).mkdir()
    config = TrainingConfig.model_validate({"launcher": {"type": "command", "command": ["sleep", "0.02"]}})
    path = tmp_path / "job.sbatch"
    path.write_text(render_script(config, run_id="r", run_dir=str(tmp_path)).text)
    environment = {"PATH": "/usr/bin:/bin", "NEXA_SCHEDULER": "local", "SLURM_ARRAY_TASK_ID": "0", "HOSTNAME": "n1"}
    ends = Counter[str]()
    for attempt in range(150):
        script = subprocess.Popen(["bash", str(path), "0", "1"], env=environment | {"SLURM_ARRAY_JOB_ID": str(attempt)})
        time.sleep(0.022 + 0.01 * (attempt % 15) / 15)
        script.terminate()
        script.wait(10)
        status = tmp_path / "status" / f"{attempt}_0"
        lines = status.read_text().splitlines() if status.exists() else []
        if lines and lines[-1].startswith("end"):
            code, caught = lines[-1].split("\t")[4:6]
            ends[f"{code} {caught}".strip()] += 1
    assert ends["0"], "no trial ended by itself, so nothing was tested"
    assert ends["143 TERM"], "no trial was told to end, so nothing was tested"
    # The signal that is remembered says that a 0 beside it is no success: the trial was told to end.
    assert set(ends) <= {"0", "143 TERM", "0 TERM"}, ends


def test_a_signal_that_comes_again_before_it_is_remembered_is_passed_on_once() -> None:
    """The second comes where the first has looked, and has not noted it down yet."""
    (forward,) = re.findall(r"^forward\(\) \{\n.*?^\}\n", made("everything"), re.MULTILINE | re.DOTALL)
    script = f"""
own_code() {{ return 1; }}
send() {{ echo "sent $1"; }}
kill() {{ [[ $1 == -0 ]] || echo "sent $2"; }}
scancel() {{ echo "sent $2"; }}
requeue_later() {{ :; }}
{forward}
set -T
trap 'if [[ $BASH_COMMAND == "nexa_caught+="* && -z $again ]]; then again=1; forward TERM; fi' DEBUG
again='' nexa_caught='' nexa_child=77 nexa_before=77 SLURM_JOB_ID=9 NEXA_SCHEDULER=slurm
forward TERM
trap - DEBUG
echo "[$nexa_caught] $again"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sent TERM", "[ TERM] 1"], done

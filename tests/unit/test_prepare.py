"""A self-contained array script in a folder: prepare_slurm_batch."""

from __future__ import annotations

import json
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest

from nexa_infra import prepare_slurm_batch
from nexa_infra.errors import ConfigError, SubmitError
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.launcher import Launcher
from nexa_infra.spec.sweep import SweepDefinition

CONFIG = """
job: {name: t, partition: gpu, time: "08:00:00", gpus_per_node: 4, array_parallelism: 2, gpu_type: rtx_5090, \
cost_per_gpu_hour: 3.25}
sweep: {base_args: [--epochs, "2"], parameters: {learning_rate: [2e-5, 1e-5], batch_size: [8, 16]}}
launcher: {type: torchrun, script: train.py, extra_args: [--standalone]}
objective: {metric: accuracy, goal: max}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and the script that it names."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(CONFIG)
    (folder / "train.py").write_text("")
    monkeypatch.chdir(folder)
    return folder


def test_the_config_of_the_documentation_works_as_it_stands(tmp_path: Path) -> None:
    made = prepare_slurm_batch("sweep.yaml", output_dir=tmp_path / "out")
    assert made.script == tmp_path / "out" / "job.sbatch"
    assert made.array == "0-3%2" and made.trials == 4 and not made.submitted
    assert made.shown[0][1] == "torchrun --standalone train.py --epochs 2 --learning_rate 2e-5 --batch_size 8"
    assert made.estimate is not None
    assert made.estimate.ceiling_usd == Decimal("416.00"), "4 trials x 4 GPUs x 8 hours x $3.25"
    assert "#SBATCH --gpus-per-node=4" in made.script_text


def test_the_parts_of_a_config_will_do(tmp_path: Path) -> None:
    sweep = SweepDefinition(parameters={"lr": (1e-4, 1e-3)}, base_args=("--fast",))
    made = prepare_slurm_batch(
        sweep=sweep, job=SlurmJob(gpus_per_node=1), launcher=Launcher(script="train.py"), output_dir=tmp_path / "out"
    )
    assert [command for _, command in made.shown] == [
        "python3 train.py --fast --lr 0.0001",
        "python3 train.py --fast --lr 0.001",
    ]
    assert made.estimate is None, "which GPU it is was not said, so no price is known"


def test_the_script_needs_nothing_but_its_folder(tmp_path: Path) -> None:
    program = 'import json, os, sys; open(os.environ["NEXA_METRICS"], "w").write(json.dumps(sys.argv[1:]))'
    made = prepare_slurm_batch(
        sweep=SweepDefinition(parameters={"x": tuple(range(1000))}),
        launcher=Launcher(type="command", command=("python3", "-c", program)),
        output_dir=tmp_path / "out",
    )
    assert made.script is not None
    environment = {"PATH": "/usr/bin:/bin", "NEXA_SCHEDULER": "local", "SLURM_ARRAY_JOB_ID": "7", "HOSTNAME": "n1"}
    for chunk, chunks, task, trial in ((0, 1, 999, 999), (1, 10, 3, 31)):
        words = ["bash", str(made.script), str(chunk), str(chunks)]
        subprocess.run(words, env=environment | {"SLURM_ARRAY_TASK_ID": str(task)}, check=True, cwd="/")
        seen = json.loads((tmp_path / "out" / "trials" / str(trial) / "metrics.json").read_text())
        assert seen == ["--x", str(trial)]


def test_without_sbatch_the_script_stays_and_the_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match=r"sbatch is not on this machine: run `sbatch --parsable --array=0-3%2"):
        prepare_slurm_batch("sweep.yaml", submit=True, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "job.sbatch").exists()


def test_an_earlier_batch_is_never_written_over(tmp_path: Path) -> None:
    prepare_slurm_batch("sweep.yaml", output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds a job.sbatch"):
        prepare_slurm_batch("sweep.yaml", output_dir=tmp_path / "out")


def test_bad_input_leaves_nothing_behind(project: Path) -> None:
    (project / "bad.yaml").write_text(CONFIG.replace("partition", "partitoin"))
    before = sorted(project.rglob("*"))
    with pytest.raises(ConfigError, match="did you mean 'partition'"):
        prepare_slurm_batch("bad.yaml")
    with pytest.raises(ConfigError, match="give a config, or sweep= and launcher="):
        prepare_slurm_batch()
    assert sorted(project.rglob("*")) == before


def test_a_batch_in_an_image_brings_what_starts_its_containers(project: Path, tmp_path: Path) -> None:
    digest = "sha256:" + "ab" * 32
    (project / "image.yaml").write_text(CONFIG + f"container: {{image: 'localhost:1/lab/train@{digest}'}}\n")
    made = prepare_slurm_batch("image.yaml", output_dir=tmp_path / "out")
    assert made.directory is not None
    assert {"container.sh", "container.conf", "guard.sh"} <= {path.name for path in made.directory.iterdir()}
    assert f"image=localhost:1/lab/train@{digest}" in (made.directory / "container.conf").read_text()


def test_a_target_without_a_catalog_is_refused_at_its_line(project: Path, tmp_path: Path) -> None:
    (project / "image.yaml").write_text(CONFIG + "container: {target: train-light}\n")
    with pytest.raises(ConfigError, match=r"image.yaml:6: container.target: .*there is no image catalog"):
        prepare_slurm_batch("image.yaml", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()

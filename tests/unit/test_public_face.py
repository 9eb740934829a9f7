"""The public face: names, positions and defaults that people's code relies on; what importing costs; a bad GPU."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nexa_infra
from nexa_infra import launch_slurm_sweep, launch_training_job, prepare_slurm_batch
from nexa_infra.errors import ConfigError

REQUIRED = inspect.Parameter.empty

# name -> its room, its positional arguments and its keyword-only ones, each with its default
FACE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "launch_training_job": (
        "nexa_infra.operations.launch",
        {"config_path": REQUIRED, "distributed": False},
        {"overrides": None, "cluster": None},
    ),
    "launch_slurm_sweep": (
        "nexa_infra.operations.launch",
        {"config": REQUIRED, "submit": False},
        {"cluster": None, "resume": None},
    ),
    "extend_sweep": (
        "nexa_infra.operations.extend",
        {"run": REQUIRED, "config": REQUIRED, "submit": False},
        {"cluster": None, "overrides": (), "budget_usd": None, "tell": None},
    ),
    "prepare_slurm_batch": (
        "nexa_infra.scheduling.slurm",
        {"config": None, "submit": False, "output_dir": None},
        {"sweep": None, "job": None, "launcher": None},
    ),
    "estimate_batch_cost": (
        "nexa_infra.monitoring.costs",
        {},
        {
            "nodes": REQUIRED,
            "gpus_per_node": REQUIRED,
            "duration_hours": REQUIRED,
            "gpu_type": REQUIRED,
            "job_count": 1,
            "gpu_hour_cost": None,
            "run_id": None,
            "output_dir": None,
        },
    ),
    "run_container": (
        "nexa_infra.containers.runner",
        {"target": REQUIRED},
        {"override_image": None, "extra_env": None, "bootstrap_args": None},
    ),
    "sync_repository": ("nexa_infra.operations.sync", {"destination": REQUIRED}, {"include_runs": False}),
    "load_config": ("nexa_infra.spec.load", {"path": REQUIRED}, {}),
}
RETURNS = {
    "launch_training_job": "ArtifactMeta",
    "launch_slurm_sweep": "SlurmBatchArtifacts",
    "extend_sweep": "SlurmBatchArtifacts",
    "prepare_slurm_batch": "SlurmBatchArtifacts",
    "estimate_batch_cost": "CostEstimate",
    "run_container": "ContainerResult",
    "sync_repository": "Snapshot",
    "load_config": "SweepConfig | TrainingConfig",
}


@pytest.mark.parametrize("name", FACE)
def test_a_public_call_has_its_room_its_positions_and_its_defaults(name: str) -> None:
    room, positional, keywords = FACE[name]
    call = getattr(nexa_infra, name)
    assert call is getattr(sys.modules[room], name)
    signature = inspect.signature(call)
    kinds = {kind: {} for kind in inspect._ParameterKind}  # type: dict[Any, dict[str, Any]]
    for parameter in signature.parameters.values():
        kinds[parameter.kind][parameter.name] = parameter.default
    assert list(kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD].items()) == list(positional.items())
    # Keyword-only arguments may be added, but only with a default.
    added = {key: value for key, value in kinds[inspect.Parameter.KEYWORD_ONLY].items() if key not in keywords}
    assert kinds[inspect.Parameter.KEYWORD_ONLY] == {**keywords, **added}
    assert REQUIRED not in added.values()
    assert signature.return_annotation == RETURNS[name]


def test_the_names_are_listed_and_no_others_are_there() -> None:
    assert sorted(nexa_infra.__all__) == sorted(FACE)
    assert set(FACE) <= set(dir(nexa_infra))
    with pytest.raises(AttributeError, match="no attribute 'launch_slurm_swep'"):
        _ = nexa_infra.launch_slurm_swep


HEAVY = (
    "prefect",
    "fabric",
    "pandas",
    "numpy",
    "mlflow",
    "pydantic_settings",
    "pydantic",
    "rich",
    "jinja2",
    "ruamel",
    "asyncio",
)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, nexa_infra; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sweep", "--help"]])
def test_help_imports_no_engine(words: list[str]) -> None:
    found = imported_by(words)
    verbs = {name for name in found if name.startswith("nexa_infra.verbs")}
    own = {name for name in found if name.startswith("nexa_infra.")} - verbs
    assert own == {"nexa_infra.__main__", "nexa_infra.errors"}
    assert not {"prefect", "fabric", "pandas", "pydantic"} & found


@pytest.mark.parametrize("words", [["status"], ["clean", "--dry-run"], ["doctor"], ["report"], ["logs", "latest"]])
def test_no_verb_of_a_run_imports_prefect_or_pandas(words: list[str], home: Path) -> None:
    assert not {"prefect", "fabric", "pandas", "numpy"} & imported_by(words)


def imported_by(words: list[str]) -> set[str]:
    """Run a verb, and return which modules it has imported."""
    code = (
        "import sys\nfrom nexa_infra.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: print('\\n\\0', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("\0")[2].split())


# ---- a GPU that no price is known of ----

UNKNOWN_GPU = """\
job:
  name: t
  gpus_per_node: 1
  gpu_type: h1000
launcher: {type: command, command: ["true"]}
"""


@pytest.mark.parametrize("kind", ["sweep", "training"])
def test_an_unknown_gpu_is_one_error_with_file_line_key_and_the_nearest(
    kind: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(UNKNOWN_GPU + ("sweep: {parameters: {n: [1, 2]}}\n" if kind == "sweep" else "training: {}\n"))
    launch: Any = launch_slurm_sweep if kind == "sweep" else launch_training_job
    with pytest.raises(ConfigError) as caught:
        launch(file, **({"submit": True} if kind == "sweep" else {}))
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.key) == (str(file), 4, "job.gpu_type")
    assert "h1000" in problem.message and "h100" in problem.message.replace("h1000", "")
    verb = "sweep" if kind == "sweep" else "train"
    done = subprocess.run([sys.executable, "-m", "nexa_infra", verb, file], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == f"{caught.value}\n"
    assert sorted(tmp_path.iterdir()) == [file], "nothing new is on disk"


def test_a_batch_of_an_unknown_gpu_is_prepared_without_a_price(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(UNKNOWN_GPU + "sweep: {parameters: {n: [1, 2]}}\n")
    assert prepare_slurm_batch(file, output_dir=tmp_path / "batch").estimate is None

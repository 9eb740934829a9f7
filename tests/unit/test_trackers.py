"""What a trial's environment tells MLflow's and W&B's libraries, by the real script in real bash."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_infra import launch_slurm_sweep, launch_training_job
from nexa_infra.errors import ConfigError, RunFailedError
from nexa_infra.operations import manage
from nexa_infra.operations.launch import follow_run
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.script import render_script
from nexa_infra.scheduling.trackers import config_entries
from nexa_infra.spec.load import load_config
from nexa_infra.spec.run import SweepConfig, TrainingConfig

PRINT = 'env -0 >"$NEXA_TRIAL_DIR/env-$NEXA_ATTEMPT"'
WANDB = {"wandb": {"project": "digits"}}
MLFLOW = {"mlflow": {"uri": "https://mlflow.example.org", "log": False}}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little code in it, to be in; nothing of a tracker's in the environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)
    # MLflow's library, once another test has imported it, leaves a name of its own there.
    for name in [name for name in os.environ if name.lstrip("_").startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    return folder


def a_sweep(tracking: dict[str, Any], script: str = PRINT, **more: Any) -> SweepConfig:
    given = {
        "job": {"name": "my.job", **more.pop("job", {})},
        "launcher": {"type": "command", "command": ["bash", "-c", script, "trial"]},
        "sweep": {"parameters": {"lr": ["1e-4", "010"], "n": ["8"]}, **more.pop("sweep", {})},
        "tracking": tracking,
    }
    return SweepConfig.model_validate({**given, **more})


def environment(run: Run, trial: int, attempt: int = 1) -> dict[str, str]:
    """Return what a tracker reads of the environment that an attempt had."""
    words = (run.files.trial(trial) / f"env-{attempt}").read_text().split("\0")
    told = dict(word.split("=", 1) for word in words if word)
    return {name: value for name, value in told.items() if name.lstrip("_").startswith(("MLFLOW_", "WANDB_"))}


def ran(config: SweepConfig) -> Run:
    launch_slurm_sweep(config, submit=True)
    return manage.find("latest")


def test_wandb_is_told_where_to_log_and_as_what() -> None:
    tracking = {"wandb": {"project": "digits", "entity": "lab", "mode": "offline"}, "tags": {"team": "it's $HOME"}}
    run = ran(a_sweep(tracking, sweep={"tags": ["first try"]}))
    found = environment(run, 1)
    folder = run.files.trial(1)
    assert found == {
        "WANDB_PROJECT": "digits",
        "WANDB_ENTITY": "lab",
        "WANDB_MODE": "offline",
        "WANDB_NAME": "my.job-1",
        "WANDB_RUN_GROUP": run.id,
        "WANDB_RUN_ID": f"{run.id}-1",
        "WANDB_RESUME": "allow",
        "WANDB_JOB_TYPE": "sweep",
        "WANDB_TAGS": "first try,team:it's $HOME",
        "WANDB_DIR": str(folder),
        "WANDB_SWEEP_PARAM_PATH": str(folder / "wandb-config.yaml"),
    }
    told = yaml.safe_load((folder / "wandb-config.yaml").read_text())
    assert told == {"wandb_version": 1, "lr": {"value": "010"}, "n": {"value": 8}}
    told = yaml.safe_load((run.files.trial(0) / "wandb-config.yaml").read_text())
    assert told["lr"] == {"value": 1e-4}


def test_mlflow_is_told_where_to_log_and_as_what() -> None:
    tags = {"team": 'it\'s "$(id)" é\\', "$nexa_trial": "{trial}"}
    run = ran(a_sweep({**MLFLOW, "tags": tags}, sweep={"tags": ["first try"]}))
    found = environment(run, 1)
    context = json.loads(found.pop("MLFLOW_RUN_CONTEXT"))
    assert found == {"MLFLOW_TRACKING_URI": "https://mlflow.example.org", "MLFLOW_EXPERIMENT_NAME": "my.job"}
    own = {"nexa.run": run.id, "nexa.trial": "1", "nexa.attempt": "1", "mlflow.runName": "my.job-1"}
    assert context == {**tags, **own, "nexa.tags": "first try"}


@pytest.mark.parametrize(
    ("uri", "name", "value"),
    [
        ("file:///tmp/my runs", "MLFLOW_ALLOW_FILE_STORE", "true"),
        ("sqlite:////tmp/my runs/m.db", "_MLFLOW_SERVER_ARTIFACT_ROOT", "file:///tmp/my%20runs/mlruns"),
    ],
)
def test_a_store_of_ones_own_is_told_of_in_full(uri: str, name: str, value: str) -> None:
    found = environment(ran(a_sweep({"mlflow": {"uri": uri, "experiment": "it's", "log": False}})), 0)
    assert found.pop("MLFLOW_RUN_CONTEXT")
    assert found == {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": "it's", name: value}


def test_what_the_job_sets_itself_stands() -> None:
    env = {"WANDB_NAME": "mine", "MLFLOW_EXPERIMENT_NAME": "mine"}
    found = environment(ran(a_sweep({**WANDB, **MLFLOW}, job={"env": env})), 0)
    assert {name: found[name] for name in env} == env


def test_a_later_attempt_goes_on_in_the_same_run_of_wandb() -> None:
    script = f'{PRINT}; [ "$NEXA_ATTEMPT" = 2 ] || exit 3'
    with pytest.raises(RunFailedError):
        ran(a_sweep({**WANDB, **MLFLOW}, script))
    run = manage.find("latest")
    follow_run(manage.prepare_retry(run.id))
    first, second = (environment(run, 0, attempt) for attempt in (1, 2))
    contexts = [json.loads(found.pop("MLFLOW_RUN_CONTEXT"))["nexa.attempt"] for found in (first, second)]
    assert first == second and first["WANDB_RUN_ID"] == f"{run.id}-0"
    assert contexts == ["1", "2"]


def test_a_training_is_called_as_its_job_is() -> None:
    config = TrainingConfig.model_validate(
        {
            "job": {"name": "one"},
            "launcher": {"type": "command", "command": ["bash", "-c", PRINT]},
            "training": {"tags": ["last"]},
            "tracking": {**WANDB, **MLFLOW},
        }
    )
    launch_training_job(config)
    found = environment(manage.find("latest"), 0)
    assert (found["WANDB_NAME"], found["WANDB_JOB_TYPE"], found["WANDB_TAGS"]) == ("one", "training", "last")
    assert json.loads(found["MLFLOW_RUN_CONTEXT"])["mlflow.runName"] == "one"


def test_an_id_of_wandbs_fits_and_stays_one_trials_own() -> None:
    config = a_sweep(WANDB)
    text = render_script(config, run_id=f"20261124-102800-{'x' * 32}-6e95801248ae", run_dir="/r").text
    [line] = [line for line in text.splitlines() if "WANDB_RUN_ID=" in line]
    fixed = line.partition("=")[2].removesuffix('"$nexa_trial"')
    assert fixed.endswith("-6e95801248ae-") and len(fixed) + len("9999999") <= 64


def test_a_million_trials_need_no_line_each() -> None:
    axes = {name: [str(number) for number in range(100)] for name in "abc"}
    script = render_script(a_sweep(WANDB, sweep={"parameters": axes}), run_id="r", run_dir="/r")
    assert len(script.text) < 60_000 and not script.tables


values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = st.sampled_from(["0", "-1", "1e-4", "1e400", "-0.0", "1E5", "1.", "007", ".5", "1_000", "nan", "0x1f", "yes"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans() | st.none() | values | numbers, min_size=1, max_size=8))
def test_any_value_reaches_wandbs_config_as_it_is(found: list[Any]) -> None:
    point = tuple((f"é{number}", value) for number, value in enumerate(found))
    script = f'{config_entries(point)}\nprintf \'{{"v": 1%s}}\\n\' "${{nexa_config[*]-}}"'
    text = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert text.isascii()
    told = yaml.safe_load(text)
    for name, value in point:
        got = told[name]["value"]
        if isinstance(got, str) or not isinstance(value, str):
            assert got == value and type(got) is type(value)
        else:
            assert got == float(value)  # a number as it is written, and no other
            assert value.lstrip("-")[:1] in "0123456789"


@pytest.mark.parametrize(
    ("tracking", "told"),
    [
        ({}, "tracking: names no tracker: add mlflow"),
        ({"tags": {"a": "b"}}, "tracking: names no tracker"),
        ({"mlflow": {}}, "tracking.mlflow.uri: is missing"),
        ({"mlflow": {"uri": "./mlruns"}}, "'./mlruns' is no tracking URI that means the same from every folder"),
        ({"mlflow": {"uri": "sqlite:///mlflow.db"}}, "is no tracking URI that means the same"),
        ({"mlflow": {"uri": "file:mlruns"}}, "is no tracking URI that means the same"),
        ({"mlflow": {"uri": "https://h", "experimnt": "x"}}, "did you mean 'experiment'"),
        ({"wandb": {"projekt": "x"}}, "did you mean 'project'"),
        ({"wandb": {"project": "x", "api_key": "k"}}, "tracking.wandb.api_key: there is no such key"),
        ({"wandb": {"project": "x", "mode": "of"}}, "not one of online, offline or disabled"),
        ({**WANDB, "tags": {"a": "b,c"}}, "tracking.tags.a: 'a:b,c' has a comma"),
        ({**WANDB, "tags": {"a": "b" * 70}}, "longer than the 64 characters"),
        ({**MLFLOW, "tags": {"mlflow.user": "b"}}, "tracking.tags.mlflow.user: is set by the run itself"),
    ],
)
def test_a_mistake_is_told_with_its_key(tracking: dict[str, Any], told: str, project: Path) -> None:
    text = {"launcher": {"type": "command", "command": ["x"]}, "sweep": {"parameters": {"a": [1]}}}
    (project / "c.yaml").write_text(json.dumps({**text, "tracking": tracking}))
    with pytest.raises(ConfigError) as error:
        load_config(project / "c.yaml")
    assert told in str(error.value)


@pytest.mark.parametrize("uri", ["https://ada:s3cret@h", "http://s3cret@h/x", "postgresql://ada:s3cret@h/db"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri: str, project: Path) -> None:
    text = {"launcher": {"type": "command", "command": ["x"]}, "training": {}, "tracking": {"mlflow": {"uri": uri}}}
    (project / "c.yaml").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"tracking.mlflow.uri: holds a user or a password.*job.env_file") as error:
        load_config(project / "c.yaml")
    assert "s3cret" not in str(error.value)


def test_a_label_of_the_run_that_wandb_would_not_take_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"sweep.tags\[1\]: 'a,b' has a comma"):
        a_sweep(WANDB, sweep={"tags": ["fine", "a,b"]})
    assert a_sweep(MLFLOW, sweep={"tags": ["a,b"]}).sweep.tags == ("a,b",)


def test_the_script_passes_shellcheck(tmp_path: Path) -> None:
    uri = {"mlflow": {"uri": "sqlite:////tmp/my runs/m.db", "experiment": "it's"}, "tags": {"team": "a b"}}
    text = render_script(a_sweep({**WANDB, **uri}, "true"), run_id="r", run_dir="/r").text
    done = subprocess.run(["shellcheck", "-s", "bash", "-"], input=text, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)

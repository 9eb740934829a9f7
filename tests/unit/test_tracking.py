"""A run's trials in MLflow, by its own library, in stores of one's own; and runs whose tracker is away."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_slurm_sweep, launch_training_job
from nexa_infra.errors import RunFailedError
from nexa_infra.operations import manage, steps, tracking
from nexa_infra.operations.launch import follow_run
from nexa_infra.operations.tracking import Tracked, log_to_mlflow
from nexa_infra.operations.tracking_entries import _name
from nexa_infra.runs.record import Run
from nexa_infra.spec.run import SweepConfig, TrainingConfig

mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed: pip install -e '.[mlflow]'")

MEASURE = """
echo '{"loss": 0.'"$1"', "deep": {"acc": NaN}, "best": "model.pt", "ok": true}' >"$NEXA_METRICS"
for step in 10 20 30; do echo '{"step": '$step', "loss": '$step$1'}'; done >"$NEXA_TRIAL_DIR/metrics.jsonl"
printf '{"step": 40, "lo' >>"$NEXA_TRIAL_DIR/metrics.jsonl"
mkdir -p "$NEXA_TRIAL_DIR/plots" "$NEXA_TRIAL_DIR/wandb"; echo x >"$NEXA_TRIAL_DIR/plots/a.svg"
echo no >"$NEXA_TRIAL_DIR/wandb/log"; echo no >"$NEXA_TRIAL_DIR/"$'no\\nname'; ln -s / "$NEXA_TRIAL_DIR/away"
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little code in it, to be in; nothing of a tracker's in the environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    # For the library's own calls of these tests.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return folder


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store in SQLite."""
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def a_sweep(uri: str, script: str = MEASURE, count: int = 3, **more: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "job": {"name": "digits", "array_parallelism": 2},
            "launcher": {"type": "command", "command": ["bash", "-c", script, "trial", "{n}"]},
            "sweep": {"parameters": {"n": list(range(count)), "+lr@x": ["1e-4"], "off": [None]}},
            "tracking": {"mlflow": {"uri": uri, **more}, "tags": {"team": "a"}},
        }
    )


def client(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri)


def logged(uri: str, run: Run) -> tuple[Any, dict[str, Any]]:
    """Return what MLflow has of a run: the sweep's own, and each trial's by its name."""
    found = client(uri).search_runs(
        [client(uri).get_experiment_by_name("digits").experiment_id], f"tags.`nexa.run` = '{run.id}'"
    )
    parents = [each for each in found if "nexa.trial" not in each.data.tags]
    children = [each for each in found if "nexa.trial" in each.data.tags]
    names = [each.info.run_name for each in children]
    assert len(parents) <= 1 and len(set(names)) == len(names)
    return (parents or [None])[0], dict(zip(names, children, strict=True))


def again(run: Run) -> Tracked:
    """Log a run once more, as it stands."""
    trials = steps.collect(run)
    done = log_to_mlflow(run, trials, steps.build(run, trials))
    assert done is not None
    return done


def history(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in client(uri).get_metric_history(run.info.run_id, name)]


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_each_trial_is_a_nested_run_with_parameters_metrics_cost_and_artifacts(store: str, tmp_path: Path) -> None:
    uri = store.format(tmp_path)
    done = launch_slurm_sweep(a_sweep(uri), submit=True)
    run = manage.find("latest")
    parent, trials = logged(uri, run)
    assert sorted(trials) == ["digits-0", "digits-1", "digits-2"]

    assert parent.info.run_name == run.id and parent.info.status == "FINISHED"
    assert parent.data.metrics["trials"] == 3 and parent.data.metrics["trials.completed"] == 3
    assert done.report is not None and done.report.actual_usd is not None
    assert math.isclose(parent.data.metrics["cost.usd"], float(done.report.actual_usd))
    names = [each.path for each in client(uri).list_artifacts(parent.info.run_id)]
    assert names == ["cost_report.json", "cost_report.md", "results.csv"]

    trial = trials["digits-1"]
    assert trial.info.status == "FINISHED"
    assert trial.data.params == {"n": "1", "_lr_x": "1e-4"}
    tags = trial.data.tags
    assert (tags["mlflow.parentRunId"], tags["team"]) == (parent.info.run_id, "a")
    assert (tags["nexa.state"], tags["nexa.attempt"], tags["best"]) == ("completed", "1", "model.pt")
    assert run.snapshot is None or tags["nexa.snapshot"] == run.snapshot.hash
    assert tags["nexa.hash"] == steps.collect(run)[1].hash
    assert math.isnan(trial.data.metrics["deep.acc"]) and trial.data.metrics["ok"] == 1
    assert {"cost.usd", "cost.core_hours", "cost.seconds"} <= set(trial.data.metrics)
    # By step, and last what it ended with; the torn line is none.
    assert history(uri, trial, "loss") == [(10, 101), (20, 201), (30, 301), (30, 0.1)]
    assert trial.data.metrics["loss"] == 0.1
    names = [each.path for each in client(uri).list_artifacts(trial.info.run_id)]
    assert names == ["metrics.json", "metrics.jsonl", "plots"]
    place = Path(client(uri).download_artifacts(trial.info.run_id, "metrics.json", str(tmp_path)))
    assert json.loads(place.read_text())["loss"] == 0.1
    # Artifacts are with the store, and not in the folder that one happens to be in.
    assert not Path("mlruns").exists()


def test_what_is_there_is_not_logged_again(uri: str) -> None:
    launch_slurm_sweep(a_sweep(uri), submit=True)
    run = manage.find("latest")
    _, first = logged(uri, run)
    done = again(run)
    assert (done.trials, done.unchanged, done.warning) == (3, 3, "")
    launch_slurm_sweep(None, submit=True, resume=run.id)
    _, second = logged(uri, run)
    assert {each.info.run_id for each in first.values()} == {each.info.run_id for each in second.values()}
    assert len(history(uri, second["digits-0"], "loss")) == 4


def test_what_was_cut_off_is_made_whole(uri: str) -> None:
    launch_slurm_sweep(a_sweep(uri), submit=True)
    run = manage.find("latest")
    _, trials = logged(uri, run)
    client(uri).delete_tag(trials["digits-0"].info.run_id, "nexa.digest")
    client(uri).delete_run(trials["digits-2"].info.run_id)
    done = again(run)
    assert (done.trials, done.unchanged) == (3, 1)
    _, trials = logged(uri, run)
    assert sorted(trials) == ["digits-0", "digits-1", "digits-2"]
    assert history(uri, trials["digits-0"], "loss") == [(10, 100), (20, 200), (30, 300), (30, 0)]


def test_a_retried_trial_is_the_same_run_with_its_new_end(uri: str) -> None:
    script = 'echo \'{"loss": 0.\'"$NEXA_ATTEMPT"\'}\' >"$NEXA_METRICS"; [ $1 != 1 ] || [ "$NEXA_ATTEMPT" = 2 ]'
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(a_sweep(uri, script, 2), submit=True)
    run = manage.find("latest")
    parent, trials = logged(uri, run)
    before = trials["digits-1"]
    assert (parent.info.status, before.info.status, trials["digits-0"].info.status) == ("FAILED", "FAILED", "FINISHED")
    assert before.data.tags["nexa.exit_code"] == "1"

    follow_run(manage.prepare_retry(run.id))
    parent, trials = logged(uri, run)
    after = trials["digits-1"]
    assert after.info.run_id == before.info.run_id
    assert (parent.info.status, after.info.status, after.data.tags["nexa.attempt"]) == ("FINISHED", "FINISHED", "2")
    assert after.data.metrics["loss"] == 0.2 and after.data.metrics["cost.usd"] > before.data.metrics["cost.usd"]
    assert parent.data.metrics["trials.completed"] == 2


PROGRAM = """
import mlflow
with mlflow.start_run() as run:
    mlflow.log_param("_lr_x", "0.0001")
    mlflow.log_metric("loss", 7.0, step=5)
    with mlflow.start_run(nested=True):
        pass
"""


def test_a_run_that_the_program_itself_has_logged_is_gone_on_with(uri: str, project: Path) -> None:
    (project / "program.py").write_text(PROGRAM)
    script = f'{sys.executable} program.py && echo \'{{"loss": 0.5, "late": 1}}\' >"$NEXA_METRICS"'
    launch_slurm_sweep(a_sweep(uri, script, 1), submit=True)
    run = manage.find("latest")
    found = client(uri).search_runs(
        [client(uri).get_experiment_by_name("digits").experiment_id], f"tags.`nexa.run` = '{run.id}'"
    )
    assert len(found) == 3  # the sweep's, the program's, and what the program has nested in it
    [theirs] = [each for each in found if "loss" in each.data.metrics]
    assert theirs.info.run_name == "digits-0"
    assert theirs.data.params == {"_lr_x": "0.0001", "n": "0"}
    assert history(uri, theirs, "loss") == [(5, 7.0)]
    assert theirs.data.metrics["late"] == 1 and theirs.data.metrics["cost.usd"] > 0
    [parent] = [each for each in found if "nexa.trial" not in each.data.tags]
    assert theirs.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert not (run.files.code / "mlruns").exists()  # a snapshot holds code alone


def test_a_training_is_one_run(uri: str) -> None:
    config = TrainingConfig.model_validate(
        {
            "job": {"name": "digits"},
            "launcher": {"type": "command", "command": ["bash", "-c", MEASURE, "trial", "1"]},
            "training": {"parameters": {"lr": "1e-4"}},
            "tracking": {"mlflow": {"uri": uri}},
        }
    )
    launch_training_job(config)
    parent, trials = logged(uri, manage.find("latest"))
    assert parent is None and list(trials) == ["digits"]
    [trial] = trials.values()
    assert trial.data.params == {"lr": "1e-4"} and trial.data.metrics["cost.projected_usd"] > 0
    names = {each.path for each in client(uri).list_artifacts(trial.info.run_id)}
    assert {"cost_report.md", "results.csv", "metrics.json"} <= names


def test_nothing_is_logged_where_it_is_not_asked_for(uri: str, tmp_path: Path) -> None:
    launch_slurm_sweep(a_sweep(uri, log=False), submit=True)
    assert not (tmp_path / "mlflow.db").exists()
    launch_slurm_sweep(a_sweep(uri, count=1, artifacts=False), submit=True)
    parent, trials = logged(uri, manage.find("latest"))
    for each in (parent, *trials.values()):
        assert client(uri).list_artifacts(each.info.run_id) == []


def test_without_the_library_one_warning_says_what_to_install(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING, "nexa_infra"):
        done = launch_slurm_sweep(a_sweep(uri), submit=True)
    [warning] = [each.getMessage() for each in caplog.records]
    assert f"run {done.run_id} was not logged to MLflow: it is not installed here" in warning
    assert "pip install 'nexa-infra[mlflow]'" in warning
    assert done.report is not None and done.report.end == "done"


def test_a_server_that_is_away_is_a_warning_in_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with caplog.at_level(logging.WARNING, "nexa_infra"):
        done = launch_slurm_sweep(a_sweep("http://127.0.0.1:9"), submit=True)
    [warning] = [each.getMessage() for each in caplog.records if each.name.startswith("nexa_infra")]
    assert "is not whole in MLflow at http://127.0.0.1:9, of its trials 0 are: " in warning
    assert "Connection refused" in warning and f"nexa-infra resume {done.run_id}" in warning
    assert done.report is not None and done.report.end == "done"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ  # the environment is as it was


def test_logging_ends_when_it_is_told_to(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_slurm_sweep(a_sweep(uri, "true", log=False), submit=True)
    run = manage.find("latest")
    run = run.model_copy(update={"config": a_sweep(uri, "true")})
    stop = threading.Event()
    put = tracking._put

    def stopping(*words: Any) -> str:
        stop.set()
        return put(*words)

    monkeypatch.setattr(tracking, "_put", stopping)
    trials = steps.collect(run)
    done = log_to_mlflow(run, trials, steps.build(run, trials), stop)
    assert done is not None and done.trials == 0


def test_a_thousand_points_and_parameters_fit_into_batches(uri: str) -> None:
    script = (
        'for ((n = 0; n < 1203; n++)); do echo "{\\"step\\": $n, \\"a\\": $n, \\"b\\": 1}"; done'
        ' >"$NEXA_TRIAL_DIR/metrics.jsonl"'
    )
    many = {f"p{number}": ["1"] for number in range(130)}
    asked = a_sweep(uri, script, 1).model_dump()
    asked["sweep"]["parameters"] = {"n": ["0"], **many}
    launch_slurm_sweep(SweepConfig.model_validate(asked), submit=True)
    _, trials = logged(uri, manage.find("latest"))
    [trial] = trials.values()
    assert len(trial.data.params) == 131
    assert len(history(uri, trial, "a")) == len(history(uri, trial, "b")) == 1203


@pytest.mark.parametrize(
    ("name", "right"),
    [("a/b", "a/b"), ("+a@b", "_a_b"), ("/a", "_a"), ("a//b", "a__b"), ("..", "_."), (".", "_"), ("é:x", "é:x")],
)
def test_names_are_such_as_mlflow_takes(name: str, right: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    assert _name(name) == right
    for check in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        check(_name(name))

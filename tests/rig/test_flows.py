"""The flows on a real Prefect server, beside the engine and the verbs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_slurm_sweep
from nexa_infra.operations import manage
from nexa_infra.runs.record import Run
from tests.conftest import ROOT, PrefectServer, processes_of
from tests.rig.proxy import wait

# What differs between two runs of the same thing: ids, moments, and what is counted in seconds.
VARIES = {"id", "run_id", "directory", "created_at", "labels", "flow_run_url"}
VARIES |= {"seconds", "usd", "metric_per_usd", "dearest", "wasted_usd", "actual_usd", "actual_unit_hours"}
VARIES |= {"usd_per_trial_mean", "usd_per_trial_median"}


def stripped(data: Any) -> Any:
    """Take out what differs between two runs of the same thing."""
    if isinstance(data, dict):
        return {name: stripped(value) for name, value in data.items() if name not in VARIES}
    if isinstance(data, list):
        return [stripped(value) for value in data]
    return data


def table(run: Run) -> list[list[str]]:
    """results.csv without its seconds and USD."""
    import csv

    with run.files.results.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [[value for name, value in row.items() if name not in {"seconds", "usd"}] for row in rows]


def words(run: Run) -> str:
    """The Markdown report without ids, moments, numbers that are counted in seconds, and the ranking by cost."""
    text = run.files.report_markdown.read_text()
    text = re.sub(r"## Dearest.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    text = text.replace(run.id, "RUN").replace(run.directory, "DIRECTORY")
    text = re.sub(r"\| (Prefect|Created) \|.*\n", "", text)
    best = re.sub(r"^(\| \d+ \| [\d.]+) \| [^|]+ \| [^|]+ \| [^|]+ \|", r"\1 |", text, flags=re.MULTILINE)
    return re.sub(r"^\| (\*\*Actual\*\*|A trial, \w+).*\n", "", best, flags=re.MULTILINE)


def test_the_flow_the_engine_and_the_verb_leave_the_same_behind(
    prefect_server: PrefectServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_infra.flows import sweep

    monkeypatch.chdir(ROOT)
    config = "deployments/configs/digits.yaml"
    runs = []
    asyncio.run(sweep(config_file=config, submit=True))
    runs.append(manage.find("latest"))
    launch_slurm_sweep(config, submit=True)
    runs.append(manage.find("latest"))
    subprocess.run([sys.executable, "-m", "nexa_infra", "sweep", config], check=True, capture_output=True)
    runs.append(manage.find("latest"))

    assert len({run.id for run in runs}) == 3
    flow, engine, verb = runs
    assert flow.labels["flow_run_id"]
    for other in (engine, verb):
        assert stripped(json.loads(other.files.record.read_text())) == stripped(
            json.loads(flow.files.record.read_text())
        )
        assert table(other) == table(flow)
        assert stripped(json.loads(other.files.report_json.read_text())) == stripped(
            json.loads(flow.files.report_json.read_text())
        )
        assert words(other) == words(flow)
    assert len(table(flow)) == 12
    assert {path.name for path in flow.files.path.iterdir()} == {path.name for path in engine.files.path.iterdir()}


SLOW = """
job: {name: slow, array_parallelism: 2}
launcher: {type: command, command: [sleep, "{seconds}"]}
sweep: {parameters: {seconds: [301, 302, 303]}}
"""

CLIENT = """
import asyncio, sys
from nexa_infra.flows import sweep
asyncio.run(sweep(config_file=sys.argv[1], submit=True))
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose trials take minutes."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "slow.yaml").write_text(SLOW)
    monkeypatch.chdir(folder)
    return folder / "slow.yaml"


def started(client: subprocess.Popen[bytes]) -> Run:
    """Wait until two trials of the client's run are running."""
    deadline = time.monotonic() + 60
    while True:
        assert client.poll() is None, "the client ended before its trials began"
        assert time.monotonic() < deadline, "the trials never began"
        time.sleep(0.1)
        if (home := manage.home()).is_dir() and list(home.glob("runs/*/run.json")):
            run = manage.find("latest")
            if manage.status(run).states.get("running") == 2:
                return run


def flow_run(server: PrefectServer, run: Run) -> Any:
    """The flow run, as the server has it."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run.labels["flow_run_id"])  # type: ignore[arg-type]


def artifacts(run: Run) -> set[str]:
    """The keys of the artifacts that the run's flow run has."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.labels["flow_run_id"]]))
        return {str(artifact.key) for artifact in client.read_artifacts(artifact_filter=chosen)}


@pytest.mark.parametrize("how", ["prefect", "SIGINT", "SIGTERM", "SIGKILL"])
def test_a_flow_that_is_called_directly_ends_with_nothing_left_running(
    prefect_server: PrefectServer, home: Path, slow: Path, how: str
) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(slow)], stderr=subprocess.DEVNULL)
    try:
        run = started(client)
        asked = time.monotonic()
        if how == "prefect":
            prefect = Path(sys.executable).with_name("prefect")
            subprocess.run([prefect, "flow-run", "cancel", run.labels["flow_run_id"]], check=True, capture_output=True)
        else:
            os.kill(client.pid, getattr(signal, how))
        while processes_of(run):
            assert time.monotonic() - asked < 10, f"{len(processes_of(run))} processes are left"
            time.sleep(0.1)
        client.wait(20)
    finally:
        client.kill()
    state = flow_run(prefect_server, run).state_name
    if how == "prefect":
        assert state == "Cancelled"
        assert manage.status(run).end == "cancelled"
    elif how != "SIGKILL":  # nobody is left to tell the server, or to write a report
        assert state == "Crashed"
    if how != "SIGKILL":
        assert run.files.report_json.exists()
        assert {"cost-report-slow", "trials-slow"} <= artifacts(run)


def test_a_failed_run_is_a_failed_flow_with_its_report(
    prefect_server: PrefectServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_infra.errors import RunFailedError
    from nexa_infra.flows import sweep

    monkeypatch.chdir(tmp_path)
    config = tmp_path / "bad.yaml"
    config.write_text(
        "job: {name: bad}\nlauncher: {type: command, command: [bash, -c, 'exit {code}']}\n"
        "sweep: {parameters: {code: [0, 7]}}\n"
    )
    with pytest.raises(RunFailedError, match="trial 1 ended as failed with exit code 7"):
        asyncio.run(sweep(config_file=str(config), submit=True))
    run = manage.find("latest")
    assert flow_run(prefect_server, run).state_name == "Failed"
    assert {"cost-report-bad", "trials-bad"} <= artifacts(run)


def test_a_refused_run_is_a_failed_flow_with_its_report(prefect_server: PrefectServer, home: Path, slow: Path) -> None:
    from nexa_infra.errors import BudgetError
    from nexa_infra.flows import sweep

    with pytest.raises(BudgetError):
        asyncio.run(sweep(config_file=str(slow), submit=True, budget_usd=0.0001))
    run = manage.find("latest")
    assert manage.status(run).end == "refused"
    assert {"cost-report-slow", "trials-slow"} <= artifacts(run)


def test_a_preview_starts_nothing_and_shows_the_script(prefect_server: PrefectServer, home: Path, slow: Path) -> None:
    from nexa_infra.flows import sweep

    assert asyncio.run(sweep(config_file=str(slow))) is None
    assert not home.exists()


HALF = """
job: {name: half, array_parallelism: 2}
launcher:
  type: command
  command: [bash, -c, 'echo {n} >> $NEXA_RUN_DIR/ran; [ {n} = 0 ] || [ -e $NEXA_RUN_DIR/again ] || sleep 300']
sweep: {parameters: {n: [0, 1, 2]}}
"""


def test_a_run_whose_client_was_killed_is_resumed_from_prefect(
    prefect_server: PrefectServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_infra.flows import sweep

    monkeypatch.chdir(tmp_path)
    config = tmp_path / "half.yaml"
    config.write_text(HALF)
    client = subprocess.Popen([sys.executable, "-m", "nexa_infra", "sweep", str(config)], stderr=subprocess.DEVNULL)
    run = started(client)
    ran = run.files.path / "ran"
    wait(lambda: manage.status(run).states == {"completed": 1, "running": 2} and len(ran.read_text().split()) == 3, 30)
    client.kill()
    client.wait()
    (run.files.path / "again").touch()
    report = asyncio.run(sweep(config_file=str(config), resume=run.id))
    assert report is not None
    assert manage.status(run).states == {"completed": 3}
    assert sorted(ran.read_text().split()) == ["0", "1", "1", "2", "2"], "0 had ended, and stays so"


TRACKED = """
job: {{name: tracked}}
launcher: {{type: command, command: [bash, -c, 'echo "{{\\"loss\\": $1}}" >"$NEXA_METRICS"', trial, "{{n}}"]}}
sweep: {{parameters: {{n: [1, 2]}}}}
tracking: {{mlflow: {{uri: "{uri}"}}}}
"""


@pytest.mark.parametrize("away", [False, True])
def test_a_flow_logs_to_a_tracker_and_ends_as_it_does_where_that_is_away(
    away: bool, prefect_server: PrefectServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_infra.flows import sweep

    mlflow = pytest.importorskip("mlflow")
    uri = "sqlite:////proc/nowhere/mlflow.db" if away else f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "tracked.yaml").write_text(TRACKED.format(uri=uri))
    monkeypatch.chdir(tmp_path)
    report = asyncio.run(sweep(config_file="tracked.yaml", submit=True))
    assert report is not None and report.end == "done"  # type: ignore[union-attr]
    if not away:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
        assert sorted(each.data.metrics.get("loss", 0) for each in found) == [0, 1, 2]

"""Deployments, through a real server and a real worker: started, followed and cancelled from the command line."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.ui.driving import eventually, flow_run_in, prefect, runs, try_prefect

if TYPE_CHECKING:
    from tests.ui.conftest import Deployed

pytestmark = pytest.mark.server

QUICK = """\
job: {name: quick, time: "00:05:00", array_parallelism: 2}
launcher:
  type: command
  command: [bash, -c, 'echo "{\\"accuracy\\": {x}}" >"$NEXA_METRICS"']
sweep: {parameters: {x: [1, 2, 3]}}
objective: {metric: accuracy, goal: max}
"""
# The program leaves its session and its parent; the number is how it is known among all processes.
SLOW = """\
job: {{name: slow, time: "00:30:00", array_parallelism: 2}}
launcher: {{type: command, command: [bash, -c, '(setsid sleep {number} &) ; exec sleep {number}']}}
sweep: {{parameters: {{x: [1, 2, 3]}}}}
"""


def ended(run: Path) -> object:
    report = run / "cost_report.json"
    return json.loads(report.read_text())["end"] if report.exists() else None


def test_a_sweep_deployment_runs_to_its_report(deployed: Deployed, tmp_path: Path) -> None:
    config = tmp_path / "quick.yaml"
    config.write_text(QUICK)

    told = prefect(deployed, "deployment", "run", "sweep/default", "-p", f"config_file={config}", "--watch")

    assert "Flow run finished successfully" in told
    [run] = runs(deployed, "quick")
    with (run / "results.csv").open(newline="") as stream:
        assert [row["state"] for row in csv.DictReader(stream)] == ["completed"] * 3
    report = json.loads((run / "cost_report.json").read_text())
    assert report["end"] == "done"
    assert [trial["metric"] for trial in report["best"]] == [3, 2, 1]


def test_a_training_deployment_runs_the_example(deployed: Deployed) -> None:
    told = prefect(deployed, "deployment", "run", "training/default", "--watch")

    assert "Flow run finished successfully" in told
    [run] = runs(deployed, "ddp")
    metrics = json.loads((run / "trials" / "0" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.8
    assert "rank 0 of 2" in (run / "trials" / "0" / "attempt-1.out").read_text()
    assert json.loads((run / "artifact.json").read_text())["metrics"] == metrics


def test_a_cancelled_deployment_run_leaves_no_process_within_ten_seconds(deployed: Deployed, tmp_path: Path) -> None:
    number = f"86400.{time.time_ns()}"
    config = tmp_path / "slow.yaml"
    config.write_text(SLOW.format(number=number))

    def processes() -> list[str]:
        return subprocess.run(["pgrep", "-f", number], capture_output=True, text=True).stdout.split()

    told = prefect(deployed, "deployment", "run", "sweep/default", "-p", f"config_file={config}")
    flow_run = flow_run_in(told)
    eventually(lambda: len(processes()) >= 4, 60)

    prefect(deployed, "flow-run", "cancel", flow_run)

    eventually(lambda: not processes(), 10)
    [run] = runs(deployed, "slow")
    # The flow reports the run as it leaves it; the hook of Prefect's cancellation then says why it ended.
    eventually(lambda: ended(run) == "cancelled", 30)
    eventually(lambda: "CANCELLED" in prefect(deployed, "flow-run", "inspect", flow_run).upper(), 30)


def test_a_config_that_is_not_understood_fails_the_flow_run_with_its_line(deployed: Deployed, tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(QUICK.replace("name: quick", "name: misspelt").replace("array_parallelism", "array_paralelism"))

    done = try_prefect(deployed, "deployment", "run", "sweep/default", "-p", f"config_file={config}", "--watch")

    assert done.returncode != 0
    assert runs(deployed, "misspelt") == []
    logs = prefect(deployed, "flow-run", "logs", flow_run_in(done.stdout))
    assert "array_parallelism" in logs

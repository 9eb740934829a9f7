"""The training flow on a real Prefect server: what is seen of its metrics while it runs, and at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from nexa_infra.operations import manage
from tests.conftest import PrefectServer
from tests.rig.proxy import wait

CONFIG = """\
job: {name: watched}
launcher:
  type: command
  command:
    - bash
    - -c
    - |
      echo "I have begun"
      echo '{"step": 1, "total_steps": 2, "loss": 2.5}' >>"$NEXA_METRICS_LOG"
      until [ -e "$NEXA_RUN_DIR/go" ]; do sleep 0.1; done
      echo '{"step": 2, "loss": NaN, "accuracy": 0.5}' >>"$NEXA_METRICS_LOG"
training: {}
"""
FLOW = """
import asyncio
from nexa_infra.flows import training
asyncio.run(training(config_file="watched.yaml", submit=True))
"""


def artifact(key: str) -> Any:
    """The newest artifact of a key; None where there is none."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
        return found[-1] if found else None


def data(key: str) -> Any:
    found = artifact(key)
    return found.data if found is not None else ""


def test_metrics_are_artifacts_while_the_flow_runs_and_pictures_in_its_report(
    prefect_server: PrefectServer, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "watched.yaml").write_text(CONFIG)
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait(lambda: "step 1/2 (50%)" in data("metrics-watched") or flow.poll() is not None, 120)
        assert flow.poll() is None, flow.communicate()[0]
        assert "| loss | 2.5 |" in data("metrics-watched")
        wait(lambda: float(data("progress-watched") or 0) == 50.0, 60)
        run = manage.find("latest")
        (run.files.path / "go").touch()
        said, _ = flow.communicate(timeout=120)
    finally:
        flow.kill()
    assert flow.returncode == 0, said
    assert said.count("I have begun") == 1, "what it prints is in the flow's log"
    assert said.count("loss is NaN at step 2") >= 1 and "WARNING" in said
    assert str(artifact("metrics-watched").flow_run_id) == run.labels["flow_run_id"]
    shown = data("metrics-watched")
    assert (
        "step 2/2 (100%)" in shown and "**Warning:** loss is NaN at step 2" in shown and "| accuracy | 0.5 |" in shown
    )
    assert float(data("progress-watched")) == 100.0
    report = data("cost-report-watched")
    assert report.count("](data:image/svg+xml;base64,") == 2
    assert len(report) < 100_000

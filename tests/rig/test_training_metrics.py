"""A training on real Slurm, over SSH, that says how it is while it runs."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from nexa_infra import launch_training_job
from nexa_infra.errors import RunFailedError
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.operations.status_text import status_page
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import mirror
from nexa_infra.scheduling.watch import Poll
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import states_by_sacct
from tests.rig.proxy import wait
from tests.rig.slurm import SlurmRig

CONFIG = """\
job: {{name: told, time: "00:10:00", memory: 50M}}
launcher:
  type: command
  command:
    - bash
    - -c
    - |
{script}
training: {{}}
health: {{nan: stop}}
"""


def a_training(folder: Path, script: str) -> Path:
    """Write the config of a training that is a bash script."""
    path = folder / "told.yaml"
    path.write_text(CONFIG.format(script=textwrap.indent(textwrap.dedent(script).strip(), " " * 6)))
    return path


def there(cluster: Cluster, run: Run) -> Path:
    """Return the run directory on the cluster, which is on this machine."""
    return Path(cluster.workdir) / "runs" / run.id


def test_metrics_come_while_it_runs_and_a_nan_ends_its_job(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path
) -> None:
    script = f"""
        if [ "$NEXA_ATTEMPT" = 2 ]; then echo '{{"step": 4, "loss": 1}}' >>"$NEXA_METRICS_LOG"; exit; fi
        echo '{{"step": 1, "total_steps": 4, "loss": 2.5}}' >>"$NEXA_METRICS_LOG"
        until [ -e {tmp_path}/go ]; do sleep 0.1; done
        echo '{{"step": 2, "loss": NaN}}' >>"$NEXA_METRICS_LOG"
        sleep 600
    """
    live: list[str] = []
    warnings: list[str] = []

    def tell(poll: Poll) -> None:
        warnings.extend(poll.warnings)
        if poll.progress is not None and not live:
            run = manage.find("latest")
            live.extend([str(poll.progress), status_page(manage.status(run))])
            (tmp_path / "go").touch()

    with pytest.raises(RunFailedError, match="loss is NaN at step 2, and health.nan is stop"):
        launch_training_job(a_training(tmp_path, script), cluster=cluster, tell=tell)
    run = manage.find("latest")
    assert live[0] == "step 1/4, loss 2.5"
    assert "Metrics     step 1/4 (25%)" in live[1]
    assert warnings == ["loss is NaN at step 2"]
    assert states_by_sacct(slurm, run)[0] == "CANCELLED"
    assert run.files.metrics_log(0).read_bytes() == (there(cluster, run) / "trials/0/metrics.jsonl").read_bytes()
    assert json.loads(run.files.report_json.read_text())["measured"]["warnings"] == ["loss is NaN at step 2"]

    # What it wrote before is nothing against it once it goes on.
    launch.follow_run(manage.prepare_resume(run.id))
    report = manage.report_of(run)
    assert report.end == "done"
    assert report.measured is not None and report.measured.step == 4
    for name in ("cost_report.md", "plots/loss.svg"):
        assert (there(cluster, run) / name).read_bytes() == (run.files.path / name).read_bytes()
    assert "](plots/loss.svg)" in run.files.report_markdown.read_text()


def test_a_long_log_comes_by_pieces_without_a_round_trip_or_a_slurm_command_more(
    cluster: Cluster, slurm: SlurmRig, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(mirror, "LAST_BYTES", 300_000)
    script = f"""
        i=0
        while [ $i -lt 20000 ]; do i=$((i + 1)); echo "{{\\"step\\": $i, \\"loss\\": 0.$i}}"; done >>"$NEXA_METRICS_LOG"
        touch {tmp_path}/written
        until [ -e {tmp_path}/go ]; do sleep 0.1; done
    """
    with connections.kept_open(cluster):
        run = steps.plan(a_training(tmp_path, script), cluster=cluster)
        steps.admit(run, steps.estimate_cost(run))
        run = steps.render(steps.sync(run))
        steps.submit(run)
        wait((tmp_path / "written").exists, 60)
        scheduler, host = steps.scheduler_of(run), connections.host_of(cluster)
        before = host.round_trips  # type: ignore[attr-defined]
        copy = run.files.metrics_log(0)
        for number in (1, 2, 3):
            scheduler.poll(run)
            assert copy.stat().st_size == number * 20_000
        assert host.round_trips == before + 3  # type: ignore[attr-defined]
        (tmp_path / "go").touch()
        wait(lambda: not scheduler.poll(run).active, 60)
        trials = steps.collect(run)
        assert copy.read_bytes() == (there(cluster, run) / "trials/0/metrics.jsonl").read_bytes()
        report = steps.report(run, trials)
    assert report.measured is not None
    assert (report.measured.lines, report.measured.step) == (20_000, 20_000)

"""Runs on a real Slurm, over real SSH, that Prefect's deployments start: followed, cancelled, left alone, taken up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from prefect import State, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)

from deployments.processes import Process
from nexa_infra.blocks import SlurmCluster
from tests.conftest import ROOT
from tests.ui.driving import eventually, flow_run_in, prefect, runs

if TYPE_CHECKING:
    from tests.rig.slurm import SlurmRig
    from tests.rig.ssh import SshRig
    from tests.ui.conftest import Deployed

pytestmark = [pytest.mark.server, pytest.mark.rig]

BY_REFERENCE = 'cluster={"$ref": {"block_document_slug": "slurm-cluster/%s"}}'
DIGITS = str(ROOT / "deployments/configs/digits.yaml")
# The rig's nodes are this machine: the trials' Python is the tests' own.
OVERRIDES = ["job.memory=500M", f"job.setup.venv={Path(sys.prefix)}"]
# Each trial notes that it has started, and waits until somebody opens the gate.
WAITING = """\
job: {{name: {name}, time: "00:10:00", memory: 100M}}
launcher:
  type: command
  command: [bash, -c, 'echo {{n}} >> "$NEXA_RUN_DIR/ran"; until [ -e {gate} ]; do sleep 0.2; done']
sweep: {{parameters: {{n: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}}}}
"""


def waiting(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a config of twelve trials that wait, and return it and their gate."""
    project = folder / "project"
    project.mkdir()
    config, gate = project / f"{name}.yaml", folder / "gate"
    config.write_text(WAITING.format(name=name, gate=gate))
    return config, gate


def queued(slurm: SlurmRig) -> Counter[str]:
    return Counter(slurm.run(["squeue", "-h", "-r", "-o", "%T"]).stdout.split())


def accounted(slurm: SlurmRig, run: str, number: int = 1) -> Counter[str]:
    """What accounting says became of a run's array tasks."""
    argv = ["sacct", "-XnP", "--starttime=now-2hours", "--format=State", f"--name=nexa-{run}-{number}"]
    return Counter(line.split()[0] for line in slurm.run(argv).stdout.splitlines())


def flow_run(identifier: str) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(identifier))


def logged(identifier: str) -> str:
    with get_client(sync_client=True) as client:
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(identifier)]))
        return "\n".join(each.message for each in client.read_logs(log_filter=chosen))


def artifacts(identifier: str) -> dict[str, str]:
    """The texts of a flow run's artifacts, by their keys."""
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(identifier)]))
        found = client.read_artifacts(artifact_filter=chosen)
        return {each.key or "": f"{each.description}\n{each.data}" for each in found}


def taken_here(config: str, **given: Any) -> State[Any]:
    """Call the flow in this process, and return how it ended."""
    from nexa_infra.flows import sweep

    async def take() -> State[Any]:
        return await sweep(config, **given, return_state=True)

    return asyncio.run(take())


def engine_of(identifier: str) -> int:
    """The process in which the worker runs a flow run."""
    mark = f"PREFECT__FLOW_RUN_ID={identifier}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue  # ended meanwhile
    raise AssertionError(f"no process runs flow run {identifier}")


def test_the_digits_run_on_slurm_from_the_command_line_with_one_login(
    deployed: Deployed, saved_cluster: SlurmCluster, slurm: SlurmRig, sshd: SshRig
) -> None:
    told = prefect(
        deployed, "deployment", "run", "sweep/slurm", "--watch",
        "-p", BY_REFERENCE % "rig", "-p", f"overrides={json.dumps(OVERRIDES)}",
    )  # fmt: skip

    assert "Flow run finished successfully" in told
    assert sshd.logins() == 1
    identifier = flow_run_in(told)
    [run] = [run for run in runs(deployed, "digits") if run.name.endswith(identifier.replace("-", "")[:12])]
    assert accounted(slurm, run.name) == {"COMPLETED": 12}
    report = json.loads((run / "cost_report.json").read_text())
    assert (report["end"], report["states"]) == ("done", {"completed": 12})
    assert report["best"][0]["metric"] > 0.9
    assert (Path(saved_cluster.workdir) / "runs" / run.name / "cost_report.md").exists()


def test_prefect_s_cancel_ends_the_jobs_and_a_passphrase_is_seen_nowhere(
    deployed: Deployed, saved_cluster: SlurmCluster, slurm: SlurmRig, sshd: SshRig, tmp_path: Path
) -> None:
    passphrase = "correct horse battery staple"
    key = sshd.new_key("locked", passphrase=passphrase)
    SlurmCluster(**{**saved_cluster.model_dump(), "key_file": str(key), "key_passphrase": passphrase}).save("locked")
    config, _ = waiting(tmp_path, "cancelled")

    words = ["-p", f"config_file={config}", "-p", BY_REFERENCE % "locked"]
    identifier = flow_run_in(prefect(deployed, "deployment", "run", "sweep/slurm", *words))
    eventually(lambda: queued(slurm) == {"RUNNING": 12}, 60)
    prefect(deployed, "flow-run", "cancel", identifier)

    eventually(lambda: not queued(slurm), 30)
    eventually(lambda: flow_run(identifier).state_name == "Cancelled", 60)
    [run] = runs(deployed, "cancelled")
    eventually(lambda: accounted(slurm, run.name) == {"CANCELLED": 12}, 15)
    assert json.loads((run / "cost_report.json").read_text())["end"] == "cancelled"
    assert sshd.logins() == 2, "the hook of Prefect's cancellation runs in the worker, and must open the key by itself"
    shown = [logged(identifier), *artifacts(identifier).values(), flow_run(identifier).model_dump_json()]
    assert [text for text in shown if passphrase in text] == []
    places = [run, Path(saved_cluster.workdir), Path(deployed.server.environment["PREFECT_HOME"])]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    assert [path for path in files if passphrase.encode() in path.read_bytes()] == []


def test_a_run_is_taken_up_again_after_its_flow_was_killed_and_its_worker_stopped(
    deployed: Deployed, saved_cluster: SlurmCluster, slurm: SlurmRig, tmp_path: Path
) -> None:
    config, gate = waiting(tmp_path, "left")
    told = prefect(deployed, "deployment", "run", "sweep/slurm", "-p", f"config_file={config}", "-p", "cluster=rig")
    first = flow_run_in(told)
    eventually(lambda: logged(first).count("12 running") == 1, 60)

    os.kill(engine_of(first), signal.SIGKILL)
    eventually(lambda: flow_run(first).state_name == "Crashed", 30)
    assert queued(slurm) == {"RUNNING": 12}

    def followed_again() -> bool:
        # Until the crash's hook has ended, Prefect's worker says Crashed over a retry: then it is asked for again.
        if flow_run(first).state_name == "Crashed":
            prefect(deployed, "flow-run", "retry", first)
        return logged(first).count("12 running") == 2

    eventually(followed_again, 60)

    worker = json.loads((deployed.server.services.home / "worker.json").read_text())["pid"]
    both = [Process.of(worker), Process.of(engine_of(first))]
    os.kill(worker, signal.SIGTERM)
    eventually(lambda: not any(process and process.alive for process in both), 30)
    assert queued(slurm) == {"RUNNING": 12}
    gate.touch()
    deployed.start()
    [run] = runs(deployed, "left")
    prefect(deployed, "deployment", "run", "sweep/slurm", "-p", f"resume={run.name}", "--watch")

    assert accounted(slurm, run.name) == {"COMPLETED": 12}
    assert not accounted(slurm, run.name, number=2)
    ran = (Path(saved_cluster.workdir) / "runs" / run.name / "ran").read_text().split()
    assert sorted(map(int, ran)) == list(range(12))
    report = json.loads((run / "cost_report.json").read_text())
    assert (report["end"], report["attempts"]) == ("done", 12)


def test_a_preview_leaves_nothing_anywhere_and_shows_what_would_run_and_when(
    saved_cluster: SlurmCluster, slurm: SlurmRig, sshd: SshRig, home: Path, tmp_path: Path
) -> None:
    state = taken_here(DIGITS, cluster="rig", overrides=OVERRIDES)

    assert state.is_completed()
    assert not home.exists()
    assert not Path(saved_cluster.workdir).exists()
    assert not queued(slurm)
    assert sshd.logins() == 1
    [shown] = [text for key, text in artifacts(str(state.state_details.flow_run_id)).items() if key == "preview-digits"]
    assert "12 trials, not submitted" in shown
    assert "Array `0-11`" in shown
    assert re.search(r"Projected cost\*\*: at most \$0\.\d+, at \$\S+ a core-hour", shown)
    assert re.search(r"would start the first trial at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", shown)
    for trial in (
        "\n0: python3 deployments/examples/digits/train.py --seed 0 --learning_rate 3e-4 --width 32 --epochs 10",
        "\n11: python3 deployments/examples/digits/train.py --seed 0 --learning_rate 3e-3 --width 128 --epochs 30",
        "#SBATCH --mem=500M",
    ):
        assert trial in shown


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        ("rgi", "there is no saved cluster 'rgi': `prefect block ls` lists them; the UI saves one (Blocks)"),
        ("away", "refuses connections: check the port (1), and whether its sshd runs"),
        ("", "this deployment runs on a Slurm cluster only, and none was chosen: choose a saved one"),
        (None, "this deployment runs on a Slurm cluster only, and none was chosen: choose a saved one"),
    ],
)
def test_a_cluster_that_is_not_there_fails_the_flow_with_one_clear_sentence(
    saved_cluster: SlurmCluster, home: Path, cluster: str | None, sentence: str
) -> None:
    SlurmCluster(**{**saved_cluster.model_dump(), "port": 1}).save("away", overwrite=True)
    with tags("cluster-required"):
        state = taken_here(DIGITS, submit=True, cluster=cluster)

    assert state.name == "Failed"
    assert sentence in (state.message or "")
    assert "\n" not in (state.message or "")
    assert not home.exists()

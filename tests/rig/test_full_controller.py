"""A controller that takes no more jobs of anybody (MaxJobCount): a run goes on as room appears."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nexa_infra.operations import launch, steps
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import shell_config
from tests.rig.slurm import SlurmRig

MOST, TRIALS = 12, 16


def test_what_a_full_controller_does_not_take_is_submitted_as_room_appears(
    rig_folder: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"MaxJobCount": str(MOST), "MinJobAge": "2"}
    with SlurmRig(rig_folder, accounting=False, settings=settings) as slurm:
        for name, value in slurm.environment().items():
            monkeypatch.setenv(name, value)
        cluster = Cluster(name="full", workdir=str(tmp_path / "w"), poll_floor=0.3, limits={"max_array_size": 8})
        config = shell_config(tmp_path, 'echo "$NEXA_TRIAL" >>"$NEXA_RUN_DIR/ran"; sleep 1', list(range(TRIALS)))
        run = steps.plan(config, cluster=cluster)
        launch.follow_run(run, tell=lambda _: None)
        states = Counter(trial.state for trial in steps.look(run))
    said = "".join(path.read_text() for path in run.files.submissions.glob("*.err"))
    assert "Slurm temporarily unable to accept job, sleeping and retrying" in said, "it was never full"
    assert states == {"completed": TRIALS}
    assert sorted(map(int, (run.files.path / "ran").read_text().split())) == list(range(TRIALS))
    assert not any(each.void for each in read_submissions(run.files))

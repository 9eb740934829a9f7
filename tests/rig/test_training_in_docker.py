"""The example training by torchrun in a container without a network, beside the same one bare."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nexa_infra.operations import launch, manage, steps
from tests.rig.docker import DockerRig
from tests.rig.images import Image

SHORT = ["training.parameters.epochs=2", "training.parameters.steps_per_epoch=5", "job.time=00:03:00"]


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed: make torch")
def test_a_training_ends_in_docker_as_it_does_bare(
    docker: DockerRig, python_image: Image, project: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project / "deployments" / "configs" / "ddp.yaml"
    # PyTorch is not in the image: this environment is seen there, and the Python that it stands on.
    seen = dict.fromkeys([sys.prefix, sys.base_prefix])
    mounts = ", ".join(f"{{source: '{place}', target: '{place}'}}" for place in seen)
    path = f"{sys.prefix}/bin:/usr/bin:/bin"
    boxed = f"container={{image: '{docker.load(python_image)}', mounts: [{mounts}], env: {{PATH: '{path}'}}}}"
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:{os.environ['PATH']}")

    losses = []
    for overrides in (SHORT, [*SHORT, boxed]):
        run = launch.plan_training(config, overrides=overrides)
        launch.follow_run(run)
        [trial] = steps.look(manage.find(run.id))
        losses.append(trial.metrics["loss"])

    assert losses[0] == losses[1]
    assert docker.containers(run.id) == []

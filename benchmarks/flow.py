"""What Prefect adds: the sweep flow beside the engine's call, on a real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.measure import ROOT, BenchmarkError, Figure, alternated, place
from deployments.environment import SetupError
from deployments.services import Services

TRIALS = 8
ROUNDS = 5


def flow() -> Iterator[Figure]:
    """Run 8 trials of `true` by the flow and by the engine's call, in a process each, in turn."""
    with place() as here:
        config = here.sweep(TRIALS)
        services = Services(ROOT, Path(sys.executable), home=here.folder / "prefect")
        try:
            with redirect_stdout(sys.stderr):
                url = services.start_server()
            env = {**services.environment(url), **here.environment}
            whole, engine = alternated(
                ROUNDS,
                lambda: float(here.inside("flow", config, env=env)),
                lambda: float(here.inside("engine", config)),
            )
        except SetupError as error:
            raise BenchmarkError(str(error)) from error
        finally:
            services.stop()
    beside = {"tool": "launch_slurm_sweep", "s": engine, "ratio": whole / engine}
    yield Figure("flow", whole - engine, "s", baseline=beside)

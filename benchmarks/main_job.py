"""The main job as a newcomer meets it: `make run` in a fresh clone, and again with its server running."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import ROOT, Figure, OwnTime, Place, environment, own_time, place, say, timed

WARM_ROUNDS = 3


def make_run() -> Iterator[Figure]:
    """Measure a cold `make run`, for which pip's cache is not used, and warm ones."""
    with place() as here:
        clone = _clone(here)
        env = _environment(clone)
        try:
            say("make run in a fresh clone, which takes a minute or two")
            cold = timed(["make", "run"], cwd=clone, env=env).seconds
            beside = {"trials_s": own_time(clone / ".nexa").span}
            yield Figure("make-run.cold", cold, "s", limit=180, baseline=beside)
            warm: list[tuple[float, OwnTime]] = []
            for number in range(WARM_ROUNDS):
                say(f"make run, its server running, {number + 1} of {WARM_ROUNDS}")
                seconds = timed(["make", "run"], cwd=clone, env=env).seconds
                warm.append((seconds, own_time(clone / ".nexa")))
        finally:
            timed(["make", "down"], cwd=clone, env=env)
    over = statistics.median(seconds - own.span for seconds, own in warm)
    beside = {"trials_s": statistics.median(own.span for _, own in warm)}
    yield Figure("make-run.warm", over, "s more than the trials", limit=8, baseline=beside)


def _clone(here: Place) -> Path:
    """Clone what is committed."""
    if here.run("git", "-C", ROOT, "status", "--porcelain").stdout:
        say("what is not committed is not in the clone, and so is not measured")
    here.run("git", "clone", "--quiet", ROOT, here.folder / "clone")
    return here.folder / "clone"


def _environment(clone: Path) -> dict[str, str]:
    """Return the environment of a new shell in the clone: this project's own .venv is not on its PATH."""
    env = environment()
    own = str(Path(sys.executable).parent)
    folders = [folder for folder in env.get("PATH", os.defpath).split(os.pathsep) if folder != own]
    return env | {"PATH": os.pathsep.join(folders), "PWD": str(clone), "PIP_NO_CACHE_DIR": "1"}

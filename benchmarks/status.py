"""How fast a large run is looked at."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import BenchmarkError, Figure, alternated, newest_run, place, say

TRIALS = 10_000
ROUNDS = 5


def status() -> Iterator[Figure]:
    """The verb `status` on a run of 10,000 trials that was really run, beside `cat` of what it has to read."""
    with place() as here:
        say(f"running {TRIALS:,} trials of `true`, which takes a minute or two")
        ran = float(here.inside("engine", here.sweep(TRIALS)))
        run = newest_run(here.home)
        told = here.python("-m", "nexa_infra", "status", "latest").stdout
        if f"{TRIALS:,} completed" not in told:
            raise BenchmarkError(f"status does not know of {TRIALS:,} completed trials: {told}")
        looked, read = alternated(
            ROUNDS,
            lambda: here.python("-m", "nexa_infra", "status", "latest").seconds,
            lambda: here.run("find", run.status, "-type", "f", "-exec", "cat", "{}", "+").seconds,
        )
    beside = {"tool": "find -exec cat {} +", "s": read, "ratio": looked / read}
    yield Figure("status", looked, "s", limit=1.0, baseline=beside)
    yield Figure("status.run", ran * 1000 / TRIALS, "ms a trial")
